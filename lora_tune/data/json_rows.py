"""JSON rows: a value per line, or one list or run of objects, read piece by piece; limits on what a row may be."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from math import isinf
from typing import Any

from lora_tune.data.unpacked import MAX_ROW_BYTES, READ_BYTES, bounded_lines
from lora_tune.errors import DataError

MAX_DEPTH = 64
MAX_KEYS = 256
MAX_DIGITS = 4000
TOO_DEEP = f"nested too deep; at most {MAX_DEPTH} levels"

Found = tuple[int, dict[str, Any] | str]
"""A line, and the row that begins there or why there is none."""

_PAIR = re.compile(r"(?<!\\)\\u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w")
"""A whole surrogate pair, as an emoji is often written; after a backslash it could be something else."""
_SPACE = re.compile(r"[ \t\n\r]*")
_NEAR_END_CHARACTERS = 16
"""A literal or escape that is cut off by the end of the text fails so close to that end."""


def read_json_lines(stream: io.BufferedReader, name: str) -> Iterator[Found]:
    """Give the row of every line that is not blank.

    Raises:
        DataError: the file is no JSON Lines file at all (exit 65).
    """
    parser = _RowParser()
    rows_seen = False
    for number, line, n_bytes in bounded_lines(stream):
        if n_bytes >= MAX_ROW_BYTES:
            yield number, too_long(n_bytes)
        elif line := line.rstrip(b" \t\r\n"):
            row = parser.parse(line)
            if not rows_seen and isinstance(row, str) and line.lstrip().startswith(b"[") and "not valid" in row:
                raise DataError(
                    f"{name}:{number}: this is one JSON list over many lines, not a row per line",
                    hint="rename the file to .json",
                    where=f"{name}:{number}",
                )
            yield number, row
        else:
            continue
        rows_seen = True


def read_json_values(stream: io.BufferedReader, name: str) -> Iterator[Found]:
    """Give the rows of a list of objects, or of objects that follow each other, each with the line where it begins.

    Raises:
        DataError: it is neither, or from some line on no JSON; what follows cannot be read (exit 65).
    """
    text = _Text(stream, name)
    first = text.next_character()
    if first == "[":
        yield from _list_elements(text)
    elif first == "{":
        yield from _objects(text)
    elif first:
        raise text.failure("neither a list nor an object; a .json file is one list of rows")


def too_long(n_bytes: int) -> str:
    """Return why a row of so many bytes is refused."""
    return f"{n_bytes:,} bytes; a row has less than {MAX_ROW_BYTES:,}: split it or leave it out"


def too_many_keys(count: int) -> str:
    """Return why a row or object with so many columns or keys is refused."""
    return f"{count:,} keys; an object or row has at most {MAX_KEYS}: put lists of values in lists"


def not_utf8(line: bytes, err: UnicodeDecodeError) -> str:
    """Return what is wrong with a line that is not UTF-8; columns are counted in characters from 1."""
    return _bad_byte(len(line[: err.start].decode("utf-8")) + 1, line[err.start])


def _bad_byte(column: int, byte: int) -> str:
    return f"not UTF-8 at column {column} (byte 0x{byte:02x}); save the file as UTF-8"


class _RowParser:
    """JSON text → row; notes what the JSON reader itself would let pass."""

    def __init__(self) -> None:
        self._noted: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_int=self._whole_number,
            parse_float=self._fraction,
            parse_constant=self._constant,
        )

    def parse(self, line: bytes) -> dict[str, Any] | str:
        """Return the row of one line, or why it is none."""
        self._noted.clear()
        try:
            text = line.decode("utf-8")
            value, end = self._decoder.raw_decode(text)
        except UnicodeDecodeError as err:
            return not_utf8(line, err)
        except json.JSONDecodeError:
            return self._parse_slowly(text)
        except RecursionError:
            return TOO_DEEP
        return self.judged(value, text) if end == len(text) else self._parse_slowly(text)

    def _parse_slowly(self, text: str) -> dict[str, Any] | str:
        """Return the row of a line with white space around it, or the place of its defect."""
        self._noted.clear()
        try:
            return self.judged(self._decoder.decode(text), text)
        except json.JSONDecodeError as err:
            return f"not valid JSON at column {err.colno}: {err.msg}"
        except RecursionError:
            return TOO_DEEP

    def value_at(self, text: str, start: int) -> tuple[object, int]:
        """Return the value that begins at `start`, and where it ends; raises what json raises."""
        self._noted.clear()
        return self._decoder.raw_decode(text, start)

    def judged(self, value: object, text: str) -> dict[str, Any] | str:
        """Return the value just parsed from `text` if it is a row, or why it is none.

        Looks into the value only when its text says that there could be something: that is what makes it fast.
        """
        if self._noted:
            return self._noted[0]
        if len(text) > 2 * MAX_DEPTH and text.count("[") + text.count("{") > MAX_DEPTH and _is_too_deep(value):
            return TOO_DEEP
        if _names_half_pair(text):
            half = _half_pair(value)
            if half is not None:
                return half
        if isinstance(value, dict):
            return value
        return f"found a {type(value).__name__}; a row is an object with named columns"

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) == len(pairs) <= MAX_KEYS:
            return values
        if len(pairs) > MAX_KEYS:
            self._noted.append(too_many_keys(len(pairs)))
        else:
            keys = [key for key, _ in pairs]
            self._noted.append(f"key {next(key for key in keys if keys.count(key) > 1)!r} is written twice")
        return values

    def _whole_number(self, digits: str) -> int:
        if len(digits) <= MAX_DIGITS:
            return int(digits)
        self._noted.append(f"a number of {len(digits)} digits; at most {MAX_DIGITS}")
        return 0

    def _fraction(self, digits: str) -> float:
        if len(digits) > MAX_DIGITS:
            self._noted.append(f"a number of {len(digits)} digits; at most {MAX_DIGITS}")
            return 0.0
        number = float(digits)
        if isinf(number):
            self._noted.append(f"the number {digits} is too large; at most about 1.8e308")
        return number

    def _constant(self, literal: str) -> float:
        self._noted.append(f"{literal} is no JSON value; write null or leave it out")
        return 0.0


def _is_too_deep(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[object] = []
        for outer in level:
            if isinstance(outer, dict | list):
                inner = outer.values() if isinstance(outer, dict) else outer
                below += [part for part in inner if isinstance(part, dict | list)]
        if not below:
            return False
        level = below
    return True


def _names_half_pair(text: str) -> bool:
    """Return False when no lone surrogate can be written in the text."""
    if "\\u" not in text:
        return False
    rest = _PAIR.sub("", text)
    return "\\ud" in rest or "\\uD" in rest


def _half_pair(value: object) -> str | None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as err:
        half = ord(err.object[err.start])
        return f"half of a surrogate pair (\\u{half:04x}): no text, it cannot be written as UTF-8"
    return None


class _Text:
    """The stretch of a text that is being read, its place in the file, and the parser of what stands there."""

    def __init__(self, stream: io.BufferedReader, name: str) -> None:
        self.name, self.line, self._stream = name, 1, stream
        # A bad byte becomes a lone surrogate, so that the text around it is still found and the byte is not lost.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._parser = _RowParser()
        self._text, self._at, self._ended, self._column = "", 0, False, 1

    def next_character(self) -> str:
        """Move past white space; return the character there, or nothing at the end."""
        while True:
            end = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches the empty text
            self.move(end)
            if end < len(self._text):
                return self._text[end]
            if self._ended:
                return ""
            self._read_on()

    def move(self, end: int | None = None) -> str:
        """Return the text up to `end`, or the next character, and stand behind it."""
        passed = self._text[self._at : self._at + 1 if end is None else end]
        self._at += len(passed)
        lines = passed.count("\n")
        self.line += lines
        self._column = len(passed) - passed.rindex("\n") if lines else self._column + len(passed)
        return passed

    def _read_on(self) -> None:
        """Read as much again as is waiting, so that a long value is tried a few times and not hundreds of times."""
        rest = self._text[self._at :]
        block = self._stream.read(max(READ_BYTES, len(rest)))
        self._ended = not block
        self._text, self._at = rest + self._decoder.decode(block, final=self._ended), 0

    def next_row(self) -> tuple[Found, object]:
        """Return the row that begins here, or why it is none, and its value; stand behind it."""
        value, end = self._next_value()
        line, column = self.line, self._column
        if end - self._at > MAX_ROW_BYTES:
            n_characters = end - self._at
            self.move(end)
            return (line, too_long(n_characters)), None
        text = self.move(end)
        if not text.isascii():
            bad = _bad_place(text)
            if bad is not None:
                row, on_line, byte = bad
                return (line + row, _bad_byte(on_line + (column - 1 if row == 0 else 0), byte)), value
        return (line, self._parser.judged(value, text)), value

    def _next_value(self) -> tuple[object, int]:
        while True:
            failed: json.JSONDecodeError | None = None
            try:
                value, end = self._parser.value_at(self._text, self._at)
            except json.JSONDecodeError as err:
                failed = err
            except RecursionError as err:
                raise self.failure(f"{TOO_DEEP}; what follows cannot be read") from err
            else:
                if end < len(self._text) or self._ended:  # else a number could go on
                    return value, end
            if failed is not None and (self._ended or not self._is_cut_off(failed)):
                self.move(failed.pos)
                raise self.failure(f"not valid JSON: {failed.msg}") from failed
            if len(self._text) - self._at > MAX_ROW_BYTES:
                raise self.failure(
                    f"a value of more than {MAX_ROW_BYTES:,} bytes, or a text that does not end; what follows cannot be read"
                )
            self._read_on()

    def _is_cut_off(self, failed: json.JSONDecodeError) -> bool:
        return failed.msg.startswith("Unterminated string") or failed.pos >= len(self._text) - _NEAR_END_CHARACTERS

    def failure(self, reason: str) -> DataError:
        """Return the error that ends the reading here."""
        byte = ord(self._text[self._at]) - 0xDC00 if self._at < len(self._text) else 0
        if 0x80 <= byte <= 0xFF:
            reason = _bad_byte(self._column, byte)
        else:
            reason = reason.replace("not valid JSON", f"not valid JSON at column {self._column}", 1)
        where = f"{self.name}:{self.line}"
        return DataError(f"{where}: {reason}", hint="correct the file there; what follows was not read", where=where)


def _bad_place(text: str) -> tuple[int, int, int] | None:
    """Return the first byte that was no UTF-8: lines below the start, column on its line, the byte."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        before = text[: err.start]
        return before.count("\n"), err.start - before.rfind("\n"), ord(text[err.start]) - 0xDC00
    return None


