"""Signals that ask a run to stop: the first is answered where nothing is lost, the second at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from lora_tune.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """While entered, SIGINT, SIGTERM and SIGHUP stop the block: at once, or where `deferred` says, later.

    The first signal puts the handlers back that were there before, so that a second one acts as if we were not here.

    Args:
        command: what the user runs to go on.
        on_signal: called with the signal's name when it has to wait.
    """

    def __init__(self, command: str, on_signal: Callable[[str], None] = lambda name: None) -> None:
        self.command = command
        self.requested: str | None = None
        """The signal's name, once it came."""
        self.when = "before the first step; there is nothing to keep"
        """What was done when a signal stops the block at once, after "stopped by SIGTERM"."""
        self._on_signal = on_signal
        self._before: dict[signal.Signals, Any] = {}
        self._deferred = 0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # What is ignored stays ignored: under nohup a closed terminal ends nothing.
            listening = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in listening}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put_back()
        if isinstance(err, _Stop):
            raise self.stopped(self.when) from None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold a signal back while the block runs: whoever is in it looks at `requested` where it can stop."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    def check(self) -> None:
        """Stop here if a signal came while it was held back."""
        if self.requested is not None:
            raise _Stop

    def stopped(self, when: str) -> StoppedError:
        """Return the error that ends the run, with the command that goes on.

        Args:
            when: after "stopped by SIGTERM".
        """
        return StoppedError(f"stopped by {self.requested} {when}", hint=f"go on with: {self.command}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._put_back()
        self.requested = signal.Signals(number).name
        if not self._deferred:
            raise _Stop
        self._on_signal(self.requested)

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class _Stop(BaseException):
    """Not an Exception: no library may take it for a failure of its own and go on."""
