"""A data file → numbered rows, one by one: JSON Lines, JSON, CSV, TSV or Parquet; every problem with its place.

Bytes and limits are unpacked.py's; what a line or cell says is read by json_rows.py and tables.py.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_tune.data.json_rows import Found, read_json_lines, read_json_values
from lora_tune.data.tables import read_delimited, read_parquet
from lora_tune.data.unpacked import data_suffix, open_unpacked, unreadable


@dataclass(frozen=True)
class Row:
    """One row as it stands in the file."""

    where: str
    """`file:line` of the line where it begins; in Parquet `file:row N`."""

    values: dict[str, Any]
    """Column → cell; CSV and TSV cells stay strings."""


@dataclass(frozen=True)
class BadRow:
    """A place in the file where a row should be and is none."""

    where: str
    """`file:line`; in Parquet `file:row N`; the file alone when it has no rows."""

    reason: str
    """What is wrong there."""


@dataclass
class RowFile:
    """All rows of one file, and what could not be read."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_rows(path: Path) -> RowFile:
    """Return the rows of `path` in memory; what is no row stands in `problems` as `file:line: reason`.

    Raises:
        MissingInputError, DataError: as iter_rows.
    """
    found = RowFile(path)
    for row in iter_rows(path):
        if isinstance(row, Row):
            found.rows.append(row)
        else:
            found.problems.append(f"{row.where}: {row.reason}")
    return found


def iter_rows(path: Path) -> Iterator[Row | BadRow]:
    """Give the rows of `path` in their order, in memory that does not grow with their number.

    A file without rows gives one BadRow. Nothing is read, and nothing raised, before the first row is asked for.

    Raises:
        MissingInputError: the file is not there or cannot be read (exit 66).
        DataError: the suffix is unknown, or from some place on the file cannot be read at all (exit 65).
    """
    empty = True
    mark = f"{path}:row " if data_suffix(path)[0] == ".parquet" else f"{path}:"
    try:
        for place, row in _read(path):
            empty = False
            yield BadRow(f"{mark}{place}", row) if isinstance(row, str) else Row(f"{mark}{place}", row)
    except OSError as err:
        raise unreadable(path, err) from err
    if empty:
        yield BadRow(str(path), "the file has no rows")


def _read(path: Path) -> Iterator[Found]:
    suffix, _ = data_suffix(path)
    if suffix == ".parquet":
        yield from read_parquet(path)
        return
    name = str(path)
    with closing(open_unpacked(path)) as stream:
        if suffix == ".json":
            yield from read_json_values(stream, name)
        elif suffix in (".csv", ".tsv"):
            yield from read_delimited(stream, name, delimiter="," if suffix == ".csv" else "\t")
        else:
            yield from read_json_lines(stream, name)
