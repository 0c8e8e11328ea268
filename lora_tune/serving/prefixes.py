"""Prompts whose keys and values are kept, so that a later prompt that begins alike need not be read again.

Kept by adapter version: what one version computed is never given to another.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MIN_REUSED_TOKENS = 8
"""A shorter common beginning is read again: copying it would not pay."""


@dataclass(frozen=True)
class _Kept:
    tokens: tuple[int, ...]
    keys_and_values: tuple[list[Any], list[Any]]
    n_bytes: int


class Prefixes:
    """The most recently used rows, up to so many bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self._kept: OrderedDict[tuple[str, tuple[int, ...]], _Kept] = OrderedDict()

    def keep(self, adapter: str, tokens: Sequence[int], keys_and_values: tuple[list[Any], list[Any]]) -> None:
        """Keep a row; one that it continues is dropped for it."""
        n_bytes = sum(t.numel() * t.element_size() for side in keys_and_values for t in side if t is not None)
        if n_bytes > self.max_bytes // 4 or len(tokens) < MIN_REUSED_TOKENS:
            return
        row = tuple(tokens)
        for key in [key for key in self._kept if key[0] == adapter and row[: len(key[1])] == key[1]]:
            self._drop(key)
        self._kept[adapter, row] = _Kept(row, keys_and_values, n_bytes)
        self.n_bytes += n_bytes
        while self.n_bytes > self.max_bytes:
            self._drop(next(iter(self._kept)))

    def longest(self, adapter: str, prompt: Sequence[int]) -> tuple[int, tuple[list[Any], list[Any]] | None]:
        """Return how many first tokens of the prompt are kept for this adapter, and their keys and values.

        The prompt's last token is never among them: it has to be read for the first token of the answer.
        """
        best, found = 0, None
        for key, kept in self._kept.items():
            if key[0] == adapter:
                n_common = common_length(kept.tokens, prompt)
                if n_common > best:
                    best, found = n_common, key
        best = min(best, len(prompt) - 1)
        if found is None or best < MIN_REUSED_TOKENS:
            return 0, None
        self._kept.move_to_end(found)
        return best, self._kept[found].keys_and_values

    def covers(self, adapter: str, tokens: Sequence[int]) -> bool:
        """Return whether all but the last of these tokens are kept already."""
        return any(key[0] == adapter and common_length(key[1], tokens) >= len(tokens) - 1 for key in self._kept)

    def forget(self, adapter: str) -> None:
        """Drop everything of one adapter."""
        for key in [key for key in self._kept if key[0] == adapter]:
            self._drop(key)

    def clear(self) -> None:
        """Drop everything."""
        self._kept.clear()
        self.n_bytes = 0

    def _drop(self, key: tuple[str, tuple[int, ...]]) -> None:
        self.n_bytes -= self._kept.pop(key).n_bytes


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many first tokens two rows share."""
    length = min(len(one), len(other))
    if tuple(one[:length]) == tuple(other[:length]):
        return length
    return next(i for i in range(length) if one[i] != other[i])
