"""One call of the model over rows of the cache: tokens in, the logits of each row's last token out."""

from collections.abc import Callable, Sequence
from typing import Any

from lora_tune.errors import RequestError, UnsupportedError
from lora_tune.serving.batches import stretching
from lora_tune.serving.cache import KeyValueRows, cache_budget

_FULL, _SLIDING = "full_attention", "sliding_attention"
_TOLERANCE = {"float32": 1e-3}
"""Largest difference of a logit to the plain model, as a share of the largest logit, by dtype; for others a twentieth."""


class Forward:
    """The model with its cache; prompts of several lengths are padded in front."""

    def __init__(self, model: Any, cache: KeyValueRows) -> None:
        self._model, self._cache = model, cache
        config = model.config.get_text_config()
        self._window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        kinds = set(getattr(config, "layer_types", None) or ())
        self._kinds = kinds or ({_SLIDING} if self._window else {_FULL})
        self._named_masks = bool(kinds) and len(kinds) > 1
        self.max_cache_bytes = cache_budget(model.device)
        self._bytes_per_token = 0
        self._additive = model.config._attn_implementation == "eager"

    def __call__(
        self, tokens: Sequence[Sequence[int]], starts: Sequence[int], *, first_row: int, route: Callable[[], None]
    ) -> Any:
        """Read tokens into consecutive rows, and return the logits that follow each row's last one, [B, V].

        Args:
            tokens: of each row, at least one.
            starts: tokens that each row holds already.
            first_row: the first row's number; the others follow it.
            route: sets the adapter of each row.
        """
        import torch

        model, n_query = self._model, max(map(len, tokens))
        pads = [n_query - len(row) for row in tokens]
        ids = torch.tensor([[0] * pad + list(row) for pad, row in zip(pads, tokens, strict=True)], device=model.device)
        places = torch.tensor([start - pad for start, pad in zip(starts, pads, strict=True)], device=model.device)
        places = places.unsqueeze(1) + torch.arange(n_query, device=model.device)
        padding = None
        if any(pads):
            padding = torch.arange(n_query, device=model.device) < torch.tensor(pads, device=model.device).unsqueeze(1)
        width = max(start + len(row) for start, row in zip(starts, tokens, strict=True))
        written = places if padding is None else places.masked_fill(padding, self._cache.trash)
        positions = places if padding is None else places.masked_fill(padding, 0)
        route()
        output = model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._mask(positions, width),
            past_key_values=self._cache.at(first_row, written, width),
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def check_holdable(self, prompt: Sequence[int]) -> None:
        """Check that a prompt and a token more fit the memory set aside.

        Raises:
            RequestError: they do not (400).
        """
        if len(prompt) + 1 > self.most_tokens():
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; there is memory set aside for {self.most_tokens()}, with the answer",
                hint="shorten it, or start the server with a smaller --max-running",
            )

    def most_tokens(self) -> int:
        """Return how long a row may become in the memory set aside: rows are of one length, so a long one lengthens all."""
        return self.max_cache_bytes // max(self._bytes_per_token, 1)

    def _mask(self, positions_bt: Any, width: int) -> Any:
        """Return which places each token sees: those up to its own, and within its window where layers slide."""
        import torch

        places = torch.arange(width, device=positions_bt.device)
        own = positions_bt.unsqueeze(-1)
        masks = {}
        for kind in self._kinds:
            seen = places <= own
            if kind == _SLIDING and self._window:
                seen = seen & (places > own - self._window)
            seen = seen.unsqueeze(1)
            if self._additive:
                least = torch.finfo(self._model.dtype).min
                seen = torch.zeros_like(seen, dtype=self._model.dtype).masked_fill(~seen, least)
            masks[kind] = seen
        return masks if self._named_masks else next(iter(masks.values()))

    def prove(self) -> None:
        """Compare two rows of unlike length, read in parts, with the plain model.

        Raises:
            UnsupportedError: their logits differ, or the model cannot be called like this.
        """
        import torch

        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in (7, 12)]
        try:
            with torch.inference_mode():
                self._cache.reserve(16)
                self([rows[0][:3], rows[1][:8]], [0, 0], first_row=0, route=_nothing)
                self([rows[0][3:6], rows[1][8:10]], [3, 8], first_row=0, route=_nothing)
                self([rows[0][6:7], rows[1][10:11]], [6, 10], first_row=0, route=_nothing)
                last = self([rows[1][11:12]], [11], first_row=1, route=_nothing)
                self._bytes_per_token = self._cache.n_bytes() // (self._cache.n_tokens + 1)
                self._cache.copy_in(0, self._cache.copy_out(1, 4), 4)
                plain = self._model(torch.tensor([rows[1]], device=self._model.device), use_cache=False).logits[0, -1]
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError, KeyError) as err:
            raise UnsupportedError(
                f"the native engine cannot call {type(self._model).__name__}: {str(err)[:200]}",
                hint="serve it with --engine simple",
            ) from err
        finally:
            self._cache.shrink()
        apart = float((last[0].float() - plain.float()).abs().max() / plain.float().abs().max())
        bound = _TOLERANCE.get(str(self._model.dtype).removeprefix("torch."), 0.05)
        if not apart <= bound:
            raise UnsupportedError(
                f"{type(self._model).__name__} answers otherwise in a batch: its logits are {apart:.1%} apart",
                hint="serve it with --engine simple",
            )


def _nothing() -> None:
    """Leave every row to the base."""


def unsupported(model: Any) -> str:
    """Return why a model cannot be held by this engine, by its config; empty if it can be tried."""
    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder beside its decoder"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of other kinds than attention: {', '.join(sorted(kinds))}"
    if stretching(config):
        return "its positions are computed from the longest row of a batch, so that answers would depend on their neighbours"
    if getattr(model, "_is_stateful", False) or not hasattr(config, "num_hidden_layers"):
        return "it keeps another state than keys and values"
    return ""
