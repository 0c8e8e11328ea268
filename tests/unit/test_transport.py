"""Export and import: the same tar every time, and nothing comes in that an export would not have made."""

import errno
import gzip
import hashlib
import io
import json
import os
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tune.adapter import registry, transport
from lora_tune.adapter.door import CONFIG, WEIGHTS, open_adapter
from lora_tune.adapter.transport import DIGESTS, export_version, import_adapter, own_name
from lora_tune.errors import (
    AdapterError,
    AdapterMismatchError,
    CannotCreateError,
    CannotWriteError,
    LoraTuneError,
    MissingInputError,
    UsageError,
)
from lora_tune.model.fingerprint import canonical_digest
from tests.unit.test_door import write
from tests.unit.test_hostile_passport import with_passport


@pytest.fixture
def root(tmp_path):
    folder = write(tmp_path / "home-source", {"lora_alpha": 8})
    (folder / "README.md").write_text("# Home\n")
    (folder / "optimizer.pt").write_bytes(b"not for others")
    registry.add(folder, "home", root=tmp_path / "r")
    return tmp_path / "r"


def test_a_version_travels_and_arrives_as_it_was(tmp_path, root):
    out = tmp_path / "home.tar"
    exported = export_version("home", out, root=root)
    arrived = import_adapter(out, root=tmp_path / "other")
    assert (arrived.name, arrived.number) == ("home", 1)
    assert registry.content_digest(open_adapter(arrived.folder)) == exported.digest
    for name in (CONFIG, WEIGHTS, "README.md"):
        assert (arrived.folder / name).read_bytes() == (root / "home" / "1" / name).read_bytes()
    assert sorted(path.name for path in arrived.folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    assert registry.origin(arrived.folder, root=tmp_path / "other") == out.resolve()
    event = json.loads((tmp_path / "other" / "journal.jsonl").read_text())
    assert (event["event"], event["digest"]) == ("imported", exported.digest)


def test_the_tar_holds_the_digest_of_every_file_and_is_read_by_any_tar_program(tmp_path, root):
    exported = export_version("home@1", tmp_path / "home.tar", root=root)
    with tarfile.open(tmp_path / "home.tar") as tar:
        members = tar.getmembers()
        contents = {member.name: tar.extractfile(member).read() for member in members}
    assert [member.name for member in members] == ["README.md", CONFIG, WEIGHTS, DIGESTS]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members} == {
        (0, 0, 0, "", "", 0o644, b"0")
    }
    said = json.loads(contents.pop(DIGESTS))
    assert said["files"] == {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    assert (said["name"], said["version"], said["content"]) == ("home", 1, exported.digest)
    whole = (tmp_path / "home.tar").read_bytes()
    assert (exported.sha256, exported.n_bytes) == (hashlib.sha256(whole).hexdigest(), len(whole))
    assert json.loads(json.dumps(exported.as_dict()))["adapter"] == "home@1"


def test_the_same_version_is_the_same_tar_byte_for_byte(tmp_path, root):
    export_version("home", tmp_path / "a.tar", root=root)
    for path in (root / "home" / "1").iterdir():
        os.utime(path, (5, 5))
        path.chmod(0o600)
    export_version("home", tmp_path / "b.tar", root=root)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


@pytest.mark.parametrize("there", ["file", "folder", "dangling link"])
def test_an_export_overwrites_nothing(tmp_path, root, there):
    out = tmp_path / "out.tar"
    {"file": lambda: out.write_text("x"), "folder": out.mkdir, "dangling link": lambda: out.symlink_to("nowhere")}[
        there
    ]()
    with pytest.raises(CannotCreateError, match="never overwritten"):
        export_version("home", out, root=root)
    assert there != "file" or out.read_text() == "x"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_came_meanwhile_is_not_overwritten(tmp_path, root, monkeypatch, links):
    out, real = tmp_path / "out.tar", transport._write_tar

    def slow(*args):
        real(*args)
        out.write_text("mine")

    def no_links(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(transport, "_write_tar", slow)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(CannotCreateError, match="never overwritten"):
        export_version("home", out, root=root)
    assert out.read_text() == "mine"
    monkeypatch.setattr(transport, "_write_tar", real)
    assert export_version("home", tmp_path / "other.tar", root=root).path.is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_full_disk_leaves_no_part_of_a_tar(tmp_path, root, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotWriteError):
        export_version("home", tmp_path / "home.tar", root=root)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home-source", "r"]


def test_a_place_that_is_not_there_is_exit_73_and_a_folder_is_no_version(tmp_path, root):
    with pytest.raises(CannotCreateError):
        export_version("home", tmp_path / "none" / "home.tar", root=root)
    with pytest.raises(UsageError):
        export_version(str(tmp_path / "home-source"), tmp_path / "home.tar", root=root)
    with pytest.raises(MissingInputError):
        export_version("home@7", tmp_path / "home.tar", root=root)


@pytest.mark.parametrize("name", ["README.md", "lora_tune.json", WEIGHTS])
def test_an_export_follows_no_link(tmp_path, root, name):
    path = root / "home" / "1" / name
    path.unlink(missing_ok=True)
    path.symlink_to("/etc/passwd")
    with pytest.raises(LoraTuneError) as caught:
        export_version("home", tmp_path / "home.tar", root=root)
    assert caught.value.exit_code in (66, 77)
    assert not (tmp_path / "home.tar").exists()


def test_a_folder_made_elsewhere_comes_in_unverified_with_an_adapters_files_only(tmp_path):
    folder = write(tmp_path / "my-adapter")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "README.md").symlink_to("/etc/passwd")
    arrived = import_adapter(folder, root=tmp_path / "r")
    assert arrived.spec == "my-adapter@1"
    assert open_adapter(arrived.folder).manifest is None
    assert sorted(path.name for path in arrived.folder.iterdir()) == [CONFIG, WEIGHTS]
    assert import_adapter(folder, "named", root=tmp_path / "r").spec == "named@1"


def test_a_folder_is_called_what_its_passport_says_and_not_what_its_recipe_made(tmp_path):
    composed = with_passport(tmp_path / "a", {"name": "mix", "recipe.output": {"name": "home-assistant"}})
    assert import_adapter(composed, root=tmp_path / "r").spec == "mix@1"
    assert own_name(open_adapter(composed), root=tmp_path / "other") == "mix"


def test_a_strangers_adapter_becomes_no_version_of_mine_unless_that_is_said(tmp_path, root):
    stranger = with_passport(tmp_path / "stranger")  # its passport says home
    export_version("home", tmp_path / "home.tar", root=root)
    unverified = write(tmp_path / "home")
    for path in (stranger, tmp_path / "home.tar", unverified):
        with pytest.raises(CannotCreateError, match="has an adapter of that name already") as caught:
            import_adapter(path, root=root)
        assert "--name home" in caught.value.hint
        assert caught.value.exit_code == 73
    assert [listed.version.spec for listed in registry.listing(root)] == ["home@1"]
    with pytest.raises(CannotCreateError, match="has an adapter of that name already"):
        own_name(open_adapter(stranger), root=root)
    assert import_adapter(stranger, "home", root=root).spec == "home@2"
    assert import_adapter(tmp_path / "home.tar", "theirs", root=root).spec == "theirs@1"


def test_a_version_here_keeps_its_own_name(tmp_path, root):
    import_adapter(with_passport(tmp_path / "a", {"name": "other"}), "home", root=root)
    import_adapter(write(tmp_path / "b"), "bare", root=root)
    assert own_name(registry.open_found("home@2", root=root), root=root) == "home"
    assert own_name(registry.open_found("bare", root=root), root=root) == "bare"
    assert import_adapter(root / "bare" / "1", root=root).spec == "bare@2"
    # In another registry its folder is called 1, which says nothing.
    with pytest.raises(UsageError, match="does not say"):
        import_adapter(root / "bare" / "1", root=tmp_path / "r2")


def test_a_folder_whose_name_is_none_needs_one(tmp_path):
    folder = write(tmp_path / "My Adapter")
    with pytest.raises(UsageError, match="does not say"):
        import_adapter(folder, root=tmp_path / "r")
    for name in ("../x", "", "A"):
        with pytest.raises(UsageError):
            import_adapter(folder, name, root=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_folder_or_file_that_is_no_adapter_does_not_come_in(tmp_path):
    bad = write(tmp_path / "bad", {"r": 0})
    (tmp_path / "empty").mkdir()
    (tmp_path / "big").mkdir()
    write(tmp_path / "big")
    (tmp_path / "big" / "README.md").write_bytes(b"x" * (1024**2 + 1))
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_text("hello" * 500)
    os.mkfifo(tmp_path / "pipe")
    for path, kind in [(bad, AdapterError), (tmp_path / "empty", MissingInputError), (tmp_path / "big", AdapterError),
                       (tmp_path / "none", MissingInputError), (tmp_path / "empty.tar", AdapterError),
                       (tmp_path / "text.tar", AdapterError), (tmp_path / "pipe", MissingInputError),
                       (tmp_path / ("x" * 300), MissingInputError)]:  # fmt: skip
        with pytest.raises(kind):
            import_adapter(path, "x", root=tmp_path / "r")
    assert registry.listing(tmp_path / "r") == []


def packed(path, contents, change=lambda info: info):
    """Write a tar of the contents, with digests that fit, each header changed as asked."""
    files = {
        name: hashlib.sha256(content).hexdigest() for name, content in contents.items() if name in (CONFIG, WEIGHTS)
    }
    content = canonical_digest({"config": files[CONFIG], "weights": files[WEIGHTS]})
    digests = {"format": 1, "name": "home", "version": 1, "content": content, "files": files}
    blocks = b""
    for name, body in {**contents, DIGESTS: json.dumps(digests).encode()}.items():
        info = tarfile.TarInfo(name)
        info.size = len(body)
        info = change(info)
        # Header by header, since tarfile itself would not write what some of them say.
        blocks += info.tobuf(tarfile.GNU_FORMAT) + (body + bytes(-len(body) % 512) if info.size else b"")
    path.write_bytes(blocks + bytes(1024))
    return path


def parts(folder):
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def of(which, /, **changes):
    def change(info):
        if info.name == which:
            for key, value in changes.items():
                setattr(info, key, value)
        return info

    return change


HOSTILE = {
    "a path upwards": of(CONFIG, name="../adapter_config.json"), "an absolute path": of(CONFIG, name="/tmp/adapter_config.json"),
    "a folder in front": of(CONFIG, name="./adapter_config.json"), "a long name": of(CONFIG, name="x" * 300),
    "a name that a terminal obeys": of(CONFIG, name="\x1b[2J"), "a pickle": of(CONFIG, name="adapter_model.bin"),
    "a link": of(WEIGHTS, type=tarfile.SYMTYPE, linkname="/etc/passwd", size=0),
    "a hard link": of(WEIGHTS, type=tarfile.LNKTYPE, linkname=CONFIG, size=0),
    "a regular file that names a link": of(WEIGHTS, linkname="/etc/passwd"),
    "a device": of(WEIGHTS, type=tarfile.CHRTYPE, devmajor=1, devminor=5, size=0), "a pipe": of(WEIGHTS, type=tarfile.FIFOTYPE, size=0),
    "a folder": of(WEIGHTS, type=tarfile.DIRTYPE, size=0), "a sparse file": of(WEIGHTS, type=tarfile.GNUTYPE_SPARSE),
    "an unknown type": of(WEIGHTS, type=b"?"), "twice the same": of(WEIGHTS, name=CONFIG),
    "a size of a petabyte": of(CONFIG, size=2**50), "a size of many terabytes": of(WEIGHTS, size=2**45),
    "a size past the end": of(DIGESTS, size=60_000), "a size below nothing": of(CONFIG, size=-512),
    "no digests": of(DIGESTS, name="README.md"),
}  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_tar_is_refused_and_leaves_nothing(tmp_path, change):
    contents = parts(write(tmp_path / "a"))
    import_adapter(packed(tmp_path / "good.tar", contents), root=tmp_path / "good")  # but for the change, it comes in
    path = packed(tmp_path / "bad.tar", contents, change)
    with pytest.raises(AdapterError) as caught:
        import_adapter(path, root=tmp_path / "r")
    assert caught.value.exit_code == 77
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 1000
    assert registry.listing(tmp_path / "r") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "bad.tar", "good", "good.tar"]


def with_digests(tmp_path, change, contents=None):
    contents = contents or parts(write(tmp_path / "a"))
    path = packed(tmp_path / "good.tar", contents)
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    files[DIGESTS] = change(json.loads(files[DIGESTS]))
    with tarfile.open(tmp_path / "bad.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return tmp_path / "bad.tar"


DIGEST_CHANGES = {
    "another digest of a file": lambda said: said["files"].update({WEIGHTS: "0" * 64}), "a file too many": lambda said: said["files"].update(x="0" * 64),
    "a file too few": lambda said: said["files"].pop(CONFIG), "another content": lambda said: said.update(content="0" * 64),
    "a hostile name": lambda said: said.update(name="../x"), "another format": lambda said: said.update(format=2),
    "more than is known": lambda said: said.update(run="rm -rf /"), "a digest that is none": lambda said: said["files"].update({CONFIG: "x"}),
}  # fmt: skip


@pytest.mark.parametrize("change", DIGEST_CHANGES.values(), ids=DIGEST_CHANGES)
def test_digests_that_do_not_fit_are_refused(tmp_path, change):
    def dumped(said):
        change(said)
        return json.dumps(said).encode()

    with pytest.raises(AdapterError):
        import_adapter(with_digests(tmp_path, dumped), root=tmp_path / "r")
    assert registry.listing(tmp_path / "r") == []


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 60_000, b'{"a":' * 9_000, b"\xff", b"x" * 70_000, b"null"])
def test_digests_that_are_no_digests_are_refused(tmp_path, content):
    with pytest.raises(AdapterError) as caught:
        import_adapter(with_digests(tmp_path, lambda _: content), root=tmp_path / "r")
    assert caught.value.message.isprintable()


