"""The journal of one server: which adapter versions it had loaded, and what its names and aliases meant.

Append-only JSON lines, each synced before what it says takes effect. A line that is cut off, damaged or of a kind not
known here is passed over and counted; fold is the one place that says what an event changes. A long journal is replaced,
in one step, by the fewest lines that come to the same.
"""

import errno
import fcntl
import logging
import os
import stat
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from lora_tune.errors import ConflictError, DrainingError, RefusedError
from lora_tune.recipe.schema import NAME_PATTERN
from lora_tune.staging import translated

MAX_HISTORY = 16
"""Aims that an alias remembers; rolling back further is not possible."""
MAX_SPLIT = 8
"""Versions that share one alias."""
LONG_JOURNAL_BYTES = 1024**2
"""About 3,000 swaps; what is longer is made short again."""
MAX_JOURNAL_BYTES = 256 * 1024**2
"""What is longer is none of ours, and is not read."""
_MAX_LINE_BYTES = 64 * 1024
_LOG = logging.getLogger(__name__)

_Name = Annotated[str, Field(pattern=NAME_PATTERN)]
_Id = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}@([1-9][0-9]{0,8}|sha256:[0-9a-f]{12})$")]
_Share = Annotated[float, Field(gt=0.0, le=1.0)]


class Record(BaseModel):
    """A version as the journal knows it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    id: _Id
    name: _Name
    number: Annotated[int, Field(ge=1, le=999_999_999)] | None
    """In the registry; None for a folder outside of it."""
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    source: Annotated[str, Field(min_length=1, max_length=4096)]
    """Its folder, relative to the registry where it lies inside."""


@dataclass(frozen=True)
class Aim:
    """What an alias points to."""

    target: tuple[tuple[str, float], ...]
    """Version ids with their shares, which sum to 1."""
    shadow: str | None = None

    @property
    def ids(self) -> frozenset[str]:
        """Every version that it needs."""
        return frozenset(id for id, _ in self.target) | ({self.shadow} if self.shadow else set())


@dataclass(frozen=True)
class State:
    """What all events together come to."""

    records: Mapping[str, Record] = field(default_factory=dict)
    """Loaded versions by id."""
    histories: Mapping[str, tuple[Aim, ...]] = field(default_factory=dict)
    """What each name and alias pointed to, oldest first; the last is what it points to. Never empty."""

    def aim(self, alias: str) -> Aim | None:
        """Return what an alias points to; None when there is no such alias."""
        return self.histories[alias][-1] if alias in self.histories else None

    def pointing_to(self, id: str) -> list[str]:
        """Return the aliases that need a version now, sorted."""
        return sorted(alias for alias, history in self.histories.items() if id in history[-1].ids)


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    at: float
    """Seconds since 1970; for people, nothing is decided by it."""


class Loaded(_Event):
    """A version came in, and its bare name points to it when `point`."""

    event: Literal["loaded"] = "loaded"
    version: Record
    point: bool


class _Aimed(_Event):
    alias: _Name
    target: Annotated[tuple[tuple[_Id, _Share], ...], Field(min_length=1, max_length=MAX_SPLIT)]
    shadow: _Id | None = None

    @property
    def aim(self) -> Aim:
        """Where it points from then on."""
        return Aim(self.target, self.shadow)


class Pointed(_Aimed):
    """An alias points elsewhere."""

    event: Literal["pointed"] = "pointed"


class Shadowed(_Aimed):
    """Another version runs beside an alias's target: not a step that is rolled back."""

    event: Literal["shadowed"] = "shadowed"


class RolledBack(_Aimed):
    """An alias points to what it pointed to before."""

    event: Literal["rolled_back"] = "rolled_back"


class Forgotten(_Event):
    """An alias is no more."""

    event: Literal["forgotten"] = "forgotten"
    alias: _Name


class Unloaded(_Event):
    """A version is gone, and with it every aim that needs it."""

    event: Literal["unloaded"] = "unloaded"
    id: _Id


Event = Loaded | Pointed | Shadowed | RolledBack | Forgotten | Unloaded
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])


def fold(state: State, event: Event) -> State:
    """Return the state after one more event."""
    records, histories = dict(state.records), dict(state.histories)
    match event:
        case Loaded():
            records[event.version.id] = event.version
            if event.point:
                name = event.version.name
                histories[name] = _pushed(histories.get(name, ()), Aim(((event.version.id, 1.0),)))
        case Pointed():
            histories[event.alias] = _pushed(histories.get(event.alias, ()), event.aim)
        case Shadowed():
            histories[event.alias] = _pushed(histories.get(event.alias, ())[:-1], event.aim)
        case RolledBack():
            histories[event.alias] = _back_to(event.aim, histories.get(event.alias, ()))
        case Forgotten():
            histories.pop(event.alias, None)
        case Unloaded():
            records.pop(event.id, None)
            histories = {alias: left for alias, history in histories.items() if (left := _without(event.id, history))}
    return State(records, histories)


