"""Values of the swap: an adapter version in the engine, what an alias means, and one request's hold on what it resolved."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_tune.adapter.door import AdapterFiles


def version_id(name: str, number: int | None, digest: str) -> str:
    """Return what a version is called: `name@3`, or `name@sha256:…` outside of the registry."""
    return f"{name}@{number}" if number is not None else f"{name}@sha256:{digest[:12]}"


@dataclass(frozen=True)
class Deployed:
    """One adapter version in the engine."""

    name: str
    number: int | None
    """In the registry; None for a folder outside of it."""
    digest: str
    """Content digest: what it is, whatever it is called."""
    files: AdapterFiles
    verdict: str
    """`equal` or `close` by its golden probes through the engine, `unverified` without a passport."""
    loaded_at: float
    """Seconds since 1970."""

    @property
    def id(self) -> str:
        """What requests and answers call this version."""
        return version_id(self.name, self.number, self.digest)

    @property
    def key(self) -> str:
        """What the engine calls it: never another content under the same key."""
        return f"{self.name}--{self.digest[:12]}"


@dataclass(frozen=True)
class Pointer:
    """What an alias, or a bare adapter name, means now."""

    alias: str
    target: tuple[tuple[str, float], ...]
    """Version ids with shares that sum to 1; one entry unless split."""
    shadow: str | None


class Lease:
    """One request's hold on what it resolved, from admission to its last token."""

    def __init__(
        self,
        version: Deployed | None,
        shadow: Deployed | None,
        *,
        model: str,
        fingerprint: str,
        give_back: Callable[[], None],
    ) -> None:
        self.version = version
        """None is the base alone."""
        self.shadow = shadow
        """Run this one too and throw its answer away."""
        self.model = model
        """What the response's `model` says."""
        self.fingerprint = fingerprint
        """What the response's `system_fingerprint` says."""
        self._left: list[Callable[[], None]] = [give_back]

    def release(self) -> None:
        """Give the hold back, once the engine has said Finish; any thread, any number of times."""
        try:
            give_back = self._left.pop()  # one step, so that only one of two threads gets it
        except IndexError:
            return
        give_back()


def chosen(target: Sequence[tuple[str, float]], draw: float) -> str:
    """Return the version that a draw in [0, 1) falls on."""
    for id, share in target:
        draw -= share
        if draw < 0:
            return id
    return target[-1][0]
