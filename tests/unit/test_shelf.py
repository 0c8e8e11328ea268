"""A registry's folder: what readers see of it, what killed writers left in it, and what hostile hands put there."""

import errno
import json
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tune.adapter import journal, registry
from lora_tune.adapter.door import WEIGHTS, open_adapter
from lora_tune.errors import (
    CannotCreateError,
    LoraTuneError,
    MissingInputError,
    RefusedError,
    UsageError,
)
from tests.unit.test_door import write
from tests.unit.test_registry import journal_of, specs, stocked


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


def test_a_name_that_is_both_is_refused_and_both_can_be_said_plainly(tmp_path):
    root = stocked(tmp_path, 1)
    registry.promote("home@1", root=root)
    shutil.copytree(root / "home", root / "prod")
    with pytest.raises(RefusedError, match="an adapter's name and an alias of home@1") as caught:
        registry.find("prod", root=root)
    assert "prod@1" in caught.value.hint
    assert registry.find("prod@1", root=root) == root / "prod" / "1"


def test_a_version_that_the_journal_does_not_know_is_there_and_the_next_writer_tells_the_journal(tmp_path):
    root = stocked(tmp_path)
    (root / "journal.jsonl").unlink()
    assert specs(root) == ["home@1", "home@2", "home@3"]
    assert {listed.added_at for listed in registry.listing(root)} == {None}
    registry.promote("home@2", root=root)
    assert [(one["event"], one["version"]) for one in journal_of(root)] == [
        ("added", 1),
        ("added", 2),
        ("added", 3),
        ("promoted", 2),
    ]
    shutil.rmtree(root / "home" / "3")
    assert registry.add(tmp_path / "source", "home", root=root).number == 4


def test_what_a_killed_writer_left_is_seen_by_no_reader_and_cleared_by_the_next_writer(tmp_path):
    root = stocked(tmp_path)
    shutil.copytree(root / "home" / "1", root / "home" / ".4-abc123")
    with (root / "journal.jsonl").open("a") as stream:
        stream.write(json.dumps({"event": "removed", "name": "home", "version": 3}) + "\n")
    assert specs(root) == ["home@1", "home@2"]
    assert registry.find("home", root=root) == root / "home" / "2"
    registry.promote("home@2", root=root)
    assert sorted(path.name for path in (root / "home").iterdir()) == ["1", "2"]
    assert registry.add(tmp_path / "source", "home", root=root).number == 4


def test_a_folder_that_cannot_be_deleted_does_not_stop_the_writers(tmp_path, monkeypatch):
    root = stocked(tmp_path)

    def failing(*_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "rename", failing)
    assert registry.remove("home@3", root=root) == "home@3"
    registry.promote("home@1", root=root)
    assert specs(root) == ["home@1", "home@2"]
    monkeypatch.undo()
    registry.promote("home@2", root=root)
    assert sorted(path.name for path in (root / "home").iterdir()) == ["1", "2"]


OUTSIDE = [
    {"event": "promoted", "alias": "prod", "name": "../../outside", "version": 1},
    {"event": "promoted", "alias": "prod", "name": "home", "version": "../../../outside"},
    {"event": "promoted", "alias": "../prod", "name": "home", "version": 1},
    {"event": "removed", "name": "../outside", "version": 1}, {"event": "removed", "name": "linked", "version": 1},
    {"event": "removed", "name": "home", "version": 7}, {"event": "removed", "alias": "../../outside"},
    {"event": "added", "name": "/etc", "version": 1, "from": "/etc/passwd\0"},
]  # fmt: skip


@pytest.mark.parametrize("line", OUTSIDE, ids=range(len(OUTSIDE)))
def test_nothing_outside_is_touched_whatever_journal_and_links_say(tmp_path, line):
    root = stocked(tmp_path, 2)
    outside = tmp_path / "outside"
    shutil.copytree(root / "home", outside)
    (root / "linked").symlink_to(outside)
    (root / "home" / "7").symlink_to(outside / "1")
    (root / "home" / "8").symlink_to(tmp_path / "dangling")
    (root / "home" / ".9-left").symlink_to(outside)
    with (root / "journal.jsonl").open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    before = {path: path.stat().st_mtime_ns for path in sorted(outside.rglob("*"))}
    assert specs(root) == ["home@1", "home@2"]
    for spec in ("linked", "linked@1", "home@7", "prod"):
        with pytest.raises(MissingInputError):
            registry.find_version(spec, root=root)
    with pytest.raises(CannotCreateError, match="is a link"):
        registry.add(tmp_path / "source", "linked", root=root)
    assert registry.origin(root / "home" / "1", root=root) == tmp_path / "source"
    registry.promote("home@1", root=root)
    assert registry.add(tmp_path / "source", "home", root=root).number == 9
    registry.remove("home@2", root=root)
    assert {path: path.stat().st_mtime_ns for path in sorted(outside.rglob("*"))} == before


