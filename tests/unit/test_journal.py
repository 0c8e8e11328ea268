"""The journal: every line counts or costs nothing, and any beginning of it is a state that was once true."""

import errno
import json
import os
import time
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_tune.adapter import journal
from lora_tune.adapter.journal import FILE_NAME, State, append, check_appendable, fold, journal_bytes, read_state
from lora_tune.errors import RefusedError

DIGEST = "ab" * 32


def event(kind, name="home", number=1, **facts):
    return {"event": kind, "name": name, "version": number, **facts}


def test_events_come_to_versions_and_aliases():
    state = fold([
        event("added", at=5, digest=DIGEST, **{"from": "/somewhere"}), event("imported", number=2), event("added", "other", 7),
        event("promoted", alias="prod"), event("promoted", number=2, alias="prod"), event("promoted", "other", 7, alias="test"),
        event("rolled_back", alias="prod"), event("removed", number=2),
    ])  # fmt: skip
    assert set(state.arrivals) == {("home", 1), ("home", 2), ("other", 7)}
    assert state.arrivals["home", 1] == journal.Arrival(5.0, DIGEST, "/somewhere")
    assert state.arrivals["home", 2] == journal.Arrival(None, None, None)
    assert state.aliases == {"prod": (("home", 1),), "test": (("other", 7),)}
    assert state.removed == {("home", 2)}
    assert state.last_numbers == {"home": 2, "other": 7}


def test_a_removed_alias_forgets_its_history():
    events = [event("promoted", alias="prod"), {"event": "removed", "alias": "prod"}]
    assert fold(events).aliases == {}
    assert fold([*events, event("promoted", number=3, alias="prod")]).aliases == {"prod": (("home", 3),)}


def test_a_rollback_says_itself_where_the_alias_points_whatever_was_lost_before_it():
    assert fold([event("rolled_back", number=4, alias="prod")]).aliases == {"prod": (("home", 4),)}
    assert fold([event("promoted", alias="prod"), event("rolled_back", number=4, alias="prod")]).aliases == {
        "prod": (("home", 4),)
    }


@pytest.mark.parametrize("strange", [
    event("renamed"), event("added", "../x"), event("added", "/etc"), event("added", "a\n"), event("added", "x" * 64), event("added", 5),
    event("added", number=0), event("added", number=-1), event("added", number=True), event("added", number="1"),
    event("added", number=1.0), event("added", number=10**9), event("added", number=None), {}, {"event": ["added"]},
    event("promoted"), event("promoted", alias="../prod"), event("promoted", alias=None), event("promoted", "..", alias="prod"),
    event("rolled_back", alias="/prod"), {"event": "removed", "alias": "../prod"}, {"event": "promoted", "alias": "prod"},
])  # fmt: skip
def test_what_is_not_plainly_an_event_of_ours_changes_no_version_and_no_alias(strange):
    state = fold([strange])
    assert (state.arrivals, state.removed, state.aliases) == ({}, frozenset(), {})
    assert state.unread == (1,)


@pytest.mark.parametrize("facts", [
    {"at": float("nan")}, {"at": float("inf")}, {"at": -1}, {"at": True}, {"at": "5"}, {"at": 10**400}, {"digest": "x"}, {"digest": DIGEST + "\n"},
    {"digest": 5}, {"from": 5}, {"from": "a\0b"}, {"from": "\x1b[2J"}, {"from": "x" * 5000}, {"from": None},
])  # fmt: skip
def test_facts_that_cannot_be_meant_are_not_said(facts):
    assert fold([event("added", **facts)]).arrivals == {("home", 1): journal.Arrival(None, None, None)}


NAMES = st.sampled_from(["home", "other", "prod", "../x", 5])
EVENTS = st.lists(
    st.fixed_dictionaries(
        {"event": st.sampled_from(["added", "imported", "promoted", "rolled_back", "removed", "unheard-of"])},
        optional={
            "name": NAMES,
            "version": st.integers(-1, 5),
            "alias": NAMES,
            "at": st.floats(),
            "from": st.text(max_size=9),
        },
    ),
    max_size=12,
)
LINES = st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")), max_size=6)


