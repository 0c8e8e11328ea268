"""Tokenized sources on disk: written once, found again by content, read row by row without filling memory."""

import hashlib
import json
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lora_tune.data.files import digest_files
from lora_tune.data.lint import SHOWN_PROBLEMS, SetLint, UsableRow, usable_rows, where_packed
from lora_tune.data.messages import Conversation, PlainText, row_from_json
from lora_tune.data.rendering import LossMaskError, fixed_template
from lora_tune.data.sources import Source
from lora_tune.data.tokens import EncodedRow, RowTokenizer, TokenizedRow
from lora_tune.errors import CannotCreateError, CannotWriteError
from lora_tune.model.fingerprint import cache_root
from lora_tune.staging import staged_folder

CHUNK_ROWS = 2048
"""Rows that are tokenized at once, and read at once."""
UNUSED_DAYS = 30
"""Tokens that were not used for so long are removed when others are written."""
KEPT = "kept from before"
"""Why nothing was tokenized."""
TEMPLATE = "template"
"""Stands among the roles for the tokens that the chat template adds around the words."""
_SCHEMA = pa.schema([
    ("ids", pa.large_list(pa.int32())), ("runs", pa.large_list(pa.int32())),
    ("row", pa.large_string()), ("hash", pa.uint64()), ("place", pa.uint64()),
])  # fmt: skip


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


def tokenized_source(
    source: Source, tokenizer: Any, *, train_on: str, on_rows: Callable[[int], None] = lambda rows: None
) -> StoredSet:
    """Return the source's tokens: those kept from before where nothing has changed, freshly made ones otherwise.

    Raises:
        DataError: the columns are of no known format; bad rows stand in the lint, refused ones in the tally.
    """
    parts = {
        "data": digest_files(source.files),
        "format": source.row_format,
        "columns": dict(source.columns),
        **tokenizer_parts(tokenizer, train_on),
    }

    def rows(lint: SetLint) -> Iterator[UsableRow]:
        for number, row in enumerate(usable_rows(source, lint)):
            if number % CHUNK_ROWS == 0:
                on_rows(number)
            yield row

    return tokenized_rows(source, parts, rows, tokenizer, train_on=train_on)


def tokenized_rows(
    source: Source,
    parts: Mapping[str, Any],
    rows: Callable[[SetLint], Iterable[UsableRow]],
    tokenizer: Any,
    *,
    train_on: str,
) -> StoredSet:
    """Return the tokens of `rows`, which `parts` decide: kept ones if there are any, else they are read and tokenized."""
    root = cache_root() / "tokens"
    folder = root / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    if (folder / "facts.json").is_file():
        with suppress(OSError):
            (folder / "facts.json").touch()
        try:
            return _open(source, folder, KEPT)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            rmtree(folder, ignore_errors=True)  # damaged
    reason = _why_fresh(root, parts)
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_unused(root)
        with staged_folder(folder) as stage:
            _write(rows, RowTokenizer(tokenizer, train_on=train_on), stage, parts)
    except (OSError, CannotCreateError, CannotWriteError):
        if not folder.is_dir():  # else another process was first, with equal content
            return _without_cache(source, parts, rows, RowTokenizer(tokenizer, train_on=train_on), reason)
    return _open(source, folder, reason)


def tokenizer_parts(tokenizer: Any, train_on: str) -> dict[str, Any]:
    """Return what besides the rows decides the tokens, by the word that a miss is explained with."""
    return {
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat template": hashlib.sha256(fixed_template(tokenizer).encode()).hexdigest(),
        "train_on": train_on,
        "libraries": {name: version(name) for name in ("tokenizers", "transformers", "jinja2")},
        "code of lora_tune": _code_digest(),
    }


@cache
def _code_digest() -> str:
    """A change of any file of this package makes every kept token stale."""
    return hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    ).hexdigest()


def _why_fresh(root: Path, parts: Mapping[str, Any]) -> str:
    """Return which part differs from the nearest kept tokens of the same rows."""
    nearest: list[str] | None = None
    for facts in root.glob("*/facts.json"):
        with suppress(OSError, ValueError, KeyError):
            kept = json.loads(facts.read_text(encoding="utf-8"))["key"]
            changed = [name for name in parts if kept.get(name) != parts[name]]
            if "data" not in changed and (nearest is None or len(changed) < len(nearest)):
                nearest = changed
    return "first time" if nearest is None else f"{' and '.join(nearest)} changed"


def _remove_unused(root: Path) -> None:
    for facts in root.glob("*/facts.json"):
        with suppress(OSError):
            if time.time() - facts.stat().st_mtime > UNUSED_DAYS * 86_400:
                rmtree(facts.parent, ignore_errors=True)


