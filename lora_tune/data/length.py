"""The length policy: what of which row is used, and a ledger of everything that is not."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_tune.errors import DataError
from lora_tune.recipe.schema import DataSection

Numbers = NDArray[np.integer[Any]]
Runs = NDArray[np.int32]


@dataclass(frozen=True)
class SetCounts:
    """What became of one set's rows."""

    rows_read: int
    """Rows of the set, repeats counted, before anything is left out."""

    rows: int
    """Sequences that are used: rows, or their parts under `split`."""

    rows_refused: int
    """Rows left out since it cannot be said for certain which of their tokens are trained."""

    rows_cut: int
    """Rows that lost their beginning or end to max_seq_tokens."""

    rows_split: int
    """Rows that became several sequences."""

    rows_dropped: int
    """Rows left out: longer than max_seq_tokens, or without a trained token after the cut."""

    tokens: int
    """Tokens of the used rows."""

    trained_tokens: int
    """Tokens of the used rows that add to the loss."""

    trained_tokens_lost: int
    """Tokens that would have added to the loss, had their row not been cut or dropped."""

    answers: int
    """Answers, each with its end-of-turn, of which at least one token is trained."""

    answers_without_end: int
    """Those of them whose end-of-turn was cut away: they teach nothing about stopping."""

    longest_tokens: int
    """Tokens of the longest row before the limit."""

    def as_dict(self) -> dict[str, int]:
        """The counts as reports print them."""
        return asdict(self)


@dataclass(frozen=True)
class Pieces:
    """What is used, one entry a sequence; all arrays are [N]."""

    source: Numbers
    """Number of the row's source."""

    row: Numbers
    """Number of the row in its source."""

    start: Numbers
    """First token that is used."""

    end: Numbers
    """The token after the last that is used."""

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class Lengths:
    """What the policy must know of a set's rows; arrays are [N]."""

    source: Numbers
    row: Numbers
    n_tokens: Numbers
    """0 for a refused row."""
    n_trained: Numbers
    n_answers: Numbers
    runs: Callable[[int], Runs]
    """Entry → trained runs of its row, [answers, 2]; asked only of rows that are too long."""


def hold_to_length(
    lengths: Lengths, section: DataSection, *, where: Callable[[int], str], name: str = "training"
) -> tuple[Pieces, SetCounts]:
    """Return what of each row is used under the section's policy, and what became of every row of the set called `name`.

    Raises:
        DataError: `too_long: fail` met a longer row, more trained tokens are lost than allowed, or no row is left.
    """
    limit = section.max_seq_tokens
    usable = lengths.n_tokens > 0
    long = lengths.n_tokens > limit
    if section.too_long == "fail" and long.any():
        first = int(np.argmax(long))
        raise DataError(
            f"{where(first)}: {lengths.n_tokens[first]} tokens, but data.max_seq_tokens is {limit} and data.too_long is fail"
            f" ({int(long.sum())} rows of {len(long)} are longer)",
            hint="raise data.max_seq_tokens, or set data.too_long to drop, cut_left, cut_right or split",
            where=where(first),
        )
    whole = np.flatnonzero(usable & ~long)
    windows = [
        window for entry in np.flatnonzero(long) for window in _windows(lengths, int(entry), limit, section.too_long)
    ]
    entries = np.array([window.entry for window in windows], np.int64)
    order = np.argsort(np.concatenate([whole, entries]), kind="stable")
    entry = np.concatenate([whole, entries])[order]
    start = np.concatenate([np.zeros(len(whole)), [window.start for window in windows]]).astype(np.int32)[order]
    end = np.concatenate([lengths.n_tokens[whole], [window.end for window in windows]]).astype(np.int32)[order]
    pieces = Pieces(lengths.source[entry], lengths.row[entry], start, end)
    if not len(pieces):
        raise _none_left(lengths, section, name)
    counts = _count(lengths, whole, windows, pieces, section)
    _hold_to_budget(lengths, counts, section, name)
    return pieces, counts


@dataclass(frozen=True)
class _Window:
    """A part of a row that is too long."""

    entry: int
    start: int
    end: int
    trained: int
    answers: int
    without_end: int


def _windows(lengths: Lengths, entry: int, limit: int, policy: str) -> list[_Window]:
    total = int(lengths.n_tokens[entry])
    if policy == "cut_right":
        edges = [(0, limit)]
    elif policy == "cut_left":
        edges = [(total - limit, total)]
    elif policy == "split":
        # Each part begins with the last token of the one before: a part's first token is never predicted.
        edges = [(start, min(start + limit, total)) for start in range(0, total - 1, limit - 1)]
    else:
        edges = []
    runs = lengths.runs(entry)
    made = [_window(entry, start, end, runs) for start, end in edges]
    return [window for window in made if window.trained]


