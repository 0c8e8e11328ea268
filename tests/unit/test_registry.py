"""The registry: versions that are added whole, numbered once, found by name and content, and never lost in silence."""

import errno
import json
import os
import shutil
import time

import pytest

from lora_tune.adapter import registry
from lora_tune.adapter.door import CONFIG, WEIGHTS, AdapterFiles, open_adapter
from lora_tune.errors import (
    AdapterError,
    AdapterMismatchError,
    CannotCreateError,
    CannotWriteError,
    LoraTuneError,
    MissingInputError,
    RefusedError,
    UsageError,
)
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
    with pytest.raises(UsageError):
        registry.ensure_writable(tmp_path / "r", name=name)
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


def stocked(tmp_path, count=3, name="home"):
    """Return a registry with so many versions of one adapter, each of its own content."""
    root = tmp_path / "r"
    for number in range(count):
        registry.add(write(tmp_path / "source", {"lora_alpha": number + 1}), name, root=root)
    return root


def journal_of(root):
    return [json.loads(line) for line in (root / "journal.jsonl").read_text().splitlines()]


def specs(root):
    return [listed.version.spec for listed in registry.listing(root)]


def test_an_alias_names_its_version_wherever_an_adapter_is_named(tmp_path, monkeypatch):
    root = stocked(tmp_path)
    done = registry.promote("home@2", root=root)
    assert done.as_dict() == {
        "alias": "prod",
        "adapter": "home@2",
        "folder": str(root / "home" / "2"),
        "previous": None,
    }
    assert registry.find("prod", root=root) == root / "home" / "2"
    assert registry.open_found("prod", root=root).shape.alpha == 2
    assert registry.aliases(root) == {"prod": registry.Version("home", 2, root / "home" / "2")}
    assert registry.promote("home", "prod", root=root).previous.spec == "home@2"
    assert registry.promote("prod", "canary", root=root).version.spec == "home@3"
    assert [(listed.version.number, listed.aliases) for listed in registry.listing(root)] == [
        (1, ()), (2, ()), (3, ("canary", "prod")),
    ]  # fmt: skip
    # A folder of that name in the working folder changes nothing.
    (tmp_path / "prod").mkdir()
    monkeypatch.chdir(tmp_path)
    assert registry.find("prod", root=root) == root / "home" / "3"


def test_a_second_promotion_to_the_same_version_is_no_event_that_a_rollback_would_take_back(tmp_path):
    root = stocked(tmp_path)
    for spec in ("home@1", "home@2", "home@2"):
        registry.promote(spec, root=root)
    assert registry.rollback("prod", root=root).version.spec == "home@1"


def test_rollbacks_go_down_the_history_and_promotions_begin_there(tmp_path):
    root = stocked(tmp_path, 4)
    for number in (1, 2, 3):
        registry.promote(f"home@{number}", root=root)
    assert registry.rollback("prod", root=root).as_dict()["adapter"] == "home@2"
    registry.promote("home@4", root=root)
    assert [registry.rollback("prod", root=root).version.number for _ in range(2)] == [2, 1]
    with pytest.raises(MissingInputError, match="points to home@1, and nothing earlier is left"):
        registry.rollback("prod", root=root)
    assert registry.aliases(root)["prod"].number == 1
    assert [(one["event"], one["version"], one["previous"]) for one in journal_of(root)[4:]] == [
        ("promoted", 1, None), ("promoted", 2, "home@1"), ("promoted", 3, "home@2"), ("rolled_back", 2, "home@3"),
        ("promoted", 4, "home@2"), ("rolled_back", 2, "home@4"), ("rolled_back", 1, "home@2"),
    ]  # fmt: skip


def test_a_rollback_to_a_removed_version_is_refused_and_the_alias_stays(tmp_path):
    root = stocked(tmp_path)
    registry.promote("home@1", root=root)
    registry.promote("home@3", root=root)
    registry.remove("home@1", root=root)
    with pytest.raises(MissingInputError, match="home@1, where prod pointed before, was removed") as caught:
        registry.rollback("prod", root=root)
    assert "promote" in caught.value.hint
    assert registry.find("prod", root=root) == root / "home" / "3"


