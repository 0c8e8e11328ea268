"""A run's folder → what it is, how far it came, and what it left. Reading only: not even a lock is made."""

import fcntl
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from lora_tune.adapter.manifest import FILE_NAME, AdapterManifest, read_manifest
from lora_tune.errors import AdapterError
from lora_tune.recipe.closed_yaml import parse
from lora_tune.run_dir import FACTS, LOCK, REPORT
from lora_tune.runs.metrics import Metrics, read_metrics
from lora_tune.runs.reading import MAX_METRICS_BYTES, UnreadableError, read_text, read_values
from lora_tune.runs.written import CheckpointManifest, ReportFile, RunFacts

State = Literal["running", "done", "resumable", "unfinished", "damaged"]
RESOLVED = "recipe.resolved.yaml"
METRICS = "metrics.jsonl"
_OWN_FILES = (FACTS, REPORT, LOCK, METRICS, RESOLVED)
TIME = re.compile(r"-(\d{8}-\d{6})(?:-\d{1,5})?$")
"""How a run's name ends: when it was begun."""
_CHECKPOINT = re.compile(r"^step-(\d{6,12})$")
MAX_PASSPORT_BYTES = 16 << 20


@dataclass(frozen=True)
class CheckpointRecord:
    """One checkpoint, by its manifest and the sizes of its files; digests are looked at by `train --resume`."""

    step: int
    folder: Path
    n_bytes: int
    damage: str
    """Why it cannot be gone on from; empty when it looks whole."""


@dataclass(frozen=True)
class RunRecord:
    """One run as its folder tells it."""

    folder: Path
    state: State
    damage: str = ""
    """Why nothing can be said of it; empty for a run."""
    started_at: float | None = None
    """Seconds since 1970."""
    facts: RunFacts = field(default_factory=RunFacts)
    report: ReportFile | None = None
    metrics: Metrics = field(default_factory=Metrics)
    recipe: Mapping[str, Any] | None = None
    """Every setting by section, as it was resolved; None when that cannot be read."""
    checkpoints: tuple[CheckpointRecord, ...] = ()
    """Oldest first."""
    passport: AdapterManifest | None = None
    has_adapter: bool = False
    warnings: tuple[str, ...] = ()
    """What is wrong with its files, and does not keep the rest from being read."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name


def read_run(folder: Path, *, metrics_bytes: int = MAX_METRICS_BYTES, brief: bool = False) -> RunRecord:
    """Return everything a run's folder says; one that is none, or cannot be read, comes back as damaged.

    Args:
        folder: the run's folder.
        metrics_bytes: so much of the end of metrics.jsonl is read.
        brief: leave out recipe and passport, which take longest.
    """
    folder = folder.absolute()
    try:
        if not any(os.path.lexists(folder / name) for name in _OWN_FILES):
            return RunRecord(folder, "damaged", damage=_why_none(folder))
        # Before anything else is read: a run that ends meanwhile is then one that was running.
        is_locked = _is_locked(folder / LOCK)
        report = read_values(folder / REPORT, ReportFile)
        facts = read_values(folder / FACTS, RunFacts) or RunFacts()
        metrics = read_metrics(folder / METRICS, cap_bytes=metrics_bytes)
        checkpoints = _checkpoints(folder / "checkpoints", facts.run_id)
    except (UnreadableError, OSError) as err:
        reason = f"{err.strerror}: {Path(str(err.filename)).name}" if isinstance(err, OSError) else str(err)
        return RunRecord(folder, "damaged", damage=reason, started_at=_started_at(folder, None))
    recipe, passport, warnings = (None, None, ()) if brief else _extras(folder)
    sound = [checkpoint for checkpoint in checkpoints if not checkpoint.damage]
    state: State = "done" if report else "running" if is_locked else "resumable" if sound else "unfinished"
    return RunRecord(
        folder, state, started_at=_started_at(folder, facts), facts=facts, report=report, metrics=metrics, recipe=recipe,
        checkpoints=checkpoints, passport=passport, has_adapter=(folder / "adapter").is_dir(), warnings=warnings,
    )  # fmt: skip


def run_folders(root: Path) -> list[Path]:
    """Return the folders under `root`, whether they are runs or not; hidden ones are left out."""
    with suppress(OSError):
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return []


def _why_none(folder: Path) -> str:
    held = sorted(path.name for path in folder.iterdir())
    return f"not a run: it holds {', '.join(held[:3])}{' …' if len(held) > 3 else ''}" if held else "empty: not a run"


def _is_locked(path: Path) -> bool:
    """Return whether a living process holds the lock. The lock is asked for as a reader and given back at once."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _extras(folder: Path) -> tuple[Mapping[str, Any] | None, AdapterManifest | None, tuple[str, ...]]:
    """Return recipe and passport; a run without one that can be read still says the rest."""
    warnings: list[str] = []
    recipe, passport = None, None
    try:
        recipe = _recipe(folder / RESOLVED)
    except UnreadableError as err:
        warnings.append(str(err))
    try:
        if (text := read_text(folder / "adapter" / FILE_NAME, cap_bytes=MAX_PASSPORT_BYTES)) is not None:
            passport = read_manifest(text, where=FILE_NAME)
    except (UnreadableError, AdapterError, ValidationError) as err:
        warnings.append(f"adapter/: {err}")
    return recipe, passport, tuple(warnings)


