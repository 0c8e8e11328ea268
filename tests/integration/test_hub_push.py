"""Pushing an adapter: the real hub client against a hub on 127.0.0.1, and back through the door."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lora_tune.adapter.door import CONFIG, WEIGHTS, open_adapter
from lora_tune.adapter.hub import push_adapter
from lora_tune.adapter.manifest import FILE_NAME
from lora_tune.adapter.registry import content_digest
from lora_tune.errors import AdapterMismatchError, LoraTuneError, UnreachableError, UsageError
from lora_tune.model.fingerprint import file_digest
from tests.adapter_hub_stand_in import TOKEN, Repository, adapter_hub
from tests.unit.test_door import write
from tests.unit.test_hostile_passport import with_passport

FILES = {CONFIG, WEIGHTS, "README.md", FILE_NAME}
HUB_BASE = {"base.name": "owner/base", "base.revision": "a" * 40}

# HF_ENDPOINT and HF_HUB_OFFLINE are read when the client is imported: it runs in a process of its own.
WORKER = """
import json, os, sys
from pathlib import Path

from lora_tune.adapter.door import open_adapter
from lora_tune.adapter.hub import push_adapter
from lora_tune.errors import LoraTuneError

for line in sys.stdin:
    job = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": job["token"]} if job["token"] else {})
    try:
        if job.get("fetch"):
            from huggingface_hub import snapshot_download

            answer = {"folder": snapshot_download(job["repo"], revision=job["fetch"], local_dir=job["folder"])}
        else:
            answer = push_adapter(open_adapter(Path(job["folder"])), job["repo"], **job["options"]).as_dict()
    except LoraTuneError as err:
        answer = {"error": err.as_dict() | {"exit_code": err.exit_code}}
    print(json.dumps(answer), flush=True)
