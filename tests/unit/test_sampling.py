"""Tokens are drawn from the distribution that the settings describe, by each answer's own generator."""

import math

import pytest
import torch

from lora_tune.serving.engine import Sampling
from lora_tune.serving.sampling import choose, generator_for


def _draws(logits, count, **settings):
    sampling = Sampling(max_tokens=1, seed=1, **settings)
    generator = generator_for(sampling)
    return [choose(logits.unsqueeze(0), [sampling], [generator])[0].id for _ in range(count)]


def _allowed(logits, temperature, top_k, top_p):
    """What top-k and then top-p leave, by the definition in fp64."""
    weights = (logits.double() / temperature).softmax(-1)
    order = sorted(range(len(logits)), key=lambda i: -float(weights[i]))[: top_k or None]
    whole, kept, total = float(weights[order].sum()), [], 0.0
    for i in order:
        kept.append(i)
        total += float(weights[i])
        if total >= top_p * whole:
            break
    return {i: float(weights[i]) / total for i in kept}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.5, 5, 1.0), (1.0, 0, 0.6), (2.0, 7, 0.8), (1.0, 1, 0.1)],
)
def test_frequencies_are_those_of_the_settings(temperature, top_k, top_p):
    logits = torch.randn(20, generator=torch.Generator().manual_seed(3)) * 2
    allowed = _allowed(logits, temperature, top_k, top_p)
    found = _draws(logits, 4000, temperature=temperature, top_k=top_k, top_p=top_p)
    assert set(found) <= set(allowed)
    for token, share in allowed.items():
        spread = math.sqrt(share * (1 - share) / 4000)
        assert found.count(token) / 4000 == pytest.approx(share, abs=5 * spread + 1e-9)


def test_a_nucleus_wider_than_the_first_look_is_found():
    logits = torch.zeros(5000)  # all alike: half of the mass is 2,500 tokens
    found = _draws(logits, 300, temperature=1.0, top_p=0.5)
    assert len(set(found)) > 200
    assert len({*_draws(logits, 3000, temperature=1.0, top_p=0.5)}) <= 2501


def test_a_large_top_k_draws_from_all_of_them():
    logits = torch.zeros(5000)
    found = set(_draws(logits, 2000, temperature=1.0, top_k=3000))
    assert len(found) > 1100


def test_temperature_zero_is_greedy_and_draws_nothing():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 0.0]])
    greedy = Sampling(max_tokens=1)
    assert [token.id for token in choose(logits, [greedy] * 2, [generator_for(greedy)] * 2)] == [1, 0]
    assert generator_for(greedy) is None
    assert _draws(logits[0], 5, temperature=1e-9) == [1] * 5


def test_tokens_without_weight_are_never_drawn():
    logits = torch.full((50,), -float("inf"))
    logits[7] = 1.0
    assert set(_draws(logits, 200, temperature=5.0)) == {7}
    assert set(_draws(logits, 200, temperature=5.0, top_p=0.99, top_k=3)) == {7}


def test_each_row_draws_from_its_own_generator():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    samplings = [Sampling(max_tokens=1, temperature=1.0, seed=seed) for seed in (1, 2, 3)]
    together = [token.id for token in choose(logits, samplings, [generator_for(s) for s in samplings])]
    alone = [choose(logits[i : i + 1], [s], [generator_for(s)])[0].id for i, s in enumerate(samplings)]
    assert together == alone


def test_logprobs_are_of_the_models_own_distribution():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    sampling = Sampling(max_tokens=1, temperature=0.1, top_k=1, seed=0, n_logprobs=2)
    token = choose(logits, [sampling], [generator_for(sampling)])[0]
    expected = logits.log_softmax(-1)[0].tolist()
    assert token.id == 2 and token.logprob == pytest.approx(expected[2])
    assert [pair[0] for pair in token.top] == [2, 1]
    assert [pair[1] for pair in token.top] == pytest.approx([expected[2], expected[1]])
    bare = Sampling(max_tokens=1, n_logprobs=0)
    assert choose(logits, [bare], [None])[0].top == ()
