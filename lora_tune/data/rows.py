"""A data file → numbered rows: JSONL, JSON (a list of objects) or CSV, as UTF-8; every problem with its line."""

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_tune.errors import DataError, MissingInputError

SUFFIXES = (".jsonl", ".json", ".csv")


@dataclass(frozen=True)
class Row:
    """One row as it stands in the file."""

    where: str
    """`file:line`; in a `.json` list `file:row N`."""

    values: dict[str, Any]
    """Column → cell; CSV cells stay strings."""


@dataclass
class RowFile:
    """All rows of one file, and what could not be read."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_rows(path: Path) -> RowFile:
    """Return the rows of `path`; lines that cannot be read stand in `problems` as `file:line: reason`.

    Raises:
        MissingInputError: the file is not there (exit 66).
        DataError: the suffix is none of `.jsonl`, `.json`, `.csv` (exit 65).
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} ends in {path.suffix or 'nothing'}; known: {', '.join(SUFFIXES)}", where=str(path))
    try:
        content = path.read_bytes()
    except OSError as err:
        raise MissingInputError(
            f"cannot read {path}: {err.strerror}", hint="correct data.path", where=str(path)
        ) from err
    found = RowFile(path)
    reader(content.removeprefix(b"\xef\xbb\xbf"), found)
    if not found.rows and not found.problems:
        found.problems.append(f"{path}: the file has no rows")
    return found


def _read_jsonl(content: bytes, found: RowFile) -> None:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            text = _decode(line, f"{found.path}:{number}", found)
            if text is not None:
                _add_json(text, f"{found.path}:{number}", found)


def _add_json(text: str, where: str, found: RowFile) -> None:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as err:
        found.problems.append(f"{where}: not valid JSON at column {err.colno}: {err.msg}")
    except RecursionError:
        found.problems.append(f"{where}: nested too deep")
    else:
        _add(value, where, found)


def _add(value: object, where: str, found: RowFile) -> None:
    if isinstance(value, dict):
        found.rows.append(Row(where, value))
    else:
        found.problems.append(f"{where}: found a {type(value).__name__}; a row is an object with named columns")


def _read_json(content: bytes, found: RowFile) -> None:
    text = _decode_lines(content, found)
    if text is None:
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as err:
        found.problems.append(f"{found.path}:{err.lineno}: not valid JSON at column {err.colno}: {err.msg}")
        return
    except RecursionError:
        found.problems.append(f"{found.path}: nested too deep")
        return
    if not isinstance(values, list):
        found.problems.append(
            f"{found.path}: found a {type(values).__name__}; a .json file is one list of rows (or use .jsonl)"
        )
        return
    for number, value in enumerate(values, start=1):
        _add(value, f"{found.path}:row {number}", found)


def _read_csv(content: bytes, found: RowFile) -> None:
    text = _decode_lines(content, found)
    if text is None:
        return
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            found.problems.append(f"{found.path}:1: a column name is written twice: {', '.join(names)}")
            return
        while True:
            first = reader.line_num + 1
            record = next(reader, None)
            if record is None:
                return
            where = f"{found.path}:{first}"
            if None in record or None in record.values():
                cells = sum(value is not None for key, value in record.items() if key is not None) + len(
                    record.get(None) or []
                )
                found.problems.append(f"{where}: {cells} cells, but the header names {len(names)} columns")
            else:
                found.rows.append(Row(where, dict(record)))
    except csv.Error as err:
        found.problems.append(f"{found.path}:{reader.line_num}: not valid CSV: {err}")


def _decode_lines(content: bytes, found: RowFile) -> str | None:
    texts = [_decode(line, f"{found.path}:{n}", found) for n, line in enumerate(content.split(b"\n"), start=1)]
    return None if None in texts else "\n".join(text for text in texts if text is not None)


def _decode(line: bytes, where: str, found: RowFile) -> str | None:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as err:
        column = len(line[: err.start].decode("utf-8")) + 1
        found.problems.append(
            f"{where}: not UTF-8 at column {column} (byte 0x{line[err.start]:02x}); save the file as UTF-8"
        )
        return None
