"""What the verbs on runs call. Open, call, and give plain values back to render."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_tune.cli import report_page
from lora_tune.errors import MissingInputError
from lora_tune.runs.compare import compare as beside
from lora_tune.runs.curves import curves
from lora_tune.runs.details import details
from lora_tune.runs.listing import list_runs as lines
from lora_tune.runs.naming import open_run
from lora_tune.runs.records import RunRecord, read_run

WATCH_SECONDS = 5.0
PAGE = "report.html"


def list_runs(runs: Path) -> dict[str, Any]:
    """Return a line for every folder under `runs`.

    Raises:
        MissingInputError: it is a file (exit 66).
    """
    if runs.exists() and not runs.is_dir():
        raise MissingInputError(f"{runs} is no folder", hint="name the folder that holds the runs with --runs DIR")
    return {"folder": str(runs), "runs": lines(runs)}


def show(name: str, *, runs: Path) -> dict[str, Any]:
    """Return everything of one run."""
    return details(open_run(name, root=runs))


def compare(names: Sequence[str], *, runs: Path) -> dict[str, Any]:
    """Return what differs between runs."""
    return beside([open_run(name, root=runs) for name in names])


def report(name: str, *, runs: Path, out: Path | None, watch: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Write a run's page and return what stands on it; with `watch` again and again until the run ends."""
    record = open_run(name, root=runs)
    page = out if out is not None else record.folder / PAGE
    told = _write(record, page, refresh_seconds=WATCH_SECONDS if watch else None)
    if watch and record.state == "running":
        say(f"writing {page} every {WATCH_SECONDS:g} s until the run ends")
        while record.state == "running":
            time.sleep(WATCH_SECONDS)
            record = read_run(record.folder)
            told = _write(record, page, refresh_seconds=WATCH_SECONDS)
    return told


def write_report(folder: Path) -> Path:
    """Write the page of a run into its folder, as `train` does when it ends, and return its path."""
    _write(read_run(folder), folder / PAGE, refresh_seconds=None)
    return folder / PAGE


def _write(record: RunRecord, page: Path, *, refresh_seconds: float | None) -> dict[str, Any]:
    told = {**details(record), "curves": curves(record.metrics), "written_at": round(time.time(), 3)}
    refresh = refresh_seconds if record.state == "running" else None
    report_page.write_report(page, report_page.run_page(told, refresh_seconds=refresh))
    return {"page": str(page), **told}
