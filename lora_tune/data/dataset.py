"""From a recipe's rows to what the trainer is fed: read, checked, split, mixed, tokenized, held to the length limit.

Nothing is cut, dropped or repeated without standing in the counts.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lora_tune.data.augment import Original, augmented_rows
from lora_tune.data.length import Lengths, Pieces, SetCounts, histogram, hold_to_length
from lora_tune.data.lint import FILE_SHIFT, SHOWN_PROBLEMS, SetLint, UsableRow
from lora_tune.data.messages import Conversation
from lora_tune.data.mixture import Indices, Share, balance, hold_out, mix
from lora_tune.data.sources import Source, find_sources
from lora_tune.data.store import tokenized_rows, tokenized_source, tokenizer_parts
from lora_tune.data.stored import StoredSet
from lora_tune.data.tokens import TokenizedRow, loss_labels
from lora_tune.data.verdict import CheckedRows, judge
from lora_tune.errors import DataError
from lora_tune.recipe.schema import AugmentSection, DataSection

Part = tuple[StoredSet, Indices]
"""A tokenized source, and which of its rows, repeats counted."""


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

    def __iter__(self) -> Iterator[TokenizedRow]:
        # Not by index until an IndexError: one inside of a row would end the loop as if the set ended there.
        return (self[number] for number in range(len(self)))

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
    own, given = stored[: len(sources.train)], stored[len(sources.train) :]
    kept, split = hold_out([len(part.n_tokens) for part in own], section.eval_split, seed=seed)
    measured = (*zip(own, split, strict=True), *((part, np.arange(len(part.n_tokens))) for part in given))
    trained = list(zip(own, mix(sources.train, kept, seed=seed)[0], strict=True))
    if augment is not None:
        trained = _augmented(trained, measured, tokenizer, section, augment, seed=seed)
    parts = [*stored, *(part for part, _ in trained[len(own) :])]
    refused = _refused(section, parts, checked.left_out)
    train = _held_to_length(trained, section, name="training")
    held_out = _held_to_length(measured, section, name="held-out") if sum(len(rows) for _, rows in measured) else None
    return Splits(
        train=train,
        held_out=held_out,
        checked=replace(
            checked,
            left_out=checked.left_out + sum(part.tally.n_refused for part in stored),
            warnings=(*checked.warnings, *refused, *_copy_warnings(trained[len(own) :], augment)),
        ),
        shares=_shares(trained, [len(rows) for rows in kept], train),
        roles=_roles(stored),
        tokenized=_reasons(own, given),
        digest=_digest(train, held_out),
    )


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


def _refused(section: DataSection, stored: Sequence[StoredSet], left_out: int) -> list[str]:
    """Return what to say of rows that cannot be proved and are left out; too many of them stop the run."""
    count = sum(part.tally.n_refused for part in stored)
    problems = [problem for part in stored for problem in part.tally.refused][:SHOWN_PROBLEMS]
    if not count:
        return []
    shown = problems + ([f"… and {count - len(problems)} more"] if count > len(problems) else [])
    if count + left_out <= section.max_bad_rows:
        return [f"left out, since they cannot be trained on for certain (data.max_bad_rows): {'; '.join(shown)}"]
    total = sum(len(part.n_tokens) for part in stored)
    raise DataError(
        "\n  ".join([f"{count} of {total} rows cannot be trained on for certain", *shown]),
        hint=next(part.tally.hint for part in stored if part.tally.n_refused)
        or "`lora-tune preview RECIPE` shows the tokens of the others",
        where=problems[0].split(": ", 1)[0],
    )


def _copy_warnings(copies: Sequence[Part], augment: AugmentSection | None) -> list[str]:
    warnings = []
    for part, rows in copies:
        if not len(rows):
            warnings.append("augment.copies made no copy: nothing that a user says could be changed")
        if part.lint.n_held_out:
            warnings.append(f"{part.lint.n_held_out} augmented copies would have equalled a held-out row: not made")
    return warnings


def _shares(trained: Sequence[Part], n_rows: Sequence[int], train: TokenizedSet) -> tuple[Share, ...]:
    """Return what is used of each source, refused and dropped rows taken off."""
    used = np.bincount(train.rows.pieces.source, minlength=len(trained)).tolist()
    rows = [*n_rows, *(len(part.n_tokens) for part, _ in trained[len(n_rows) :])]
    return tuple(Share(part.source.name, own, count) for (part, _), own, count in zip(trained, rows, used, strict=True))


def _reasons(own: Sequence[StoredSet], given: Sequence[StoredSet]) -> dict[str, str]:
    """Return why each source was tokenized; a folder's held-out files are told from its training files."""
    reasons = {part.source.name: part.reason for part in own}
    for part in given:
        name = part.source.name
        reasons[f"{name} (held out)" if name in reasons else name] = part.reason
    return reasons


