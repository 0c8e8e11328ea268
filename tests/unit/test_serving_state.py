"""A server's journal: what survives a crash, what a damaged line costs, and who may write."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.errors import CannotCreateError, CannotWriteError, ConflictError, RefusedError
from lora_tune.serving import state as module
from lora_tune.serving.state import (
    MAX_HISTORY,
    Aim,
    Forgotten,
    Journal,
    Loaded,
    Pointed,
    Record,
    RolledBack,
    Shadowed,
    State,
    Unloaded,
    fold,
    folded,
)

IDS = [f"home@{n}" for n in (1, 2, 3)] + ["other@1", "away@sha256:0123456789ab"]
names = st.sampled_from(["home", "other", "prod", "beta"])
ids = st.sampled_from(IDS)
at = st.just(1.5)


def record(id):
    name, _, number = id.partition("@")
    return Record(
        id=id, name=name, number=int(number) if number.isdecimal() else None, digest="a" * 64, source=f"{name}/1"
    )


targets = st.one_of(
    ids.map(lambda id: ((id, 1.0),)),
    st.tuples(ids, ids).filter(lambda pair: pair[0] != pair[1]).map(lambda pair: ((pair[0], 0.25), (pair[1], 0.75))),
)
shadows = st.none() | ids
events = st.one_of(
    st.builds(Loaded, at=at, version=ids.map(record), point=st.booleans()),
    st.builds(Pointed, at=at, alias=names, target=targets, shadow=shadows),
    st.builds(Shadowed, at=at, alias=names, target=targets, shadow=shadows),
    st.builds(RolledBack, at=at, alias=names, target=targets, shadow=shadows),
    st.builds(Forgotten, at=at, alias=names),
    st.builds(Unloaded, at=at, id=ids),
)


def after(*several):
    found = State()
    for event in several:
        found = fold(found, event)
    return found


def lines(several):
    return [event.model_dump_json().encode() for event in several]


@given(st.lists(events, max_size=30))
def test_what_is_written_is_what_is_read(several):
    assert folded(lines(several)) == (after(*several), 0)


@given(st.lists(events, max_size=30), st.data())
def test_a_state_never_needs_what_was_unloaded_and_remembers_no_empty_history(several, data):
    state = after(*several)
    assert all(1 <= len(history) <= MAX_HISTORY for history in state.histories.values())
    id = data.draw(ids)
    left = fold(state, Unloaded(at=1.0, id=id))
    assert id not in left.records
    assert all(id not in aim.ids for history in left.histories.values() for aim in history)
    for alias, history in left.histories.items():
        # What is left is what there was, in its order, but for a shadow.
        kept = [aim.target for aim in state.histories[alias] if id not in dict(aim.target)]
        assert [aim.target for aim in history] == [t for n, t in enumerate(kept) if n == 0 or t != kept[n - 1]] or any(
            aim.shadow for aim in state.histories[alias]
        )


@given(st.lists(events, min_size=1, max_size=12), st.data())
def test_a_cut_anywhere_costs_at_most_the_line_that_was_cut(several, data):
    whole = b"".join(line + b"\n" for line in lines(several))
    cut = data.draw(st.integers(0, len(whole)))
    state, n_passed_over = folded(whole[:cut].splitlines())
    n_whole = whole[:cut].count(b"\n")
    assert n_passed_over <= 1
    assert state in (after(*several[:n_whole]), after(*several[: n_whole + 1]))


@given(
    st.lists(events, max_size=8),
    st.lists(
        st.binary(max_size=40).filter(lambda b: b.strip() and b"\n" not in b and b"\r" not in b), min_size=1, max_size=4
    ),
    st.data(),
)
def test_foreign_lines_change_nothing_and_are_counted(several, junk, data):
    mixed = lines(several)
    for piece in junk:
        mixed.insert(data.draw(st.integers(0, len(mixed))), piece)
    assert folded(mixed) == (after(*several), len(junk))


HOSTILE = [
    {"event": "loaded", "at": 1.0, "point": True, "version": {"id": "../x@1", "name": "x", "number": 1, "digest": "a" * 64, "source": "x"}},
    {"event": "loaded", "at": 1.0, "point": 1, "version": record("home@1").model_dump()},
    {"event": "loaded", "at": 1.0, "point": True, "version": record("home@1").model_dump() | {"digest": "zz"}},
    {"event": "loaded", "at": 1.0, "point": True, "version": record("home@1").model_dump() | {"extra": 1}},
    {"event": "pointed", "at": 1.0, "alias": "a/b", "target": [["home@1", 1.0]]},
    {"event": "pointed", "at": 1.0, "alias": "a", "target": []},
    {"event": "pointed", "at": 1.0, "alias": "a", "target": [["home@1", 0.0]]},
    {"event": "pointed", "at": 1.0, "alias": "a", "target": [["home@1", 2.0]]},
    {"event": "pointed", "at": 1.0, "alias": "a", "target": [["home@1", 0.1]] * 9},
    {"event": "pointed", "at": 1.0, "alias": "a\n", "target": [["home@1", 1.0]]},
    {"event": "exploded", "at": 1.0}, {"at": 1.0}, [], "x", 5, None,
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_a_line_that_is_not_plainly_one_of_ours_changes_nothing(value):
    assert folded([json.dumps(value).encode()]) == (State(), 1)


def pointed(alias, id, **more):
    return Pointed(at=1.0, alias=alias, target=((id, 1.0),), **more)


def only(id):
    return Aim(((id, 1.0),))


def test_rolling_back_goes_to_where_the_event_says_also_when_lines_between_were_lost():
    state = after(pointed("prod", "home@1"), pointed("prod", "home@2"), pointed("prod", "home@3"))
    back = RolledBack(at=1.0, alias="prod", target=(("home@1", 1.0),))
    assert fold(state, back).histories["prod"] == (only("home@1"),)
    assert after(back).histories["prod"] == (only("home@1"),)


def test_a_shadow_is_no_step_and_goes_with_its_version():
    state = after(pointed("prod", "home@1"), Shadowed(at=1.0, alias="prod", target=(("home@1", 1.0),), shadow="home@2"))
    assert state.histories["prod"] == (Aim((("home@1", 1.0),), "home@2"),)
    assert fold(state, Unloaded(at=1.0, id="home@2")).histories["prod"] == (only("home@1"),)


def test_unloading_what_stands_between_leaves_one_step_where_there_were_two():
    state = after(*(pointed("prod", id) for id in ("home@1", "home@2", "home@1")))
    assert fold(state, Unloaded(at=1.0, id="home@2")).histories["prod"] == (only("home@1"),)


def test_an_appended_event_is_on_disk_and_read_by_the_next_server(tmp_path):
    first = Journal(tmp_path / "deep" / "s.jsonl")
    first.append(pointed("prod", "home@1"))
    first.close()
    second = Journal(tmp_path / "deep" / "s.jsonl")
    assert second.read() == (after(pointed("prod", "home@1")), 0)
    second.close()


def test_after_a_torn_line_the_next_event_begins_on_a_line_of_its_own(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_bytes(lines([pointed("prod", "home@1")])[0] + b'\n{"event":"poi')
    held = Journal(path)
    assert held.read() == (after(pointed("prod", "home@1")), 1)
    held.append(pointed("prod", "home@2"))
    assert held.read() == (after(pointed("prod", "home@1"), pointed("prod", "home@2")), 1)
    held.close()


def test_one_server_at_a_time_holds_a_journal(tmp_path):
    held = Journal(tmp_path / "s.jsonl")
    with pytest.raises(ConflictError, match="another server"):
        Journal(tmp_path / "s.jsonl")
    held.close()
    Journal(tmp_path / "s.jsonl").close()


@pytest.mark.parametrize("broken", ["write", "fsync", "half"])
def test_a_write_that_fails_leaves_the_journal_as_it_was(tmp_path, monkeypatch, broken):
    held = Journal(tmp_path / "s.jsonl")
    held.append(pointed("prod", "home@1"))
    before = (tmp_path / "s.jsonl").read_bytes()
    write = os.write

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        module.os, "fsync" if broken == "fsync" else "write", full if broken != "half" else lambda d, c: write(d, c[:9])
    )
    with pytest.raises(CannotWriteError):
        held.append(pointed("prod", "home@2"))
    monkeypatch.undo()
    assert (tmp_path / "s.jsonl").read_bytes() == before
    held.append(pointed("prod", "home@3"))
    assert held.read() == (after(pointed("prod", "home@1"), pointed("prod", "home@3")), 0)
    held.close()


def test_what_is_no_regular_file_is_refused(tmp_path):
    (tmp_path / "real").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder"):
        with pytest.raises(RefusedError, match="not a regular file"):
            Journal(tmp_path / name)


def test_a_place_that_cannot_be_made_is_said_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotCreateError):
        Journal(tmp_path / "file" / "s.jsonl")


def test_a_journal_that_is_too_long_is_not_read(tmp_path):
    with (tmp_path / "s.jsonl").open("wb") as stream:
        stream.truncate(module.MAX_JOURNAL_BYTES + 1)
    with pytest.raises(RefusedError, match="at most"):
        Journal(tmp_path / "s.jsonl")


def grown(path, n_swaps):
    """Return the state of a journal in which an alias went to and fro."""
    held = Journal(path)
    several = [Loaded(at=1.0, version=record(id), point=True) for id in IDS]
    several += [pointed("prod", IDS[n % 3], shadow=IDS[3] if n % 2 else None) for n in range(n_swaps)]
    for event in several:
        held.append(event)
    held.close()
    return after(*several)


def test_a_long_journal_becomes_short_and_says_the_same(tmp_path, monkeypatch):
    path = tmp_path / "s.jsonl"
    state = grown(path, 200)
    monkeypatch.setattr(module, "LONG_JOURNAL_BYTES", 4096)
    long = path.stat().st_size
    held = Journal(path)
    held.shorten(at=2.0)
    assert held.read() == (state, 0)
    assert path.stat().st_size < long / 4
    assert sorted(tmp_path.iterdir()) == [path]
    held.append(pointed("beta", "home@1"))
    with pytest.raises(ConflictError, match="another server"):
        Journal(path)
    held.close()
    again = Journal(path)
    assert again.read() == (fold(state, pointed("beta", "home@1")), 0)
    again.close()


@given(st.lists(events, max_size=40))
def test_the_fewest_lines_come_to_the_same(several):
    state = after(*several)
    assert after(*module._fewest(state, 1.5)) == state
    assert list(after(*module._fewest(state, 1.5)).records) == list(state.records), "versions keep their order"


def test_a_journal_stays_short_however_long_a_server_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONG_JOURNAL_BYTES", 4096)
    state = grown(tmp_path / "s.jsonl", 2000)
    held = Journal(tmp_path / "s.jsonl")
    assert held.read() == (state, 0)
    assert (tmp_path / "s.jsonl").stat().st_size < 32 * 1024
    held.close()


def test_a_short_journal_is_left_as_it_is(tmp_path):
    grown(tmp_path / "s.jsonl", 200)
    before = (tmp_path / "s.jsonl").read_bytes()
    held = Journal(tmp_path / "s.jsonl")
    held.shorten(at=2.0)
    held.close()
    assert (tmp_path / "s.jsonl").read_bytes() == before


def test_what_could_not_be_read_is_kept_beside_a_journal_that_is_made_short(tmp_path, monkeypatch):
    path = tmp_path / "s.jsonl"
    state = grown(path, 200)
    path.write_bytes(path.read_bytes() + b'{"event":"of a later kind"}\n')
    before = path.read_bytes()
    monkeypatch.setattr(module, "LONG_JOURNAL_BYTES", 4096)
    held = Journal(path)
    held.shorten(at=2.0)
    assert held.read() == (state, 0)
    assert (tmp_path / "s.jsonl.damaged").read_bytes() == before
    held.close()


@pytest.mark.parametrize("broken", ["write", "fsync", "open"])
def test_a_journal_that_cannot_be_made_short_goes_on_as_it_is(tmp_path, monkeypatch, broken):
    path = tmp_path / "s.jsonl"
    state = grown(path, 200)
    monkeypatch.setattr(module, "LONG_JOURNAL_BYTES", 4096)
    held = Journal(path)
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, broken, full)
    held.shorten(at=2.0)
    monkeypatch.undo()
    assert path.read_bytes() == before
    held.append(pointed("beta", "home@1"))
    assert held.read() == (fold(state, pointed("beta", "home@1")), 0)
    assert sorted(tmp_path.iterdir()) == [path]
    held.close()


def test_a_server_that_opened_the_long_journal_holds_the_short_one_or_none(tmp_path, monkeypatch):
    """It has opened the file when the other one puts a shorter one in its place and ends."""
    path = tmp_path / "s.jsonl"
    state = grown(path, 200)
    monkeypatch.setattr(module, "LONG_JOURNAL_BYTES", 4096)
    other, checked = Journal(path), Journal._check_ours

    def meanwhile(self, descriptor):
        monkeypatch.setattr(Journal, "_check_ours", checked)
        other.shorten(at=2.0)
        other.close()
        checked(self, descriptor)

    monkeypatch.setattr(Journal, "_check_ours", meanwhile)
    held = Journal(path)
    assert os.fstat(held._descriptor).st_ino == path.stat().st_ino
    assert held.read() == (state, 0)
    held.close()


def test_a_line_longer_than_any_of_ours_is_passed_over_as_one(tmp_path):
    path = tmp_path / "s.jsonl"
    first, second = lines([pointed("prod", "home@1"), pointed("prod", "home@2")])
    path.write_bytes(first + b"\n" + b"x" * 300_000 + b"\n" + second + b"\n")
    held = Journal(path)
    assert held.read() == (after(pointed("prod", "home@1"), pointed("prod", "home@2")), 1)
    held.close()