"""


def _worker(endpoint, home):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    with (home / "stderr").open("w") as said:
        return subprocess.Popen(
            [sys.executable, "-c", WORKER], env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
        )  # fmt: skip


def _ask(worker, **job):
    worker.stdin.write(json.dumps({"token": TOKEN, "options": {}, **job}) + "\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    home = tmp_path_factory.mktemp("hub-home")
    with adapter_hub() as hub:
        worker = _worker(hub.endpoint, home)
        yield hub, worker, home
        worker.stdin.close()
        worker.wait(timeout=30)
        worker.stdout.close()


@pytest.fixture
def hub(running):
    running[0].forget()
    return running[0]


@pytest.fixture
def push(running, hub):
    def ask(folder, repo="me/home", token=TOKEN, **options):
        return _ask(running[1], folder=str(folder), repo=repo, token=token, options=options)

    return ask


def test_exactly_four_files_arrive_and_pass_the_door_as_they_left(tmp_path, hub, push, running):
    folder = with_passport(tmp_path / "a", HUB_BASE)
    for name in ("optimizer.pt", ".env", "notes.md", "adapter_model.bin", "tokenizer.json"):
        (folder / name).write_text("secret")
    config = json.loads((folder / CONFIG).read_text()) | {"base_model_name_or_path": "owner/base"}
    (folder / CONFIG).write_text(json.dumps(config))
    passport = json.loads((folder / FILE_NAME).read_text()) | {"config_digest": file_digest(folder / CONFIG)}
    (folder / FILE_NAME).write_text(json.dumps(passport))
    report = push(folder)
    repository = hub.repositories["me/home"]
    assert set(repository.branches["main"]) == FILES
    assert repository.private
    assert repository.large == {WEIGHTS}
    for name in (CONFIG, WEIGHTS, FILE_NAME):
        assert repository.branches["main"][name] == (folder / name).read_bytes()
    assert {file["name"]: file["n_bytes"] for file in report["files"]} == {
        name: len(content) for name, content in repository.branches["main"].items()
    }
    assert (report["url"], report["commit"]) == (f"{hub.endpoint}/me/home", repository.heads["main"])
    assert (report["base_model"], report["private"], report["dry_run"], report["notes"]) == (
        "owner/base",
        True,
        False,
        [],
    )
    assert set(hub.tokens) == {TOKEN}
    back = _ask(running[1], repo="me/home", fetch=report["commit"], folder=str(tmp_path / "back"))
    again = open_adapter(Path(back["folder"]))
    assert content_digest(again) == content_digest(open_adapter(folder)) == report["content_digest"]
    assert again.manifest == open_adapter(folder).manifest
    assert 'base_model: "owner/base"\n' in (tmp_path / "back" / "README.md").read_text()


def test_a_second_push_adds_a_commit_and_leaves_other_files(tmp_path, hub, push):
    hub.repositories["me/home"] = Repository(private=True, branches={"main": {"LICENSE": b"mine", WEIGHTS: b"old"}})
    push(with_passport(tmp_path / "a"))
    assert set(hub.repositories["me/home"].branches["main"]) == FILES | {"LICENSE"}
    assert hub.repositories["me/home"].branches["main"]["LICENSE"] == b"mine"


def test_a_branch_is_made_when_it_is_missing(tmp_path, hub, push):
    folder = with_passport(tmp_path / "a")
    for _ in range(2):
        assert push(folder, revision="v2")["branch"] == "v2"
    assert set(hub.repositories["me/home"].branches["v2"]) == FILES
    assert hub.repositories["me/home"].branches["main"] == {}


def test_no_path_of_this_machine_leaves_it(tmp_path, hub, push):
    home = str(tmp_path)
    plain = write(tmp_path / "b", {"base_model_name_or_path": f"{home}/models/my-base"})
    report = push(plain)
    sent = hub.repositories["me/home"].branches["main"]
    assert set(sent) == FILES - {FILE_NAME}
    assert not any(home.encode() in content for content in sent.values())
    assert json.loads(sent[CONFIG])["base_model_name_or_path"] == "my-base"
    assert report["base_model"] is None
    assert "my-base" in report["notes"][0]
    assert home not in json.dumps(report)
    assert b"unverified" in sent["README.md"]


def test_the_hub_id_that_the_passport_knows_stands_in_the_config(tmp_path, hub, push):
    folder = with_passport(tmp_path / "a", HUB_BASE)  # its config says x/y
    report = push(folder)
    sent = hub.repositories["me/home"].branches["main"]
    assert json.loads(sent[CONFIG])["base_model_name_or_path"] == "owner/base"
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for name, content in sent.items():
        (arrived / name).write_bytes(content)
    assert content_digest(open_adapter(arrived)) == report["content_digest"]


def test_a_public_repository_is_not_written_to_by_a_private_push(tmp_path, hub, push):
    hub.repositories["me/home"] = Repository(private=False)
    error = push(with_passport(tmp_path / "a"))["error"]
    assert error["exit_code"] == 77
    assert hub.repositories["me/home"].branches["main"] == {}
    assert push(with_passport(tmp_path / "a"), private=False)["private"] is False


ANSWERS = {
    "a token that the hub does not know": ({"POST .*create": (401, "Invalid credentials in Authorization header")}, 66, ("HF_TOKEN", "hf auth login")),
    "a token that may not write": ({"POST .*/preupload/.*": (403, "Forbidden: you must use a write token")}, 77, ("HF_TOKEN", "hf auth login")),
    "a commit that is forbidden": ({"POST .*/commit/.*": (403, "pass a token hf_abcdefgh")}, 77, ("HF_TOKEN",)),
    "a hub that is down": ({"POST .*create": (503, "maintenance")}, 69, ("maintenance", "run it again")),
    "a card that the hub does not take": ({"POST .*validate-yaml": (400, "bad base_model")}, 77, ("bad base_model",)),
    "an upload that is refused": ({"PUT /lfs/.*": (403, "signature")}, 77, ()),
    "an answer that is not a hub's": ({"POST .*create": (200, "hello")}, 69, ("HF_ENDPOINT",)),
    "words that a terminal obeys": ({"POST .*create": (400, "x\x1b[2Jy\n" + "z" * 5000)}, 77, ()),
}  # fmt: skip


@pytest.mark.parametrize(("answers", "code", "said"), ANSWERS.values(), ids=ANSWERS)
def test_what_the_hub_refuses_is_said_in_our_words(tmp_path, hub, push, answers, code, said):
    hub.answers.update(answers)
    error = push(with_passport(tmp_path / "a"))["error"]
    assert error["exit_code"] == code
    words = error["message"] + error["hint"]
    assert all(part in words for part in said)
    assert words.isprintable()
    assert len(words) < 1000
    assert "hf_" not in words
    assert error["hint"]
    assert not any(repository.branches["main"] for repository in hub.repositories.values())


def test_a_namespace_of_others_is_refused_with_what_to_do(tmp_path, hub, push):
    error = push(with_passport(tmp_path / "a"), repo="someone/home")["error"]
    assert (error["exit_code"], "someone/home" in error["message"]) == (77, True)
    assert "of your own" in error["hint"]


def test_no_token_is_said_before_anything_is_asked(tmp_path, hub, push):
    error = push(with_passport(tmp_path / "a"), token=None)["error"]
    assert error["exit_code"] == 66
    assert "HF_TOKEN" in error["hint"]
    assert "hf auth login" in error["hint"]
    assert hub.asked == []


@pytest.mark.parametrize(("kind", "said"), [("ignored", "has no"), ("damaged", "holds another")])
def test_what_did_not_arrive_is_not_called_pushed(tmp_path, hub, push, kind, said):
    getattr(hub, kind).add(FILE_NAME)
    error = push(with_passport(tmp_path / "a"))["error"]
    assert error["exit_code"] == 74
    assert f"{said} {FILE_NAME}" in error["message"]


def test_what_the_hub_remarks_is_passed_on(tmp_path, hub, push, running):
    hub.yaml_warnings.append("empty licence \x1b[2J")
    notes = push(with_passport(tmp_path / "a"))["notes"]
    assert any("empty licence" in note for note in notes)
    assert all(note.isprintable() for note in notes)


def test_a_token_stands_in_no_word_and_no_bar_is_drawn(tmp_path, hub, push, running):
    said_before = (running[2] / "stderr").stat().st_size
    hub.answers["POST .*create"] = (400, f"{TOKEN} Bearer {TOKEN}")
    assert "right" not in json.dumps(push(with_passport(tmp_path / "a")))
    hub.answers.clear()
    assert "right" not in json.dumps(push(with_passport(tmp_path / "a")))
    assert (running[2] / "stderr").stat().st_size == said_before


def test_a_hub_that_is_not_there_is_exit_69(tmp_path, running):
    folder = with_passport(tmp_path / "a")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = _worker(f"http://127.0.0.1:{port}", running[2])
    try:
        error = _ask(worker, folder=str(folder), repo="me/home")["error"]
    finally:
        worker.communicate(timeout=30)
    assert (error["exit_code"], "cannot be reached" in error["message"]) == (69, True)


def test_offline_mode_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)  # HF_HUB_OFFLINE is set for all tests
    with pytest.raises(UnreachableError, match="HF_HUB_OFFLINE"):
        push_adapter(open_adapter(with_passport(tmp_path / "a")), "me/home")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_dry_run_shows_the_files_and_touches_no_network(tmp_path, no_network):
    folder = with_passport(tmp_path / "a")
    (folder / "optimizer.pt").write_text("x")
    report = push_adapter(open_adapter(folder), "me/home", dry_run=True)
    assert report.dry_run
    assert (report.url, report.commit) == (None, None)
    assert {file.name for file in report.files} == FILES
    shown = {file.name: file for file in report.files}
    for name in (WEIGHTS, FILE_NAME):
        assert (shown[name].n_bytes, shown[name].sha256) == ((folder / name).stat().st_size, file_digest(folder / name))


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, FILE_NAME])
def test_a_file_that_was_changed_after_the_check_is_not_sent(tmp_path, no_network, name):
    adapter = open_adapter(with_passport(tmp_path / "a"))
    other = with_passport(write(tmp_path / "b", {"lora_alpha": 4}), {"name": "another"})
    content = (other / name).read_bytes()
    (adapter.folder / name).write_bytes(content if name == FILE_NAME else content[:-1] + b" ")
    with pytest.raises(LoraTuneError) as caught:
        push_adapter(adapter, "me/home", dry_run=True)
    assert caught.value.exit_code == 77


def test_a_link_put_in_a_file_s_place_is_not_followed(tmp_path, no_network):
    adapter = open_adapter(with_passport(tmp_path / "a"))
    secret = shutil.copy(adapter.folder / CONFIG, tmp_path / "secret.json")
    (adapter.folder / CONFIG).unlink()
    (adapter.folder / CONFIG).symlink_to(secret)
    with pytest.raises(AdapterMismatchError):
        push_adapter(adapter, "me/home", dry_run=True)


@pytest.mark.parametrize("repo", ["home", "a/b/c", "me/", "/home", "me/ho me", "me/home.git", "me/-x", "me/a--b", "me/..", "me/x\n",
                                  "https://hub/me/x", "me/" + "x" * 96, "", "../me"])  # fmt: skip
def test_a_name_that_no_repository_can_have_is_a_mistake_of_the_command(tmp_path, no_network, repo):
    with pytest.raises(UsageError) as caught:
        push_adapter(open_adapter(with_passport(tmp_path / "a")), repo, dry_run=True)
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("branch", ["", "-x", "a..b", "x\n", "a" * 101, "f" * 40, "a b"])
def test_a_branch_that_cannot_be_is_a_mistake_of_the_command(tmp_path, no_network, branch):
    with pytest.raises(UsageError):
        push_adapter(open_adapter(with_passport(tmp_path / "a")), "me/home", dry_run=True, revision=branch)
