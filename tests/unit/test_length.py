"""The length policy: nothing is cut, dropped or split uncounted, and no trained token is lost without a word."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.data.length import Lengths, histogram, hold_to_length
from lora_tune.errors import DataError
from lora_tune.recipe.schema import DataSection

LIMIT = 16


@st.composite
def row_masks(draw):
    """Rows as loss masks: [T] booleans with at least one trained token, never the first."""
    mask = draw(st.lists(st.booleans(), min_size=2, max_size=60).filter(lambda mask: any(mask[1:])))
    return [False, *mask[1:]]


def lengths_of(masks):
    runs = []
    for mask in masks:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], np.array(mask, int), [0]])))
        runs.append(edges.reshape(-1, 2).astype(np.int32))
    return Lengths(
        source=np.zeros(len(masks), np.int64),
        row=np.arange(len(masks)),
        n_tokens=np.array([len(mask) for mask in masks]),
        n_trained=np.array([sum(mask) for mask in masks]),
        n_answers=np.array([len(run) for run in runs]),
        runs=lambda entry: runs[entry],
    )


def held(masks, too_long, *, limit=LIMIT, budget="100%"):
    section = DataSection(path="x.jsonl", max_seq_tokens=limit, too_long=too_long, max_lost_tokens=budget)
    return hold_to_length(lengths_of(masks), section, where=lambda entry: f"row:{entry}")


def trained_in(masks, pieces):
    """Return, from the masks alone, every (row, token) that adds to the loss: a piece's first token is not predicted."""
    pairs = zip(pieces.row.tolist(), pieces.start.tolist(), pieces.end.tolist(), strict=True)
    return [(row, t) for row, start, end in pairs for t in range(start + (start > 0), end) if masks[row][t]]


@given(
    masks=st.lists(row_masks(), min_size=1, max_size=8),
    too_long=st.sampled_from(["drop", "cut_left", "cut_right", "split"]),
)
def test_the_ledger_equals_what_is_used(masks, too_long):
    try:
        pieces, counts = held(masks, too_long)
    except DataError as err:
        assert "row is left" in err.message
        assert all(len(mask) > LIMIT for mask in masks)
        return
    used = trained_in(masks, pieces)
    assert len(set(used)) == len(used) == counts.trained_tokens
    assert counts.trained_tokens + counts.trained_tokens_lost == sum(map(sum, masks))
    assert counts.tokens == int((pieces.end - pieces.start).sum())
    assert counts.rows == len(pieces)
    assert counts.rows_read == len(masks) == len(set(pieces.row.tolist())) + counts.rows_dropped
    assert int((pieces.end - pieces.start).max()) <= LIMIT
    assert {row for row, _ in used} == set(pieces.row.tolist())
    assert pieces.row.tolist() == sorted(pieces.row.tolist())


@given(masks=st.lists(row_masks(), min_size=1, max_size=8))
def test_splitting_loses_no_trained_token(masks):
    pieces, counts = held(masks, "split", budget="0%")
    assert counts.trained_tokens_lost == 0
    assert sorted(trained_in(masks, pieces)) == [
        (r, t) for r, mask in enumerate(masks) for t, on in enumerate(mask) if on
    ]


@given(masks=st.lists(row_masks(), min_size=1, max_size=8))
def test_an_answer_whose_end_is_cut_away_is_counted(masks):
    try:
        pieces, counts = held(masks, "cut_right")
    except DataError:
        return
    ends = [
        [*mask, False].index(False, t) for mask in masks for t in range(1, len(mask)) if mask[t] and not mask[t - 1]
    ]
    without = sum(
        any(mask[t] for t in range(start, LIMIT)) and end > LIMIT
        for mask in masks
        for start in range(1, len(mask))
        if mask[start] and not mask[start - 1]
        for end in [[*mask, False].index(False, start)]
    )
    assert counts.answers_without_end == without
    assert counts.answers <= len(ends)
    assert len(pieces) == counts.rows


def test_more_loss_than_the_budget_stops_with_a_limit_that_would_do():
    masks = [[False] + [True] * 9] * 97 + [[False] + [True] * 99] * 3
    with pytest.raises(DataError, match="loses 297 of 1170 trained tokens") as caught:
        held(masks, "drop", budget="5%")
    assert "set data.max_seq_tokens to 100" in caught.value.hint
    assert held(masks, "drop", limit=100, budget="5%")[1].trained_tokens_lost == 0
    assert held(masks, "drop", budget="26%")[1].rows_dropped == 3


def test_the_policy_fail_names_the_first_long_row_and_how_many_there_are():
    with pytest.raises(DataError, match=r"row:1: 17 tokens, but data.max_seq_tokens is 16 .* \(2 rows of 3") as caught:
        held([[False, True], [False] + [True] * 16, [False] + [True] * 20], "fail")
    assert caught.value.where == "row:1"


def test_a_refused_row_is_counted_and_not_used():
    lengths = lengths_of([[False, True], [False, True]])
    lengths.n_tokens[1] = lengths.n_trained[1] = 0
    pieces, counts = hold_to_length(lengths, DataSection(path="x"), where=str)
    assert (counts.rows_refused, counts.rows, pieces.row.tolist()) == (1, 1, [0])


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=50), st.integers(8, 2000))
def test_every_row_stands_in_the_histogram_once(n_tokens, limit):
    bins = histogram(np.array(n_tokens), limit)
    assert sum(row["rows"] for row in bins) == len(n_tokens)
    for row in bins:
        assert row["rows"] == sum(row["tokens_from"] <= n <= row["tokens_to"] for n in n_tokens)
        assert row["too_long"] == (row["tokens_from"] > limit)
