"""Prompt ids → answers, through transformers' generate, in batches: for measuring."""

from collections.abc import Sequence
from typing import Any

from lora_tune.data.rendering import LossMaskError
from lora_tune.data.tokens import end_of_turn_ids

# A base's own generation settings (a repetition penalty, say) would change what is measured.
_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": 1.0,
}


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: what the template ends a turn with, the tokenizer's eos, the model's own."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    try:
        ends = end_of_turn_ids(tokenizer)
    except LossMaskError:
        ends = []  # a base whose template cannot be trained on can still be talked to
    found = (*ends, tokenizer.eos_token_id, *own)
    return sorted({int(token) for token in found if token is not None})


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    ends: Sequence[int],
    batch: int = 16,
) -> list[list[int]]:
    """Return the greedy answer to each prompt as token ids, without the token that ended it.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: for its pad id.
        prompts: token ids, [B][T]; batches are formed of prompts of like length.
        max_tokens: longest answer.
        ends: ids that end an answer.
        batch: prompts in one batch.
    """
    import torch

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        width = max(len(prompts[i]) for i in chosen)
        padded = [[tokenizer.pad_token_id] * (width - len(prompts[i])) + list(prompts[i]) for i in chosen]
        attended = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
        with torch.no_grad():
            output = model.generate(
                input_ids=torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(attended, device=model.device),
                max_new_tokens=max_tokens, **_GREEDY,
                eos_token_id=list(ends), pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        for i, row in zip(chosen, output[:, width:].tolist(), strict=True):
            answers[i] = _until_end(row, ends)
    return answers


def _until_end(row: Sequence[int], ends: Sequence[int]) -> list[int]:
    stop = next((i for i, token in enumerate(row) if token in ends), len(row))
    return list(row[:stop])