def _list_elements(text: _Text) -> Iterator[Found]:
    text.move()
    if text.next_character() != "]":
        while True:
            found, _ = text.next_row()
            yield found
            after = text.next_character()
            if after == "]":
                break
            if after != ",":
                raise text.failure(
                    "not valid JSON: expected ',' or ']' after a row" if after else "the list does not end"
                )
            text.move()
            if text.next_character() == "]":
                raise text.failure("not valid JSON: a comma after the last row")
    text.move()
    if text.next_character():
        raise text.failure("something follows the list; a .json file is one list of rows")


def _objects(text: _Text) -> Iterator[Found]:
    """Give objects that follow each other: JSON Lines by another name. A single one is taken for a wrapped list."""
    held, value = text.next_row()
    if not text.next_character():
        raise _single_object(text.name, value)
    yield held
    while text.next_character():
        found, _ = text.next_row()
        yield found


def _single_object(name: str, value: object) -> DataError:
    lists = [key for key, part in value.items() if isinstance(part, list)] if isinstance(value, dict) else []
    hint = (
        f"save the list under {lists[0]!r} alone" if lists else "put the row into a list, or rename the file to .jsonl"
    )
    return DataError(f"{name}: found a dict; a .json file is one list of rows (or use .jsonl)", hint=hint, where=name)
