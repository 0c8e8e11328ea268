"""The fleet: brings adapter versions into the engine, says what names and aliases mean, and takes versions out again.

A load is RESOLVE → VERIFY → STAGE → PROBE → COMMIT; before COMMIT (one synced journal line, then one assignment) a failure
changes nothing. A request resolves its model once and keeps that version to its last token.
"""

import math
import re
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from lora_tune.errors import BusyError, ConflictError, DrainingError, LoraTuneError, RequestError
from lora_tune.recipe.schema import NAME_PATTERN
from lora_tune.serving import sources
from lora_tune.serving.deployed import Deployed, Lease, Pointer
from lora_tune.serving.engine import Engine, ServedBase
from lora_tune.serving.places import Places
from lora_tune.serving.sources import Found
from lora_tune.serving.state import (
    MAX_HISTORY,
    MAX_SPLIT,
    Aim,
    Event,
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
)
from lora_tune.serving.table import Table, shown

__all__ = ["Deployed", "Fleet", "Lease", "Pointer"]

_SHARES_HINT = f"1 to {MAX_SPLIT} versions, each with a share above 0, that sum to 1"


class Fleet:
    """One engine's adapters. Every method may be called from any thread; `lease` and looks never wait for the others.

    Raises:
        ConflictError: another server keeps its state in this file (409).
        RefusedError, CannotCreateError, CannotWriteError: the state file cannot be used (exit 77, 73, 74).
    """

    def __init__(self, engine: Engine, base: ServedBase, *, registry: Path, state: Path) -> None:
        self.engine = engine
        self.base = base
        self.registry = registry
        self._table = Table(base)
        self._places = Places(engine, base, self._table)
        self._journal = Journal(state)
        self._recorded, self._n_passed_over = self._journal.read()
        self._journal.shorten(at=time.time())
        self._restored = self._recorded == State()
        # Taken in this order: a name's lock while a version of it is brought in or taken out, then `_changing` while
        # a change of the table is checked, journalled and assigned. Requests take neither.
        self._name_locks: dict[str, threading.RLock] = {}
        self._changing = threading.Lock()
        self._lost: dict[str, Record] = {}

    def restore(self) -> list[str]:
        """Load again what the state file says; return in words what could not be, and what is served in its place.

        Nothing is journalled: what could not be loaded this time is tried again at the next start, until it is unloaded.

        Raises:
            DrainingError: the server is shutting down (503).
        """
        words = [f"{self._n_passed_over} damaged lines of {self._journal.path} were passed over"] * bool(
            self._n_passed_over
        )
        if self._restored:
            return words
        state, arrived = self._recorded, []
        for record in _by_need(state):
            self._check_not_draining()
            try:
                with self._name_lock(record.name):
                    arrived.append(self._places.bring_in(sources.recall(record, root=self.registry), make_room=None))
                    # Seen at once by a version with the same content, which shares its place in the engine.
                    self._table.assign(State(), arrived=arrived[-1:])
            except LoraTuneError as err:
                words.append(f"{record.id} was not loaded again: {err.message}")
                self._lost[record.id] = record
        known = {version.id for version in arrived}
        for id in {
            *state.records,
            *(id for history in state.histories.values() for aim in history for id in aim.ids),
        } - known:
            state = fold(state, Unloaded(at=time.time(), id=id))
        for alias, history in sorted(self._recorded.histories.items()):
            aim = state.aim(alias)
            if aim != history[-1]:
                now = f"now points to {shown(aim)}" if aim else "is gone"
                words.append(f"{alias} pointed to {shown(history[-1])}; it {now}")
        self._table.assign(state)
        self._restored = True
        return words

    def lease(self, model: str, *, draw: float) -> Lease:
        """Return a hold on what `model` means now, for one request.

        Args:
            model: the base's name, an adapter's name or alias, `name@3` or `name@sha256:…`.
            draw: in [0, 1); decides which version of a split answers.

        Raises:
            MissingInputError: nothing is called that; close names are given, and the base never stands in (404).
            BusyError: it was loaded before the server started again, and may be soon (429).
            DrainingError: the server is shutting down (503).
        """
        if (
            not self._restored
            and model != self.base.name
            and model in {*self._recorded.histories, *self._recorded.records}
        ):
            raise _restoring()
        return self._table.lease(model, draw)

    def load(self, spec: str, *, name: str | None = None, point: bool = True, allow_outside: bool = False) -> Deployed:
        """Bring a version in, proved by its probes, and point its bare name to it; one that is loaded already is kept.

        Args:
            spec: what the registry calls it, or a folder inside the registry.
            name: another name to serve it under.
            point: whether the bare name means this version from now on.
            allow_outside: any folder may be named; for the operator's own command line.

        Raises:
            RequestError: spec or name cannot be meant (400).
            MissingInputError: there is no such adapter (404).
            ConflictError: the name is the base's or an alias's, or the version is being unloaded (409).
            RefusedError: it is no adapter, does not belong to this base, or answers otherwise than its passport says (412).
            UnsupportedError: this engine cannot hold such an adapter (422).
            BusyError: every place is taken by what cannot be retired, or the server is being restored (429).
            DrainingError: the server is shutting down (503).
            CannotWriteError: the state file cannot be written; nothing was changed (507).
        """
        self._check_open()
        found = sources.find(spec, root=self.registry, name=name, allow_outside=allow_outside)
        with self._name_lock(found.name):
            self._table.check_name(found.name)
            if self._table.resident(found.id, found.digest) is None:
                return self._committed(found, self._places.bring_in(found, make_room=self._retired_one), point=point)
            with self._changing:
                self._check_open()
                version = self._table.resident(found.id, found.digest)
                assert version is not None, "it is taken out under its name's lock only"
                if point and self._table.state.aim(found.name) != Aim(((found.id, 1.0),)):
                    self._commit(Loaded(at=time.time(), version=found.record, point=True))
            return version

    def point(
        self,
        alias: str,
        *,
        target: str | None = None,
        split: Mapping[str, float] | None = None,
        shadow: str | None = None,
    ) -> Pointer:
        """Point an alias to a loaded version, or split it between several; or only run another version beside it.

        Args:
            alias: a name; one that an adapter bears can only point to that adapter's versions.
            target: what all its requests get.
            split: version → share of its requests.
            shadow: a version that runs beside, its answers thrown away; "" ends that. Alone it leaves the target as it is;
                a new target begins without one.

        Raises:
            RequestError: the alias is no name, or not exactly one of target and split says where it points (400).
            MissingInputError: a version is not loaded (404).
            ConflictError: the alias is the base's name or an adapter's, or a version is being unloaded (409).
            BusyError, DrainingError, CannotWriteError: as `load`.
        """
        if not re.fullmatch(NAME_PATTERN, alias):
            raise RequestError(f"{alias[:100]!a} is no name for an alias", hint=sources.NAME_HINT)
        if (target is not None and split is not None) or (target is None and split is None and shadow is None):
            raise RequestError(
                "exactly one of target and split says where an alias points", hint="or give a shadow alone"
            )
        shares = _checked(split) if split is not None else {target: 1.0} if target is not None else None
        with self._changing:
            self._check_open()
            beside = self._table.named(shadow).id if shadow else None
            if shares is None:
                aimed = self._table.history(alias)[-1].target
            else:
                aimed = tuple((self._table.named(id).id, share) for id, share in shares.items())
            if len({id for id, _ in aimed}) < len(aimed):
                raise RequestError("a split names one version twice", hint=_SHARES_HINT)
            self._table.check_alias(alias, [id for id, _ in aimed])
            kind = Shadowed if shares is None else Pointed
            self._commit(kind(at=time.time(), alias=alias, target=aimed, shadow=beside))
            return self._table.pointers()[alias]

    def rollback(self, alias: str) -> Pointer:
        """Point an alias to what it pointed to before.

        Raises:
            MissingInputError: there is no such alias (404).
            ConflictError: there is nothing before that is still loaded, or it is being unloaded (409).
            BusyError, DrainingError, CannotWriteError: as `load`.
        """
        with self._changing:
            self._check_open()
            history = self._table.history(alias)
            if len(history) < 2:
                raise ConflictError(
                    f"nothing that {alias} pointed to before {shown(history[-1])} is still loaded",
                    hint="load the version that is wanted, then point to it",
                )
            aim = history[-2]
            self._table.check_aim(aim)
            self._commit(RolledBack(at=time.time(), alias=alias, target=aim.target, shadow=aim.shadow))
            return self._table.pointers()[alias]

    def forget(self, alias: str) -> None:
        """Take a name or alias away; the versions that it pointed to stay loaded.

        Raises:
            MissingInputError: there is no such alias (404).
            BusyError, DrainingError, CannotWriteError: as `load`.
        """
        with self._changing:
            self._check_open()
            self._table.history(alias)
            self._commit(Forgotten(at=time.time(), alias=alias))

    def unload(self, id: str, *, timeout: float = 60.0) -> None:
        """Free a version once nobody uses it; a bare adapter name stands for all its versions and the name itself.

        Raises:
            MissingInputError: it is not loaded (404).
            ConflictError: an alias points to it, or requests still use it after `timeout` seconds: it then stays (409).
            BusyError, DrainingError: as `load`.
            CannotWriteError: it is free, but comes back when the server starts again (507).
        """
        until = time.monotonic() + timeout
        with self._changing:
            self._check_open()
            lost = [record.id for record in self._lost.values() if id in (record.id, record.name)]
            ids = [version.id for version in self._table.versions() if id in (version.id, version.name)]
            if not ids and id in self._table.state.histories:
                raise ConflictError(f"{id} is an alias, not an adapter", hint="unload the version that it points to")
            leaving = self._table.leave(ids if ids or lost else [id], ignoring="" if "@" in id else id)
        try:
            for version in leaving:
                self._check_unused(version, until)
            with self._changing:
                self._strike_out(lost, name=id)
            while leaving:
                with self._name_lock(leaving[0].name):
                    self._free(leaving[0])
                leaving.pop(0)
        finally:
            self._table.stay(leaving)

    def versions(self) -> list[Deployed]:
        """Return what is loaded, by id."""
        return self._table.versions()

    def pointers(self) -> dict[str, Pointer]:
        """Return what every name and alias means, by alias."""
        return self._table.pointers()

    def names(self) -> list[str]:
        """Return everything that `lease` takes: the base's name, then names and aliases, then version ids."""
        return self._table.names()

    def in_flight(self) -> dict[str, int]:
        """Return how many requests use each loaded version, and the base under its name."""
        return self._table.in_flight()

    def swaps(self) -> int:
        """Return how often a name or alias has come to mean something else since the server began."""
        return self._table.n_swaps

    def ready(self) -> bool:
        """Return whether what the state file says was restored, new requests are taken, and the engine answers."""
        return self._restored and not self._table.draining and self.engine.can_answer()

    def drain(self, timeout: float) -> None:
        """Take nothing new, and wait at most `timeout` seconds for what is being answered."""
        self._table.drain(timeout)

    def close(self) -> None:
        """Let go of the state file; the engine is its opener's to close."""
        with self._changing:
            self._journal.close()

    def _check_open(self) -> None:
        self._check_not_draining()
        if not self._restored:
            raise _restoring()

    def _check_not_draining(self) -> None:
        if self._table.draining:
            raise DrainingError("the server is shutting down", hint="ask another one, or this one once it is back")

    def _name_lock(self, name: str) -> threading.RLock:
        return self._name_locks.setdefault(name, threading.RLock())

    def _commit(self, event: Event, *, arrived: Deployed | None = None) -> None:
        """Journal, then assign; `_changing` is held."""
        state = fold(self._table.state, event)
        self._journal.append(event)
        self._table.assign(state, arrived=[arrived] if arrived else [])

    def _committed(self, found: Found, version: Deployed, *, point: bool) -> Deployed:
        try:
            with self._changing:
                self._check_open()
                self._table.check_name(found.name)
                self._commit(Loaded(at=time.time(), version=found.record, point=point), arrived=version)
                self._lost.pop(version.id, None)
        except BaseException:
            self._places.drop(version)
            raise
        return version

    def _check_unused(self, version: Deployed, until: float) -> None:
        if not self._table.wait_unused(version, until):
            raise ConflictError(
                f"{self.in_flight()[version.id]} requests still use {version.id}; it stays loaded",
                hint="try again later, or wait longer",
            )

    def _strike_out(self, lost: Iterable[str], *, name: str) -> None:
        """Forget versions that could not be restored, and a name whose versions are all about to go; `_changing` is held."""
        for id in lost:
            if id in self._lost:
                self._journal.append(Unloaded(at=time.time(), id=id))
                del self._lost[id]
        # Unless it was pointed to a newer version meanwhile.
        if name in self._table.state.histories and self._table.is_leaving(name):
            self._commit(Forgotten(at=time.time(), alias=name))

    def _retired_one(self) -> bool:
        """Free the longest unused version that no request uses and no alias points to; return whether there was one."""
        for version in self._table.idle():
            lock = self._name_lock(version.name)
            # Another load may hold that name and wait for ours: never wait for it here.
            if not lock.acquire(blocking=False):
                continue
            try:
                with self._changing:
                    leaving = self._table.leave_idle(version)
                if leaving:
                    try:
                        self._free(version)
                    finally:
                        self._table.stay([version])
                    return True
            finally:
                lock.release()
        return False

    def _free(self, version: Deployed) -> None:
        """Take an unused version out; its name's lock is held, and nothing points to it nor can begin to."""
        if not self._table.shares_key(version):
            self._places.let_go(version)
        with self._changing:
            event = Unloaded(at=time.time(), id=version.id)
            self._table.assign(fold(self._table.state, event), gone=version.id)
            self._journal.append(event)


def _by_need(state: State) -> list[Record]:
    """Return the versions to restore: those that an alias points to first, then those that it pointed to last."""
    steps_back: dict[str, int] = {}
    for history in state.histories.values():
        for step, aim in enumerate(reversed(history)):
            for id in aim.ids:
                steps_back[id] = min(step, steps_back.get(id, step))
    return sorted(state.records.values(), key=lambda record: steps_back.get(record.id, MAX_HISTORY))


def _checked(split: Mapping[str, float]) -> dict[str, float]:
    shares = {id: float(share) for id, share in split.items()}
    total = math.fsum(shares.values())
    if not 1 <= len(shares) <= MAX_SPLIT or not all(0 < share <= 1 for share in shares.values()):
        raise RequestError(f"a split of {len(shares)} shares", hint=_SHARES_HINT)
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        raise RequestError(f"the shares of a split sum to {total:.6g}", hint=_SHARES_HINT)
    return {id: share / total for id, share in shares.items()}


def _restoring() -> BusyError:
    return BusyError(
        "what was loaded before the server started again is being loaded", hint="wait until GET /ready says so"
    )