_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class Journal:
    """The journal's file, held by one server at a time.

    Raises:
        ConflictError: another server holds it (409).
        RefusedError: it is no regular file, or too long to be one of ours (exit 77).
        CannotCreateError, CannotWriteError: it cannot be made or opened (exit 73, 74).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._long_bytes = LONG_JOURNAL_BYTES
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._hold(self._opened())
            _sync_folder(path.parent)
        except OSError as err:
            if err.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise _not_regular(path) from err
            raise translated(err, path) from err

    def _hold(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.close = weakref.finalize(self, os.close, descriptor)
        """Let go of the file; another server may then hold it."""

    def _opened(self) -> int:
        while True:
            # Never through a link; without O_NONBLOCK, opening a pipe waits for its other end.
            descriptor = os.open(self.path, _FLAGS | os.O_NONBLOCK, 0o644)
            try:
                self._check_ours(descriptor)
                held, named = os.fstat(descriptor), self.path.stat()
            except BaseException:
                os.close(descriptor)
                raise
            if (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino):
                return descriptor
            os.close(descriptor)  # the server that held it has just put a shorter one in its place

    def _check_ours(self, descriptor: int) -> None:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise _not_regular(self.path)
        if facts.st_size > MAX_JOURNAL_BYTES:
            raise RefusedError(
                f"{self.path} has {facts.st_size:,} bytes; a server's state has at most {MAX_JOURNAL_BYTES:,}",
                hint="move it away, then load the adapters again",
                where=str(self.path),
            )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise ConflictError(
                f"another server keeps its state in {self.path}",
                hint="stop it, or give this server a state file of its own",
                where=str(self.path),
            ) from err

    def read(self) -> tuple[State, int]:
        """Return what its events come to, and how many lines were passed over."""
        return folded(_lines(self._descriptor))

    def shorten(self, *, at: float) -> None:
        """Put the fewest lines that come to the same in the place of a long journal; a crash leaves the one or the other.

        What could not be read stays beside it. Where it cannot be done, the journal goes on as it is.
        """
        size = os.fstat(self._descriptor).st_size
        if size <= self._long_bytes:
            return
        state, n_passed_over = self.read()
        lines = b"".join(event.model_dump_json().encode() + b"\n" for event in _fewest(state, at))
        assert folded(lines.splitlines()) == (state, 0), "a shorter journal says the same"
        self._long_bytes = max(LONG_JOURNAL_BYTES, 4 * len(lines))
        if 2 * len(lines) > size:
            return
        try:
            self._replace(lines, keep_old=n_passed_over > 0)
        except OSError as err:
            _LOG.warning("%s could not be made shorter: %s", self.path, err.strerror)

    def _replace(self, lines: bytes, *, keep_old: bool) -> None:
        stage = self.path.with_name(f".{self.path.name}.shorter")
        descriptor = os.open(stage, _FLAGS | os.O_TRUNC, 0o644)
        try:
            # Locked before it has the name: nobody else may ever hold it.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.write(descriptor, lines) != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
            if keep_old:
                old = self.path.with_name(f"{self.path.name}.damaged")
                old.unlink(missing_ok=True)
                os.link(self.path, old)
            stage.replace(self.path)
        except OSError:
            os.close(descriptor)
            with suppress(OSError):
                stage.unlink()
            raise
        self.close()
        self._hold(descriptor)
        _sync_folder(self.path.parent)

    def append(self, event: Event) -> None:
        """Write one event at the end and sync it, or write nothing.

        Raises:
            CannotWriteError: it could not be written; the journal is as it was (exit 74).
            DrainingError: the journal is closed (503).
        """
        if not self.close.alive:  # by now its descriptor may be another file's
            raise DrainingError("the server is shutting down", hint="ask another one, or this one once it is back")
        self.shorten(at=event.at)
        before = os.fstat(self._descriptor).st_size
        # A crash may have cut the last line off; what follows it begins on a line of its own.
        torn = before > 0 and os.pread(self._descriptor, 1, before - 1) != b"\n"
        line = (b"\n" if torn else b"") + event.model_dump_json().encode() + b"\n"
        try:
            try:
                if os.write(self._descriptor, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._descriptor)
            except OSError:
                os.ftruncate(self._descriptor, before)
                raise
        except OSError as err:
            raise translated(err, self.path) from err


def folded(lines: Iterable[bytes]) -> tuple[State, int]:
    """Return what the lines come to, and how many were passed over."""
    state, n_passed_over = State(), 0
    for line in lines:
        try:
            event = _EVENT.validate_json(line, strict=True)
        except ValidationError:
            n_passed_over += bool(line.strip())
            continue
        state = fold(state, event)
    return state, n_passed_over


def _lines(descriptor: int) -> Iterator[bytes]:
    """Yield the lines of a file; one that is longer than any of ours is yielded in part."""
    with os.fdopen(os.dup(descriptor), "rb") as stream:
        stream.seek(0)
        while line := stream.readline(_MAX_LINE_BYTES):
            yield line.rstrip(b"\n")
            while len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = stream.readline(_MAX_LINE_BYTES)


def _fewest(state: State, at: float) -> Iterator[Event]:
    """Yield events that come to a state."""
    for version in state.records.values():
        yield Loaded(at=at, version=version, point=False)
    for alias, history in state.histories.items():
        for aim in history:
            yield Pointed(at=at, alias=alias, target=aim.target, shadow=aim.shadow)


def _pushed(history: tuple[Aim, ...], aim: Aim) -> tuple[Aim, ...]:
    return history if history[-1:] == (aim,) else (*history, aim)[-MAX_HISTORY:]


def _back_to(aim: Aim, history: tuple[Aim, ...]) -> tuple[Aim, ...]:
    """Return the history up to an aim before the last; the event says where it points, whatever lines were lost."""
    earlier = history[:-1]
    while earlier and earlier[-1] != aim:
        earlier = earlier[:-1]
    return earlier or (aim,)


def _without(id: str, history: tuple[Aim, ...]) -> tuple[Aim, ...]:
    left: tuple[Aim, ...] = ()
    for aim in history:
        if all(id != other for other, _ in aim.target):
            left = _pushed(left, replace(aim, shadow=None) if aim.shadow == id else aim)
    return left


def _not_regular(path: Path) -> RefusedError:
    return RefusedError(f"{path} is not a regular file", hint="move it away", where=str(path))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