@pytest.mark.parametrize("name", [".lock", "journal.jsonl"])
def test_a_lock_or_journal_that_is_a_link_writes_nothing_through_it(tmp_path, name):
    root, target = stocked(tmp_path, 1), tmp_path / "target"
    target.write_text("precious")
    (root / name).unlink()
    (root / name).symlink_to(target)
    for act in (lambda: registry.add(tmp_path / "source", "home", root=root), lambda: registry.promote("home@1", root=root),
                lambda: registry.remove("home@1", root=root)):  # fmt: skip
        with pytest.raises((RefusedError, CannotCreateError)):
            act()
    assert target.read_text() == "precious"
    assert (root / "home" / "1").is_dir()


def test_the_highest_number_is_not_passed(tmp_path):
    root = stocked(tmp_path, 1)
    with (root / "journal.jsonl").open("a") as stream:
        stream.write(json.dumps({"event": "removed", "name": "home", "version": 999_999_999}) + "\n")
    with pytest.raises(CannotCreateError, match="used up its numbers"):
        registry.add(tmp_path / "source", "home", root=root)
    assert specs(root) == ["home@1"]


def test_an_alias_of_a_folder_that_was_removed_by_hand_says_so(tmp_path):
    root = stocked(tmp_path)
    registry.promote("home@2", root=root)
    shutil.rmtree(root / "home" / "2")
    with pytest.raises(MissingInputError, match=r"prod points to home@2, and .* is not there"):
        registry.find("prod", root=root)
    assert registry.promote("home@3", root=root).previous.spec == "home@2"


def test_a_registry_that_is_not_there_is_empty_and_a_file_is_none(tmp_path):
    (tmp_path / "file").write_text("x")
    assert registry.listing(tmp_path / "none") == []
    assert registry.aliases(tmp_path / "none") == {}
    for read in (registry.listing, registry.aliases):
        with pytest.raises(MissingInputError, match="file is no folder, and a registry is one"):
            read(tmp_path / "file")
    for root in (tmp_path / "none", tmp_path / "file"):
        for act in (registry.promote, registry.remove):
            with pytest.raises(MissingInputError, match="no registry"):
                act("home", root=root)


def damage(root, event):
    """Damage the last line of that kind where it stands, and return its number."""
    lines = (root / "journal.jsonl").read_bytes().splitlines(keepends=True)
    number = max(n for n, line in enumerate(lines) if event.encode() in line)
    lines[number] = lines[number].replace(event.encode(), b"x" * len(event))
    (root / "journal.jsonl").write_bytes(b"".join(lines))
    return number + 1


def test_a_damaged_line_that_may_have_moved_an_alias_is_said_until_the_alias_is_promoted_again(tmp_path):
    root = stocked(tmp_path)
    registry.promote("home@1", root=root)
    registry.promote("home@3", root=root)
    assert (registry.journal_damage(root), registry.why_doubtful("prod", root=root)) == ("", "")
    line = damage(root, "promoted")
    assert f"line {line} of {root / 'journal.jsonl'} is damaged" in registry.journal_damage(root)
    said = registry.why_doubtful("prod", root=root)
    assert said.startswith("prod is taken to point to home@1, and may not")
    assert "promote NAME@VERSION prod" in said
    assert registry.why_doubtful("home", root=root) == registry.why_doubtful("./prod", root=root) == ""
    # Said again, even for the version that it is taken to point to, it is settled; the lost line stays known.
    registry.promote("home@1", root=root)
    assert registry.why_doubtful("prod", root=root) == ""
    assert "damaged" in registry.journal_damage(root)
    with pytest.raises(MissingInputError, match="nothing earlier is left"):
        registry.rollback("prod", root=root)


