"""A run's folder: its name, creation, lock and files. Nothing in it is ever overwritten by another run."""

import fcntl
import itertools
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.errors import CannotCreateError
from lora_tune.staging import write_file


@dataclass(frozen=True)
class RunDir:
    """One run's own folder, locked for as long as this process lives."""

    path: Path
    lock_descriptor: int

    @property
    def metrics(self) -> Path:
        """One JSON object a line: what was measured, step by step."""
        return self.path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        """The exported adapter."""
        return self.path / "adapter"

    def write(self, name: str, text: str) -> Path:
        """Write one text file of the run, whole or not at all."""
        write_file(self.path / name, text)
        return self.path / name

    def write_json(self, name: str, values: Mapping[str, Any]) -> Path:
        """Write one JSON file of the run; NaN is refused, not written."""
        return self.write(name, json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n")


def create_run_dir(name: str, *, path: Path | None = None, root: Path = Path("runs")) -> RunDir:
    """Create and lock a new run folder: `path`, or `root/<name>-<time>`.

    Raises:
        CannotCreateError: the folder holds something already, or cannot be made or written (exit 73).
    """
    folder = path if path is not None else root / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        if path is None:
            folder = _make_next(folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise CannotCreateError(
                f"{folder} is not empty; a run never writes into another's folder",
                hint="give another --run-dir, or none: every run then gets a new folder under runs/",
            )
        descriptor = os.open(folder / "run.lock", os.O_CREAT | os.O_RDWR, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        raise CannotCreateError(
            f"{folder} belongs to a run that is still going", hint="give another --run-dir"
        ) from err
    except OSError as err:
        raise CannotCreateError(
            f"cannot create the run folder {folder}: {err.strerror}", hint="give a writable place with --run-dir"
        ) from err
    return RunDir(folder.resolve(), descriptor)


def _make_next(first: Path) -> Path:
    """Make and return `first`, or `first-2`, `first-3` … where runs of the same second were quicker."""
    for number in itertools.count(1):
        folder = first if number == 1 else first.with_name(f"{first.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("counting ends nowhere")
