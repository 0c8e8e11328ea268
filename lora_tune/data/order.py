"""In which order rows are trained: at random, in batches of like length, or joined into packs. Numbers in, numbers out.

Every order is a function of the rows' lengths, the seed and the epoch alone, so a resumed run goes on with exactly the
rows that were left.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lora_tune.recipe.schema import TrainSection

Indices = NDArray[np.int64]

WORTH_GROUPING = 0.1
"""Rows are grouped where rows at random would be padded by this share of the tokens more."""
GROUP_BATCHES = 50
"""Batches whose rows are sorted by length together: enough for little padding, few enough that batches differ between epochs."""


@dataclass(frozen=True)
class BatchPlan:
    """How rows share a forward pass, epoch by epoch."""

    batching: Literal["grouped", "random", "packed"]
    """What the recipe says, or `auto` chose."""

    widths: Indices
    """Tokens of what stands side by side: of each row, or of each pack, [sequences]."""

    packs: Sequence[Indices] | None
    """The rows of each pack; None where rows stand alone."""

    step_sequences: int
    """Sequences of one step."""

    seed: int

    def order(self, epoch: int) -> Indices:
        """Return every sequence once, in the order of that epoch, [sequences]."""
        if self.batching == "random":
            return random_order(len(self.widths), seed=self.seed, epoch=epoch)
        return grouped_batches(self.widths, self.step_sequences, seed=self.seed, epoch=epoch)

    def steps(self, section: TrainSection) -> int:
        """Return how many steps the section takes over these sequences."""
        return n_steps(section, len(self.widths))

    def padding_share(self, batch: int) -> float:
        """Return the share of padding in the first epoch when `batch` sequences stand side by side."""
        return padding_share(self.widths, self.order(0), batch)


def plan_batches(lengths: Indices, section: TrainSection, *, limit: int) -> BatchPlan:
    """Return how these rows are batched.

    Args:
        lengths: tokens of each row, [rows].
        section: batching, step size and seed.
        limit: tokens of a full pack.
    """
    batching, seed = section.batching, section.seed
    step_sequences = section.micro_batch_sequences * section.gradient_accumulation_steps
    if batching == "packed":
        packs = pack(lengths, limit, seed=seed)
        widths = np.array([int(lengths[members].sum()) for members in packs], dtype=np.int64)
        return BatchPlan(batching, widths, packs, step_sequences, seed)
    chosen = choose_batching(lengths, step_sequences, seed=seed) if batching == "auto" else batching
    return BatchPlan(chosen, lengths, None, step_sequences, seed)


def n_steps(section: TrainSection, n_sequences: int) -> int:
    """Return how many steps a run takes, as the trainer counts: a last, smaller batch is a step too."""
    if section.max_steps is not None:
        return section.max_steps
    micro_batches = -(-n_sequences // section.micro_batch_sequences)
    per_epoch = max(1, -(-micro_batches // section.gradient_accumulation_steps))
    return -int(-section.epochs * per_epoch // 1)


def random_order(n_rows: int, *, seed: int, epoch: int, draw: int = 0) -> Indices:
    """Return every row index once, in an order drawn from (seed, epoch, draw), [n_rows].

    Source: NEP 19 promises that a bit generator's raw numbers never change with numpy's version; it promises less of
        `Generator.permutation`, and a checkpoint may be resumed after an upgrade.
    """
    numbers = np.random.PCG64(np.random.SeedSequence([seed, epoch, draw])).random_raw(n_rows)
    return np.argsort(np.asarray(numbers, dtype=np.uint64), kind="stable").astype(np.int64)


def grouped_batches(lengths: Indices, batch: int, *, seed: int, epoch: int) -> Indices:
    """Return every row index once, such that each `batch` of them in a row have like lengths, longest first, [rows].

    The batches stand in random order, but for two: in epoch 0 the one with the longest row comes first, so that memory
    runs out at the first step or never; the last batch of an epoch may hold fewer rows.

    Args:
        lengths: tokens of each row, [rows].
        batch: rows that belong together: those of one step, so that cutting a step into other micro-batches trains the
            same rows.
        seed: of the run.
        epoch: from 0.
    """
    n_full = len(lengths) // batch
    # Small sets are sorted in two halves at least: sorted as a whole, every epoch would have the same batches.
    group_batches = max(1, min(GROUP_BATCHES, n_full // 2))
    n_groups = max(1, n_full // group_batches)
    shuffled = random_order(len(lengths), seed=seed, epoch=epoch)
    group = np.minimum(np.arange(len(lengths)) // (batch * group_batches), n_groups - 1)
    rows = shuffled[np.lexsort((-lengths[shuffled], group))]
    batches, rest = rows[: n_full * batch].reshape(n_full, batch), rows[n_full * batch :]
    batches = batches[random_order(n_full, seed=seed, epoch=epoch, draw=1)]
    if epoch == 0 and n_full:
        longest = int(np.argmax(lengths[batches[:, 0]]))
        batches[[0, longest]] = batches[[longest, 0]]
    return np.concatenate([batches.ravel(), rest])


def pack(lengths: Indices, limit: int, *, seed: int) -> list[Indices]:
    """Return packs of row indices whose tokens together are at most `limit`; every row is in exactly one.

    Best fit, longest rows first; the seed decides among rows of one length. The packs do not change from epoch to epoch
    (their order should), for the number of steps in an epoch must not.

    Args:
        lengths: tokens of each row, [rows], each from 1 to `limit`: longer rows were dealt with by `data.too_long`.
        limit: tokens of a full pack.
        seed: of the run.
    """
    if not len(lengths):
        return []
    assert int(lengths.min()) >= 1 and int(lengths.max()) <= limit, "a row is empty or longer than a pack"
    shuffled = random_order(len(lengths), seed=seed, epoch=0)
    rows = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    pack_of_row = np.empty(len(lengths), dtype=np.int64)
    pack_of_row[rows], n_packs = _best_fit(lengths[rows].tolist(), limit)
    in_packs = np.argsort(pack_of_row, kind="stable")
    ends = np.cumsum(np.bincount(pack_of_row, minlength=n_packs))
    return np.split(in_packs, ends[:-1])


def choose_batching(lengths: Indices, batch: int, *, seed: int) -> Literal["random", "grouped"]:
    """Return what `train.batching: auto` means for these rows: grouped where that saves real work, else random.

    Rows of one length are often rows of one kind, so they are mixed where grouping saves little.

    Args:
        lengths: tokens of each row, [rows].
        batch: rows of a step, so that the choice is the same however the step is cut into micro-batches.
        seed: of the run.
    """
    at_random = padding_share(lengths, random_order(len(lengths), seed=seed, epoch=0), batch)
    grouped = padding_share(lengths, grouped_batches(lengths, batch, seed=seed, epoch=0), batch)
    return "grouped" if at_random - grouped >= WORTH_GROUPING else "random"


def padding_share(lengths: Indices, order: Indices, batch: int) -> float:
    """Return the share of padding when each `batch` rows in `order` are padded to the longest of them."""
    if not len(order):
        return 0.0
    starts = np.arange(0, len(order), batch)
    widths = np.maximum.reduceat(lengths[order], starts)
    computed = int((widths * np.diff(np.append(starts, len(order)))).sum())
    return 1.0 - int(lengths[order].sum()) / computed


def _best_fit(descending: list[int], limit: int) -> tuple[list[int], int]:
    """Return the pack of each length, and the count of packs: each goes where it leaves the least room."""
    rooms: list[int] = []  # sorted, each once: what is free in the packs of `packs_with`
    packs_with: dict[int, list[int]] = {}
    chosen, n_packs = [], 0
    for length in descending:
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, number = limit, n_packs
            n_packs += 1
        else:
            room = rooms[at]
            number = packs_with[room].pop()
            if not packs_with[room]:
                del rooms[at]
        left = room - length
        if left:
            waiting = packs_with.setdefault(left, [])
            if not waiting:
                insort(rooms, left)
            waiting.append(number)
        chosen.append(number)
    return chosen, n_packs
