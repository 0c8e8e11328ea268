"""One tokenized source on disk, memory-mapped: read row by row, without filling memory."""

import hashlib
import json
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lora_tune.data.lint import SetLint, where_packed
from lora_tune.data.messages import Conversation, PlainText, row_from_json
from lora_tune.data.sources import Source
from lora_tune.data.tokens import TokenizedRow

FACTS, ROWS = "facts.json", "rows.arrow"


@dataclass(frozen=True)
class Tally:
    """What the tokens of one source say, over all of its rows."""

    roles: Mapping[str, tuple[int, int]]
    """By role: tokens of its words, and how many of them are trained."""

    refused: tuple[str, ...]
    """`file:line: reason` of the first rows that cannot be trained on for certain."""

    n_refused: int
    hint: str
    """What to do about the first of them."""

    systems: tuple[str | None, ...]
    """System messages that rows begin with, at most two; None stands for none."""


@dataclass(frozen=True)
class StoredSet:
    """One source as tokens, memory-mapped; rows are numbered as the lint counts them."""

    source: Source
    lint: SetLint
    tally: Tally
    reason: str
    """Why it was tokenized: `kept from before`, `first time`, or what has changed since."""

    key: str
    """sha256 over everything that decides its rows, their places and their tokens."""

    digest: str
    """sha256 over ids and loss masks of all rows."""

    table: Any
    """Arrow table with the columns of the schema above."""

    n_tokens: NDArray[np.int32]
    """Tokens of each row, before the length limit; 0 for a refused row."""

    n_trained: NDArray[np.int32]
    """Trained tokens of each row."""

    n_answers: NDArray[np.int32]
    """Trained runs of each row."""

    def encoded(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return ids, [T], and trained runs, [N, 2], of a row."""
        ids, runs = (self.table.column(name)[row].values.to_numpy() for name in ("ids", "runs"))
        return ids, runs.reshape(-1, 2)

    def where(self, row: int) -> str:
        """Return `file:line` of a row."""
        return where_packed(self.source, int(self.lint.places[row]))

    def row(self, row: int) -> Conversation | PlainText:
        """Return a row as messages or text."""
        return row_from_json(self.table.column("row")[row].as_py(), self.where(row))

    def tokenized(self, row: int, start: int, end: int) -> TokenizedRow:
        """Return a row's tokens in [start, end)."""
        ids, runs = self.encoded(row)
        trained = np.zeros(len(ids), dtype=bool)
        for first, last in runs:
            trained[first:last] = True
        if start:
            trained[start] = False  # nothing stands before it in this part, so it is not predicted
        return TokenizedRow(tuple(ids[start:end].tolist()), tuple(trained[start:end].tolist()), self.where(row))


def open_stored(source: Source, folder: Path, reason: str) -> StoredSet:
    """Return what store.py wrote into `folder`, checked to be the very bytes that it wrote.

    Raises:
        OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException: it is not there, or damaged.
    """
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    told = facts.pop("facts")
    if told != digest_of(facts) or facts["rows"] != file_digest(folder / ROWS):
        raise ValueError(f"{folder} was changed after it was written")
    table = pa.ipc.open_file(pa.memory_map(str(folder / ROWS))).read_all()
    hashes, places = array("Q"), array("Q")
    for column, values in (("hash", hashes), ("place", places)):
        values.frombytes(table.column(column).to_numpy().tobytes())
    lint, tally = SetLint.from_facts(facts["lint"], hashes, places), facts["tally"]
    refused = tuple(f"{where_packed(source, int(places[number]))}: {reason}" for number, reason in tally["refused"])
    return StoredSet(
        source=source,
        lint=lint,
        tally=Tally(
            roles={role: (count, trained) for role, (count, trained) in tally["roles"].items()},
            refused=refused,
            n_refused=tally["n_refused"],
            hint=tally["hint"],
            systems=tuple(tally["systems"]),
        ),
        reason=reason,
        key=digest_of(facts["key"]),
        digest=facts["digest"],
        table=table,
        n_tokens=_per_row(table.column("ids"), lambda values: np.ones(len(values), np.int32), 1),
        n_trained=_per_row(table.column("runs"), lambda values: values[1::2] - values[0::2], 2),
        n_answers=_per_row(table.column("runs"), lambda values: np.ones(len(values) // 2, np.int32), 2),
    )


def _per_row(column: Any, measure: Callable[[NDArray[np.int32]], NDArray[np.int32]], width: int) -> NDArray[np.int32]:
    """Return the sum of `measure` over each row's list; one measured value stands for `width` entries."""
    parts = [np.empty(0, np.int32)]
    for chunk in column.chunks:
        sums = np.concatenate([[0], np.cumsum(measure(chunk.values.to_numpy()), dtype=np.int64)])
        edges = sums[chunk.offsets.to_numpy() // width]
        parts.append(np.diff(edges).astype(np.int32))
    return np.concatenate(parts)


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(values: Mapping[str, Any]) -> str:
    """Return the sha256 of plain data."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