def _window(entry: int, start: int, end: int, runs: Runs) -> _Window:
    first = start + 1 if start else 0  # the first token of a part has nothing before it to be predicted from
    kept = np.minimum(runs[:, 1], end) - np.maximum(runs[:, 0], first)
    reached = kept > 0
    return _Window(
        entry, start, end, int(kept[reached].sum()), int(reached.sum()), int((reached & (runs[:, 1] > end)).sum())
    )


def _count(
    lengths: Lengths, whole: Numbers, windows: Sequence[_Window], pieces: Pieces, section: DataSection
) -> SetCounts:
    trained = int(lengths.n_trained[whole].sum(dtype=np.int64)) + sum(window.trained for window in windows)
    used = {window.entry for window in windows}
    split = section.too_long == "split"
    return SetCounts(
        rows_read=len(lengths.row),
        rows=len(pieces),
        rows_refused=int((lengths.n_tokens == 0).sum()),
        rows_cut=0 if split else len(used),
        rows_split=len(used) if split else 0,
        rows_dropped=int((lengths.n_tokens > section.max_seq_tokens).sum()) - len(used),
        tokens=int((pieces.end - pieces.start).sum(dtype=np.int64)),
        trained_tokens=trained,
        trained_tokens_lost=int(lengths.n_trained.sum(dtype=np.int64)) - trained,
        # A part without its answer's end shares the answer with the next part.
        answers=int(lengths.n_answers[whole].sum(dtype=np.int64))
        + sum(window.answers - (window.without_end if split else 0) for window in windows),
        answers_without_end=0 if split else sum(window.without_end for window in windows),
        longest_tokens=int(lengths.n_tokens.max()),
    )


def _none_left(lengths: Lengths, section: DataSection, name: str) -> DataError:
    long = lengths.n_tokens[lengths.n_tokens > section.max_seq_tokens]
    shortest = f" (the shortest has {int(long.min())} tokens)" if len(long) else ""
    return DataError(
        f"no {name} row is left: of {len(lengths.row)}, {len(long)} are longer than data.max_seq_tokens = "
        f"{section.max_seq_tokens}{shortest} and {int((lengths.n_tokens == 0).sum())} cannot be trained on for certain",
        hint="raise data.max_seq_tokens",
        where="data.max_seq_tokens",
    )


def _hold_to_budget(lengths: Lengths, counts: SetCounts, section: DataSection, name: str) -> None:
    total = counts.trained_tokens + counts.trained_tokens_lost
    allowed = float(section.max_lost_tokens.removesuffix("%")) / 100
    if counts.trained_tokens_lost <= allowed * total:
        return
    raise DataError(
        f"data.max_seq_tokens = {section.max_seq_tokens} with data.too_long = {section.too_long} loses "
        f"{counts.trained_tokens_lost} of {total} trained tokens ({counts.trained_tokens_lost / total:.1%}) of the {name} rows, and "
        f"data.max_lost_tokens allows {section.max_lost_tokens}",
        hint=f"set data.max_seq_tokens to {_limit_within(lengths, allowed * total)} (the longest row has "
        f"{counts.longest_tokens}), or data.too_long to split, which loses none, or raise data.max_lost_tokens",
        where="data.max_seq_tokens",
    )


def _limit_within(lengths: Lengths, allowed: float) -> int:
    """Return the smallest limit at which the rows above it hold no more than `allowed` trained tokens."""
    order = np.argsort(lengths.n_tokens)[::-1]
    lost = np.cumsum(lengths.n_trained[order], dtype=np.int64)
    return int(lengths.n_tokens[order[int(np.searchsorted(lost, allowed, side="right"))]])


def histogram(n_tokens: Numbers, limit: int, bins: int = 20) -> list[dict[str, Any]]:
    """Return how many rows have how many tokens: bins of equal, round width up to the longest row."""
    longest = int(n_tokens.max(initial=1))
    width = max(1, -(-longest // bins))
    width = next(
        step for base in (1, 10, 100, 1000, 10**4, 10**5) for step in (base, 2 * base, 5 * base) if step >= width
    )
    counted = np.bincount((np.maximum(n_tokens, 1) - 1) // width)
    return [
        {
            "tokens_from": number * width + 1,
            "tokens_to": (number + 1) * width,
            "rows": int(rows),
            "too_long": number * width + 1 > limit,
        }
        for number, rows in enumerate(counted)
    ]
