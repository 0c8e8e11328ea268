"""From a recipe's rows to what the trainer is fed: read, checked, split, mixed, tokenized, held to the length limit.

Nothing is cut, dropped or repeated without standing in the counts.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lora_tune.data.augment import augmented_rows
from lora_tune.data.length import Lengths, Pieces, SetCounts, histogram, hold_to_length
from lora_tune.data.lint import FILE_SHIFT, CheckedRows, judge
from lora_tune.data.messages import Conversation, PlainText
from lora_tune.data.mixture import Indices, Share, balance, hold_out, mix
from lora_tune.data.sources import Source, find_sources
from lora_tune.data.store import StoredSet, tokenized_rows, tokenized_source, tokenizer_parts
from lora_tune.data.tokens import TokenizedRow, loss_labels
from lora_tune.errors import DataError
from lora_tune.recipe.schema import AugmentSection, DataSection

SHOWN_ROWS = 20


@dataclass(frozen=True)
class TokenRows(Sequence[TokenizedRow]):
    """The sequences of one set, read from disk one by one."""

    stored: tuple[StoredSet, ...]
    pieces: Pieces

    @property
    def n_tokens_by_row(self) -> NDArray[np.int64]:
        """Tokens of each sequence, [N]."""
        return self.pieces.end - self.pieces.start

    def __len__(self) -> int:
        return len(self.pieces)

    @overload
    def __getitem__(self, index: int) -> TokenizedRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TokenizedRow]: ...
    def __getitem__(self, index: int | slice) -> TokenizedRow | Sequence[TokenizedRow]:
        if isinstance(index, slice):
            part = (
                values[index] for values in (self.pieces.source, self.pieces.row, self.pieces.start, self.pieces.end)
            )
            return TokenRows(self.stored, Pieces(*part))
        pieces = self.pieces
        stored = self.stored[int(pieces.source[index])]
        return stored.tokenized(int(pieces.row[index]), int(pieces.start[index]), int(pieces.end[index]))

    def conversations(self) -> Iterator[Conversation]:
        """Yield the conversations behind the sequences, each once, in order; plain texts are none."""
        seen: set[tuple[int, int]] = set()
        for place in zip(self.pieces.source.tolist(), self.pieces.row.tolist(), strict=True):
            if place not in seen:
                seen.add(place)
                row = self.stored[place[0]].row(place[1])
                if isinstance(row, Conversation):
                    yield row


@dataclass(frozen=True)
class TokenizedSet:
    """One set, ready to train or measure on."""

    rows: TokenRows
    """Its sequences."""

    counts: SetCounts
    """What became of every row that was read."""

    histogram: list[dict[str, Any]]
    """Rows by their tokens, before the length limit."""

    @property
    def n_tokens_by_row(self) -> NDArray[np.int64]:
        """Tokens of each sequence, [N]."""
        return self.rows.n_tokens_by_row

    def shared_system_message(self) -> str | None:
        """Return the system message that every row of the sources begins with, or None."""
        found = {system for stored in self.rows.stored for system in stored.tally.systems}
        return found.pop() if len(found) == 1 else None


@dataclass(frozen=True)
class Splits:
    """Everything the trainer and the evaluation need of the data."""

    train: TokenizedSet
    held_out: TokenizedSet | None
    checked: CheckedRows
    shares: tuple[Share, ...]
    """What of each source is trained in an epoch, augmented copies last."""

    roles: Mapping[str, tuple[int, int]]
    """By role: tokens of its words over all rows, and how many are trained."""

    tokenized: Mapping[str, str]
    """By source: `kept from before`, or why its rows were tokenized now."""

    digest: str
    """sha256 over what is used of which rows, their tokens and loss masks, training set first."""

    def counts(self) -> dict[str, dict[str, int]]:
        """Counts by set, as printed and kept."""
        sets = {"train": self.train} | ({"held_out": self.held_out} if self.held_out else {})
        return {name: part.counts.as_dict() for name, part in sets.items()}

    def ledger(self) -> dict[str, Any]:
        """Everything known of the rows and their tokens, as `check --tokens` and reports keep it."""
        sets = {"train": self.train} | ({"held_out": self.held_out} if self.held_out else {})
        return {
            "counts": self.counts(),
            "sources": [share.as_dict() for share in self.shares],
            "roles": {role: {"tokens": n, "trained": trained} for role, (n, trained) in self.roles.items()},
            "tokens_by_row": {name: part.histogram for name, part in sets.items()},
            "tokenized": dict(self.tokenized),
            "digest": self.digest,
        }


def prepare_dataset(
    section: DataSection,
    tokenizer: Any,
    *,
    seed: int,
    augment: AugmentSection | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Splits:
    """Read, check, split, mix, tokenize and count.

    Args:
        section: the rows.
        tokenizer: a fast tokenizer with a chat template.
        seed: of the split, the mixture and the copies.
        augment: changes to the training rows.
        on_rows: told now and then how many rows of a source are tokenized.

    Raises:
        MissingInputError: a file is not there.
        DataError: rows are wrong, no trained token can be proved, or too much is lost to the length limit.
    """
    sources = find_sources(section)
    named = (*sources.train, *sources.held_out)
    stored = [tokenized_source(source, tokenizer, train_on=section.train_on, on_rows=on_rows) for source in named]
    checked = judge(
        section, sources.train, sources.held_out, [part.lint for part in stored], seed=seed, notes=sources.notes
    )
    _refuse_unproved(section, stored, checked.left_out)
    own, given = stored[: len(sources.train)], stored[len(sources.train) :]
    kept, split = hold_out([len(part.n_tokens) for part in own], section.eval_split, seed=seed)
    trained, shares = mix(sources.train, kept, seed=seed)
    if augment is not None and augment.balance_labels > 0:
        trained, shares = _balanced(own, trained, shares, augment.balance_labels, seed=seed)
    train_parts, train_rows = list(own), list(trained)
    if augment is not None and augment.copies > 0:
        copies = _augmented(own, kept, tokenizer, section, augment, seed=seed)
        train_parts.append(copies)
        train_rows.append(np.arange(len(copies.n_tokens), dtype=np.int64))
        shares = [*shares, Share("augmented copies", len(copies.n_tokens), len(copies.n_tokens))]
    train = _held_to_length(train_parts, train_rows, section)
    measured = [*own, *given]
    measured_rows = [*split, *(np.arange(len(part.n_tokens), dtype=np.int64) for part in given)]
    held_out = _held_to_length(measured, measured_rows, section) if sum(map(len, measured_rows)) else None
    return Splits(
        train, held_out, checked, tuple(shares), _roles(stored),
        {part.source.name: part.reason for part in stored}, _digest(train, held_out),
    )  # fmt: skip


def as_examples(rows: Sequence[TokenizedRow]) -> Any:
    """Return the rows as a datasets.Dataset that gives `input_ids` and `labels` when asked, and holds no tokens itself."""
    from datasets import Dataset

    def fetch(batch: Mapping[str, list[int]]) -> dict[str, list[list[int]]]:
        found = [rows[number] for number in batch["row"]]
        return {
            "input_ids": [list(row.input_ids) for row in found],
            "labels": [loss_labels(row.input_ids, row.trained) for row in found],
        }

    return Dataset.from_dict({"row": range(len(rows))}).with_transform(fetch)


def _refuse_unproved(section: DataSection, stored: Sequence[StoredSet], left_out: int) -> None:
    count = sum(part.tally.n_refused for part in stored)
    if count + left_out <= section.max_bad_rows or not count:
        return
    problems = [problem for part in stored for problem in part.tally.refused][:SHOWN_ROWS]
    shown = problems + ([f"… and {count - len(problems)} more"] if count > len(problems) else [])
    total = sum(len(part.n_tokens) for part in stored)
    raise DataError(
        "\n  ".join([f"{count} of {total} rows cannot be trained on for certain", *shown]),
        hint=next(part.tally.hint for part in stored if part.tally.n_refused)
        or "`lora-tune preview RECIPE` shows the tokens of the others",
        where=problems[0].split(": ", 1)[0],
    )


def _balanced(
    stored: Sequence[StoredSet], rows: Sequence[Indices], shares: Sequence[Share], share: float, *, seed: int
) -> tuple[list[Indices], list[Share]]:
    labels = [[_label(part, row) for row in own.tolist()] for part, own in zip(stored, rows, strict=True)]
    more = balance(labels, rows, share, seed=seed)
    return more, [Share(old.name, old.rows, len(new)) for old, new in zip(shares, more, strict=True)]


def _label(stored: StoredSet, row: int) -> str | None:
    found = stored.row(row)
    return found.label if isinstance(found, Conversation) else None


def _augmented(
    stored: Sequence[StoredSet], rows: Sequence[Indices], tokenizer: Any, section: DataSection, augment: AugmentSection,
    *, seed: int,
) -> StoredSet:  # fmt: skip
    """Return changed copies of the training rows as a source of their own."""
    files = tuple(path for part in stored for path in part.source.files)
    source = Source("augmented copies", files, "chat", {})
    chosen = hashlib.sha256(b"".join(own.tobytes() for own in rows)).hexdigest()
    parts = {
        "data": [part.digest for part in stored],
        "rows": chosen,
        "augment": augment.model_dump(mode="json"),
        "seed": seed,
        **tokenizer_parts(tokenizer, section.train_on),
    }

    def originals() -> Iterator[tuple[Conversation | PlainText, int]]:
        first_file = 0
        for part, own in zip(stored, rows, strict=True):
            for row in own.tolist():
                yield part.row(row), int(part.lint.places[row]) + (first_file << FILE_SHIFT)
            first_file += len(part.source.files)

    return tokenized_rows(
        source,
        parts,
        lambda lint: augmented_rows(originals(), lint, augment, seed=seed),
        tokenizer,
        train_on=section.train_on,
    )


def _held_to_length(stored: Sequence[StoredSet], rows: Sequence[Indices], section: DataSection) -> TokenizedSet:
    lengths = Lengths(
        source=np.concatenate([np.full(len(own), number, np.int16) for number, own in enumerate(rows)]),
        row=np.concatenate(list(rows)),
        n_tokens=np.concatenate([part.n_tokens[own] for part, own in zip(stored, rows, strict=True)]),
        n_trained=np.concatenate([part.n_trained[own] for part, own in zip(stored, rows, strict=True)]),
        n_answers=np.concatenate([part.n_answers[own] for part, own in zip(stored, rows, strict=True)]),
        runs=lambda entry: stored[int(lengths.source[entry])].encoded(int(lengths.row[entry]))[1],
    )

    def where(entry: int) -> str:
        return stored[int(lengths.source[entry])].where(int(lengths.row[entry]))

    pieces, counts = hold_to_length(lengths, section, where=where)
    return TokenizedSet(TokenRows(tuple(stored), pieces), counts, histogram(lengths.n_tokens, section.max_seq_tokens))


def _roles(stored: Sequence[StoredSet]) -> dict[str, tuple[int, int]]:
    roles: dict[str, tuple[int, int]] = {}
    for part in stored:
        for role, (tokens, trained) in part.tally.roles.items():
            before = roles.get(role, (0, 0))
            roles[role] = (before[0] + tokens, before[1] + trained)
    return roles


def _digest(train: TokenizedSet, held_out: TokenizedSet | None) -> str:
    digest = hashlib.sha256()
    for part in (train, held_out):
        if part is not None:
            digest.update(json.dumps([stored.digest for stored in part.rows.stored]).encode())
            pieces = part.rows.pieces
            for values in (pieces.source, pieces.row, pieces.start, pieces.end):
                digest.update(values.astype(np.int64).tobytes())
        digest.update(b"--\n")
    return digest.hexdigest()
