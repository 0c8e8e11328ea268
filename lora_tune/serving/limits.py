"""What an engine takes on: how long prompts may be, how many answers may wait, how many adapters it holds."""

from collections.abc import Collection
from dataclasses import dataclass

from lora_tune.errors import BusyError, ConflictError, MissingInputError, RequestError
from lora_tune.serving.engine import BASE, Work

MAX_WAITING = 256
"""Answers that may wait, unless an engine is told otherwise."""


@dataclass(frozen=True)
class EngineLimits:
    """The bounds that every engine checks before it takes an answer or an adapter."""

    max_context_tokens: int
    """Most tokens of prompt and answer together."""
    n_vocabulary: int
    """Tokens that the base knows."""
    max_waiting: int
    max_adapters: int

    def check_work(self, work: Work) -> None:
        """Check that the prompt, with a token of an answer, can be read.

        Raises:
            RequestError: it is empty, too long, or holds a token that the base does not know (400).
        """
        prompt, n_wanted = work.prompt, work.sampling.max_tokens
        if not 1 <= len(prompt) < self.max_context_tokens or n_wanted < 1:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and {n_wanted} are asked for; "
                f"2 to {self.max_context_tokens} tokens fit, at least one of each",
                hint="shorten the conversation",
            )
        if not 0 <= min(prompt) <= max(prompt) < self.n_vocabulary:
            raise RequestError(
                f"the prompt holds a token that is not among the {self.n_vocabulary} that the base knows"
            )

    def check_place(self, work: Work, *, held: Collection[str], n_waiting: int) -> None:
        """Check that the answer's adapter is there, and that the answer may wait for its turn.

        Raises:
            MissingInputError: no such adapter is loaded (404).
            BusyError: too many answers are waiting (429).
        """
        if work.adapter != BASE and work.adapter not in held:
            raise MissingInputError(f"no adapter {work.adapter!r} is loaded")
        if n_waiting >= self.max_waiting:
            raise BusyError(f"{n_waiting} answers are waiting", hint="try again later")

    def check_arrival(self, key: str, *, held: Collection[str], arriving: Collection[str] = ()) -> None:
        """Check that one more adapter may come in under this key.

        Raises:
            ConflictError: it is there, or on its way (409).
            BusyError: every place is taken (429).
        """
        if key in held or key in arriving:
            raise ConflictError(f"{key} is loaded already")
        if len(held) + len(arriving) >= self.max_adapters:
            raise BusyError(
                f"all {self.max_adapters} places for adapters are taken",
                hint="unload one, or start the server with a larger --max-adapters",
            )

    def room_tokens(self, work: Work) -> int:
        """Return how many tokens its answer may have."""
        return min(work.sampling.max_tokens, self.max_context_tokens - len(work.prompt))
