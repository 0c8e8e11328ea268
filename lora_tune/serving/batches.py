"""What a model lets stand in one batch, and the plain engine's batches: answers of one adapter that go on together."""

from collections.abc import Sequence
from typing import Any, Literal

from lora_tune.serving.engine import Token


class Batch:
    """Answers of one adapter that go on together: the tokens so far, padded in front, and what the model remembers."""

    def __init__(self, rows: list[Any], device: Any) -> None:
        import torch

        self.rows = rows
        self.adapter = rows[0].work.adapter
        prompts = [row.work.prompt for row in rows]
        width = max(map(len, prompts))
        self.ids = torch.tensor([(0,) * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        self.attended = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        self.cache: Any = None

    def go_on(self, going: Sequence[int], tokens: Sequence[Token]) -> list[Any]:
        """Take in one token a row, keep the rows numbered in `going`, and return the others."""
        import torch

        left = [row for number, row in enumerate(self.rows) if number not in going]
        chosen = torch.tensor(going, device=self.ids.device, dtype=torch.long)
        if left and self.cache is not None:
            self.cache.reorder_cache(chosen)
        made = torch.tensor([[tokens[number].id] for number in going], device=self.ids.device, dtype=torch.long)
        self.ids = torch.cat([self.ids[chosen], made.reshape(-1, 1)], dim=1)
        self.attended = torch.cat([self.attended[chosen], torch.ones_like(made.reshape(-1, 1))], dim=1)
        self.rows = [self.rows[number] for number in going]
        return left


def only_attends(model: Any) -> bool:
    """Return whether padding can be masked out: a layer with a running state would take it in."""
    from transformers import DynamicCache

    try:
        layers = DynamicCache(config=model.config).layers
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return not any("LinearAttention" in type(layer).__name__ for layer in layers)


def stretching(config: Any) -> Literal["", "dynamic", "longrope"]:
    """Return how positions are stretched by the length of the longest row of a batch; empty if they are not."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {one.get("rope_type", one.get("type")) for one in (rope, *rope.values()) if isinstance(one, dict)}
    return next((kind for kind in ("dynamic", "longrope") if kind in kinds), "")


def rereads_from(config: Any) -> int | None:
    """Return the length from which longrope reads every token with other frequencies than before; None where none does.

    Source: transformers 5.23, `Phi3ForCausalLM.prepare_inputs_for_generation`: what was remembered is dropped there
        (tests/integration/test_stretched_positions.py).
    """
    if stretching(config) != "longrope":
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    short = getattr(config, "original_max_position_embeddings", None) or rope.get("original_max_position_embeddings")
    return None if short is None else int(short) + 1
