"""A run's folder: its name, creation, lock and files. Nothing in it is ever overwritten by another run."""

import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.errors import CannotCreateError, CannotWriteError, LoraTuneError, MissingInputError
from lora_tune.staging import write_file

FACTS = "run.json"
"""What a run is: its id, versions, and the digests of data, base and template."""
REPORT = "report.json"
"""There once the run is done."""
LOCK = "run.lock"
_TIME = re.compile(r"(\d{8}-\d{6})(?:-(\d{1,6}))?")
_LEFT_BEHIND = (".probe-", ".recipe.", ".run.json-", ".report.json-", ".report.html-", ".adapter-", ".metrics.")
"""How the names begin of what a killed run had not finished writing."""


@dataclass(frozen=True)
class RunDir:
    """One run's own folder, locked until it is closed or this process ends."""

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

    @property
    def checkpoints(self) -> Path:
        """What the run can go on from, a folder by step."""
        return self.path / "checkpoints"

    def write(self, name: str, text: str) -> Path:
        """Write one text file of the run, whole or not at all."""
        write_file(self.path / name, text)
        return self.path / name

    def write_json(self, name: str, values: Mapping[str, Any]) -> Path:
        """Write one JSON file of the run; NaN is refused, not written."""
        return self.write(name, json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n")

    def close(self) -> None:
        """Let others have the folder."""
        os.close(self.lock_descriptor)

    def facts(self) -> dict[str, Any]:
        """Return what run.json says, or nothing where the run ended before it was written.

        Raises:
            MissingInputError: it cannot be read, or is gone while checkpoints are there (exit 66).
        """
        try:
            if not (self.path / FACTS).exists() and not any(self.checkpoints.glob("step-*")):
                return {}
            values = json.loads((self.path / FACTS).read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("it holds no object")
        except (OSError, ValueError) as err:
            raise MissingInputError(
                f"{self.path / FACTS} cannot be read ({err}), and without it nothing tells whose checkpoints these are",
                hint="start a new run, without --resume",
            ) from err
        return values


def create_run_dir(name: str, *, path: Path | None = None, root: Path = Path("runs")) -> RunDir:
    """Create and lock a new run folder: `path`, or `root/<name>-<time>`.

    Raises:
        CannotCreateError: the folder holds something already, or cannot be made (exit 73).
        CannotWriteError: nothing can be written into it (exit 74).
    """
    folder = path if path is not None else root / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        if path is None:
            folder = _make_next(folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise _not_created(folder, err) from err
    _refuse_foreign(folder)
    probe_folder(folder)
    run = _lock(folder)
    try:
        # Once more behind the lock: another run may have begun, and even ended, since the look before.
        _refuse_foreign(folder)
    except CannotCreateError:
        run.close()
        raise
    return run


def open_run_dir(folder: Path) -> RunDir:
    """Lock and return the folder of a run that was begun, to go on with it; an empty or absent folder is made.

    Raises:
        CannotCreateError: the folder holds something else, or the run is still going (exit 73).
        CannotWriteError: nothing can be written into it (exit 74).
    """
    if not folder.exists() or not (found := _names(folder)):
        return create_run_dir("", path=folder)
    ours = {FACTS, "recipe.yaml", "recipe.resolved.yaml", "checkpoints"}
    if not found & ours:
        raise CannotCreateError(
            f"{folder} is not the folder of a run; it holds {', '.join(sorted(found)[:3])}",
            hint="give the --run-dir that the run was started with",
        )
    probe_folder(folder)
    return _lock(folder)


def newest_unfinished(name: str, *, root: Path = Path("runs")) -> Path:
    """Return the newest run of `name` under `root` that has begun and not finished.

    Raises:
        MissingInputError: there is none (exit 66).
    """
    begun = [
        path
        for path in root.glob(f"{name}-*")
        if _TIME.fullmatch(path.name.removeprefix(f"{name}-"))
        and (path / FACTS).is_file()
        and not (path / REPORT).is_file()
    ]
    if not begun:
        raise MissingInputError(
            f"there is no unfinished run of {name} under {root}/",
            hint="give its folder with --run-dir, or start a new run without --resume",
        )
    return max(begun, key=lambda path: _when(path.name.removeprefix(f"{name}-")))


def check_place(path: Path | None, *, root: Path = Path("runs")) -> None:
    """Check, before anything slow, that a new run's folder can be made and written; nothing is left behind.

    Raises:
        CannotCreateError: it holds something already, or stands under a file (exit 73).
        CannotWriteError: nothing can be written there (exit 74).
    """
    folder = path if path is not None else root
    if path is not None and folder.is_dir():
        _refuse_foreign(folder)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise _not_created(path or root, NotADirectoryError(20, "a file stands in its way"))
    probe_folder(folder)


def probe_folder(folder: Path) -> None:
    """Check that a file can be written, synced and renamed in `folder`.

    Raises:
        CannotWriteError: it cannot: read-only, full, or not ours (exit 74).
    """
    stage: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=".probe-", dir=folder)
        stage = Path(name)
        try:
            os.write(descriptor, b"probe")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        # The run that won the race for this folder may have cleared it away already: it could be written, then.
        with suppress(FileNotFoundError):
            stage = stage.rename(stage.with_name(f"{stage.name}-renamed"))
    except OSError as err:
        raise CannotWriteError(
            f"nothing can be written into {folder}: {err.strerror or err}",
            hint="give a writable place with --run-dir",
        ) from err
    finally:
        if stage is not None:
            with suppress(OSError):
                stage.unlink(missing_ok=True)


def _names(folder: Path) -> set[str]:
    """Return what stands in a folder beside a lock and what killed writers left behind."""
    try:
        return {path.name for path in folder.iterdir() if path.name != LOCK and not path.name.startswith(_LEFT_BEHIND)}
    except OSError as err:
        raise _not_created(folder, err) from err


def _refuse_foreign(folder: Path) -> None:
    found = _names(folder)
    if not found:
        return
    raise CannotCreateError(
        f"{folder} is not empty; a run never writes into another's folder",
        hint="add --resume to go on with the run in it"
        if FACTS in found
        else "give another --run-dir, or none: every run then gets a new folder under runs/",
    )


def _lock(folder: Path) -> RunDir:
    """Lock a folder, and clear away what a killed run was writing when it died."""
    try:
        descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except OSError as err:
        raise _not_created(folder, err) from err
    if not _locked(descriptor):
        os.close(descriptor)
        raise CannotCreateError(
            f"{folder} belongs to a run that is still going", hint="wait for it, or give another --run-dir"
        )
    for path in folder.iterdir():
        if path.name.startswith(_LEFT_BEHIND):
            # Whoever lost the race for this folder clears its own probe away at the same time.
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    return RunDir(folder.resolve(), descriptor)


def _locked(descriptor: int) -> bool:
    """Return whether the lock is ours; `runs list` may hold it for a moment, to see whether a run is going."""
    for left in reversed(range(5)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if left:
                time.sleep(0.004)
        else:
            return True
    return False


def _not_created(folder: Path, err: OSError) -> LoraTuneError:
    kind = CannotWriteError if err.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO} else CannotCreateError
    return kind(
        f"cannot create the run folder {folder}: {err.strerror or err}", hint="give a writable place with --run-dir"
    )


def _when(ending: str) -> tuple[str, int]:
    """Return when a folder's name says its run was begun: the time, then the number among runs of that second."""
    match = _TIME.fullmatch(ending)
    assert match is not None, "only such names are asked for"
    return match[1], int(match[2] or 1)


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
