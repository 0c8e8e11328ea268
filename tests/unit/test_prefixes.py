"""Kept beginnings: only within one adapter version, never the whole prompt, never more bytes than allowed."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.serving.prefixes import MIN_REUSED_TOKENS, Prefixes, common_length

ROWS = st.lists(st.integers(0, 2), max_size=30)


def _states(n_tokens, mark):
    return ([torch.full((1, n_tokens, 2), float(mark))], [torch.full((1, n_tokens, 2), float(mark))])


@given(ROWS, ROWS)
def test_common_length_is_the_longest_common_beginning(one, other):
    n = common_length(one, other)
    assert one[:n] == other[:n]
    assert n == min(len(one), len(other)) or one[n] != other[n]


@given(st.lists(st.tuples(st.sampled_from("ab"), ROWS), max_size=8), st.sampled_from("ab"), ROWS)
def test_what_is_found_begins_like_the_prompt_and_is_the_same_adapters(kept, adapter, prompt):
    prefixes = Prefixes(10_000)
    for mark, (key, row) in enumerate(kept):
        prefixes.keep(key, row, _states(len(row), mark))
    n_tokens, states = prefixes.longest(adapter, prompt)
    if states is None:
        assert n_tokens == 0
    else:
        key, row = kept[int(states[0][0][0, 0, 0])]
        assert key == adapter
        assert MIN_REUSED_TOKENS <= n_tokens < len(prompt)
        assert row[:n_tokens] == prompt[:n_tokens]
    prefixes.forget(adapter)
    assert prefixes.longest(adapter, prompt) == (0, None)
    prefixes.clear()
    assert prefixes.n_bytes == 0


def test_the_bytes_are_bounded_and_the_least_recently_used_go_first():
    prefixes = Prefixes(2000)  # a row of 20 tokens has 320 bytes
    rows = [[n] * 20 for n in range(9)]
    for n, row in enumerate(rows):
        prefixes.keep("a", row, _states(20, n))
        prefixes.longest("a", [*rows[0], 5])
        assert prefixes.n_bytes <= 2000
    assert prefixes.longest("a", [*rows[0], 5])[0] == 20
    assert prefixes.longest("a", [*rows[1], 5])[0] == 0
    prefixes.keep("a", [7] * 100, _states(100, 1))
    assert prefixes.longest("a", [7] * 101)[0] == 20  # the long one would have taken most of the room


def test_a_row_takes_the_place_of_what_it_continues():
    prefixes = Prefixes(10_000)
    prefixes.keep("a", [1] * 10, _states(10, 0))
    prefixes.keep("b", [1] * 10, _states(10, 0))
    prefixes.keep("a", [1] * 20, _states(20, 1))
    assert prefixes.n_bytes == 160 + 320
    assert prefixes.covers("a", [1] * 21) and not prefixes.covers("a", [1] * 22) and not prefixes.covers("b", [1] * 12)
