"""The verdict over all rows of a recipe: what is wrong, what may surprise, and how many rows there are."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_tune.data.formats import column_meant
from lora_tune.data.lint import SHOWN_PROBLEMS, SetLint, usable_rows, where, where_packed
from lora_tune.data.mixture import Indices, hold_out, mix
from lora_tune.data.sources import Source, find_sources
from lora_tune.errors import DataError
from lora_tune.recipe.schema import DataSection

SHOWN_COLUMNS = 10
IMBALANCE = 10
"""Labels are called imbalanced when the commonest has this many times the rows of the rarest."""

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class CheckedRows:
    """What is known of all rows of a recipe."""

    row_format: str
    """The format given, or detected; several sources may have several."""

    detected: bool
    """True when `format: auto` found it."""

    n_train: int
    """Rows to train on, before repeats and the length limit."""

    rows_an_epoch: int
    """Training rows of an epoch, repeats and weights of data.mix counted, before copies and the length limit."""

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
        rows_an_epoch=sum(share.used for share in mix(train, kept, seed=seed)[1]),
        n_held_out=len(measured),
        left_out=n_problems,
        labels=dict(labels.most_common()),
        warnings=tuple(warnings),
    )


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
        shown = "; ".join(f"{where(source, (file, line))}: {reason}" for file, line, reason in lint.problems)
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
