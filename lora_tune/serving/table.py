"""The table that requests look things up in: loaded versions, what names mean, and how many use what.

Its lock is only ever held for a few assignments. Whoever changes what names mean (swap.py) holds a lock of its own around
look, journal and `assign`, so that what was looked up is still so when it is assigned.
"""

import difflib
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping

from lora_tune.errors import ConflictError, DrainingError, MissingInputError
from lora_tune.serving.deployed import Deployed, Lease, Pointer, chosen
from lora_tune.serving.engine import ServedBase
from lora_tune.serving.state import Aim, State

_BY_DIGEST = re.compile(r"(?P<name>[a-z0-9][a-z0-9-]{0,62})@sha256:(?P<digest>[0-9a-f]{8,64})")


class Table:
    """What is loaded, meant and used at this moment; any thread."""

    def __init__(self, base: ServedBase) -> None:
        self.base = base
        self._lock = threading.Condition()
        self._state = State()
        self._deployed: dict[str, Deployed] = {}
        self._leaving: set[str] = set()
        self._uses: Counter[str] = Counter()
        self._last_use: dict[str, int] = {}
        self._n_steps = 0
        self._n_swaps = 0
        self._draining = False

    @property
    def state(self) -> State:
        """What is loaded and meant, as the journal would say it."""
        return self._state

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken any more."""
        return self._draining

    @property
    def n_swaps(self) -> int:
        """How often a name or alias came to mean something else."""
        return self._n_swaps

    def versions(self) -> list[Deployed]:
        """Return what is loaded, by id."""
        with self._lock:
            return [self._deployed[id] for id in sorted(self._deployed)]

    def pointers(self) -> dict[str, Pointer]:
        """Return what every name and alias means, by alias."""
        histories = self._state.histories
        return {
            alias: Pointer(alias, histories[alias][-1].target, histories[alias][-1].shadow)
            for alias in sorted(histories)
        }

    def names(self) -> list[str]:
        """Return everything that `lease` takes: the base's name, then names and aliases, then version ids."""
        with self._lock:
            return [self.base.name, *sorted(self._state.histories), *sorted(self._deployed)]

    def in_flight(self) -> dict[str, int]:
        """Return how many requests use each loaded version, and the base under its name."""
        with self._lock:
            return {id: self._uses[id] for id in (self.base.name, *sorted(self._deployed))}

    def lease(self, model: str, draw: float) -> Lease:
        """Return a hold on what `model` means.

        Raises:
            MissingInputError: nothing is called that (404).
            DrainingError: nothing new is taken (503).
        """
        with self._lock:
            if self._draining:
                raise DrainingError("the server is shutting down", hint="ask another one, or this one once it is back")
            version, shadow = (None, None) if model == self.base.name else self._meant(model, draw)
            held = [version.id if version else self.base.name, *([shadow.id] if shadow else [])]
            self._n_steps += 1
            for id in held:
                self._uses[id] += 1
                self._last_use[id] = self._n_steps
        fingerprint = f"base-{self.base.weights_digest[:12]}" + (f"+{version.digest[:12]}" if version else "")
        return Lease(version, shadow, model=held[0], fingerprint=fingerprint, give_back=lambda: self._give_back(held))

    def named(self, id: str) -> Deployed:
        """Return the loaded version that an id, or a name that means one version, stands for.

        Raises:
            MissingInputError: it is not loaded (404).
            ConflictError: it is being unloaded, or the name means several versions (409).
        """
        with self._lock:
            aim = self._state.aim(id)
            if aim is not None and len(aim.target) > 1:
                raise ConflictError(
                    f"{id} is split between {shown(aim)}", hint="say which version is meant, as NAME@VERSION"
                )
            version = self._deployed[aim.target[0][0]] if aim is not None else self._by_id(id)
            if version is None:
                raise self._unknown(id)
            if version.id in self._leaving:
                raise being_unloaded(version.id)
            return version

    def resident(self, id: str, digest: str) -> Deployed | None:
        """Return the loaded version of that id; None when there is none.

        Raises:
            ConflictError: it is being unloaded, or has another content (409).
        """
        with self._lock:
            version = self._deployed.get(id)
            if version is None:
                return None
            if id in self._leaving:
                raise being_unloaded(id)
            if version.digest != digest:
                raise ConflictError(
                    f"{id} is loaded as sha256:{version.digest[:12]}…, but is sha256:{digest[:12]}… on disk",
                    hint=f"unload {id} first, or add it to the registry as a new version",
                )
            return version

    def holder(self, key: str) -> Deployed | None:
        """Return a loaded version that the engine holds under this key; None when there is none."""
        with self._lock:
            return next((version for version in self._deployed.values() if version.key == key), None)

    def shares_key(self, version: Deployed) -> bool:
        """Return whether another id stands for the same adapter in the engine."""
        with self._lock:
            return self._shares_key(version)

    def history(self, alias: str) -> tuple[Aim, ...]:
        """Return what an alias has pointed to, oldest first, the last is now.

        Raises:
            MissingInputError: there is no such alias (404).
        """
        with self._lock:
            if alias not in self._state.histories:
                raise self._unknown(alias)
            return self._state.histories[alias]

    def check_aim(self, aim: Aim) -> None:
        """Check that nothing that is being unloaded would be needed; raises ConflictError (409)."""
        with self._lock:
            for id in sorted(aim.ids & self._leaving):
                raise being_unloaded(id)

    def check_name(self, name: str) -> None:
        """Check that an adapter may be called that.

        Raises:
            ConflictError: it is the base's name, or an alias of other adapters' versions (409).
        """
        aim = self._state.aim(name)
        if name == self.base.name:
            raise ConflictError(f"{name} is the base's name", hint="load the adapter under another name")
        if aim is not None and any(_name_of(id) != name for id, _ in aim.target):
            raise ConflictError(
                f"{name} is an alias of {shown(aim)}", hint="load the adapter under another name, or remove the alias"
            )

    def check_alias(self, alias: str, ids: Iterable[str]) -> None:
        """Check that an alias may point to these versions.

        Raises:
            ConflictError: it is the base's name, or the name of an adapter whose versions they are not (409).
        """
        if alias == self.base.name:
            raise ConflictError(f"{alias} is the base's name", hint="choose another alias")
        with self._lock:
            is_adapter = any(version.name == alias for version in self._deployed.values())
        strangers = [id for id in ids if _name_of(id) != alias]
        if is_adapter and strangers:
            raise ConflictError(
                f"{alias} is an adapter's name; it cannot point to {strangers[0]}", hint="choose another alias"
            )

    def assign(self, state: State, *, arrived: Iterable[Deployed] = (), gone: str | None = None) -> None:
        """Make this what everybody sees from now on, in one step."""
        with self._lock:
            for version in arrived:
                self._deployed[version.id] = version
                self._n_steps += 1
                self._last_use[version.id] = self._n_steps
            if gone is not None:
                self._deployed.pop(gone, None)
                self._last_use.pop(gone, None)
                self._uses.pop(gone, None)
                self._leaving.discard(gone)
            before, self._state = self._state, state
            self._n_swaps += _n_moved(before, state)

    def leave(self, ids: Iterable[str], *, ignoring: str = "") -> list[Deployed]:
        """Give these versions to no new request: they are about to be unloaded. All of them, or none.

        Args:
            ids: loaded versions.
            ignoring: an alias that goes with them.

        Raises:
            MissingInputError: one is not loaded (404).
            ConflictError: an alias points to one, or it is being unloaded already (409).
        """
        with self._lock:
            versions = []
            for id in ids:
                if id not in self._deployed:
                    raise self._unknown(id)
                pointing = [alias for alias in self._state.pointing_to(id) if alias != ignoring]
                if pointing:
                    raise ConflictError(
                        f"{', '.join(pointing)} {'points' if len(pointing) == 1 else 'point'} to {id}",
                        hint=f"point {pointing[0]} elsewhere first"
                        + (f", or unload {pointing[0]} as a whole" if pointing[0] == _name_of(id) else ""),
                    )
                if id in self._leaving:
                    raise being_unloaded(id)
                versions.append(self._deployed[id])
            self._leaving |= {version.id for version in versions}
            return versions

    def is_leaving(self, alias: str) -> bool:
        """Return whether all that an alias points to is about to be unloaded, or not loaded."""
        with self._lock:
            aim = self._state.aim(alias)
            return aim is not None and all(id in self._leaving or id not in self._deployed for id, _ in aim.target)

    def leave_idle(self, version: Deployed) -> bool:
        """Give a version that is neither used nor pointed to to no new request; return whether it is so."""
        with self._lock:
            idle = version in self._idle()
            if idle:
                self._leaving.add(version.id)
            return idle

    def idle(self) -> list[Deployed]:
        """Return what nobody uses and no alias points to, the longest unused first."""
        with self._lock:
            return self._idle()

    def stay(self, versions: Iterable[Deployed]) -> None:
        """Take `leave` back for those that are still here."""
        with self._lock:
            self._leaving -= {version.id for version in versions}

    def wait_unused(self, version: Deployed, until: float) -> bool:
        """Wait until no request uses a version, at most to that monotonic time; return whether it is so."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._uses[version.id], max(0.0, until - time.monotonic()))

    def drain(self, timeout: float) -> bool:
        """Take nothing new, and wait for what is being answered; return whether all of it was."""
        with self._lock:
            self._draining = True
            return self._lock.wait_for(lambda: not any(self._uses.values()), timeout)

    def _meant(self, model: str, draw: float) -> tuple[Deployed, Deployed | None]:
        aim = self._state.aim(model)
        if aim is None:
            version = self._by_id(model)
            if version is None or version.id in self._leaving:
                raise self._unknown(model)
            return version, None
        id = chosen(aim.target, draw)
        if id in self._leaving:  # the name goes with all its versions
            raise self._unknown(model)
        shadow = self._deployed[aim.shadow] if aim.shadow not in (None, id) else None
        return self._deployed[id], shadow

    def _by_id(self, id: str) -> Deployed | None:
        match = _BY_DIGEST.fullmatch(id)
        if id in self._deployed or match is None:
            return self._deployed.get(id)
        fitting = [
            version
            for _, version in sorted(self._deployed.items())
            if version.name == match["name"] and version.digest.startswith(match["digest"])
        ]
        # One content under two numbers is one adapter; two contents that begin alike are none that was named.
        return fitting[0] if len({version.digest for version in fitting}) == 1 else None

    def _idle(self) -> list[Deployed]:
        needed = {id for history in self._state.histories.values() for id in history[-1].ids}
        idle = [
            version
            for id, version in self._deployed.items()
            if id not in needed and id not in self._leaving and not self._uses[id] and not self._shares_key(version)
        ]
        return sorted(idle, key=lambda version: self._last_use[version.id])

    def _shares_key(self, version: Deployed) -> bool:
        return any(other.key == version.key and other.id != version.id for other in self._deployed.values())

    def _give_back(self, held: Iterable[str]) -> None:
        with self._lock:
            for id in held:
                self._uses[id] -= 1
            self._lock.notify_all()

    def _unknown(self, model: str) -> MissingInputError:
        names = [self.base.name, *sorted(self._state.histories), *sorted(self._deployed)]
        close = difflib.get_close_matches(model[:200], names, n=3)
        listed = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(names[:10])}"
        return MissingInputError(
            f"no model {model[:100]!a} is loaded; {listed}", hint="GET /v1/models lists what is; an operator loads more"
        )


def shown(aim: Aim) -> str:
    """Return an aim as a message says it."""
    parts = [id if share == 1.0 else f"{id} ({share:.4g})" for id, share in aim.target]
    return " and ".join(parts) + (f" with {aim.shadow} in its shadow" if aim.shadow else "")


def being_unloaded(id: str) -> ConflictError:
    """Return what is said of a version that is about to go."""
    return ConflictError(f"{id} is being unloaded", hint="try again in a moment")


def _name_of(id: str) -> str:
    return id.partition("@")[0]


def _n_moved(before: State, after: State) -> int:
    aims: Mapping[str, Aim | None] = {alias: before.aim(alias) for alias in after.histories}
    return sum(aim is not None and aim.target != after.histories[alias][-1].target for alias, aim in aims.items())
