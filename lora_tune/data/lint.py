"""Row checks over the whole set, before anything heavy loads. Token checks are counted in tokens.py and dataset.py."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_tune.data.formats import COLUMNS, RowError, column_meant, detect_format, to_conversation, unused_columns
from lora_tune.data.messages import Conversation
from lora_tune.data.rows import RowFile, read_rows
from lora_tune.errors import DataError
from lora_tune.recipe.schema import DataSection

SHOWN_PROBLEMS = 20
SHOWN_COLUMNS = 10


@dataclass(frozen=True)
class CheckedRows:
    """All rows of a recipe as conversations, split, with what is worth knowing about them."""

    row_format: str
    """The format given, or detected."""

    detected: bool
    """True when `format: auto` found it."""

    train: tuple[Conversation, ...]
    """Rows to train on."""

    held_out: tuple[Conversation, ...]
    """Rows to measure on; empty when the recipe holds out none."""

    warnings: tuple[str, ...]
    """Things that work and may still surprise: columns not used, duplicates, held-out rows that are also trained."""


def check_rows(section: DataSection, *, seed: int) -> CheckedRows:
    """Read, check and split every row that the recipe names.

    Raises:
        MissingInputError: a file is not there (exit 66).
        DataError: rows cannot be trained on; the first 20 are listed as `file:line: reason` (exit 65).
    """
    files = [read_rows(Path(path)) for path in (section.path, section.eval_path) if path is not None]
    row_format = section.format if section.format != "auto" else _detect(files[0])
    problems: list[str] = []
    sets = []
    for file in files:
        problems += file.problems
        conversations = []
        for row in file.rows:
            try:
                conversations.append(to_conversation(row, row_format))
            except RowError as err:
                problems.append(f"{row.where}: {err}")
        sets.append(conversations)
    if problems:
        raise _rows_refused(problems)
    train, held_out = (sets[0], sets[1]) if len(sets) == 2 else _hold_out(sets[0], section.eval_split, seed=seed)
    warnings = (*_column_warnings(files, row_format), *_warnings(train, held_out))
    return CheckedRows(row_format, section.format == "auto", tuple(train), tuple(held_out), warnings)


def _detect(file: RowFile) -> str:
    if file.problems and not file.rows:
        raise _rows_refused(file.problems)
    columns = list(file.rows[0].values)
    found = detect_format(columns)
    if found is None:
        known = "\n".join(f"  {name}: {text}" for name, text in COLUMNS.items())
        raise DataError(
            f"{file.rows[0].where}: columns {', '.join(columns)} are of no known format\n{known}",
            hint="rename the columns, or name the format in data.format",
            where=file.rows[0].where,
        )
    return found


def _hold_out(
    rows: Sequence[Conversation], share: float, *, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Hold out round(share · rows) rows, at least one, chosen by the seed; the order of the rest stays."""
    if share == 0.0:
        return list(rows), []
    if len(rows) < 2:
        raise DataError(
            f"data.eval_split needs at least 2 rows; found {len(rows)}", hint="add rows, or set eval_split to 0"
        )
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    chosen = set(random.Random(f"held-out {seed}").sample(range(len(rows)), count))  # noqa: S311 - a split, not a secret
    train = [row for i, row in enumerate(rows) if i not in chosen]
    return train, [row for i, row in enumerate(rows) if i in chosen]


def _column_warnings(files: Sequence[RowFile], row_format: str) -> list[str]:
    rows = [row for file in files for row in file.rows]
    unused = Counter(name for row in rows for name in unused_columns(row, row_format))
    warnings = []
    for name, count in unused.most_common(SHOWN_COLUMNS):
        meant = column_meant(name, row_format)
        guess = f"; did you mean {meant!r}?" if meant else ""
        warnings.append(f"column {name!r} is not used, in {count} of {len(rows)} rows{guess}")
    if len(unused) > SHOWN_COLUMNS:
        warnings.append(f"{len(unused) - SHOWN_COLUMNS} more columns are not used")
    return warnings


def _warnings(train: Sequence[Conversation], held_out: Sequence[Conversation]) -> list[str]:
    warnings = []
    seen = {row.messages for row in train}
    if len(seen) < len(train):
        warnings.append(f"{len(train) - len(seen)} of {len(train)} training rows are exact copies of another")
    leaked = [row.where for row in held_out if row.messages in seen]
    if leaked:
        warnings.append(
            f"{len(leaked)} of {len(held_out)} held-out rows are also trained, so their figures mean nothing; the first is {leaked[0]}"
        )
    return warnings


def _rows_refused(problems: Sequence[str]) -> DataError:
    shown = list(problems[:SHOWN_PROBLEMS])
    if len(problems) > SHOWN_PROBLEMS:
        shown.append(f"… and {len(problems) - SHOWN_PROBLEMS} more")
    count = f"{len(problems)} row{'s' if len(problems) != 1 else ''} cannot be used"
    return DataError(
        "\n  ".join([count, *shown]),
        hint="correct these rows; docs/guides/data.md shows every format",
        where=problems[0].split(": ", 1)[0],
    )
