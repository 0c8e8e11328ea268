"""Who can reach a server is settled before anything is loaded: addresses, keys, and what is refused."""

import pytest

from lora_tune.cli.exposure import ADMIN_KEY, API_KEY, MIN_KEY_CHARS, is_loopback, read_exposure
from lora_tune.errors import MissingInputError, RefusedError, UsageError

KEY, OTHER = "k" * MIN_KEY_CHARS, "another-key-of-a-test"


def exposed(host="127.0.0.1", *, api=None, admin=None, hosts=(), origins=(), **environment):
    return read_exposure(
        host, api_key_file=api, admin_key_file=admin, allow_hosts=hosts, allow_origins=origins, environment=environment
    )


def key_file(path, content, mode=0o600):
    path.write_text(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_this_machine_alone_needs_no_key(host):
    assert is_loopback(host)
    found = exposed(host)
    assert (found.api_keys, found.warnings) == ((), ())
    assert {"localhost", "127.0.0.1", "[::1]"} <= set(found.hosts)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.7", "2001:db8::1", "no-such-host.invalid", "\udc80", "a" * 300])  # fmt: skip
def test_other_machines_need_a_key(host, tmp_path):
    assert not is_loopback(host)
    with pytest.raises(RefusedError) as refused:
        exposed(host)
    assert "--api-key-file" in refused.value.hint
    # An admin key opens the admin routes only: it does not stand in for an API key.
    with pytest.raises(RefusedError):
        exposed(host, admin=key_file(tmp_path / "admin", KEY))
    assert exposed(host, api=key_file(tmp_path / "api", KEY)).api_keys == (KEY,)
    assert exposed(host, **{API_KEY: KEY}).api_keys == (KEY,)


def test_keys_come_from_files_and_the_environment(tmp_path):
    found = exposed(
        api=key_file(tmp_path / "api", f"\n{KEY}\n  {OTHER}  \n\n"), admin=key_file(tmp_path / "admin", OTHER),
        **{API_KEY: KEY, ADMIN_KEY: f"{KEY}\n"},
    )  # fmt: skip
    assert found.api_keys == (KEY, OTHER)
    assert found.admin_keys == (OTHER, KEY)
    settings = found.settings(page=False)
    assert (settings.api_keys, settings.admin_keys, settings.page) == (found.api_keys, found.admin_keys, False)


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o644, 0o660])
def test_a_key_file_that_others_can_read_is_told(tmp_path, mode):
    (warning,) = exposed(api=key_file(tmp_path / "api", KEY, mode)).warnings
    assert "chmod 600" in warning
    assert KEY not in warning


@pytest.mark.parametrize("content", ["", "\n \n", "short", "one sentence, twenty signs", f"{KEY}\nshort", f"{KEY}\x00", "k" * 600, "ключ" * 8])  # fmt: skip
def test_what_is_no_key_is_refused_without_showing_it(tmp_path, content):
    with pytest.raises(UsageError) as refused:
        exposed(api=key_file(tmp_path / "api", content))
    assert all(word not in refused.value.message for word in content.split() if word != "one")
    if content.strip() and "\x00" not in content and "\n" not in content:
        with pytest.raises(UsageError):
            exposed(**{ADMIN_KEY: content})


def test_a_key_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(MissingInputError):
        exposed(api=tmp_path / "no")
    (tmp_path / "bytes").write_bytes(b"\xff" * 20)
    with pytest.raises(MissingInputError):
        exposed(api=tmp_path / "bytes")


def test_the_url_is_one_that_this_machine_can_ask():
    assert exposed().url(8000) == "http://127.0.0.1:8000"
    assert exposed("::1").url(1) == "http://[::1]:1"
    assert exposed("0.0.0.0", **{API_KEY: KEY}).url(1) == "http://127.0.0.1:1"
    assert exposed("::", **{API_KEY: KEY}).url(1) == "http://[::1]:1"


def test_names_to_be_asked_for_are_listed():
    everywhere = exposed("0.0.0.0", **{API_KEY: KEY})
    assert "--allow-host" in everywhere.warnings[0]
    assert "0.0.0.0" not in everywhere.hosts
    named = exposed("0.0.0.0", hosts=("models.example.org",), origins=("https://example.org",), **{API_KEY: KEY})
    assert named.warnings == ()
    assert "models.example.org" in named.hosts
    assert named.settings(page=True).allowed_origins == ("https://example.org",)
    assert "192.0.2.7" in exposed("192.0.2.7", **{API_KEY: KEY}).hosts
