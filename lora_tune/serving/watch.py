"""Follows an alias of the registry: whatever it is promoted to there is loaded and pointed to here."""

import logging
import threading
from pathlib import Path

from lora_tune.adapter import journal, registry
from lora_tune.adapter.shelf import Version
from lora_tune.errors import BusyError, LoraTuneError
from lora_tune.serving.swap import Fleet

_LOG = logging.getLogger(__name__)
_STOP_SECONDS = 5.0
"""Longest wait for a look that is loading: its probes alone may take minutes."""


class Watch:
    """One alias, looked at whenever the registry's journal has grown; what fails is logged, and the old version goes on.

    A change that failed is tried again when the journal grows; when there was only no place, at every look.
    """

    def __init__(self, fleet: Fleet, alias: str, *, registry: Path, every_seconds: float = 2.0) -> None:
        self._fleet = fleet
        self._alias = alias
        self._root = registry
        self._every_seconds = every_seconds
        self._seen_bytes = -1
        self._followed: Version | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch-{alias}", daemon=True)
        self.problem = ""
        """Why the alias is not followed at this moment; empty when it is."""

    def start(self) -> None:
        """Begin to look, on a thread of its own."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; returns when the last look is over, or after some seconds: closing the engine ends that one."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)

    def look(self) -> None:
        """Look once; follow the alias if it has moved."""
        n_bytes = journal.journal_bytes(self._root)
        if n_bytes == self._seen_bytes:
            return
        problem, again = "", False
        try:
            self._follow()
        except LoraTuneError as err:
            problem, again = err.message, isinstance(err, BusyError)
        if problem and problem != self.problem:
            _LOG.warning("the alias %s of the registry is not followed: %s", self._alias, problem)
        self.problem = problem
        self._seen_bytes = -1 if again else n_bytes

    def _follow(self) -> None:
        version = registry.find_version(self._alias, root=self._root)
        if version == self._followed:
            return
        deployed = self._fleet.load(version.spec, point=False)
        self._fleet.point(self._alias, target=deployed.id)
        self._followed = version
        _LOG.info("%s now points to %s", self._alias, deployed.id)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.look()
            except Exception:  # noqa: BLE001 - a door: the thread that follows must outlive one failed look
                _LOG.exception("looking at the registry's alias %s failed", self._alias)
            self._stop.wait(self._every_seconds)
