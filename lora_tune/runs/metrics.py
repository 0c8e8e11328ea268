"""metrics.jsonl → steps and held-out measurements, each step once: what a resumed run did again replaces what it did before."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from lora_tune.runs.reading import MAX_METRICS_BYTES, json_values, read_end
from lora_tune.runs.written import HeldOutLine, StepLine


@dataclass(frozen=True)
class Metrics:
    """What a run measured while it trained, in the order of the steps."""

    steps: tuple[StepLine, ...] = ()
    held_out: tuple[HeldOutLine, ...] = ()
    warnings: tuple[str, ...] = ()
    """What the run warned of."""
    n_unread_lines: int = 0
    """Lines that say nothing we can read; a killed run leaves half a line."""
    n_repeated_steps: int = 0
    """Steps that were done again after a resume."""
    is_whole: bool = True
    """False when only the end of the file was read."""


def read_metrics(path: Path, *, cap_bytes: int = MAX_METRICS_BYTES) -> Metrics:
    """Return what the file's last `cap_bytes` say; nothing when there is none.

    Raises:
        UnreadableError: it is no regular file, or cannot be read.
    """
    found = read_end(path, cap_bytes=cap_bytes)
    if found is None:
        return Metrics()
    content, is_whole = found
    lines = content.split(b"\n")
    return _sorted_out(lines if is_whole else lines[1:], is_whole=is_whole)


def _sorted_out(lines: Iterable[bytes], *, is_whole: bool) -> Metrics:
    steps: dict[int, StepLine] = {}
    held_out: dict[int, HeldOutLine] = {}
    warnings: dict[str, None] = {}
    n_unread = n_repeated = 0
    for line in lines:
        if not line.strip():
            continue
        try:
            values = json_values(line.decode("utf-8"))
            event = values["event"]
            if event == "step":
                step = StepLine.model_validate(values)
                n_repeated += _forget_from(step.step, steps, held_out)
                steps[step.step] = step
            elif event == "held_out":
                measured = HeldOutLine.model_validate(values)
                held_out[measured.step] = measured
            elif event == "warning":
                warnings[str(values["message"])] = None
        except (ValueError, ValidationError, KeyError, TypeError):
            n_unread += 1
    return Metrics(tuple(steps.values()), tuple(held_out.values()), tuple(warnings), n_unread, n_repeated, is_whole)


def _forget_from(step: int, steps: dict[int, StepLine], held_out: dict[int, HeldOutLine]) -> int:
    """Forget what was recorded of this step and later ones, and return how many steps that were."""
    if not steps or step > next(reversed(steps)):
        return 0
    again = [known for known in steps if known >= step]
    for known in again:
        del steps[known]
    for known in [known for known in held_out if known >= step]:
        del held_out[known]
    return len(again)
