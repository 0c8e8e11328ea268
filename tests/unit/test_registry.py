"""The registry: versions that are added whole, numbered once, found by name and content, and never lost in silence."""

import errno
import json
import os

import pytest

from lora_tune.adapter import registry
from lora_tune.adapter.door import WEIGHTS, open_adapter
from lora_tune.errors import AdapterError, CannotCreateError, CannotWriteError, MissingInputError, UsageError
from tests.unit.test_door import write


def test_the_registry_numbers_versions_and_finds_them(tmp_path):
    source, root = write(tmp_path / "a"), tmp_path / "adapters"
    first = registry.add(source, "home", root=root)
    second = registry.add(write(tmp_path / "b", {"lora_alpha": 8}), "home", root=root)
    assert (first.spec, second.spec) == ("home@1", "home@2")
    assert registry.find("home", root=root) == second.folder
    assert registry.find("home@1", root=root) == first.folder
    digest = registry.content_digest(open_adapter(first.folder))
    assert registry.find(f"home@sha256:{digest[:12]}", root=root) == first.folder
    assert registry.find(str(source), root=root) == source
    assert [json.loads(line)["version"] for line in (root / "journal.jsonl").read_text().splitlines()] == [1, 2]


def test_what_is_not_in_the_registry_is_named_with_close_names(tmp_path):
    registry.add(write(tmp_path / "a"), "home-assistant", root=tmp_path / "r")
    with pytest.raises(MissingInputError, match="did you mean home-assistant"):
        registry.find("home-asistant", root=tmp_path / "r")
    with pytest.raises(MissingInputError, match="it has 1"):
        registry.find("home-assistant@7", root=tmp_path / "r")


@pytest.mark.parametrize("name", ["../x", "/abs", "a/b", "", "A", "a b", ".", "x" * 64, "-x", "a\x00b", "a\n"])
def test_hostile_names_write_nothing(tmp_path, name):
    with pytest.raises((UsageError, CannotCreateError)):
        registry.add(write(tmp_path / "a"), name, root=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_folder_that_is_no_adapter_is_not_registered(tmp_path):
    folder = write(tmp_path / "a", {"r": 0})
    with pytest.raises(AdapterError):
        registry.add(folder, "home", root=tmp_path / "r")
    assert not (tmp_path / "r" / "home" / "1").exists()
    assert not (tmp_path / "r" / "journal.jsonl").exists()


def test_a_folder_that_is_not_there_is_not_registered(tmp_path):
    with pytest.raises(MissingInputError):
        registry.add(tmp_path / "nowhere", "home", root=tmp_path / "r")


def test_a_number_is_never_given_twice(tmp_path):
    source, root = write(tmp_path / "a"), tmp_path / "r"
    registry.add(source, "other", root=root)
    for _ in range(3):
        last = registry.add(source, "home", root=root)
    for path in last.folder.iterdir():
        path.unlink()
    last.folder.rmdir()
    assert registry.add(source, "home", root=root).number == 4
    (root / "journal.jsonl").unlink()
    assert registry.add(source, "home", root=root).number == 5


@pytest.mark.parametrize("line", [
    b'{"event": "added", "na', b"5", b'["home", 9]', b'{"name": "home", "version": "9"}', b'{"name": "home", "version": true}',
    b'{"name": "home", "version": -9}', b"\xff\xfe", b"[" * 100_000,
])  # fmt: skip
def test_a_damaged_line_of_the_journal_costs_that_line_only(tmp_path, line):
    source, root = write(tmp_path / "a"), tmp_path / "r"
    registry.add(source, "home", root=root)
    with (root / "journal.jsonl").open("ab") as journal:
        journal.write(line)
    second = registry.add(source, "home", root=root)
    assert second.number == 2
    assert registry.origin(second.folder, root=root) == source


def test_a_folder_whose_name_is_no_number_is_no_version(tmp_path):
    root = tmp_path / "r"
    first = registry.add(write(tmp_path / "a"), "home", root=root)
    for name in ("003", "\u0664", "x", "0"):
        (root / "home" / name).mkdir()
    (root / "bad\nname" / "1").mkdir(parents=True)
    assert registry.find("home", root=root) == first.folder
    assert [version.spec for version, _ in registry.list_versions(root=root)] == ["home@1"]
    with pytest.raises(MissingInputError):
        registry.find("home@1\n", root=root)


def test_a_damaged_version_does_not_hide_the_one_that_is_looked_for(tmp_path):
    root = tmp_path / "r"
    damaged = registry.add(write(tmp_path / "a"), "home", root=root)
    wanted = registry.add(write(tmp_path / "b", {"lora_alpha": 8}), "home", root=root)
    digest = registry.content_digest(open_adapter(wanted.folder))
    (damaged.folder / WEIGHTS).write_bytes(b"x")
    assert registry.find(f"home@sha256:{digest}", root=root) == wanted.folder
    with pytest.raises(MissingInputError, match="1 damaged"):
        registry.find("home@sha256:00000000", root=root)


def test_a_place_that_cannot_be_a_folder_is_exit_73(tmp_path):
    (tmp_path / "file").write_text("x")
    for act in (registry.ensure_writable, lambda root: registry.add(write(tmp_path / "a"), "home", root=root)):
        for root in (tmp_path / "file", tmp_path / "file" / "r"):
            with pytest.raises(CannotCreateError) as caught:
                act(root)
            assert str(root) in caught.value.message
            assert caught.value.hint


def test_a_lock_or_journal_that_cannot_be_opened_is_exit_73(tmp_path):
    for name in (".lock", "journal.jsonl"):
        root = tmp_path / name.strip(".")
        (root / name).mkdir(parents=True)
        with pytest.raises(CannotCreateError):
            registry.ensure_writable(root)
        with pytest.raises(CannotCreateError):
            registry.add(write(tmp_path / "a"), "home", root=root)
        assert not (root / "home" / "1").exists()


def test_a_writable_registry_is_left_as_it_was(tmp_path):
    registry.ensure_writable(tmp_path / "deep" / "r")
    assert list((tmp_path / "deep" / "r").iterdir()) == []
    registry.add(write(tmp_path / "a"), "home", root=tmp_path / "r")
    before = sorted((tmp_path / "r").rglob("*"))
    registry.ensure_writable(tmp_path / "r")
    assert sorted((tmp_path / "r").rglob("*")) == before


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, CannotWriteError), (errno.EIO, CannotWriteError),
                                              (errno.EROFS, CannotCreateError)])  # fmt: skip
def test_a_journal_that_cannot_be_written_leaves_no_version(tmp_path, monkeypatch, number, kind):
    source, root = write(tmp_path / "a"), tmp_path / "r"
    registry.add(source, "home", root=root)
    journal = (root / "journal.jsonl").read_bytes()
    real = os.fsync

    def failing(descriptor):
        if os.path.samestat(os.fstat(descriptor), (root / "journal.jsonl").stat()):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(kind):
        registry.add(source, "home", root=root)
    monkeypatch.undo()
    assert not (root / "home" / "2").exists()
    assert (root / "journal.jsonl").read_bytes() == journal
    assert registry.add(source, "home", root=root).number == 2
