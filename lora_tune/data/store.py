"""Tokenized sources on disk: written once, found again by everything that decides their tokens."""

import hashlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pyarrow as pa

from lora_tune.data.files import digest_files
from lora_tune.data.lint import SHOWN_PROBLEMS, SetLint, UsableRow, usable_rows
from lora_tune.data.messages import Conversation, PlainText
from lora_tune.data.rendering import LossMaskError, fixed_template
from lora_tune.data.sources import Source
from lora_tune.data.stored import FACTS, ROWS, StoredSet, digest_of, file_digest, open_stored
from lora_tune.data.tokens import EncodedRow, RowTokenizer
from lora_tune.data.unpacked import data_suffix
from lora_tune.errors import CannotCreateError, CannotWriteError
from lora_tune.model.fingerprint import cache_root
from lora_tune.staging import staged_folder, translated

CHUNK_ROWS = 2048
"""Rows that are tokenized at once, at most."""
CHUNK_CHARS = 2 * 1024 * 1024
"""Characters of text that are tokenized at once, but for a single longer row."""
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


def tokenized_source(
    source: Source, tokenizer: Any, *, train_on: str, on_rows: Callable[[int], None] = lambda rows: None
) -> StoredSet:
    """Return the source's tokens: those kept from before where nothing has changed, freshly made ones otherwise.

    Raises:
        DataError: the columns are of no known format; bad rows stand in the lint, refused ones in the tally.
    """
    parts = {
        "data": digest_files(source.files),
        "kind of file": ["".join(data_suffix(path)) for path in source.files],
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
    root, key = cache_root() / "tokens", digest_of(parts)
    folder = root / key[:32]
    reason = ""
    if (folder / FACTS).is_file():
        with suppress(OSError):
            (folder / FACTS).touch()
        try:
            return open_stored(source, folder, KEPT)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            reason = "what was kept is damaged"
            rmtree(folder, ignore_errors=True)
    reason = reason or _why_fresh(root, parts, source)
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_unused(root)
        with staged_folder(folder) as stage:
            _write(source, rows, RowTokenizer(tokenizer, train_on=train_on), stage, parts)
    except (OSError, CannotCreateError, CannotWriteError):
        if not folder.is_dir():  # else another process was first, with equal content
            return _without_cache(source, parts, rows, RowTokenizer(tokenizer, train_on=train_on), reason)
    return open_stored(source, folder, reason)


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


def _why_fresh(root: Path, parts: Mapping[str, Any], source: Source) -> str:
    """Return which part differs from the nearest kept tokens of the same rows, or else of the same files."""
    nearest: list[str] = []
    edited = False
    for place in root.glob(f"*/{FACTS}"):
        with suppress(OSError, ValueError, KeyError):
            kept = json.loads(place.read_text(encoding="utf-8"))
            changed = [name for name in parts if kept["key"].get(name) != parts[name]]
            edited |= changed == ["data"] and kept["paths"] == _paths(source)
            if changed and "data" not in changed and (not nearest or len(changed) < len(nearest)):
                nearest = changed
    if nearest:
        return f"{' and '.join(nearest)} changed"
    return "data changed" if edited else "first time"


def _paths(source: Source) -> list[str]:
    return [str(path.resolve()) for path in source.files]


def _remove_unused(root: Path) -> None:
    """Remove what nobody used for long, and what killed processes left behind a day ago or more."""
    limits = [*((place, UNUSED_DAYS) for place in root.glob(f"*/{FACTS}")), *((left, 1) for left in root.glob(".*-*"))]
    for place, days in limits:
        with suppress(OSError):
            if time.time() - place.stat().st_mtime > days * 86_400:
                rmtree(place.parent if place.name == FACTS else place, ignore_errors=True)


def _without_cache(
    source: Source,
    parts: Mapping[str, Any],
    rows: Callable[[SetLint], Iterable[UsableRow]],
    tokenizer: RowTokenizer,
    reason: str,
) -> StoredSet:
    """Write the tokens into a folder that vanishes with this process: a full cache must not stop a run."""
    scratch = tempfile.TemporaryDirectory(prefix="lora_tune-", ignore_cleanup_errors=True)
    try:
        _write(source, rows, tokenizer, Path(scratch.name), parts)
    except OSError as err:
        raise translated(err, Path(scratch.name)) from err
    stored = open_stored(source, Path(scratch.name), f"{reason}; the cache cannot be written")
    _SCRATCH.append(scratch)
    return stored


_SCRATCH: list[tempfile.TemporaryDirectory[str]] = []


def _write(
    source: Source,
    rows: Callable[[SetLint], Iterable[UsableRow]],
    tokenizer: RowTokenizer,
    stage: Path,
    parts: Mapping[str, Any],
) -> None:
    lint, tally, digest = SetLint(), _Counting(), hashlib.sha256()
    with pa.OSFile(str(stage / ROWS), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        written = 0
        for chunk, found in _in_chunks(rows(lint), tokenizer):
            for number, (usable, row) in enumerate(zip(chunk, found, strict=True)):
                tally.add(written + number, usable.row, row)
            batch = _batch(chunk, found, lint, written)
            written += len(chunk)
            for name in ("ids", "runs"):
                digest.update(batch.column(name).values.to_numpy().tobytes())
            writer.write_batch(batch)
    facts = {
        "key": dict(parts), "paths": _paths(source), "lint": lint.as_facts(), "tally": tally.as_facts(),
        "digest": digest.hexdigest(), "rows": file_digest(stage / ROWS),
    }  # fmt: skip
    (stage / FACTS).write_text(json.dumps({**facts, "facts": digest_of(facts)}), encoding="utf-8")


Found = EncodedRow | LossMaskError


def _in_chunks(rows: Iterable[UsableRow], tokenizer: RowTokenizer) -> Iterator[tuple[list[UsableRow], list[Found]]]:
    """Read and render the next rows while the tokenizer, which is not Python, works on the last ones."""
    waiting = iter(rows)
    with ThreadPoolExecutor(1) as pool:
        chunk = _chunk(waiting)
        ahead = pool.submit(tokenizer.encode, tokenizer.draft([usable.row for usable in chunk]))
        while chunk:
            following = _chunk(waiting)
            drafts = tokenizer.draft([usable.row for usable in following])
            found = ahead.result()
            ahead = pool.submit(tokenizer.encode, drafts)
            yield chunk, found
            chunk = following


def _chunk(rows: Iterator[UsableRow]) -> list[UsableRow]:
    chunk, n_chars = [], 0
    for row in rows:
        chunk.append(row)
        n_chars += len(row.packed)
        if len(chunk) == CHUNK_ROWS or n_chars >= CHUNK_CHARS:
            break
    return chunk


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
