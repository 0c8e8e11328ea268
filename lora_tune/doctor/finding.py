"""What one check of the installed stack found."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["ok", "failed", "warning", "skipped", "info"]

REINSTALL = (
    "install lora_tune into a fresh environment, which takes the tested versions; if it still fails, report it with the "
    "output of `lora-tune doctor --json`"
)
"""What to do where the numbers of an installed library are wrong."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    name: str
    verdict: Verdict
    """`failed` alone makes the doctor fail; `info` only tells."""
    detail: str
    """What was compared and what was found, in words."""
    measured: float | None = None
    """The figure that decides, in the unit that `detail` names; None where nothing is measured."""
    bound: float | None = None
    """The largest figure that is let through."""
    hint: str = ""
    """One action that helps; empty where none is needed."""

    def as_dict(self) -> dict[str, Any]:
        """The finding as `--json` prints it."""
        return asdict(self)


def bounded(name: str, measured: float, bound: float, detail: str, *, hint: str = REINSTALL) -> Finding:
    """Return the finding of a figure that must not exceed its bound; a figure that is no number exceeds it."""
    good = measured <= bound
    return Finding(name, "ok" if good else "failed", detail, measured, bound, "" if good else hint)