def _label(stored: StoredSet, row: int) -> str | None:
    found = stored.row(row)
    return found.label if isinstance(found, Conversation) else None


def _augmented(
    trained: Sequence[Part], measured: Sequence[Part], tokenizer: Any, section: DataSection, augment: AugmentSection,
    *, seed: int,
) -> list[Part]:  # fmt: skip
    """Return the training rows with rare labels repeated, and changed copies of them as one more part."""
    parts = list(trained)
    if augment.balance_labels > 0:
        labels = [[_label(part, row) for row in rows.tolist()] for part, rows in parts]
        more = balance(labels, [rows for _, rows in parts], augment.balance_labels, seed=seed)
        parts = [(part, rows) for (part, _), rows in zip(parts, more, strict=True)]
    if augment.copies > 0:
        copies = _copies(parts, measured, tokenizer, section, augment, seed=seed)
        parts.append((copies, np.arange(len(copies.n_tokens))))
    return parts


def _copies(
    trained: Sequence[Part], measured: Sequence[Part], tokenizer: Any, section: DataSection, augment: AugmentSection,
    *, seed: int,
) -> StoredSet:  # fmt: skip
    """Return changed copies of the training rows as a source of their own; none of them equals a held-out row."""
    files = tuple(path for part, _ in trained for path in part.source.files)
    source = Source("augmented copies", files, "chat", {})
    held_out = {int(part.lint.hashes[row]) for part, rows in measured for row in rows.tolist()}
    key = {
        "data": [part.key for part, _ in trained],
        "rows": hashlib.sha256(b"|".join(rows.astype(np.int64).tobytes() for _, rows in trained)).hexdigest(),
        "held-out rows": hashlib.sha256(repr(sorted(held_out)).encode()).hexdigest(),
        "augment": augment.model_dump(mode="json", exclude={"neftune_alpha"}),
        "seed": seed,
        **tokenizer_parts(tokenizer, section.train_on),
    }

    def originals() -> Iterator[Original]:
        first_file = 0
        for part, rows in trained:
            for row, times in zip(*(values.tolist() for values in np.unique(rows, return_counts=True)), strict=True):
                if part.n_tokens[row]:  # a row that cannot be proved has no copies either
                    yield Original(part.row(row), int(part.lint.places[row]) + (first_file << FILE_SHIFT), times)
            first_file += len(part.source.files)

    def rows(lint: SetLint) -> Iterator[UsableRow]:
        return augmented_rows(originals(), lint, augment, seed=seed, held_out=held_out)

    return tokenized_rows(source, key, rows, tokenizer, train_on=section.train_on)


def _held_to_length(parts: Sequence[Part], section: DataSection, *, name: str) -> TokenizedSet:
    lengths = Lengths(
        source=np.concatenate([np.full(len(rows), number, np.int16) for number, (_, rows) in enumerate(parts)]),
        row=np.concatenate([rows for _, rows in parts]),
        n_tokens=np.concatenate([part.n_tokens[rows] for part, rows in parts]),
        n_trained=np.concatenate([part.n_trained[rows] for part, rows in parts]),
        n_answers=np.concatenate([part.n_answers[rows] for part, rows in parts]),
        runs=lambda entry: parts[int(lengths.source[entry])][0].encoded(int(lengths.row[entry]))[1],
    )

    def where(entry: int) -> str:
        return parts[int(lengths.source[entry])][0].where(int(lengths.row[entry]))

    pieces, counts = hold_to_length(lengths, section, where=where, name=name)
    stored = tuple(part for part, _ in parts)
    return TokenizedSet(TokenRows(stored, pieces), counts, histogram(lengths.n_tokens, section.max_seq_tokens))


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
