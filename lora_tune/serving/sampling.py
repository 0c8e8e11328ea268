"""Logits → the next tokens: greedy, or drawn by each answer's own generator, so that no answer depends on its neighbours."""

import math
from collections.abc import Sequence
from typing import Any

from lora_tune.serving.engine import Sampling, Token

_NUCLEUS = 1024
"""The likeliest tokens among which top-p is looked for first; a full sort of a large vocabulary costs milliseconds."""


def generator_for(sampling: Sampling) -> Any:
    """Return the random generator of one answer; None for a greedy one. Without a seed, the system's entropy."""
    import torch

    if sampling.temperature == 0:
        return None
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def choose(logits_bv: Any, samplings: Sequence[Sampling], generators: Sequence[Any]) -> list[Token]:
    """Return the next token of each row.

    Args:
        logits_bv: [B, V], any float dtype; not changed.
        samplings: how each row is sampled, [B].
        generators: of `generator_for`, [B]; each sampled row draws exactly one number.
    """
    likeliest = logits_bv.argmax(-1).tolist()
    ids = [
        top if generator is None else _draw(logits_bv[row].float(), samplings[row], generator)
        for row, (top, generator) in enumerate(zip(likeliest, generators, strict=True))
    ]
    return [
        Token(token) if sampling.n_logprobs is None else _with_logprobs(logits_bv[row], token, sampling.n_logprobs)
        for row, (token, sampling) in enumerate(zip(ids, samplings, strict=True))
    ]


def _draw(logits_v: Any, sampling: Sampling, generator: Any) -> int:
    """Return one token by inverting the cumulated distribution at one uniform number."""
    import torch

    # The whole range of floats is allowed: so small a temperature is greedy.
    scaled = ((logits_v - logits_v.max()) / max(sampling.temperature, 1e-5)).cpu()
    vocabulary = scaled.shape[-1]
    kept = min(sampling.top_k, vocabulary) if sampling.top_k > 0 else vocabulary
    uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
    if sampling.top_p >= 1.0 and kept == vocabulary:
        return _invert(scaled.double().exp(), uniform)
    total = scaled.double().exp().sum() if kept == vocabulary else None
    wide = kept if kept < vocabulary else min(kept, _NUCLEUS)
    while True:
        values, order = scaled.topk(wide)
        weights = values.double().exp()
        whole = float(weights.sum() if total is None else total)
        cumulated = weights.cumsum(-1)
        if wide == kept or float(cumulated[-1]) >= sampling.top_p * whole:
            # The nucleus: the fewest likeliest tokens that reach top_p; the one that crosses it belongs to it.
            n_nucleus = int((cumulated < sampling.top_p * whole).sum()) + 1
            return int(order[_invert(weights[:n_nucleus], uniform)])
        wide = min(kept, wide * 8)


def _invert(weights: Any, uniform: float) -> int:
    """Return the index at which the cumulated weights pass `uniform` of their sum; never one of weight zero."""
    import torch

    cumulated = weights.cumsum(-1)
    bound = min(uniform * float(cumulated[-1]), math.nextafter(float(cumulated[-1]), 0.0))
    found = int(torch.searchsorted(cumulated, torch.tensor(bound, dtype=cumulated.dtype), right=True))
    last: int = weights.shape[-1] - 1
    return min(found, last)


def _with_logprobs(logits_v: Any, token: int, n_top: int) -> Token:
    logprobs = logits_v.float().log_softmax(-1)
    values, ids = logprobs.topk(n_top) if n_top else (logprobs[:0], logprobs[:0])
    pairs = tuple(zip((int(i) for i in ids.tolist()), map(float, values.tolist()), strict=True))
    return Token(token, float(logprobs[token]), pairs)
