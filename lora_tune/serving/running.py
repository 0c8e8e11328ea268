"""One answer on its way through the native engine."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lora_tune.errors import LoraTuneError
from lora_tune.serving.engine import Finish, Sink, Work
from lora_tune.serving.prefixes import MIN_REUSED_TOKENS, common_length

IDLE_PREFILL_TOKENS = 1024
"""Most prompt tokens of one call when nobody is waiting for a next token."""
BUSY_PREFILL_TOKENS = 32
"""And when somebody is, for each prompt that waits per answer being made: it adds to the time between two tokens."""


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
    def n_generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.n_prompt

    @property
    def reading(self) -> bool:
        """Whether its prompt is not read to the end."""
        return self.n_cached < self.n_prompt

    def cancel(self) -> None:
        """Stop before its next token."""
        self.cancelled = True

    def finish(
        self, reason: Literal["stop", "length", "cancelled", "failed"], error: LoraTuneError | None = None
    ) -> Finish:
        """Return its last event."""
        return Finish(reason, self.n_generated, self.n_reused, error)


def prefill_budget(n_running: int, n_answering: int) -> int:
    """Return how many tokens of prompts one call may read."""
    if not n_answering:
        return IDLE_PREFILL_TOKENS
    n_reading = n_running - n_answering
    return min(max(BUSY_PREFILL_TOKENS * n_reading // n_answering, BUSY_PREFILL_TOKENS), IDLE_PREFILL_TOKENS)


def begins_like(answer: RunningAnswer, other: RunningAnswer) -> bool:
    """Return whether its prompt begins so much like another's that it is worth waiting to take that over."""
    if answer.work.adapter != other.work.adapter:
        return False
    n_common = common_length(answer.work.prompt, other.work.prompt)
    return n_common - other.n_reused >= MIN_REUSED_TOKENS


def told(err: BaseException) -> LoraTuneError:
    """Return what clients are told of a failure; what it was, the log says."""
    if isinstance(err, LoraTuneError):
        return err
    return LoraTuneError("the engine failed", hint="the server's log says why")
