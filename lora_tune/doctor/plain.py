"""The same figures by another way: a base's own forward pass, one row at a time, with W + scaling B A computed here.

Neither peft, trl, accelerate nor our trainer take part, so that none of them is measured against itself.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

Weights = Mapping[str, torch.Tensor]


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return `layer.lora_A` and `layer.lora_B` → a copy of that weight of the adapter on a model."""
    return {
        _short(name): weight.detach().cpu().clone() for name, weight in model.named_parameters() if ".lora_" in name
    }


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".weight").replace(".default", "")


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the gradients by the same names; a weight without one has none here either."""
    return {_short(name): p.grad.detach().cpu().clone() for name, p in model.named_parameters() if p.grad is not None}


def with_adapter(base: Any, adapter: Weights, scaling: float) -> dict[str, torch.Tensor]:
    """Return name → W + scaling B A of every layer that the adapter changes; a base of Conv1D holds its W transposed."""
    own = dict(base.named_parameters())
    changed = {}
    for layer in {name.rpartition(".")[0] for name in adapter}:
        weight = own[f"{layer}.weight"]
        a, b = (adapter[f"{layer}.{part}"].to(weight.device) for part in ("lora_A", "lora_B"))
        update = scaling * (b @ a)
        changed[f"{layer}.weight"] = weight + (update.T if _is_turned(base) else update)
    return changed


def _is_turned(base: Any) -> bool:
    return str(base.config.model_type) == "gpt2"


def logits(base: Any, ids: Sequence[int], weights: Weights | None = None) -> torch.Tensor:
    """Return what a plain base says to one row, [T, V], with some of its weights exchanged."""
    device = next(base.parameters()).device
    inputs = {"input_ids": torch.tensor([list(ids)], device=device), "use_cache": False}
    found: torch.Tensor = torch.func.functional_call(base, dict(weights or {}), (), inputs).logits[0]
    return found


def loss(base: Any, rows: Iterable[Any], weights: Weights | None = None) -> torch.Tensor:
    """Return the mean negative log-likelihood of the rows' trained tokens, each predicted from those before it."""
    summed, count = torch.zeros(()), 0
    for row in rows:
        log_likelihood = logits(base, row.input_ids, weights).float().log_softmax(-1).cpu()
        for place in range(1, len(row.input_ids)):
            if row.trained[place]:
                summed = summed - log_likelihood[place - 1, row.input_ids[place]]
                count += 1
    return summed / count


def loss_and_gradients(
    base: Any, rows: Iterable[Any], adapter: Weights, scaling: float
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss with the adapter, and its gradient by each of the adapter's weights."""
    leaves = {name: weight.detach().cpu().clone().requires_grad_() for name, weight in adapter.items()}
    found = loss(base, rows, with_adapter(base, leaves, scaling))
    names = list(leaves)
    return float(found), dict(zip(names, torch.autograd.grad(found, [leaves[name] for name in names]), strict=True))


def greedy(base: Any, prompt: Sequence[int], weights: Weights, *, max_tokens: int, end: int) -> list[int]:
    """Return the likeliest answer to a prompt, token by token without a cache, up to the token that ends it."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(max_tokens):
            token = int(logits(base, ids, weights)[-1].argmax())
            if token == end:
                break
            ids.append(token)
    return ids[len(prompt) :]


def apart(found: Weights, expected: Weights) -> float:
    """Return ‖found − expected‖ / ‖expected‖ over all tensors; infinite where one is missing or is no number."""
    if found.keys() != expected.keys():
        return math.inf
    difference = sum(
        float((found[name].cpu().double() - expected[name].cpu().double()).square().sum()) for name in expected
    )
    size = sum(float(expected[name].double().square().sum()) for name in expected)
    measured = float((difference / size) ** 0.5) if size else math.inf
    return measured if math.isfinite(measured) else math.inf