def test_an_unknown_alias_cannot_be_rolled_back(tmp_path):
    root = stocked(tmp_path)
    registry.promote("home@1", "test", root=root)
    with pytest.raises(MissingInputError, match="known: test"):
        registry.rollback("prod", root=root)
    with pytest.raises(MissingInputError, match="no registry"):
        registry.rollback("prod", root=tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("alias", ["home", "other", "../x", "", "A", "a b", "x" * 64, "a\n", "home@2", "a/b"])
def test_an_alias_is_a_name_of_its_own(tmp_path, alias):
    root = stocked(tmp_path, 1)
    registry.add(tmp_path / "source", "other", root=root)
    with pytest.raises(UsageError) as caught:
        registry.promote("home@1", alias, root=root)
    assert caught.value.exit_code == 2
    assert registry.aliases(root) == {}


def test_an_adapter_cannot_take_an_alias_name_and_the_user_hears_before_training(tmp_path):
    root = stocked(tmp_path, 1)
    registry.promote("home@1", root=root)
    registry.ensure_writable(root, name="home")
    for act in (
        lambda: registry.add(tmp_path / "source", "prod", root=root),
        lambda: registry.ensure_writable(root, name="prod"),
    ):
        with pytest.raises(CannotCreateError, match=r"prod is an alias in .*, of home@1"):
            act()
    assert specs(root) == ["home@1"]


@pytest.mark.parametrize("damage", ["no weights", "no config", "other bytes", "another adapter"])
def test_a_damaged_version_is_neither_promoted_nor_rolled_back_to(tmp_path, damage):
    root = stocked(tmp_path)
    registry.promote("home@1", root=root)
    registry.promote("home@2", root=root)
    folder = root / "home" / "1"
    if damage == "no weights":
        (folder / WEIGHTS).unlink()
    elif damage == "no config":
        (folder / CONFIG).unlink()
    elif damage == "other bytes":
        (folder / WEIGHTS).write_bytes(b"x" * 100)
    else:  # It has no passport, and passes every check of the door; only the journal knows what it was.
        shutil.copyfile(root / "home" / "3" / CONFIG, folder / CONFIG)
    for act in (lambda: registry.promote("home@1", "test", root=root), lambda: registry.rollback("prod", root=root)):
        with pytest.raises(AdapterError, match="home@1 is damaged") as caught:
            act()
        assert caught.value.exit_code == 77
    assert {alias: version.number for alias, version in registry.aliases(root).items()} == {"prod": 2}
    assert [isinstance(listed.files_or_error, AdapterFiles) for listed in registry.listing(root)] == [False, True, True]
    with pytest.raises(LoraTuneError):
        registry.open_found("home@1", root=root)


def test_a_version_that_was_changed_since_it_came_is_not_opened(tmp_path):
    root = stocked(tmp_path)
    shutil.copyfile(root / "home" / "3" / CONFIG, root / "home" / "1" / CONFIG)
    with pytest.raises(AdapterMismatchError, match="when it was added"):
        registry.open_found("home@1", root=root)
    with pytest.raises(AdapterMismatchError):
        registry.open_found(str(root / "home" / "1"), root=root)
    assert registry.open_found("home@2", root=root).shape.alpha == 2
    assert registry.open_found(str(tmp_path / "source"), root=root).shape.alpha == 3


@pytest.mark.parametrize(
    "spec", ["home@9", "other", "home@sha256:00000000", "home@", "home@0", "", "x" * 5000, "home@2\n"]
)
def test_what_is_not_there_is_neither_promoted_nor_removed(tmp_path, spec):
    root = stocked(tmp_path)
    before = journal_of(root)
    for act in (registry.promote, registry.remove, registry.find_version):
        with pytest.raises(MissingInputError) as caught:
            act(spec, root=root)
        assert len(caught.value.message) < 1000
    assert journal_of(root) == before


@pytest.mark.parametrize("act", [registry.promote, registry.remove, registry.find_version])
def test_a_folder_is_neither_promoted_nor_removed(tmp_path, act):
    root = stocked(tmp_path)
    for spec in (str(root / "home" / "1"), "./home", "../r/home/1", "."):
        with pytest.raises(UsageError, match="a folder's path"):
            act(spec, root=root)
    assert specs(root) == ["home@1", "home@2", "home@3"]


def test_a_removed_version_is_gone_and_its_number_is_never_given_again(tmp_path):
    root = stocked(tmp_path)
    assert registry.remove("home@3", root=root) == "home@3"
    assert not (root / "home" / "3").exists()
    assert specs(root) == ["home@1", "home@2"]
    assert registry.find("home", root=root) == root / "home" / "2"
    with pytest.raises(MissingInputError, match="it has 1, 2"):
        registry.find("home@3", root=root)
    assert registry.add(tmp_path / "source", "home", root=root).number == 4


def test_what_the_journal_cannot_be_told_does_not_happen(tmp_path, monkeypatch):
    root = stocked(tmp_path)
    registry.promote("home@1", root=root)
    registry.promote("home@2", root=root)

    def failing(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", failing)
    for act in (lambda: registry.remove("home@3", root=root), lambda: registry.remove("prod", root=root),
                lambda: registry.promote("home@3", root=root), lambda: registry.rollback("prod", root=root)):  # fmt: skip
        with pytest.raises(CannotWriteError, match="nothing was changed") as caught:
            act()
        assert caught.value.exit_code == 74
    monkeypatch.undo()
    assert specs(root) == ["home@1", "home@2", "home@3"]
    assert registry.find("prod", root=root) == root / "home" / "2"


def test_the_last_version_of_a_name_can_be_removed(tmp_path):
    root = stocked(tmp_path, 1)
    assert registry.remove("home", root=root) == "home@1"
    assert specs(root) == []
    assert not (root / "home").exists()
    assert registry.add(tmp_path / "source", "home", root=root).number == 2


def test_a_bare_name_of_several_versions_is_not_enough_to_remove_one(tmp_path):
    root = stocked(tmp_path)
    with pytest.raises(UsageError, match="has versions 1, 2, 3"):
        registry.remove("home", root=root)
    assert specs(root) == ["home@1", "home@2", "home@3"]


def test_what_an_alias_points_to_is_not_removed_until_the_alias_is_given_up(tmp_path):
    root = stocked(tmp_path)
    registry.promote("home@2", root=root)
    registry.promote("home@2", "test", root=root)
    with pytest.raises(RefusedError, match="home@2 is what prod and test points to") as caught:
        registry.remove("home@2", root=root)
    assert caught.value.exit_code == 77
    assert "adapters remove prod" in caught.value.hint
    assert registry.remove("prod", root=root) == "prod"
    registry.promote("home@1", "test", root=root)
    assert specs(root) == ["home@1", "home@2", "home@3"]  # the alias went, not the version
    assert registry.remove("home@2", root=root) == "home@2"
    with pytest.raises(MissingInputError):
        registry.find("prod", root=root)


def test_a_damaged_version_can_be_removed(tmp_path):
    root = stocked(tmp_path)
    (root / "home" / "2" / WEIGHTS).write_bytes(b"x")
    assert registry.remove("home@2", root=root) == "home@2"
    assert specs(root) == ["home@1", "home@3"]


def test_the_list_says_when_each_version_came_and_how_much_room_it_takes(tmp_path):
    before = time.time()
    root = stocked(tmp_path, 2)
    for listed in registry.listing(root):
        assert before <= listed.added_at <= time.time()
        assert listed.n_bytes == sum(path.stat().st_size for path in listed.version.folder.iterdir()) > 0


def test_what_is_wrong_with_an_adapter_is_said_of_the_folder_that_the_user_named(tmp_path):
    source = write(tmp_path / "a", {"r": 0})
    with pytest.raises(AdapterError) as caught:
        registry.add(source, "home", root=tmp_path / "r")
    assert caught.value.message.startswith(str(source / CONFIG))
    assert caught.value.where == str(source / CONFIG)
