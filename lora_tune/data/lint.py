"""Row checks over the whole set, streaming, before anything heavy loads. Token checks are counted in dataset.py."""

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from typing import Any

from lora_tune.data.formats import (
    COLUMNS,
    RowError,
    detect_format,
    mapping_suggestion,
    ours,
    to_row,
    unused_columns,
)
from lora_tune.data.messages import Conversation, DataRow, PlainText, Preference, Rated, trained_row
from lora_tune.data.rows import BadRow, Row, iter_rows
from lora_tune.data.secrets import find_secrets
from lora_tune.data.sources import Source
from lora_tune.errors import DataError

SHOWN_PROBLEMS = 20

FILE_SHIFT = 40
"""A packed place holds the file's number above this bit."""
_NUMBERED = 1 << (FILE_SHIFT - 1)
"""Marks a packed place that counts rows, not lines."""

Place = tuple[int, str]
"""A row's file, by its number in the source, and its line there: paths may change, the content's digest does not."""


@dataclass
class SetLint:
    """What is known of one source's rows so far; grows row by row, and nothing in it grows with long texts."""

    row_format: str = ""
    detected: bool = False
    rows_read: int = 0
    """Rows in the files, bad ones too."""
    problems: list[tuple[int, str, str]] = field(default_factory=list)
    """File, line and reason of the first rows that cannot be used."""
    n_problems: int = 0
    n_unwanted: int = 0
    """Rows whose only answer is rated unwanted: supervised training has no use for them."""
    n_pairs: int = 0
    """Preference rows, of which only the chosen answer is trained."""
    n_held_out: int = 0
    """Augmented copies that would have equalled a held-out row."""
    columns: Counter[str] = field(default_factory=Counter)
    """Columns that the format does not read, by rows."""
    labels: Counter[str] = field(default_factory=Counter)
    secrets: Counter[str] = field(default_factory=Counter)
    """Kinds of likely secrets and personal data, by rows."""
    first_secret: dict[str, Place] = field(default_factory=dict)
    hashes: "array[int]" = field(default_factory=lambda: array("Q"))
    """64 bits of each usable row's content, in order."""
    places: "array[int]" = field(default_factory=lambda: array("Q"))
    """Where each usable row stands, packed."""

    def problem(self, place: Place, reason: str) -> None:
        """Count a row that cannot be used; the first ones are kept."""
        self.n_problems += 1
        if len(self.problems) < SHOWN_PROBLEMS:
            self.problems.append((*place, reason))

    def usable(self, row: Conversation | PlainText, place: int) -> "UsableRow":
        """Return a row that can be used, counted, at a packed place."""
        packed = row.as_json()
        self.places.append(place)
        self.hashes.append(content_hash(packed))
        return UsableRow(row, packed)

    def as_facts(self) -> dict[str, Any]:
        """Everything but the hashes and places, as JSON."""
        plain = {
            name: getattr(self, name)
            for name in ("row_format", "detected", "rows_read", "n_problems", "n_unwanted", "n_pairs", "n_held_out")
        }
        counted = {name: dict(getattr(self, name)) for name in ("columns", "labels", "secrets", "first_secret")}
        return {**plain, **counted, "problems": self.problems}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], hashes: "array[int]", places: "array[int]") -> "SetLint":
        """Return the lint that `as_facts` wrote."""
        counters = {name: Counter(facts[name]) for name in ("columns", "labels", "secrets")}
        first = {kind: (file, line) for kind, (file, line) in facts["first_secret"].items()}
        problems = [(file, line, reason) for file, line, reason in facts["problems"]]
        return cls(
            **{**facts, **counters, "first_secret": first, "problems": problems, "hashes": hashes, "places": places}
        )


def content_hash(packed: str) -> int:
    """Return 64 bits of a row's content, as its line of JSON has it."""
    return int.from_bytes(blake2b(packed.encode(), digest_size=8).digest())


@dataclass(frozen=True)
class UsableRow:
    """A row that supervised training can use."""

    row: Conversation | PlainText
    packed: str
    """The row in one line of JSON."""


def usable_rows(source: Source, lint: SetLint) -> Iterator[UsableRow]:
    """Yield the source's rows that can be used, one at a time; `lint` takes note of everything.

    Raises:
        MissingInputError: a file is not there.
        DataError: the columns are of no known format.
    """
    for number, path in enumerate(source.files):
        skip = len(str(path)) + 1
        for row in iter_rows(path):
            place = (number, row.where[skip:])
            if isinstance(row, BadRow):
                lint.rows_read += 1
                lint.problem(place, row.reason)
                continue
            if not lint.row_format:
                _choose_format(source, lint, row)
            lint.rows_read += 1
            try:
                made = to_row(row, lint.row_format, source.columns)
            except RowError as err:
                lint.problem(place, str(err))
                continue
            lint.columns.update(unused_columns(row, lint.row_format, source.columns))
            trained = _note(lint, made, place)
            if trained is not None:
                yield lint.usable(trained, _pack_place(place))


def _choose_format(source: Source, lint: SetLint, row: Row) -> None:
    if source.row_format != "auto":
        lint.row_format = source.row_format
        return
    columns = ours(list(row.values), source.columns)
    found = detect_format(columns)
    if found is None:
        known = "\n".join(f"  {name}: {text}" for name, text in COLUMNS.items())
        suggestion = mapping_suggestion(columns)
        raise DataError(
            f"{row.where}: columns {', '.join(columns)} are of no known format\n{known}",
            hint=f"write `{suggestion}`"
            if suggestion
            else "map the columns in data.columns, or name the format in data.format",
            where=row.where,
        )
    lint.row_format, lint.detected = found, True


def _note(lint: SetLint, made: DataRow, place: Place) -> Conversation | PlainText | None:
    """Take note of a row and return what of it is trained."""
    trained = trained_row(made)
    lint.n_pairs += isinstance(made, Preference)
    lint.n_unwanted += isinstance(made, Rated) and trained is None
    if trained is None:
        return None
    if isinstance(trained, Conversation) and trained.label is not None:
        lint.labels[trained.label] += 1
    for kind in dict.fromkeys(chain.from_iterable(map(find_secrets, _texts(trained)))):
        lint.secrets[kind] += 1
        lint.first_secret.setdefault(kind, place)
    return trained


def _texts(row: Conversation | PlainText) -> Iterator[str]:
    """Yield every text of a row in which a secret may stand."""
    if isinstance(row, PlainText):
        yield row.text
        return
    for message in row.messages:
        yield message.content
        if not message.is_plain:
            yield message.reasoning
            yield from (call.arguments for call in message.tool_calls)
    if row.tools:
        yield row.tools


def where(source: Source, place: Place) -> str:
    """Return `file:line` of a place in a source."""
    file, line = place
    return f"{source.files[file]}:{line}" if line else str(source.files[file])


def where_packed(source: Source, packed: int) -> str:
    """Return `file:line` of a place as `SetLint.places` holds it."""
    line = packed & (_NUMBERED - 1)
    return where(source, (packed >> FILE_SHIFT, f"row {line}" if packed & _NUMBERED else str(line)))


def _pack_place(place: Place) -> int:
    file, line = place
    number = line.removeprefix("row ")
    return file << FILE_SHIFT | (_NUMBERED if number != line else 0) | int(number)