def test_a_tar_with_an_adapter_that_the_door_refuses_names_the_tar(tmp_path):
    path = packed(tmp_path / "bad.tar", parts(write(tmp_path / "a", {"r": 0})))
    with pytest.raises(AdapterError, match=r"bad\.tar/adapter_config\.json: r is 0"):
        import_adapter(path, root=tmp_path / "r")
    assert registry.listing(tmp_path / "r") == []


@pytest.mark.parametrize("where", ["weights", "config", "tail", "gzip", "extended header", "a file twice"])
def test_a_changed_tar_is_refused(tmp_path, root, where):
    path = tmp_path / "home.tar"
    export_version("home", path, root=root)
    content = bytearray(path.read_bytes())
    if where == "weights":
        content[content.index((root / "home" / "1" / WEIGHTS).read_bytes()) + 700] ^= 1
    elif where == "config":
        content[content.index(b'"lora_alpha": 8') + 14] = ord("9")
    elif where == "tail":
        content[-1] = 1
    elif where == "gzip":
        content = bytearray(gzip.compress(bytes(content)))
    elif where == "a file twice":
        content = content[:1024] + content  # README.md, which comes first
    else:
        info = tarfile.TarInfo("README.md")
        info.pax_headers = {"path": "../../x"}
        content = bytearray(info.tobuf(tarfile.PAX_FORMAT)) + content
    path.write_bytes(content)
    kind = AdapterMismatchError if where in ("weights", "config") else AdapterError
    with pytest.raises(kind) as caught:
        import_adapter(path, root=tmp_path / "other")
    assert caught.value.exit_code == 77
    assert registry.listing(tmp_path / "other") == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_to_a_tar_is_refused_or_changes_nothing_of_the_adapter(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("t")
    version = registry.add(write(folder / "a"), "home", root=folder / "r")
    export_version("home", folder / "home.tar", root=folder / "r")
    content = bytearray((folder / "home.tar").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 6000) if data.draw(st.booleans()) else st.integers(0, len(content) - 1))] = (
            data.draw(st.integers(0, 255))
        )
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    (folder / "bad.tar").write_bytes(content[:cut])
    try:
        arrived = import_adapter(folder / "bad.tar", root=folder / "other")
    except LoraTuneError as err:
        assert err.exit_code == 77
        assert registry.listing(folder / "other") == []
    else:
        for name in (CONFIG, WEIGHTS):
            assert (arrived.folder / name).read_bytes() == (version.folder / name).read_bytes()
