"""Keys and values of the answers being made: one dense row each, which transformers' models write and read as their cache.

A model is called with the rows that it works on and where each of their tokens stands (`KeyValueRows.at`); rows in use
are always the first ones, so that reading them copies nothing.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_tune.errors import OutOfMemoryError

_GROWTH_TOKENS = 128
"""Rows are lengthened by at least so much at once."""


@dataclass
class _Call:
    """Where one call of the model writes, and how much it reads."""

    first: int
    last: int
    rows: Any
    """[B, 1] row of each token."""
    positions: Any
    """[B, T] place of each token in its row; a padding token goes to the last place, which nothing reads."""
    width: int


class KeyValueRows:
    """Rows of keys and values, [N, H, T, D] a layer; lengths grow with what is asked for."""

    is_compileable = False

    def __init__(self, n_layers: int, max_rows: int) -> None:
        self.max_rows = max_rows
        self.keys: list[Any] = [None] * n_layers
        self.values: list[Any] = [None] * n_layers
        self.n_tokens = 0
        """Tokens that each row has room for."""
        self._call: _Call | None = None

    @property
    def trash(self) -> int:
        """The place past every token: padding is written there."""
        return self.n_tokens

    def reserve(self, n_tokens: int) -> None:
        """Make room for so many tokens in each row, keeping what is there.

        Raises:
            OutOfMemoryError: there is no memory for it; what was there is there still.
        """
        if n_tokens <= self.n_tokens:
            return
        least = -(-n_tokens // _GROWTH_TOKENS) * _GROWTH_TOKENS
        ample = -(-max(n_tokens, self.n_tokens + self.n_tokens // 2) // _GROWTH_TOKENS) * _GROWTH_TOKENS
        try:
            self._lengthen(ample)
        except OutOfMemoryError:
            if least == ample:
                raise
            self._lengthen(least)

    def _lengthen(self, wanted: int) -> None:
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                if tensor is not None:
                    tensors[layer] = self._longer(tensor, wanted)
        self.n_tokens = wanted

    def shrink(self) -> None:
        """Give the memory back; only when no row is in use."""
        self.keys = [None] * len(self.keys)
        self.values = [None] * len(self.values)
        self.n_tokens = 0

    def at(self, first: int, positions_bt: Any, width: int) -> "KeyValueRows":
        """Return the cache, set to rows `first`… and those places, and to be read up to `width` tokens."""
        import torch

        last = first + positions_bt.shape[0]
        rows = torch.arange(first, last, device=positions_bt.device).unsqueeze(1)
        self._call = _Call(first, last, rows, positions_bt, width)
        return self

    def update(self, keys_bhtd: Any, values_bhtd: Any, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Write the call's keys and values, and return those of its rows; what transformers' attention calls."""
        assert self._call is not None, "at() comes first"
        call, written = self._call, []
        for tensors, new in ((self.keys, keys_bhtd), (self.values, values_bhtd)):
            if tensors[layer_idx] is None:
                tensors[layer_idx] = self._empty(new)
            kept = tensors[layer_idx]
            if call.positions.shape[1] == 1:
                kept[call.rows[:, 0], :, call.positions[:, 0]] = new[:, :, 0]
            else:
                kept[call.rows, :, call.positions] = new.transpose(1, 2)
            written.append(kept[call.first : call.last, :, : call.width])
        return written[0], written[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """What some models read to number positions; ours are always given."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of what a mask must cover."""
        assert self._call is not None, "at() comes first"
        return self._call.width, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """What some models read to number positions; ours are always given."""
        return 0

    def get_max_length(self, layer_idx: int = 0) -> int:
        """Rows grow, so there is no longest."""
        return -1

    def clear(self, row: int) -> None:
        """Set a row to zeros."""
        for tensor in (*self.keys, *self.values):
            if tensor is not None:
                tensor[row].zero_()

    def move(self, source: int, target: int, n_tokens: int) -> None:
        """Copy the first tokens of one row over another's, and leave nothing of what stood there."""
        for tensor in (*self.keys, *self.values):
            if tensor is not None:
                tensor[target, :, :n_tokens].copy_(tensor[source, :, :n_tokens])
                tensor[target, :, n_tokens:].zero_()

    def copy_out(self, row: int, n_tokens: int) -> tuple[list[Any], list[Any]]:
        """Return a copy of a row's first tokens, keys and values by layer, [H, T, D]; None for a layer that has none of its own."""
        return (
            [None if tensor is None else tensor[row, :, :n_tokens].clone() for tensor in self.keys],
            [None if tensor is None else tensor[row, :, :n_tokens].clone() for tensor in self.values],
        )

    def copy_in(self, row: int, kept: tuple[Sequence[Any], Sequence[Any]], n_tokens: int) -> None:
        """Write the first tokens of a kept copy into a row."""
        for tensors, copies in ((self.keys, kept[0]), (self.values, kept[1])):
            for layer, copy in enumerate(copies):
                if copy is None:
                    continue
                if tensors[layer] is None:
                    tensors[layer] = self._empty(copy.unsqueeze(0))
                tensors[layer][row, :, :n_tokens].copy_(copy[:, :n_tokens])

    def n_bytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values) if t is not None)

    def _empty(self, like: Any) -> Any:
        """Zeros, since a masked place is still multiplied by zero, and zero times what lies about may be NaN."""
        shape = (self.max_rows, like.shape[1], self.n_tokens + 1, like.shape[3])
        try:
            return like.new_zeros(shape)
        except RuntimeError as err:
            raise _no_memory(shape) from err

    def _longer(self, tensor: Any, n_tokens: int) -> Any:
        shape = (tensor.shape[0], tensor.shape[1], n_tokens + 1, tensor.shape[3])
        try:
            longer = tensor.new_zeros(shape)
        except RuntimeError as err:
            raise _no_memory(shape) from err
        longer[:, :, : self.n_tokens].copy_(tensor[:, :, : self.n_tokens])
        return longer


def _no_memory(shape: tuple[int, ...]) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"no memory for keys and values of {shape[0]} answers of {shape[2]} tokens",
        hint="start the server with a smaller --max-running or --max-context",
    )


def cache_budget(device: Any) -> int:
    """Return the most bytes that keys and values may take: half of a machine's memory, or of what is free on a GPU."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