def test_an_alias_that_is_not_known_may_have_stood_in_a_damaged_line(tmp_path):
    root = stocked(tmp_path)
    registry.promote("home@1", "stage", root=root)
    line = damage(root, "promoted")
    with pytest.raises(MissingInputError, match=rf"line {line} of .* is damaged.* may have named it"):
        registry.find_version("stage", root=root)


@pytest.mark.parametrize("digits", ["", "d", "df60", "df60abc"])
def test_too_few_digits_of_a_digest_are_said(tmp_path, digits):
    root = stocked(tmp_path, 1)
    for act in (registry.find, registry.find_version, registry.promote):
        with pytest.raises(UsageError, match="8 digits of its digest or more"):
            act(f"home@sha256:{digits}", root=root)


def test_no_word_at_all_is_not_the_working_folder(tmp_path, monkeypatch):
    root = stocked(tmp_path, 1)
    monkeypatch.chdir(root / "home" / "1")
    with pytest.raises(MissingInputError, match="no adapter ''"):
        registry.open_found("", root=root)


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "promote", "rollback", "remove", "remove alias"]), st.sampled_from(["a", "b"]),
              st.integers(1, 4), st.sampled_from(["prod", "test"])),
    max_size=14,
)  # fmt: skip


class Model:
    """What a registry is, in plain words: the oracle."""

    def __init__(self):
        self.there, self.given, self.aliases = set(), {"a": 0, "b": 0}, {}

    def step(self, deed, name, number, alias):
        """Do it and return whether it can be done."""
        version, history = (name, number), self.aliases.get(alias)
        if deed == "add":
            self.given[name] += 1
            self.there.add((name, self.given[name]))
        elif deed == "promote" and version in self.there:
            if not history or history[-1] != version:
                self.aliases.setdefault(alias, []).append(version)
        elif deed == "rollback" and history and len(history) > 1 and history[-2] in self.there:
            history.pop()
        elif deed == "remove" and version in self.there and version not in [h[-1] for h in self.aliases.values()]:
            self.there.remove(version)
        elif deed == "remove alias" and history:
            del self.aliases[alias]
        else:
            return False
        return True


@settings(max_examples=40, deadline=None)
@given(steps=STEPS)
def test_any_sequence_of_deeds_does_what_the_words_say(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("any")
    source, root, model = write(folder / "source"), folder / "r", Model()
    for deed, name, number, alias in steps:
        act = {
            "add": lambda name=name: registry.add(source, name, root=root),
            "promote": lambda name=name, number=number, alias=alias: registry.promote(
                f"{name}@{number}", alias, root=root
            ),
            "rollback": lambda alias=alias: registry.rollback(alias, root=root),
            "remove": lambda name=name, number=number: registry.remove(f"{name}@{number}", root=root),
            "remove alias": lambda alias=alias: registry.remove(alias, root=root),
        }[deed]
        if model.step(deed, name, number, alias):
            act()
        else:
            with pytest.raises(LoraTuneError):
                act()
        assert {listed.version.key for listed in registry.listing(root)} == model.there
        assert {name: version.key for name, version in registry.aliases(root).items()} == {
            name: history[-1] for name, history in model.aliases.items()
        }


def test_a_reader_that_a_writer_overtakes_looks_again(tmp_path, monkeypatch):
    root = stocked(tmp_path)
    registry.promote("home@1", root=root)
    real, looks = journal.read_state, []

    def overtaken(where):
        state = real(where)
        looks.append(state)
        if len(looks) == 1:
            monkeypatch.setattr(journal, "read_state", real)
            registry.promote("home@2", root=root)
            registry.remove("home@1", root=root)
            monkeypatch.setattr(journal, "read_state", overtaken)
        return state

    monkeypatch.setattr(journal, "read_state", overtaken)
    assert registry.find("prod", root=root) == root / "home" / "2"
    assert len(looks) == 2


def test_a_version_that_is_removed_while_it_is_listed_is_not_listed_as_damaged(tmp_path, monkeypatch):
    root = stocked(tmp_path)
    real = registry.open_adapter

    def overtaken(folder):
        if folder.name == "2":
            registry.remove("home@2", root=root)
        return real(folder)

    monkeypatch.setattr(registry, "open_adapter", overtaken)
    assert [listed.version.spec for listed in registry.listing(root)] == ["home@1", "home@3"]
