"""A run's checkpoints on disk: written whole, verified when read, retired by step. What is in them is snapshot.py's.

A checkpoint is `checkpoints/step-000123/`: its files, and a manifest with size and sha256 of each. Steps order them,
never clocks. Only those with the run's own id are ever read, counted or removed.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.errors import CannotWriteError, TrainingError
from lora_tune.staging import staged_folder

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"^step-(\d{6,12})$")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint."""

    folder: Path
    step: int


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that cannot be gone on from."""

    folder: Path
    step: int
    why: str


class CheckpointError(Exception):
    """A checkpoint is damaged or another run's; the text says how."""


def folder_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:06d}"


def steps_on_disk(root: Path) -> list[int]:
    """Return the steps that have a checkpoint, verified or not, oldest first."""
    with suppress(FileNotFoundError):
        found = (_NAME.match(path.name) for path in root.iterdir() if path.is_dir() and not path.is_symlink())
        return sorted(int(match[1]) for match in found if match)
    return []


def write_checkpoint(root: Path, step: int, run_id: str, fill: Callable[[Path], None], *, needs_bytes: int) -> Path:
    """Write one checkpoint and return its folder: it stands there whole, or not at all.

    A first failure, of a full disk say, may be over soon: what was begun is removed and tried once more.

    Args:
        root: the run's folder of checkpoints.
        step: optimizer steps done.
        run_id: the run's id.
        fill: writes the files into the empty folder that it is given.
        needs_bytes: about what they take.

    Raises:
        CannotWriteError: twice it could not be written; earlier checkpoints are untouched (exit 74).
    """
    final = root / folder_name(step)
    for last_try in (False, True):
        try:
            check_space(root, needs_bytes, what=f"the checkpoint of step {step}")
            with staged_folder(final) as stage:
                fill(stage)
                (stage / MANIFEST).write_bytes(_manifest(stage, step, run_id))
        except CannotWriteError as err:
            if last_try:
                raise _not_written(root, step, needs_bytes, err) from err
        else:
            return final
    raise AssertionError("the second try returns or raises")


def verify(folder: Path, run_id: str) -> Checkpoint:
    """Return the checkpoint if every byte of it is as it was written by this run.

    Raises:
        CheckpointError: it is not.
    """
    match = _NAME.match(folder.name)
    try:
        manifest = _read_manifest(folder / MANIFEST)
        if manifest["run_id"] != run_id:
            raise CheckpointError("it belongs to another run")
        if match is None or manifest["step"] != int(match[1]):
            raise CheckpointError(f"its manifest is that of step {manifest['step']}")
        for name, (n_bytes, digest) in manifest["files"].items():
            if _facts(folder / name) != (n_bytes, digest):
                raise CheckpointError(f"{name} is not what was written")
    except OSError as err:
        missing = Path(str(err.filename or folder)).name
        raise CheckpointError(f"{missing} cannot be read ({err.strerror or err})") from err
    return Checkpoint(folder, int(manifest["step"]))


def newest_verified(root: Path, run_id: str) -> tuple[Checkpoint | None, list[PassedOver]]:
    """Return the newest checkpoint that verifies, and the newer ones that do not.

    Raises:
        TrainingError: there are checkpoints, and none verifies (exit 65).
    """
    passed: list[PassedOver] = []
    for step in reversed(steps_on_disk(root)):
        folder = root / folder_name(step)
        try:
            return verify(folder, run_id), passed
        except CheckpointError as err:
            passed.append(PassedOver(folder, step, str(err)))
    if passed:
        told = "; ".join(f"{found.folder.name}: {found.why}" for found in passed[:5])
        raise TrainingError(
            f"none of the {len(passed)} checkpoints in {root} can be gone on from: {told}",
            hint="start a new run, without --resume",
        )
    return None, passed


def retire(root: Path, run_id: str, *, keep: int, keep_steps: frozenset[int] = frozenset()) -> None:
    """Remove this run's oldest checkpoints, all but the `keep` newest and those of `keep_steps`."""
    ours = [step for step in steps_on_disk(root) if _is_ours(root / folder_name(step), run_id)]
    for step in ours[:-keep]:
        if step not in keep_steps:
            _remove(root / folder_name(step))


def set_aside(passed: list[PassedOver]) -> list[Path]:
    """Rename checkpoints that cannot be gone on from, so that their steps can be written again; nothing is deleted."""
    moved = []
    for found in passed:
        places = (found.folder.with_name(f"{found.folder.name}.damaged-{number}") for number in range(1, 1000))
        place = next(place for place in places if not place.exists())
        found.folder.rename(place)
        moved.append(place)
    return moved


def clear_unfinished(root: Path) -> None:
    """Remove what a killed writer left half-written."""
    with suppress(FileNotFoundError):
        for path in root.iterdir():
            if path.name.startswith(".step-") and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)


def check_space(folder: Path, needs_bytes: int, *, what: str) -> None:
    """Check that the disk has room.

    Raises:
        CannotWriteError: it has not; the message says where, how much is needed and how much is free (exit 74).
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needs_bytes:
        raise CannotWriteError(
            f"no room for {what} in {folder}: it needs {needs_bytes / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free",
            hint="free some space there, or give a --run-dir on another disk",
        )


def _not_written(root: Path, step: int, needs_bytes: int, err: CannotWriteError) -> CannotWriteError:
    steps = steps_on_disk(root)
    kept = f"the last good one is that of step {steps[-1]}" if steps else "there is none yet"
    free = shutil.disk_usage(root.parent).free
    return CannotWriteError(
        f"the checkpoint of step {step} could not be written into {root}, tried twice: {err.message}; it needs about "
        f"{needs_bytes / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free; {kept}",
        hint="free some space there, then run the same command with --resume",
    )


def _manifest(stage: Path, step: int, run_id: str) -> bytes:
    files = {path.name: list(_facts(path)) for path in sorted(stage.iterdir())}
    return _canonical({"format": FORMAT, "run_id": run_id, "step": step, "files": files})


def _canonical(values: dict[str, Any]) -> bytes:
    """Return the one way that these values are written, with the digest of the rest: any changed byte shows."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**values, "digest": digest}, sort_keys=True, indent=1) + "\n").encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    written = path.read_bytes()
    try:
        values = json.loads(written)
        rest = {name: value for name, value in values.items() if name != "digest"}
        sound = _canonical(rest) == written and rest["format"] == FORMAT
        fields = {**rest, "run_id": str(rest["run_id"]), "step": int(rest["step"]), "files": dict(rest["files"])}
        fields["files"] = {Path(name).name: (int(n), str(sha)) for name, (n, sha) in fields["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as err:
        raise CheckpointError(f"{MANIFEST} is damaged") from err
    if not sound:
        raise CheckpointError(f"{MANIFEST} is damaged")
    return fields


def _facts(path: Path) -> tuple[int, str]:
    """Return size and sha256 of a regular file."""
    digest, n_bytes = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{path.name} is no file")
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            n_bytes += len(chunk)
    return n_bytes, digest.hexdigest()


def _is_ours(folder: Path, run_id: str) -> bool:
    try:
        return bool(_read_manifest(folder / MANIFEST)["run_id"] == run_id)
    except (OSError, CheckpointError):
        return False


def _remove(folder: Path) -> None:
    """Remove a checkpoint such that a kill in between leaves no half of it under its name."""
    stage = folder.with_name(f".{folder.name}-retired")
    shutil.rmtree(stage, ignore_errors=True)
    with suppress(OSError):
        folder.rename(stage)
        shutil.rmtree(stage, ignore_errors=True)
