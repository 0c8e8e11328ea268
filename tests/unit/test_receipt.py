"""The receipt's figures, from logits written down by hand, against scipy-free formulas in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lora_tune.adapter.receipt import (
    GREEDY_TOKENS,
    NO_EFFECT_KL,
    Difference,
    Part,
    Receipt,
    Said,
    difference,
    kl_bound,
    merged_card,
    same_prompts,
)

LOGITS = st.lists(st.lists(st.floats(-20, 20), min_size=3, max_size=3), min_size=4, max_size=4)


def _said(logits, prompt=(1, 2), answer=(0, 1)):
    return Said((*prompt, *answer), tuple(prompt), torch.tensor(logits, dtype=torch.float32))


def _kl(p, q):
    """KL(softmax p ‖ softmax q), summed out."""
    p, q = ([math.exp(x - max(row)) for x in row] for row in (p, q))
    p, q = ([x / sum(row) for x in row] for row in (p, q))
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0 and b > 0)


@settings(max_examples=60, deadline=None)
@given(LOGITS, LOGITS)
def test_the_figures_are_those_of_the_formulas(was, now):
    was, now = torch.tensor(was).tolist(), torch.tensor(now).tolist()  # as fp32 holds them
    found = difference([_said(was)], [_said(now)])
    far = [max(abs(a - b) for a, b in zip(*rows, strict=True)) for rows in zip(was, now, strict=True)]
    assert found.kl == pytest.approx(sum(max(0, _kl(*rows)) for rows in zip(was, now, strict=True)) / 4, abs=1e-6)
    assert found.max_abs_delta_prompt == pytest.approx(far[0], abs=1e-5)
    assert found.max_abs_delta == pytest.approx(max(far[1:]), abs=1e-5)


def test_the_first_token_that_would_not_have_been_chosen_is_named():
    says = {token: [9.0 if n == token else 0.0 for n in range(3)] for token in range(3)}
    was = _said([says[2], says[0], says[1], says[2]])
    for row, expected in ((0, None), (1, 0), (2, 1), (3, 2)):
        now = [says[2], says[0], says[1], says[2]]
        now[row] = says[(now[row].index(9.0) + 1) % 3]
        found = difference([was], [_said(now)])
        assert found.diverges_at == (expected,)
        assert found.top1_agreement == 0.75
    assert difference([was, was], [was, was]) == Difference(0.0, 0.0, 0.0, 1.0, (None, None))


def test_only_so_many_tokens_are_looked_at():
    ids = [0] * (GREEDY_TOKENS + 2)
    was, now = torch.zeros(len(ids), 2), torch.zeros(len(ids), 2)
    now[-1, 1] = 1
    found = difference([Said(tuple(ids), (0, 0), was)], [Said(tuple(ids), (0, 0), now)])
    assert found.diverges_at == (None,)


def test_other_prompts_are_noticed():
    logits = [[0.0, 1.0, 2.0]] * 4
    assert same_prompts([_said(logits)], [_said(logits)])
    assert not same_prompts([_said(logits)], [_said(logits, prompt=(1, 3))])
    assert not same_prompts([_said(logits)], [_said(logits, prompt=(1, 2, 2), answer=(1,))])


def test_a_model_that_says_nan_is_no_number_that_a_bound_lets_through():
    found = difference([_said([[0.0, 1.0, 2.0]] * 4)], [_said([[0.0, math.nan, 2.0]] * 4)])
    assert not found.kl <= 1e9


def test_the_card_says_what_was_measured_and_against_what():
    receipt = Receipt(
        0.001, 0.002, 3e-8, 0.995, (None, 4), "original", "nf4", "fp32", (Part("a", 1.0, "d", True), Part("b", -0.5, "d", True)),
        "the 2 adapters", 4, None, 1e-9, 1e-6, 0.5, 2e-9, 0.25, "trained", 1, 10,
    )  # fmt: skip
    card = merged_card("owner/tiny", receipt)
    assert card.startswith('---\nbase_model: "owner/tiny"\nlibrary_name: transformers\n')
    for words in ("# a + b, merged", "`a` + -0.5 · `b`", "full-precision weights", "held in nf4", "against the 2 adapters",
                  "| KL divergence | 3e-08 nats a token |", "99.5%", "number 5", "| closer to what was trained | trained |"):  # fmt: skip
        assert words in card
    assert "passport" not in card


HOSTILE = "x` <img src=http://evil/t.png> [click](http://evil)"


def _receipt(*parts):
    return Receipt(
        0.0, 0.0, 0.0, 1.0, (None,), "trained", "none", "fp32", parts, "the adapter on its full-precision base", None, None,
        0.0, 1e-6, 0.5, None, None, None, 1, 10,
    )  # fmt: skip


def test_a_strangers_name_is_no_markup_in_the_card():
    card = merged_card(HOSTILE, _receipt(Part(HOSTILE, 1.0, "d", True)))
    shown = MarkdownIt("commonmark").enable("table").render(card.split("\n---\n", 1)[1])
    assert "<img" not in shown
    assert "<a " not in shown
    assert "&lt;img" in shown


@pytest.mark.parametrize("name", ["builtin:smollm2-135m", "tm", "/home/me/base", HOSTILE])
def test_only_a_base_that_the_hub_knows_stands_in_the_head_of_the_card(name):
    assert "base_model" not in merged_card(name, _receipt(Part("a", 1.0, "d", True)))


def test_the_card_of_an_unverified_adapter_claims_nothing_of_what_it_was_trained_on():
    card = merged_card("owner/tiny", _receipt(Part("a", 1.0, "d", True), Part("b", 1.0, "d", False)))
    assert "**Unverified**: `b` has no passport" in card
    assert "It was trained on" not in card


@given(st.floats(0, 10), st.sampled_from([1e-6, 1e-2, 5e-2]))
def test_a_merge_that_loses_the_adapter_is_never_within_its_bound(effect, rounding):
    """A merged model that is the bare base differs from the adapter by exactly its effect."""
    bound = kl_bound(rounding, effect)
    assert bound <= rounding
    assert effect <= NO_EFFECT_KL or effect > bound
