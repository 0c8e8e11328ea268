"""What a run is called on the command line → its folder."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from lora_tune.errors import MissingInputError, UsageError
from lora_tune.runs.records import TIME, RunRecord, read_run, run_folders

NEAREST = 3


def find_run(name: str, *, root: Path) -> Path:
    """Return the folder of a run: its path, its name under `root`, or a beginning that only one name there has.

    Raises:
        MissingInputError: there is none; the nearest names are given (exit 66).
        UsageError: several names begin so (exit 2).
    """
    folders = {folder.name: folder for folder in run_folders(root)}
    if name in folders:
        return folders[name]
    if name and Path(name).is_dir():
        return Path(name)
    begin = [known for known in folders if name and known.startswith(name)]
    if len(begin) == 1:
        return folders[begin[0]]
    if begin:
        shown = ", ".join(begin[-NEAREST:]) + (" …" if len(begin) > NEAREST else "")
        raise UsageError(
            f"{name!r} begins the names of {len(begin)} runs under {root}/: {shown}",
            hint="give one more letter, or a folder",
        )
    near = _nearest(name, list(folders))
    raise MissingInputError(
        f"there is no run {name!r} under {root}/, and no such folder",
        hint=f"the nearest: {', '.join(near)}; `lora-tune runs list` shows all" if near
        else f"there are no runs under {root}/; name a run's folder, or another place with --runs DIR",
    )  # fmt: skip


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    """Return the names that are most like this one, whole or without their time; without any, the last ones."""

    def likeness(other: str) -> float:
        parts = (other, TIME.sub("", other))
        return max(difflib.SequenceMatcher(None, name, part).ratio() for part in parts)

    like = sorted((other for other in known if likeness(other) >= 0.3), key=likeness, reverse=True)
    return like[:NEAREST] or list(known[-NEAREST:])


def open_run(name: str, *, root: Path) -> RunRecord:
    """Return the run of that name.

    Raises:
        MissingInputError: there is none, or its files cannot be read (exit 66).
        UsageError: several names begin so (exit 2).
    """
    record = read_run(find_run(name, root=root))
    if record.state == "damaged":
        raise MissingInputError(
            f"{record.folder} cannot be read as a run: {record.damage}",
            hint="name another run; `lora-tune runs list` shows what is there",
            where=str(record.folder),
        )
    return record