def _recipe(path: Path) -> Mapping[str, Any] | None:
    text = read_text(path)
    if text is None:
        return None
    document = parse(text)
    if document.problems or not isinstance(document.value, dict):
        reason = document.problems[0].message if document.problems else "no sections"
        raise UnreadableError(f"{path.name}: {reason}")
    return document.value


def _checkpoints(root: Path, run_id: str | None) -> tuple[CheckpointRecord, ...]:
    if not root.is_dir() or root.is_symlink():
        return ()
    found = ((_CHECKPOINT.match(path.name), path) for path in root.iterdir() if path.is_dir())
    named = sorted((int(match[1]), path) for match, path in found if match)
    return tuple(_checkpoint(step, path, run_id) for step, path in named)


def _checkpoint(step: int, folder: Path, run_id: str | None) -> CheckpointRecord:
    n_bytes, damage = 0, ""
    try:
        sizes = {path.name: path.lstat().st_size for path in folder.iterdir()}
        n_bytes = sum(sizes.values())
        manifest = read_values(folder / "manifest.json", CheckpointManifest)
        if manifest is None:
            damage = "it has no manifest"
        elif manifest.step != step:
            damage = f"its manifest is that of step {manifest.step}"
        elif run_id is not None and manifest.run_id != run_id:
            damage = "it belongs to another run"
        else:
            damage = next(
                (f"{name} is not as long as it was" for name, n in _sizes(manifest) if sizes.get(name) != n), ""
            )
    except (UnreadableError, OSError) as err:
        damage = str(err)
    return CheckpointRecord(step, folder, n_bytes, damage)


def _sizes(manifest: CheckpointManifest) -> list[tuple[str, int]]:
    firsts = (
        (name, facts[0] if isinstance(facts, list) and facts else facts) for name, facts in manifest.files.items()
    )
    return [(name, size) for name, size in firsts if isinstance(size, int)]


def _started_at(folder: Path, facts: RunFacts | None) -> float | None:
    """Return when a run began: as it says, as its folder's name says, or when its recipe was written."""
    if facts is not None and facts.started_at is not None:
        return facts.started_at
    if match := TIME.search(folder.name):
        with suppress(ValueError, OverflowError):
            return time.mktime(time.strptime(match[1], "%Y%m%d-%H%M%S"))
    for path in (folder / "recipe.yaml", folder / FACTS, folder / LOCK, folder):
        with suppress(OSError):
            return path.stat().st_mtime
    return None