@settings(max_examples=50, deadline=None)
@given(events=EVENTS)
def test_what_is_appended_is_what_is_read(tmp_path_factory, events):
    root = tmp_path_factory.mktemp("r")
    for one in events:
        append(root, one)
    assert read_state(root) == fold(events)


@settings(max_examples=50, deadline=None)
@given(events=EVENTS, data=st.data())
def test_a_journal_cut_anywhere_is_one_of_the_states_that_were(tmp_path_factory, events, data):
    root = tmp_path_factory.mktemp("r")
    lines = [json.dumps(one).encode() + b"\n" for one in events]
    content = b"".join(lines)
    (root / FILE_NAME).write_bytes(content[: data.draw(st.integers(0, len(content)))])
    assert read_state(root) in [fold(events[:n]) for n in range(len(events) + 1)]


@settings(max_examples=100, deadline=None)
@given(events=EVENTS, garbage=LINES)
@example(
    events=[],
    garbage=[
        b"\xff\xfe{",
        b"\xef\xbb\xbf{}",
        b'{"a": 1' + b"0" * 5000 + b"}",
        b"{" * 3000,
        b"\r",
        b"null",
        b"[]",
        b"NaN",
    ],
)
def test_lines_that_are_none_of_ours_cost_themselves_only(tmp_path_factory, events, garbage):
    root = tmp_path_factory.mktemp("r")
    lines = [json.dumps(one).encode() for one in events]
    for number, line in enumerate(garbage):
        lines.insert((number * 7) % (len(lines) + 1), line)
    (root / FILE_NAME).write_bytes(b"".join(line + b"\n" for line in lines))
    found, expected = read_state(root), fold(events)
    assert replace(found, unread=(), doubtful=frozenset()) == replace(expected, unread=(), doubtful=frozenset())
    strange = sum(1 for line in garbage if line.strip() and not line.endswith(b"\x18"))
    assert len(found.unread) == len(expected.unread) + strange


def test_a_line_of_100_mb_is_passed_over_in_little_memory_and_time(tmp_path):
    good = json.dumps(event("added")).encode() + b"\n"
    with (tmp_path / FILE_NAME).open("wb") as stream:
        stream.write(good + b'{"event": "added", "name": "big", "version": 1, "x": "')
        for _ in range(100):
            stream.write(b"x" * 1024**2)
        stream.write(b'"}\n' + json.dumps(event("added", number=2)).encode() + b"\n")
    start = time.monotonic()
    tracemalloc.start()
    try:
        assert set(read_state(tmp_path).arrivals) == {("home", 1), ("home", 2)}
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 5
    assert peak_bytes < 1024**2


@pytest.mark.parametrize("longer", [-1, 0, 1])
def test_the_longest_line_is_read_and_a_longer_one_is_not(tmp_path, longer):
    line = json.dumps(event("added", x="")).encode()
    padded = line[:-2] + b"x" * (journal._MAX_LINE_BYTES - len(line) - 1 + longer) + line[-2:] + b"\n"
    assert len(padded) == journal._MAX_LINE_BYTES + longer
    (tmp_path / FILE_NAME).write_bytes(padded + json.dumps(event("added", number=2)).encode())
    state = read_state(tmp_path)
    assert set(state.arrivals) == ({("home", 2)} | ({("home", 1)} if longer <= 0 else set()))
    assert state.unread == ((1,) if longer > 0 else ())


def test_deep_json_is_passed_over(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(
        b"[" * 60_000 + b"\n" + b'{"a":' * 10_000 + b"\n" + json.dumps(event("added")).encode()
    )
    assert set(read_state(tmp_path).arrivals) == {("home", 1)}


def test_a_journal_that_is_too_long_is_refused(tmp_path):
    with (tmp_path / FILE_NAME).open("wb") as stream:
        stream.truncate(journal.MAX_JOURNAL_BYTES + 1)
    with pytest.raises(RefusedError, match="at most"):
        read_state(tmp_path)


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "device"])
def test_a_journal_that_is_no_regular_file_is_neither_read_nor_written(tmp_path, kind):
    target, path = tmp_path / "target", tmp_path / FILE_NAME
    if kind == "link":
        target.write_text(json.dumps(event("added")) + "\n")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else target)
    for act in (
        lambda: read_state(tmp_path),
        lambda: append(tmp_path, event("added")),
        lambda: check_appendable(tmp_path),
    ):
        with pytest.raises(RefusedError, match="not a regular file"):
            act()
    assert target.exists() == (kind == "link")
    assert not target.exists() or target.read_text() == json.dumps(event("added")) + "\n"


