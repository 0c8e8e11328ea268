"""A data file → numbered rows: JSONL, JSON (a list of objects) or CSV, as UTF-8; every problem with its line."""

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_tune.errors import DataError, MissingInputError

SUFFIXES = (".jsonl", ".json", ".csv")
MAX_CELL_CHARACTERS = 16 * 1024 * 1024
_MAX_DIGITS = 4000


@dataclass(frozen=True)
class _Defect:
    """Stands in a parsed row for what cannot be taken as it is."""

    reason: str


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
    except (OSError, ValueError) as err:  # ValueError: a NUL in the path
        reason = err.strerror if isinstance(err, OSError) else err
        raise MissingInputError(f"cannot read {path}: {reason}", hint="correct data.path", where=str(path)) from err
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
        value = _parse(text)
    except json.JSONDecodeError as err:
        found.problems.append(f"{where}: not valid JSON at column {err.colno}: {err.msg}")
    except RecursionError:
        found.problems.append(f"{where}: nested too deep")
    else:
        _add(value, where, found)


def _parse(text: str) -> object:
    """Return the JSON value; keys written twice and endless numbers become a _Defect, so that their row is known."""
    return json.loads(text, object_pairs_hook=_object, parse_int=_whole_number)


def _object(pairs: list[tuple[str, object]]) -> object:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    keys = [key for key, _ in pairs]
    return _Defect(f"key {next(key for key in keys if keys.count(key) > 1)!r} is written twice")


def _whole_number(digits: str) -> object:
    return int(digits) if len(digits) <= _MAX_DIGITS else _Defect(f"a number of {len(digits)} digits")


def _add(value: object, where: str, found: RowFile) -> None:
    try:
        reason = _defect(value)
    except RecursionError:
        reason = "nested too deep"
    if reason is not None:
        found.problems.append(f"{where}: {reason}")
    elif isinstance(value, dict):
        found.rows.append(Row(where, value))
    else:
        found.problems.append(f"{where}: found a {type(value).__name__}; a row is an object with named columns")


def _defect(value: object) -> str | None:
    """Return why the value cannot be part of a row, or None."""
    if isinstance(value, _Defect):
        return value.reason
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as err:
            return f"half of a surrogate pair (\\u{ord(value[err.start]):04x}): no text, it cannot be written as UTF-8"
        return None
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return next((reason for reason in map(_defect, inner) if reason is not None), None)


def _read_json(content: bytes, found: RowFile) -> None:
    text = _decode_lines(content, found)
    if text is None:
        return
    try:
        values = _parse(text)
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
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    usual = csv.field_size_limit(MAX_CELL_CHARACTERS)  # the limit is the process's, not the reader's
    names: list[str] = []
    first = 1
    try:
        for cells in reader:
            where, first = f"{found.path}:{first}", reader.line_num + 1
            if not cells:
                continue
            if not names:
                names = cells
                if len(set(names)) < len(names):
                    found.problems.append(f"{where}: a column name is written twice: {', '.join(names)}")
                    return
            elif len(cells) != len(names):
                found.problems.append(f"{where}: {len(cells)} cells, but the header names {len(names)} columns")
            else:
                found.rows.append(Row(where, dict(zip(names, cells, strict=True))))
    except csv.Error as err:
        found.problems.append(f"{found.path}:{reader.line_num}: not valid CSV: {err}")
    finally:
        csv.field_size_limit(usual)


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
