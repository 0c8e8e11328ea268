"""`journal.jsonl`: what happened to a registry's versions and aliases, one line each, only ever appended to.

A line that is damaged or of a kind not known here costs that line only, and is counted: it may have moved an alias. An
end without a line break is no damage: an event counts only once its whole line is synced, so what a crash cut off was
never promised to anyone. Which versions there are is said by their folders; what was removed, and where aliases point,
is said here alone.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_tune.adapter.manifest import has_control
from lora_tune.errors import MissingInputError, RefusedError
from lora_tune.recipe.schema import NAME_PATTERN

FILE_NAME = "journal.jsonl"
MAX_NUMBER = 999_999_999
"""Highest number of a version."""
MAX_JOURNAL_BYTES = 256 * 1024**2
"""About a million events; what is longer is not read."""
_MAX_LINE_BYTES = 64 * 1024
_MAX_PATH_CHARS = 4096
_LAST_SECOND = 253_402_300_799
"""Of the year 9999, the last that a date can show."""
_CUT_OFF = b"\x18"
"""What ends a line that a crash cut off (ASCII's CANCEL, which no JSON holds), so that it is not taken for damage."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Key = tuple[str, int]
"""A version's name and number."""


@dataclass(frozen=True)
class Arrival:
    """How a version came into the registry; None is what the journal does not say, or does not say plainly."""

    at: float | None
    """Seconds since 1970."""
    digest: str | None
    """Its content digest when it came."""
    origin: str | None
    """The folder or file that it was copied from."""


@dataclass(frozen=True)
class State:
    """What all events together come to."""

    arrivals: Mapping[Key, Arrival] = field(default_factory=dict)
    removed: frozenset[Key] = frozenset()
    aliases: Mapping[str, tuple[Key, ...]] = field(default_factory=dict)
    """Where each alias pointed, oldest first; the last is where it points. What was rolled back is not in it."""
    last_numbers: Mapping[str, int] = field(default_factory=dict)
    """By name, the highest number that any event knows: a number is never given twice."""
    unread: tuple[int, ...] = ()
    """Numbers of the lines that were passed over."""
    doubtful: frozenset[str] = frozenset()
    """Aliases that have not been moved since such a line: it may have moved them."""


def read_state(root: Path) -> State:
    """Return what the journal in `root` comes to; no journal is the empty state.

    Raises:
        RefusedError: the journal is no regular file, or too long to be one of ours (exit 77).
        MissingInputError: it cannot be read (exit 66).
    """
    return fold(_read_events(root))


def fold(events: Iterable[Mapping[str, Any] | None]) -> State:
    """Return what the events come to, oldest first; what is not plainly one of ours changes nothing, and is counted.

    Args:
        events: one for each line; None for a line that never said anything.
    """
    arrivals: dict[Key, Arrival] = {}
    removed: set[Key] = set()
    histories: dict[str, list[Key]] = {}
    last_numbers: dict[str, int] = {}
    unread: list[int] = []
    doubtful: set[str] = set()
    for line, event in enumerate(events, 1):
        if event is None:
            continue
        kind, key, alias = event.get("event"), _key(event), _name(event.get("alias"))
        if key is not None:
            last_numbers[key[0]] = max(key[1], last_numbers.get(key[0], 0))
        if key is not None and kind in ("added", "imported"):
            arrivals[key] = _arrival(event)
        elif key is not None and kind == "removed":
            removed.add(key)
        elif alias is not None and kind == "removed":
            histories.pop(alias, None)
            doubtful.discard(alias)
        elif key is not None and alias is not None and kind in ("promoted", "rolled_back"):
            _move(histories.setdefault(alias, []), key, back=kind == "rolled_back")
            doubtful.discard(alias)
        else:
            unread.append(line)
            doubtful.update(histories)
    aliases = {alias: tuple(history) for alias, history in histories.items()}
    return State(arrivals, frozenset(removed), aliases, last_numbers, tuple(unread), frozenset(doubtful))


def append(root: Path, event: Mapping[str, Any]) -> None:
    """Write one event at the journal's end and sync it, or write nothing.

    Raises:
        OSError: it could not be written; the journal is as it was.
        RefusedError: the journal is no regular file (exit 77).
    """
    descriptor = _open_regular(root / FILE_NAME, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    try:
        before = os.fstat(descriptor).st_size
        line = _line_end(descriptor, before) + json.dumps(event, sort_keys=True).encode() + b"\n"
        try:
            if os.write(descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)
    if before == 0:
        _sync_folder(root)


def _line_end(descriptor: int, n_bytes: int) -> bytes:
    """Return what ends the last line, which a crash may have cut off: what follows it begins on a line of its own."""
    start = max(0, n_bytes - _MAX_LINE_BYTES)
    tail = os.pread(descriptor, n_bytes - start, start).rpartition(b"\n")[2]
    if not tail:
        return b""
    # Whole but for its line break, it counts already.
    return b"\n" if _parsed(tail) is not None else _CUT_OFF + b"\n"


def check_appendable(root: Path) -> None:
    """Check that a journal that is there can be appended to; nothing is made or changed.

    Raises:
        OSError: it cannot.
        RefusedError: it is no regular file (exit 77).
    """
    try:
        os.close(_open_regular(root / FILE_NAME, os.O_RDWR | os.O_APPEND))
    except FileNotFoundError:
        return


def journal_bytes(root: Path) -> int:
    """Return the journal's length: as long as it is the same, nothing has happened."""
    try:
        return (root / FILE_NAME).lstat().st_size
    except OSError:
        return 0


def _read_events(root: Path) -> Iterator[dict[str, Any] | None]:
    """Yield what each line says: None for a blank or cut off one, an empty event for one that cannot be read."""
    path = root / FILE_NAME
    try:
        descriptor = _open_regular(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as err:
        raise MissingInputError(f"{path} cannot be read: {err.strerror}", where=str(path)) from err
    with os.fdopen(descriptor, "rb") as stream:
        size = os.fstat(descriptor).st_size
        if size > MAX_JOURNAL_BYTES:
            raise RefusedError(
                f"{path} has {size:,} bytes; a registry's journal has at most {MAX_JOURNAL_BYTES:,}",
                hint="move it away: versions stay, aliases must then be promoted again",
                where=str(path),
            )
        whole = True
        while piece := stream.readline(_MAX_LINE_BYTES):
            begins, whole = whole, piece.endswith(b"\n")
            if begins:
                # A line that is longer than any of ours comes in pieces, and none of them is all of it.
                fits = whole or len(piece) < _MAX_LINE_BYTES
                event = _parsed(piece) if fits else None
                says_nothing = fits and (not whole or not piece.strip() or piece.endswith(_CUT_OFF + b"\n"))
                yield event if event is not None or says_nothing else {}


def _open_regular(path: Path, flags: int) -> int:
    """Return a descriptor of the file itself: never through a link, and never a device or a pipe."""
    try:
        # Without O_NONBLOCK, opening a pipe waits for its other end.
        descriptor = os.open(path, flags | _SAFELY, 0o644)
    except OSError as err:
        if err.errno in (errno.ELOOP, errno.ENXIO):
            raise _not_regular(path) from err
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return descriptor


def _not_regular(path: Path) -> RefusedError:
    return RefusedError(
        f"{path} is not a regular file", hint="move it away, or give another --registry", where=str(path)
    )


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


def _name(value: object) -> str | None:
    return value if isinstance(value, str) and re.fullmatch(NAME_PATTERN, value) else None


def _key(event: Mapping[str, Any]) -> Key | None:
    name, number = _name(event.get("name")), event.get("version")
    if name is None or type(number) is not int or not 1 <= number <= MAX_NUMBER:
        return None
    return name, number


def _arrival(event: Mapping[str, Any]) -> Arrival:
    at, digest, origin = event.get("at"), event.get("digest"), event.get("from")
    dated = isinstance(at, int | float) and not isinstance(at, bool) and 0 <= at <= _LAST_SECOND
    return Arrival(
        float(at) if at is not None and dated else None,
        digest if isinstance(digest, str) and _DIGEST.fullmatch(digest) else None,
        origin if isinstance(origin, str) and len(origin) <= _MAX_PATH_CHARS and not has_control(origin) else None,
    )


def _move(history: list[Key], key: Key, *, back: bool) -> None:
    """Move an alias; the event itself says where it points then, whatever lines were lost."""
    if back and history:
        history.pop()
    if not history or history[-1] != key:
        history.append(key)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
