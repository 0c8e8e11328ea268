"""What a recipe's data section names → sources: found files, with how their rows are laid out and mixed."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_tune.data.files import DataFiles, find_files, find_measured_files
from lora_tune.errors import DataError
from lora_tune.recipe.schema import DataSection, MixedSet


@dataclass(frozen=True)
class Source:
    """One set of rows."""

    name: str
    """The path, as a reader knows it."""

    files: tuple[Path, ...]
    """Its files, in the order they are read."""

    row_format: str
    """A format's name, or `auto`."""

    columns: Mapping[str, str]
    """Our column names → those of the files."""

    repeat: float | None = None
    """How often its rows are trained in an epoch."""

    weight: float | None = None
    """Its share of the mixture beside the other weights."""


@dataclass(frozen=True)
class Sources:
    """Everything a recipe trains on and measures on."""

    train: tuple[Source, ...]
    held_out: tuple[Source, ...]
    """Rows that stand in files of their own; empty when they are split off, or there are none."""

    notes: tuple[str, ...]
    """What was found and not used."""


def find_sources(section: DataSection) -> Sources:
    """Return the section's sources.

    Raises:
        MissingInputError: a file, folder or hub dataset is not there.
        UnreachableError: the hub cannot be reached.
        DataError: a folder has no training file, or held-out rows come from two places.
    """
    named = section.mix or (MixedSet(path=section.path or "", revision=section.revision),)
    found = [(part, find_files(part.path, part.revision)) for part in named]
    train = tuple(_source(part.path, files.train, section, part) for part, files in found)
    own = [(part, files) for part, files in found if files.held_out]
    notes = tuple(
        f"{part.path}: {', '.join(path.name for path in files.unused)} not used"
        for part, files in found
        if files.unused
    )
    if section.eval_path is not None:
        held_out = (_source(section.eval_path, find_measured_files(section.eval_path), section),)
        skipped = tuple(f"{part.path}: its own held-out files are not used, data.eval_path is" for part, _ in own)
        return Sources(train, held_out, notes + skipped)
    if own and section.eval_split > 0:
        raise DataError(
            f"{own[0][0].path} has held-out files of its own ({_names(own[0][1])}), and data.eval_split is set too",
            hint="set data.eval_split to 0, or name the training file itself in data.path",
            where="data.eval_split",
        )
    return Sources(train, tuple(_source(part.path, files.held_out, section, part) for part, files in own), notes)


def _shown(path: str) -> str:
    """Return the path as a reader knows it: from the working folder, where it is inside."""
    beside = os.path.relpath(path) if Path(path).is_absolute() else path
    return path if beside.startswith("..") else beside


def _names(files: DataFiles) -> str:
    return ", ".join(path.name for path in files.held_out)


def _source(name: str, files: Sequence[Path], section: DataSection, part: MixedSet | None = None) -> Source:
    return Source(
        name=_shown(name),
        files=tuple(files),
        row_format=(part.format if part and part.format else None) or section.format,
        columns=part.columns if part and part.columns is not None else section.columns,
        repeat=part.repeat if part else None,
        weight=part.weight if part else None,
    )
