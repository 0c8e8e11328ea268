"""From a recipe's rows to what the trainer is fed: tokenized, held to the length limit, counted.

Nothing is cut or dropped without standing in the counts.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lora_tune.data.lint import CheckedRows, check_rows
from lora_tune.data.messages import Conversation
from lora_tune.data.tokens import LossMaskError, TokenizedRow, loss_labels, tokenize
from lora_tune.errors import DataError
from lora_tune.recipe.schema import DataSection

SHOWN_ROWS = 20


@dataclass(frozen=True)
class SetCounts:
    """What became of one set's rows."""

    rows_read: int
    """Rows in the file, or its part."""

    rows: int
    """Rows that are used."""

    rows_cut: int
    """Rows that lost their end to max_seq_tokens."""

    rows_dropped: int
    """Rows left out: longer than max_seq_tokens, or cut until no trained token was left."""

    tokens: int
    """Tokens of the used rows."""

    trained_tokens: int
    """Tokens of the used rows that add to the loss."""

    trained_tokens_lost: int
    """Tokens that would have added to the loss, had their row not been cut or dropped."""

    longest_tokens: int
    """Tokens of the longest row before the limit."""

    def as_dict(self) -> dict[str, int]:
        """The counts as reports print them."""
        return asdict(self)


@dataclass(frozen=True)
class TokenizedSet:
    """One set, ready to train or measure on."""

    rows: tuple[TokenizedRow, ...]
    """Tokens of the used rows."""

    conversations: tuple[Conversation, ...]
    """The same rows as messages, in the same order."""

    counts: SetCounts
    """What became of every row that was read."""

    def shared_system_message(self) -> str | None:
        """Return the system message that every row begins with, or None."""
        first = {row.messages[0].content if row.messages[0].role == "system" else None for row in self.conversations}
        return first.pop() if len(first) == 1 else None


@dataclass(frozen=True)
class Splits:
    """Everything the trainer and the evaluation need of the data."""

    train: TokenizedSet
    held_out: TokenizedSet | None
    checked: CheckedRows
    digest: str
    """sha256 over the used rows' tokens and loss masks, training set first."""

    def counts(self) -> dict[str, dict[str, int]]:
        """Counts by set, as printed and kept."""
        sets = {"train": self.train} | ({"held_out": self.held_out} if self.held_out else {})
        return {name: part.counts.as_dict() for name, part in sets.items()}


def prepare_dataset(section: DataSection, tokenizer: Any, *, seed: int) -> Splits:
    """Read, check, split, tokenize and count.

    Raises:
        MissingInputError: a file is not there.
        DataError: rows are wrong, no trained token can be proved, or `too_long: fail` met a longer row.
    """
    checked = check_rows(section, seed=seed)
    train = tokenize_set(checked.train, tokenizer, section)
    held_out = tokenize_set(checked.held_out, tokenizer, section) if checked.held_out else None
    return Splits(train, held_out, checked, _digest(train, held_out))


def tokenize_set(conversations: Sequence[Conversation], tokenizer: Any, section: DataSection) -> TokenizedSet:
    """Return the set's tokens under the section's length policy, with counts."""
    full, problems = [], []
    hint = ""
    for conversation in conversations:
        try:
            full.append((conversation, tokenize(conversation, tokenizer, train_on=section.train_on)))
        except LossMaskError as err:
            problems.append(f"{conversation.where}: {err.message}")
            hint = hint or err.hint
    if problems:
        shown = problems[:SHOWN_ROWS] + (
            [f"… and {len(problems) - SHOWN_ROWS} more"] if len(problems) > SHOWN_ROWS else []
        )
        raise DataError(
            "\n  ".join([f"{len(problems)} of {len(conversations)} rows cannot be trained on for certain", *shown]),
            hint=hint or "`lora-tune preview RECIPE` shows the tokens of the others",
            where=problems[0].split(": ", 1)[0],
        )
    return _hold_to_length(full, section)


def as_examples(rows: Sequence[TokenizedRow]) -> Any:
    """Return the rows as a datasets.Dataset of `input_ids` and `labels`, which TRL passes on untouched."""
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "input_ids": [list(row.input_ids) for row in rows],
            "labels": [loss_labels(row.input_ids, row.trained) for row in rows],
        }
    )


def _hold_to_length(full: Sequence[tuple[Conversation, TokenizedRow]], section: DataSection) -> TokenizedSet:
    limit = section.max_seq_tokens
    used: list[tuple[Conversation, TokenizedRow]] = []
    cut = 0
    for conversation, row in full:
        kept = row
        if len(row.input_ids) > limit:
            if section.too_long == "fail":
                raise DataError(
                    f"{row.where}: {len(row.input_ids)} tokens, but data.max_seq_tokens is {limit} and data.too_long is fail",
                    hint="raise data.max_seq_tokens, or set data.too_long to drop or cut_right",
                    where=row.where,
                )
            if section.too_long == "drop" or not any(row.trained[:limit]):
                continue
            kept = replace(row, input_ids=row.input_ids[:limit], trained=row.trained[:limit])
            cut += 1
        used.append((conversation, kept))
    if not used:
        raise DataError(
            f"no row is left: all {len(full)} are longer than data.max_seq_tokens = {limit}",
            hint="raise data.max_seq_tokens",
        )
    rows = tuple(row for _, row in used)
    trained = sum(row.n_trained for row in rows)
    counts = SetCounts(
        rows_read=len(full),
        rows=len(rows),
        rows_cut=cut,
        rows_dropped=len(full) - len(rows),
        tokens=sum(len(row.input_ids) for row in rows),
        trained_tokens=trained,
        trained_tokens_lost=sum(row.n_trained for _, row in full) - trained,
        longest_tokens=max(len(row.input_ids) for _, row in full),
    )
    return TokenizedSet(rows, tuple(conversation for conversation, _ in used), counts)


def _digest(train: TokenizedSet, held_out: TokenizedSet | None) -> str:
    digest = hashlib.sha256()
    for part in (train, held_out):
        for row in part.rows if part else ():
            digest.update(f"{row.input_ids}{[int(on) for on in row.trained]}\n".encode())
        digest.update(b"--\n")
    return digest.hexdigest()
