"""Every run under a folder in a line each, newest first."""

from pathlib import Path
from typing import Any

from lora_tune.runs.records import RunRecord, read_run, run_folders

END_BYTES = 1 << 20
"""So much of each metrics.jsonl is read: the last step stands there, and of most runs every measurement."""


def list_runs(root: Path) -> list[dict[str, Any]]:
    """Return a line a folder under `root`: those that cannot be read too, with the reason."""
    records = [read_run(folder, metrics_bytes=END_BYTES, brief=True) for folder in run_folders(root)]
    records.sort(key=lambda record: (record.started_at or 0.0, record.name), reverse=True)
    return [_line(record) for record in records]


def _line(record: RunRecord) -> dict[str, Any]:
    return {
        "run": record.name,
        "folder": str(record.folder),
        "state": record.state,
        "damage": record.damage or None,
        "step": done_steps(record),
        "steps": planned_steps(record),
        "last_loss": record.metrics.steps[-1].loss if record.metrics.steps else None,
        "held_out_loss": held_out_loss(record),
        "adapter": record.report.adapter.registry if record.report and record.report.adapter else None,
        "started_at": record.started_at,
        "elapsed_seconds": elapsed_seconds(record),
    }


def done_steps(record: RunRecord) -> int | None:
    """Return how many optimizer steps a run has done."""
    if record.metrics.steps:
        return record.metrics.steps[-1].step
    return record.report.training.steps if record.report else None


def planned_steps(record: RunRecord) -> int | None:
    """Return how many steps the run was to take; early stopping may have ended it before."""
    if record.metrics.steps and record.metrics.steps[-1].steps is not None:
        return record.metrics.steps[-1].steps
    return record.report.training.steps if record.report else None


def held_out_loss(record: RunRecord) -> float | None:
    """Return the adapter's loss on the held-out rows, or the last that was measured while training."""
    if record.report:
        measured = record.report.evaluation.adapter if record.report.evaluation else None
        return measured.loss if measured else record.report.training.held_out_loss
    return record.metrics.held_out[-1].held_out_loss if record.metrics.held_out else None


def elapsed_seconds(record: RunRecord) -> float | None:
    """Return how long a run took: all parts of one that is done, else its training so far."""
    if record.report and record.report.seconds:
        return round(sum(record.report.seconds.values()), 3)
    return record.metrics.steps[-1].elapsed_seconds if record.metrics.steps else None
