"""Rows of tables: CSV and TSV, whose cells stay strings, and Parquet, whose cells have types of their own."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_tune.data.json_rows import MAX_DEPTH, MAX_KEYS, TOO_DEEP, Found, not_utf8, too_long, too_many_keys
from lora_tune.data.unpacked import MAX_RATIO, MAX_ROW_BYTES, RATIO_FREE_BYTES, bounded_lines, refuse_special
from lora_tune.errors import DataError

_NAMES = {",": "comma", "\t": "tab", ";": "semicolon"}
_BATCH_ROWS = 256
_BATCH_BYTES = 64 * 1024 * 1024


def read_delimited(stream: io.BufferedReader, name: str, *, delimiter: str) -> Iterator[Found]:
    """Give the rows of a CSV (`,`) or TSV (tab) file, each with the physical line where it begins.

    Raises:
        DataError: the header cannot be used, or from some line on the quotes are not right (exit 65).
    """
    lines = _Lines(stream, name)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        first = lines.begin_row()
        try:
            cells = _next_cells(reader)
        except StopIteration:
            return
        except csv.Error as err:
            reason = f"not valid {'CSV' if delimiter == ',' else 'TSV'}: {_explained(err)}"
            line, reason = lines.bad[0] if lines.bad else (lines.number, reason)
            if first < lines.number or not names:
                begun = f" (the row begins in line {first})" if first < line else ""
                raise _unusable(name, line, f"{reason}{begun}; what follows cannot be read") from err
            yield line, reason  # the reader begins anew with the next line
            continue
        if not names and cells:
            if lines.bad:
                raise _unusable(name, *lines.bad[0])
            names = _header(cells, delimiter, f"{name}:{first}")
        elif lines.bad:
            yield lines.bad[0]
        elif len(cells) == len(names):
            if cells:
                yield first, dict(zip(names, cells, strict=True))
        elif cells:
            yield first, f"{len(cells)} cells, but the header names {len(names)} columns"


def _next_cells(reader: Any) -> list[str]:
    usual = csv.field_size_limit(MAX_ROW_BYTES + 1)  # the limit is the process's, not the reader's
    try:
        cells: list[str] = next(reader)
    finally:
        csv.field_size_limit(usual)
    return cells


class _Lines:
    """The lines that csv asks for one by one; knows where the row began and which of its lines are not UTF-8."""

    def __init__(self, stream: io.BufferedReader, name: str) -> None:
        self.number = 0
        self.bad: list[tuple[int, str]] = []
        self._lines, self._name, self._first, self._n_bytes = bounded_lines(stream), name, 1, 0

    def begin_row(self) -> int:
        """Return the line where the next row begins."""
        if self.bad:
            self.bad = []
        self._n_bytes, self._first = 0, self.number + 1
        return self._first

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number, line, n_bytes = next(self._lines)
        self._n_bytes += n_bytes
        if self._n_bytes >= MAX_ROW_BYTES:
            raise _unusable(
                self._name, self._first, f"the row has more than {too_long(self._n_bytes)}; or a quote does not end"
            )
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as err:
            self.bad.append((self.number, not_utf8(line, err)))
            return line.decode("utf-8", errors="replace")


def _header(cells: list[str], delimiter: str, where: str) -> list[str]:
    if len(cells) == 1:
        other = next((mark for mark in ";\t," if mark in cells[0] and mark != delimiter), None)
        if other is not None and not (other == ";" and "," in cells[0]):
            suffix = ".tsv" if other == "\t" else ".csv"
            raise DataError(
                f"{where}: the columns are separated by {_NAMES[other]}s, not by {_NAMES[delimiter]}s",
                hint="save it with commas" if other == ";" else f"rename the file to {suffix}",
                where=where,
            )
    if len(cells) > MAX_KEYS:
        raise DataError(f"{where}: {too_many_keys(len(cells))}", where=where)
    if len(set(cells)) < len(cells):
        raise DataError(
            f"{where}: a column name is written twice: {', '.join(cells)}", hint="rename one of them", where=where
        )
    return cells


def _explained(err: csv.Error) -> str:
    said = str(err)
    if "new-line character" in said:
        return "a line ends in a carriage return alone; save the file with usual line ends"
    return "a quote does not end" if "unexpected end of data" in said else said


def _unusable(name: str, line: int, reason: str) -> DataError:
    where = f"{name}:{line}"
    return DataError(f"{where}: {reason}", hint="correct the file there", where=where)


def read_parquet(path: Path) -> Iterator[Found]:
    """Give the rows of a Parquet file with their number from 1; values as Python objects.

    Raises:
        MissingInputError: the file is not there (exit 66).
        DataError: it is damaged or no Parquet file, or unpacks to far more than there is (exit 65).
    """
    refuse_special(path)
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            _refuse_bomb(file.metadata, path)
            _refuse_schema(file.schema_arrow, path)
            for batch in file.iter_batches(batch_size=_batch_rows_at_once(file.metadata), use_threads=False):
                for row in _batch_rows(batch):
                    number += 1
                    yield number, row if isinstance(row, str) else {name: _given(value) for name, value in row.items()}
    except (pyarrow.ArrowException, OSError, RecursionError) as err:
        said = str(err).strip().splitlines()[:1]
        raise DataError(
            f"{path}: damaged or no Parquet file: {said[0] if said else type(err).__name__}",
            hint="write or copy it again",
            where=str(path),
        ) from err


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    if batch.nbytes <= MAX_ROW_BYTES:
        try:
            yield from batch.to_pylist()
        except UnicodeDecodeError:  # before the first row is given
            pass
        else:
            return
    for number in range(batch.num_rows):
        row = batch.slice(number, 1)
        if row.nbytes > MAX_ROW_BYTES:
            yield too_long(row.nbytes)
            continue
        try:
            (values,) = row.to_pylist()
        except UnicodeDecodeError as err:
            values = f"not UTF-8 (byte 0x{err.object[err.start]:02x}); write the column as UTF-8"
        yield values


def _given(value: Any) -> Any:
    """Return the value without the nulls inside of it.

    Parquet gives every object of a column the keys of all: one that a row never had would be trained as `null`.
    """
    if isinstance(value, dict):
        return {key: _given(inner) for key, inner in value.items() if inner is not None}
    return [_given(inner) for inner in value] if isinstance(value, list) else value


def _batch_rows_at_once(metadata: Any) -> int:
    """Return so many rows that one long text, kept once in a dictionary and meant in every row, does not fill the memory."""
    largest = 0
    for group in range(metadata.num_row_groups):
        columns = [metadata.row_group(group).column(n) for n in range(metadata.num_columns)]
        largest = max(largest, sum(_dictionary_bytes(column) for column in columns))
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // (largest + 1)))


def _dictionary_bytes(column: Any) -> int:
    if not column.has_dictionary_page:
        return 0
    packed = max(0, column.data_page_offset - column.dictionary_page_offset)
    return int(packed * column.total_uncompressed_size / max(1, column.total_compressed_size))


def _refuse_bomb(metadata: Any, path: Path) -> None:
    n_bytes = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    packed = path.stat().st_size
    if n_bytes > RATIO_FREE_BYTES and n_bytes > MAX_RATIO * packed:
        raise DataError(
            f"{path}: {packed:,} bytes unpack to {n_bytes:,}; at most {MAX_RATIO} times as many are read",
            hint="a file like this can fill the memory; if you trust it, write it again uncompressed",
            where=str(path),
        )


def _refuse_schema(schema: Any, path: Path) -> None:
    import pyarrow

    if len(set(schema.names)) < len(schema.names):
        names = ", ".join(schema.names)
        raise DataError(f"{path}: a column name is written twice: {names}", hint="rename one of them", where=str(path))
    level = [pyarrow.struct(list(schema))]
    for _ in range(MAX_DEPTH):
        widest = max(part.num_fields for part in level)
        if widest > MAX_KEYS:
            raise DataError(f"{path}: {too_many_keys(widest)}", where=str(path))
        level = [part.field(n).type for part in level for n in range(part.num_fields)]
        if not level:
            return
    raise DataError(f"{path}: {TOO_DEEP}", where=str(path))
