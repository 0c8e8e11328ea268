"""Which rows are trained how often: the split, the mixture and the balance of labels, each from a seed."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.data.mixture import balance, hold_out, mix
from lora_tune.data.sources import Source
from lora_tune.errors import DataError


def source(name, **share):
    return Source(name, (Path(name),), "auto", {}, **share)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(lambda n: sum(n) > 1),
    st.floats(0.01, 0.5),
    st.integers(0, 9),
)
def test_every_row_is_trained_or_held_out(counts, share, seed):
    train, held = hold_out(counts, share, seed=seed)
    for count, kept, split in zip(counts, train, held, strict=True):
        assert sorted([*kept.tolist(), *split.tolist()]) == list(range(count))
    total = sum(counts)
    assert sum(map(len, held)) == min(max(1, round(share * total)), total - 1)
    again = hold_out(counts, share, seed=seed)
    assert all(np.array_equal(a, b) for a, b in zip(held, again[1], strict=True))


def test_one_row_cannot_be_split():
    with pytest.raises(DataError, match="at least 2 rows"):
        hold_out([1], 0.1, seed=0)


@pytest.mark.parametrize(("repeat", "expected"), [(None, 10), (2.0, 20), (0.3, 3), (1.5, 15)])
def test_a_repeat_trains_whole_passes_and_a_seeded_part(repeat, expected):
    (rows,), (share,) = mix([source("a", repeat=repeat)], [np.arange(10)], seed=0)
    assert len(rows) == share.used == expected
    times = Counter(rows.tolist())
    assert max(times.values()) - min(times.get(row, 0) for row in range(10)) <= 1
    assert np.array_equal(rows, mix([source("a", repeat=repeat)], [np.arange(10)], seed=0)[0][0])


def test_weights_share_out_as_many_rows_as_there_are():
    sources = [source("a", weight=3.0), source("b", weight=1.0)]
    rows, shares = mix(sources, [np.arange(20), np.arange(100)], seed=0)
    assert [len(own) for own in rows] == [90, 30]
    assert [share.as_dict()["rows_an_epoch"] for share in shares] == [90, 30]
    assert set(Counter(rows[0].tolist()).values()) == {4, 5}


def test_a_set_that_would_give_no_row_is_refused():
    with pytest.raises(DataError, match="b: no row of it would be trained"):
        mix([source("a"), source("b", repeat=0.001)], [np.arange(5), np.arange(5)], seed=0)


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=40), st.floats(0.0, 1.0))
def test_balancing_brings_rare_labels_up_and_takes_no_row_away(labels, share):
    rows = [np.arange(len(labels))]
    (more,) = balance([labels], rows, share, seed=0)
    before = Counter(label for label in labels if label)
    after = Counter(labels[row] for row in more.tolist() if labels[row])
    goal = round(share * max(before.values(), default=0))
    assert {label: max(count, goal) for label, count in before.items()} == after
    assert more.tolist()[: len(labels)] == list(range(len(labels)))