def test_no_journal_is_no_event_and_nothing_is_made(tmp_path):
    (tmp_path / "file").write_text("x")
    for root in (tmp_path, tmp_path / "none", tmp_path / "file"):
        assert read_state(root) == State()
        assert journal_bytes(root) == 0
    check_appendable(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_line_that_a_crash_cut_off_does_not_swallow_the_next(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b'{"event": "added", "na')
    append(tmp_path, event("added"))
    assert set(read_state(tmp_path).arrivals) == {("home", 1)}
    assert (tmp_path / FILE_NAME).read_bytes().count(b"\n") == 2


def test_a_promotion_says_again_where_an_alias_points_and_a_rollback_goes_past_it():
    events = [event("promoted", number=number, alias="prod") for number in (1, 2, 2)]
    assert fold(events).aliases == {"prod": (("home", 1), ("home", 2))}


def lines_of(*lines):
    return b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)


MOVED = event("promoted", alias="prod")


@pytest.mark.parametrize(
    "damaged", [b"{\n", b"\0\0\0\n", b'{"event": "promotxd", "alias": "prod"}\n', b"x" * 70_000 + b"\n", b"5\n"]
)
@pytest.mark.parametrize("last", [True, False])
def test_a_damaged_line_is_counted_and_what_it_may_have_moved_is_in_doubt(tmp_path, damaged, last):
    after = [] if last else [event("added", number=2)]
    (tmp_path / FILE_NAME).write_bytes(lines_of(MOVED, b"\n", damaged, *after))
    state = read_state(tmp_path)
    assert (state.unread, state.doubtful) == ((3,), {"prod"})
    assert state.aliases == {"prod": (("home", 1),)}
    append(tmp_path, event("promoted", number=2, alias="test"))
    assert read_state(tmp_path).doubtful == {"prod"}
    append(tmp_path, event("promoted", number=2, alias="prod"))
    assert (read_state(tmp_path).unread, read_state(tmp_path).doubtful) == ((3,), frozenset())


def test_whatever_a_crash_cut_off_is_no_damage_not_even_once_more_was_appended(tmp_path):
    whole = lines_of(event("promoted", number=2, alias="prod"))
    for cut in range(len(whole) + 1):
        (tmp_path / FILE_NAME).write_bytes(lines_of(MOVED, whole[:cut]))
        counts = cut >= len(whole) - 1  # only the line break is missing
        for number in (3, 4):
            state = read_state(tmp_path)
            assert (state.unread, state.doubtful) == ((), frozenset()), cut
            assert state.aliases["prod"][-1] == ("home", 2 if counts else 1)
            append(tmp_path, event("added", number=number))
        assert set(read_state(tmp_path).arrivals) == {("home", 3), ("home", 4)}


def test_a_crash_within_the_mark_of_a_crash_is_no_damage(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(lines_of(MOVED, b'{"alias": "pr\x18'))
    append(tmp_path, event("added"))
    assert read_state(tmp_path).unread == ()
    assert set(read_state(tmp_path).arrivals) == {("home", 1)}


@pytest.mark.parametrize("fault", ["short", "full", "sync"])
def test_an_event_is_written_whole_or_not_at_all(tmp_path, monkeypatch, fault):
    append(tmp_path, event("added"))
    before = (tmp_path / FILE_NAME).read_bytes()
    real = os.write

    def failing(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    replaced = {
        "short": ("write", lambda fd, line: real(fd, line[:9])),
        "full": ("write", failing),
        "sync": ("fsync", failing),
    }
    monkeypatch.setattr(os, *replaced[fault])
    with pytest.raises(OSError, match="No space"):
        append(tmp_path, event("promoted", alias="prod"))
    assert (tmp_path / FILE_NAME).read_bytes() == before