def _without_cache(
    source: Source,
    parts: Mapping[str, Any],
    rows: Callable[[SetLint], Iterable[UsableRow]],
    tokenizer: RowTokenizer,
    reason: str,
) -> StoredSet:
    """Write the tokens into a folder that vanishes with this process: a full cache must not stop a run."""
    scratch = tempfile.TemporaryDirectory(prefix="lora_tune-", ignore_cleanup_errors=True)
    _write(rows, tokenizer, Path(scratch.name), parts)
    stored = _open(source, Path(scratch.name), f"{reason}; the cache cannot be written")
    _SCRATCH.append(scratch)
    return stored


_SCRATCH: list[tempfile.TemporaryDirectory[str]] = []


def _write(
    rows: Callable[[SetLint], Iterable[UsableRow]], tokenizer: RowTokenizer, stage: Path, parts: Mapping[str, Any]
) -> None:
    lint, tally, digest = SetLint(), _Counting(), hashlib.sha256()
    with pa.OSFile(str(stage / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        written = 0
        for chunk, found in _in_chunks(rows(lint), tokenizer):
            for number, (usable, row) in enumerate(zip(chunk, found, strict=True)):
                tally.add(written + number, usable.row, row)
            batch = _batch(chunk, found, lint, written)
            written += len(chunk)
            for name in ("ids", "runs"):
                digest.update(batch.column(name).values.to_numpy().tobytes())
            writer.write_batch(batch)
    facts = {"key": dict(parts), "lint": lint.as_facts(), "tally": tally.as_facts(), "digest": digest.hexdigest()}
    (stage / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


Found = EncodedRow | LossMaskError


def _in_chunks(rows: Iterable[UsableRow], tokenizer: RowTokenizer) -> Iterator[tuple[list[UsableRow], list[Found]]]:
    """Read and render the next rows while the tokenizer, which is not Python, works on the last ones."""
    waiting = iter(rows)
    with ThreadPoolExecutor(1) as pool:
        chunk = list(islice(waiting, CHUNK_ROWS))
        ahead = pool.submit(tokenizer.encode, tokenizer.draft([usable.row for usable in chunk]))
        while chunk:
            following = list(islice(waiting, CHUNK_ROWS))
            drafts = tokenizer.draft([usable.row for usable in following])
            found = ahead.result()
            ahead = pool.submit(tokenizer.encode, drafts)
            yield chunk, found
            chunk = following


class _Counting:
    """The tally while rows are written."""

    def __init__(self) -> None:
        self.roles: Counter[str] = Counter()
        self.trained: Counter[str] = Counter()
        self.refused: list[tuple[int, str]] = []
        self.n_refused = 0
        self.hint = ""
        self.systems: dict[str | None, None] = {}

    def add(self, number: int, row: Conversation | PlainText, found: Found) -> None:
        if len(self.systems) < 2 and isinstance(row, Conversation):
            self.systems[row.messages[0].content if row.messages[0].role == "system" else None] = None
        if isinstance(found, LossMaskError):
            self.n_refused += 1
            self.hint = self.hint or found.hint
            if len(self.refused) < SHOWN_PROBLEMS:
                self.refused.append((number, found.message))
            return
        words = 0
        for role, tokens, trained in found.roles:
            self.roles[role] += tokens
            self.trained[role] += trained
            words += tokens
        self.roles[TEMPLATE] += len(found.ids) - words
        self.trained[TEMPLATE] += sum(end - start for start, end in found.runs) - sum(row[2] for row in found.roles)

    def as_facts(self) -> dict[str, Any]:
        return {
            "roles": {role: [count, self.trained[role]] for role, count in self.roles.items()},
            "refused": self.refused,
            "n_refused": self.n_refused,
            "hint": self.hint,
            "systems": list(self.systems),
        }


def _batch(chunk: Sequence[UsableRow], found: Sequence[Found], lint: SetLint, first: int) -> Any:
    rows = [row if isinstance(row, EncodedRow) else EncodedRow([], (), ()) for row in found]
    span = slice(first, first + len(chunk))
    return pa.record_batch(
        [
            _lists([row.ids for row in rows]),
            _lists([[edge for run in row.runs for edge in run] for row in rows]),
            pa.array([usable.packed for usable in chunk], pa.large_string()),
            pa.array(np.frombuffer(lint.hashes[span], np.uint64)),
            pa.array(np.frombuffer(lint.places[span], np.uint64)),
        ],
        schema=_SCHEMA,
    )


def _lists(rows: Sequence[list[int]]) -> Any:
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.fromiter(chain.from_iterable(rows), np.int32, count=int(offsets[-1]))
    return pa.LargeListArray.from_arrays(offsets, values)


def _open(source: Source, folder: Path, reason: str) -> StoredSet:
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    table = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow"))).read_all()
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
