"""Row checks over the whole set, streaming, before anything heavy loads. Token checks are counted in dataset.py."""

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_tune.data.formats import (
    COLUMNS,
    RowError,
    column_meant,
    detect_format,
    mapping_suggestion,
    ours,
    to_row,
    unused_columns,
)
from lora_tune.data.messages import Conversation, DataRow, PlainText, Preference, Rated, trained_row
from lora_tune.data.mixture import Indices, hold_out
from lora_tune.data.rows import BadRow, Row, iter_rows
from lora_tune.data.secrets import find_secrets
from lora_tune.data.sources import Source, find_sources
from lora_tune.errors import DataError
from lora_tune.recipe.schema import DataSection

SHOWN_PROBLEMS = 20
SHOWN_COLUMNS = 10
Hashes = NDArray[np.uint64]
IMBALANCE = 10
"""Labels are called imbalanced when the commonest has this many times the rows of the rarest."""

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
        self.hashes.append(int.from_bytes(blake2b(packed.encode(), digest_size=8).digest()))
        return UsableRow(row, packed)

    def as_facts(self) -> dict[str, Any]:
        """Everything but the hashes and places, as JSON."""
        plain = {
            name: getattr(self, name)
            for name in ("row_format", "detected", "rows_read", "n_problems", "n_unwanted", "n_pairs")
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


@dataclass(frozen=True)
class UsableRow:
    """A row that supervised training can use."""

    row: Conversation | PlainText
    packed: str
    """The row in one line of JSON."""


@dataclass(frozen=True)
class CheckedRows:
    """What is known of all rows of a recipe."""

    row_format: str
    """The format given, or detected; several sources may have several."""

    detected: bool
    """True when `format: auto` found it."""

    n_train: int
    """Rows to train on, before repeats and the length limit."""

    n_held_out: int
    """Rows to measure on."""

    left_out: int
    """Rows that cannot be used, within data.max_bad_rows."""

    labels: Mapping[str, int]
    """Rows by label, of labelled texts; a held-out part that is split off is counted in."""

    warnings: tuple[str, ...]
    """Things that work and may still surprise: columns not used, duplicates, held-out rows that are also trained."""

    def as_dict(self) -> dict[str, Any]:
        """The facts as `check` prints them."""
        return {
            "format": self.row_format, "detected": self.detected, "train_rows": self.n_train,
            "held_out_rows": self.n_held_out, "rows_left_out": self.left_out, "labels": dict(self.labels),
        }  # fmt: skip


def check_rows(section: DataSection, *, seed: int) -> CheckedRows:
    """Read and check every row that the recipe names; memory does not grow with their text.

    Raises:
        MissingInputError: a file is not there (exit 66).
        DataError: rows cannot be used; the first 20 are listed as `file:line: reason` (exit 65).
    """
    sources = find_sources(section)
    lints = [SetLint() for _ in (*sources.train, *sources.held_out)]
    for source, lint in zip((*sources.train, *sources.held_out), lints, strict=True):
        for _ in usable_rows(source, lint):
            pass
    return judge(section, sources.train, sources.held_out, lints, seed=seed, notes=sources.notes)


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


def judge(
    section: DataSection, train: Sequence[Source], held_out: Sequence[Source], lints: Sequence[SetLint],
    *, seed: int, notes: Sequence[str] = (),
) -> CheckedRows:  # fmt: skip
    """Return the verdict over every source's lint.

    Raises:
        DataError: more rows are bad than data.max_bad_rows allows, or none is left.
    """
    sources = (*train, *held_out)
    n_problems = sum(lint.n_problems for lint in lints)
    if n_problems > section.max_bad_rows:
        raise _rows_refused(sources, lints, n_problems, section.max_bad_rows)
    for source, lint in zip(sources, lints, strict=True):
        if not lint.hashes:
            raise DataError(f"{source.name}: no row can be used", hint=_why_none(lint), where=source.name)
    own, given = lints[: len(train)], lints[len(train) :]
    kept, split = hold_out([len(lint.hashes) for lint in own], section.eval_split, seed=seed)
    everything = [np.arange(len(lint.hashes)) for lint in given]
    trained = _picked(own, kept)
    measured = _picked(lints, [*split, *everything])
    places = [
        where_packed(source, int(lint.places[row]))
        for source, lint, rows in zip(sources, lints, [*split, *everything], strict=True)
        for row in rows[np.isin(_hashes(lint)[rows], trained)][:1]
    ]
    labels = sum((lint.labels for lint in own), Counter[str]())
    warnings = [
        *notes,
        *(text for source, lint in zip(sources, lints, strict=True) for text in _source_warnings(source, lint)),
        *_copy_warnings(trained, measured, places),
        *_label_warnings(labels, sum((lint.labels for lint in given), Counter[str]())),
    ]
    formats = dict.fromkeys(lint.row_format for lint in lints)
    return CheckedRows(
        row_format=" + ".join(formats),
        detected=all(source.row_format == "auto" for source in sources),
        n_train=len(trained),
        n_held_out=len(measured),
        left_out=n_problems,
        labels=dict(labels.most_common()),
        warnings=tuple(warnings),
    )


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
    texts = [trained.text] if isinstance(trained, PlainText) else [message.content for message in trained.messages]
    for kind in dict.fromkeys(chain.from_iterable(map(find_secrets, texts))):
        lint.secrets[kind] += 1
        lint.first_secret.setdefault(kind, place)
    return trained


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


def _hashes(lint: SetLint) -> Hashes:
    return np.frombuffer(lint.hashes, dtype=np.uint64)


def _source_warnings(source: Source, lint: SetLint) -> list[str]:
    warnings = []
    for name, count in lint.columns.most_common(SHOWN_COLUMNS):
        meant = column_meant(name, lint.row_format)
        guess = f"; did you mean {meant!r}?" if meant else ""
        warnings.append(f"column {name!r} is not used, in {count} of {lint.rows_read} rows{guess}")
    if len(lint.columns) > SHOWN_COLUMNS:
        warnings.append(f"{len(lint.columns) - SHOWN_COLUMNS} more columns are not used")
    if lint.n_problems:
        shown = "; ".join(f"{where(source, (file, line))}: {reason}" for file, line, reason in lint.problems[:3])
        warnings.append(f"left out, since they cannot be used (data.max_bad_rows): {_rows(lint.n_problems)}: {shown}")
    if lint.n_pairs:
        warnings.append(
            f"{lint.n_pairs} preference pairs: train.method sft trains the chosen answer, the rejected one is not used"
        )
    if lint.n_unwanted:
        warnings.append(
            f"{_rows(lint.n_unwanted)} {'is' if lint.n_unwanted == 1 else 'are'} rated unwanted and not trained (train.method sft)"
        )
    for kind, count in lint.secrets.most_common():
        warnings.append(
            f"{_rows(count)} with what looks like a secret or personal data ({kind}); the first is "
            f"{where(source, lint.first_secret[kind])}: a model can repeat what it was trained on"
        )
    return warnings


def _picked(lints: Sequence[SetLint], rows: Sequence[Indices]) -> Hashes:
    return np.concatenate([_hashes(lint)[own] for lint, own in zip(lints, rows, strict=True)])


def _copy_warnings(trained: Hashes, measured: Hashes, leaked_places: Sequence[str]) -> list[str]:
    warnings = []
    known = np.unique(trained)
    if len(known) < len(trained):
        warnings.append(f"{len(trained) - len(known)} of {len(trained)} training rows are exact copies of another")
    if leaked_places:
        leaked = int(np.isin(measured, known).sum())
        warnings.append(
            f"{leaked} of {len(measured)} held-out rows are also trained, so their figures mean nothing; "
            f"the first is {leaked_places[0]}"
        )
    return warnings


def _rows(count: int) -> str:
    return f"{count} row{'s' if count != 1 else ''}"


def _label_warnings(trained: Counter[str], measured: Counter[str]) -> list[str]:
    warnings = []
    if len(trained) == 1:
        warnings.append(f"every row has the label {next(iter(trained))!r}: there is nothing to tell apart")
    if len(trained) > 1:
        (most, often), (least, rare) = trained.most_common()[0], trained.most_common()[-1]
        if often >= IMBALANCE * rare:
            warnings.append(
                f"labels are imbalanced: {most!r} has {often} rows, {least!r} has {rare}; "
                "augment.balance_labels repeats rare ones"
            )
    unseen = [label for label in measured if label not in trained]
    if unseen:
        warnings.append(f"{len(unseen)} labels are measured but never trained, such as {unseen[0]!r}")
    return warnings


def _why_none(lint: SetLint) -> str:
    if lint.n_unwanted:
        return "every row is rated unwanted, and train.method sft trains wanted answers"
    return "the file has no rows" if not lint.rows_read else "correct the rows; docs/guides/data.md shows every format"


def _rows_refused(sources: Sequence[Source], lints: Sequence[SetLint], total: int, allowed: int) -> DataError:
    problems = [
        f"{where(source, (file, line))}: {reason}"
        for source, lint in zip(sources, lints, strict=True)
        for file, line, reason in lint.problems
    ]
    shown = problems[:SHOWN_PROBLEMS]
    if total > len(shown):
        shown.append(f"… and {total - len(shown)} more")
    more = f", and data.max_bad_rows allows {allowed}" if allowed else ""
    count = f"{_rows(total)} cannot be used{more}"
    return DataError(
        "\n  ".join([count, *shown]),
        hint="correct these rows; docs/guides/data.md shows every format",
        where=problems[0].split(": ", 1)[0],
    )
