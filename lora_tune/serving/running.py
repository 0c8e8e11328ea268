"""One answer on its way through the native engine."""

from dataclasses import dataclass, field
from typing import Any

from lora_tune.serving.engine import Sink, Work


@dataclass(eq=False)
class RunningAnswer:
    """One answer on its way through the engine; its row in the cache is its index among the running ones."""

    work: Work
    sink: Sink
    generator: Any
    tokens: list[int]
    """Prompt and what was generated."""
    n_cached: int = 0
    """First tokens whose keys and values are in its row."""
    n_reused: int = 0
    cancelled: bool = False
    placed: bool = False
    """Whether a beginning was looked for among what is kept."""
    stops: frozenset[int] = field(default_factory=frozenset)

    @property
    def n_prompt(self) -> int:
        """Tokens of its prompt."""
        return len(self.work.prompt)

    @property
    def reading(self) -> bool:
        """Whether its prompt is not read to the end."""
        return self.n_cached < self.n_prompt

    def cancel(self) -> None:
        """Stop before its next token."""
        self.cancelled = True
