"""Which rows of which source are trained and which are held out, and how often: numbers only, no rows."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_tune.data.sources import Source
from lora_tune.errors import DataError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """What of one source is trained."""

    name: str
    rows: int
    """Its training rows."""

    used: int
    """Rows trained in an epoch, repeats counted."""

    def as_dict(self) -> dict[str, Any]:
        """The share as reports print it."""
        return {"source": self.name, "rows": self.rows, "rows_an_epoch": self.used}


def hold_out(counts: Sequence[int], share: float, *, seed: int) -> tuple[list[Indices], list[Indices]]:
    """Return training and held-out rows by source: round(share x rows) of all rows, at least one, chosen by the seed.

    Raises:
        DataError: there are fewer than two rows to split.
    """
    everything = [np.arange(count, dtype=np.int64) for count in counts]
    if share == 0.0:
        return everything, [np.empty(0, np.int64) for _ in counts]
    total = sum(counts)
    if total < 2:
        raise DataError(
            f"data.eval_split needs at least 2 rows; found {total}", hint="add rows, or set eval_split to 0"
        )
    count = min(max(1, round(share * total)), total - 1)
    chosen = np.zeros(total, dtype=bool)
    chosen[random.Random(f"held-out {seed}").sample(range(total), count)] = True  # noqa: S311 - a split, not a secret
    parts = np.split(chosen, np.cumsum(counts)[:-1])
    return [rows[~part] for rows, part in zip(everything, parts, strict=True)], [
        rows[part] for rows, part in zip(everything, parts, strict=True)
    ]


def mix(sources: Sequence[Source], rows: Sequence[Indices], *, seed: int) -> tuple[list[Indices], list[Share]]:
    """Return each source's rows for an epoch: whole passes first, then a seeded choice for what is left over.

    With weights, the mixture has as many rows as all sources together, shared out by weight.

    Raises:
        DataError: a source would give no row at all.
    """
    total, weights = sum(map(len, rows)), sum(source.weight or 0.0 for source in sources)
    mixed, shares = [], []
    for number, (source, own) in enumerate(zip(sources, rows, strict=True)):
        if source.weight is not None:
            wanted = round(total * source.weight / weights)
        else:
            wanted = round(len(own) * (source.repeat if source.repeat is not None else 1.0))
        if wanted == 0 or not len(own):
            raise DataError(
                f"{source.name}: no row of it would be trained ({len(own)} rows, {wanted} wanted)",
                hint="raise its weight or repeat, or take it out of data.mix",
                where="data.mix",
            )
        passes, rest = divmod(wanted, len(own))
        extra = random.Random(f"mix {seed} {number}").sample(range(len(own)), rest)  # noqa: S311
        mixed.append(np.concatenate([*[own] * passes, own[np.sort(np.array(extra, np.int64))]]))
        shares.append(Share(source.name, len(own), wanted))
    return mixed, shares


def balance(
    labels: Sequence[Sequence[str | None]], rows: Sequence[Indices], share: float, *, seed: int
) -> list[Indices]:
    """Return the rows with those of rare labels repeated, up to `share` of the commonest label's rows.

    Args:
        labels: by source, the label of each of `rows`; None is never repeated.
        rows: by source, the rows of an epoch.
        share: 1 brings every label to the commonest one's count.
        seed: chooses which rows are repeated once more than the others.
    """
    places: dict[str, list[tuple[int, int]]] = {}
    for source, own in enumerate(labels):
        for position, label in enumerate(own):
            if label is not None:
                places.setdefault(label, []).append((source, position))
    goal = round(share * max(map(len, places.values()), default=0))
    extra: list[list[int]] = [[] for _ in rows]
    for label, own_places in sorted(places.items()):
        passes, rest = divmod(max(0, goal - len(own_places)), len(own_places))
        chosen = random.Random(f"balance {seed} {label}").sample(own_places, rest)  # noqa: S311
        for source, position in [*own_places * passes, *chosen]:
            extra[source].append(int(rows[source][position]))
    return [np.concatenate([own, np.array(more, np.int64)]) for own, more in zip(rows, extra, strict=True)]
