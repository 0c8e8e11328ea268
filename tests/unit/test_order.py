"""Orders of rows: every row once, the same for the same seed and epoch, little padding, packs that hold."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tune.data.order import choose_batching, grouped_batches, pack, padding_share, plan_batches, random_order
from lora_tune.recipe.schema import TrainSection

LENGTHS = st.lists(st.integers(1, 64), max_size=300).map(lambda lengths: np.array(lengths, dtype=np.int64))
SEEDS = st.integers(0, 2**32 - 1)
EPOCHS = st.integers(0, 5)
BATCHES = st.integers(1, 16)
UNHURRIED = settings(deadline=None)


def _long_tailed(n_rows: int) -> np.ndarray:
    return np.clip(np.random.default_rng(7).lognormal(5.0, 0.8, n_rows).astype(np.int64), 1, 1024)


def _batch_sets(order: np.ndarray, batch: int) -> set[frozenset[int]]:
    return {frozenset(order[start : start + batch].tolist()) for start in range(0, len(order), batch)}


@UNHURRIED
@given(LENGTHS, BATCHES, SEEDS, EPOCHS)
def test_every_row_comes_exactly_once_an_epoch(lengths, batch, seed, epoch):
    everything = list(range(len(lengths)))
    assert sorted(grouped_batches(lengths, batch, seed=seed, epoch=epoch).tolist()) == everything
    assert sorted(random_order(len(lengths), seed=seed, epoch=epoch).tolist()) == everything


@UNHURRIED
@given(LENGTHS, BATCHES, SEEDS, EPOCHS)
def test_seed_and_epoch_decide_and_numpys_global_state_does_not(lengths, batch, seed, epoch):
    found = []
    for elsewhere in (1, 2):
        np.random.seed(elsewhere)
        found.append(
            (
                grouped_batches(lengths, batch, seed=seed, epoch=epoch).tolist(),
                random_order(len(lengths), seed=seed, epoch=epoch).tolist(),
                [members.tolist() for members in pack(lengths, 64, seed=seed)],
            )
        )
    assert found[0] == found[1]


@UNHURRIED
@given(LENGTHS.filter(len), BATCHES, SEEDS)
def test_the_first_batch_of_all_holds_the_longest_row(lengths, batch, seed):
    first = grouped_batches(lengths, batch, seed=seed, epoch=0)[:batch]
    assert lengths[first].max() == lengths.max()


@UNHURRIED
@given(LENGTHS, BATCHES, SEEDS, EPOCHS)
def test_a_batch_runs_from_its_longest_row_to_its_shortest(lengths, batch, seed, epoch):
    order = grouped_batches(lengths, batch, seed=seed, epoch=epoch)
    for start in range(0, len(order), batch):
        found = lengths[order[start : start + batch]]
        assert (np.diff(found) <= 0).all()


@pytest.mark.parametrize("n_rows", [24, 100, 1000, 5000])
def test_batches_differ_between_epochs_and_seeds(n_rows):
    lengths = np.arange(1, n_rows + 1)  # no two alike: sorted as a whole they could be cut in one way only
    first = _batch_sets(grouped_batches(lengths, 4, seed=0, epoch=0), 4)
    for other in (
        grouped_batches(lengths, 4, seed=0, epoch=1),
        grouped_batches(lengths, 4, seed=1, epoch=0),
    ):
        assert len(first & _batch_sets(other, 4)) < len(first) / 2


def test_batches_stand_in_random_order_not_by_length():
    lengths = _long_tailed(4000)
    means = lengths[grouped_batches(lengths, 4, seed=0, epoch=1)].reshape(-1, 4).mean(axis=1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.1  # sorted, a batch would tell the next one's length


def test_grouped_batches_have_little_padding_where_random_ones_have_much():
    lengths = _long_tailed(10_000)
    for epoch in (0, 1):
        assert padding_share(lengths, grouped_batches(lengths, 4, seed=0, epoch=epoch), 4) < 0.05
        assert padding_share(lengths, random_order(len(lengths), seed=0, epoch=epoch), 4) > 0.35


def test_padding_share_is_that_of_the_rectangles():
    lengths = np.array([1, 3, 2, 2, 5])
    # 1 and 3 stand in 2 × 3 places, 2 and 2 in 2 × 2, 5 alone in 1 × 5: 15 places for 13 tokens.
    assert padding_share(lengths, np.arange(5), 2) == pytest.approx(2 / 15)
    assert padding_share(lengths, np.arange(5), 1) == 0.0
    assert padding_share(lengths, np.array([], dtype=np.int64), 2) == 0.0


@UNHURRIED
@given(LENGTHS, st.integers(64, 200), SEEDS)
def test_packs_hold_every_row_once_and_never_more_than_the_limit(lengths, limit, seed):
    packs = pack(lengths, limit, seed=seed)
    assert sorted(int(row) for members in packs for row in members) == list(range(len(lengths)))
    assert all(0 < lengths[members].sum() <= limit for members in packs)


@UNHURRIED
@given(LENGTHS, st.integers(64, 200), SEEDS)
def test_no_two_packs_would_fit_into_one(lengths, limit, seed):
    filled = sorted(int(lengths[members].sum()) for members in pack(lengths, limit, seed=seed))
    assert len(filled) < 2 or filled[0] + filled[1] > limit


def test_the_seed_decides_who_shares_a_pack():
    lengths = np.full(200, 10)
    together = [{frozenset(members.tolist()) for members in pack(lengths, 64, seed=seed)} for seed in (0, 1)]
    assert together[0] != together[1]


@pytest.mark.parametrize("lengths", [[3, 65], [0, 3]])
def test_a_row_that_no_pack_can_hold_is_our_own_mistake(lengths):
    with pytest.raises(AssertionError):
        pack(np.array(lengths), 64, seed=0)


def test_a_million_rows_are_packed_in_seconds_and_nearly_full():
    lengths = _long_tailed(1_000_000)
    start = time.monotonic()
    packs = pack(lengths, 1024, seed=0)
    assert time.monotonic() - start < 10
    assert lengths.sum() / (len(packs) * 1024) > 0.99


def test_auto_groups_rows_only_where_that_saves_work():
    alike, mixed = np.full(400, 60), np.arange(400) + 1
    assert choose_batching(alike, 4, seed=0) == "random"
    assert choose_batching(mixed, 4, seed=0) == "grouped"
    for lengths in (alike, mixed):
        plan = plan_batches(lengths, TrainSection(micro_batch_sequences=4), limit=512)
        cut = plan_batches(lengths, TrainSection(micro_batch_sequences=1, gradient_accumulation_steps=4), limit=512)
        assert plan.batching == cut.batching
        assert plan.order(1).tolist() == cut.order(1).tolist()


@pytest.mark.parametrize("batching", ["random", "grouped", "packed"])
def test_a_plan_holds_every_row_once(batching):
    lengths = np.arange(90) % 30 + 1
    plan = plan_batches(lengths, TrainSection(batching=batching), limit=64)
    rows = np.concatenate(plan.packs) if plan.packs is not None else np.arange(90)
    assert sorted(rows.tolist()) == list(range(90))
    assert int(plan.widths.sum()) == int(lengths.sum())
    assert sorted(plan.order(3).tolist()) == list(range(len(plan.widths)))
    assert plan.padding_share(4) == padding_share(plan.widths, plan.order(0), 4)
