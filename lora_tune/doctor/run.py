"""The doctor's round: every check on the same sample, one after the other; what one raises hides no other."""

import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from lora_tune.doctor import stack
from lora_tune.doctor.finding import REINSTALL, Finding
from lora_tune.errors import LoraTuneError
from lora_tune.recipe.schema import BaseSection, DataSection

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Check:
    """One check of the tiny model."""

    name: str
    module: str
    """Where in this package it lives; loaded when it runs, so that one broken library spoils its own checks only."""
    function: str


CHECKS = (
    Check("loss mask", "mask_checks", "loss_mask"),
    Check("gradients", "training_checks", "gradients"),
    Check("accumulation", "training_checks", "accumulation"),
    Check("packing", "training_checks", "packing"),
    Check("padding", "training_checks", "padding"),
    Check("checkpointing", "training_checks", "checkpointing"),
    Check("optimizer step", "training_checks", "optimizer_step"),
    Check("held-out loss", "training_checks", "held_out_loss"),
    Check("resume", "training_checks", "resume"),
    Check("batched answers", "training_checks", "batched_answers"),
    Check("adapter on", "adapter_checks", "adapter_on"),
    Check("adapter off", "adapter_checks", "adapter_off"),
    Check("saved = loaded", "adapter_checks", "saved_loaded"),
    Check("merged = adapter", "adapter_checks", "merged"),
    Check("nf4", "adapter_checks", "nf4"),
)


@dataclass(frozen=True)
class Diagnosis:
    """All findings."""

    findings: tuple[Finding, ...]
    seconds: float

    @property
    def healthy(self) -> bool:
        """Whether nothing failed; warnings are let through."""
        return not any(finding.verdict == "failed" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The diagnosis as `--json` prints it."""
        verdicts = [finding.verdict for finding in self.findings]
        return {
            "ok": self.healthy,
            "seconds": round(self.seconds, 1),
            "counts": {verdict: verdicts.count(verdict) for verdict in ("ok", "failed", "warning", "skipped", "info")},
            "findings": [finding.as_dict() for finding in self.findings],
        }


def examine(base: BaseSection | None, data: DataSection | None, progress: Progress) -> Diagnosis:
    """Return what is found about the installed stack, and about a base if one is named; offline, and leaving nothing behind.

    Args:
        base: whose files and chat template are looked at too.
        data: of the recipe that names it, if one does.
        progress: told what is being done.
    """
    start = time.monotonic()
    progress("loading the libraries", 0.0)
    findings = [_of("versions", stack.versions), stack.imports()]
    if findings[-1].verdict == "failed":
        findings += [Finding(check.name, "skipped", "the libraries do not load") for check in CHECKS]
        return Diagnosis(tuple(findings), time.monotonic() - start)
    findings += [_of(look.__name__.replace("_", " "), look) for look in stack.FACTS]
    from lora_tune.model.dense import quiet

    with quiet():
        if base is not None:
            progress("looking at the base", 0.1)
            findings += _base_findings(base, data)
        findings += _tiny_findings(progress)
    return Diagnosis(tuple(findings), time.monotonic() - start)


def _base_findings(base: BaseSection, data: DataSection | None) -> list[Finding]:
    found: list[Finding] = []

    def look() -> Finding:
        from lora_tune.doctor.base_checks import examine_base

        found.extend(examine_base(base, data))
        return found[-1]

    last = _of("base's files", look)
    return found if found and last is found[-1] else [*found, last]


def _tiny_findings(progress: Progress) -> list[Finding]:
    with tempfile.TemporaryDirectory(prefix="lora-tune-doctor-") as scratch:
        made: list[Any] = []
        failed = _of("sample", lambda: _make(Path(scratch), made))
        if not made:
            skipped = [Finding(check.name, "skipped", "the tiny model could not be made") for check in CHECKS]
            return [failed, *skipped]
        return list(run_checks(made[0], CHECKS, progress))


def _make(folder: Path, made: list[Any]) -> Finding:
    from lora_tune.doctor.sample import make_sample
    from lora_tune.model.load import detect_device

    made.append(make_sample(folder, detect_device()))
    return Finding("sample", "ok", "the tiny model is made")


def run_checks(sample: Any, checks: Sequence[Check], progress: Progress) -> list[Finding]:
    """Return what these checks find on a sample, with the user's cache kept out of it."""
    from lora_tune.doctor.sample import own_cache

    findings = []
    gc.freeze()  # every training ends with a full collection, which takes long over all that the libraries hold
    try:
        for number, check in enumerate(checks):
            progress(f"checking {check.name}", 0.2 + 0.8 * number / len(checks))
            with own_cache(sample.scratch()):
                findings.append(_of(check.name, partial(_call, check, sample)))
    finally:
        gc.unfreeze()
    return findings


def _call(check: Check, sample: Any) -> Finding:
    finding: Finding = getattr(import_module(f"lora_tune.doctor.{check.module}"), check.function)(sample)
    return finding


def _of(name: str, look: Callable[[], Finding]) -> Finding:
    """Return the finding; what is raised instead is one too."""
    try:
        return look()
    except LoraTuneError as err:
        return Finding(name, "failed", err.message, hint=err.hint or REINSTALL)
    except Exception as err:  # noqa: BLE001 - a broken stack raises anything, and the other checks must still be made
        return Finding(name, "failed", f"{type(err).__name__}: {' '.join(str(err).split())[:300]}", hint=REINSTALL)
