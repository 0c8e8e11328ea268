"""What an engine is: prompts in, tokens out, adapters by key. Who may use which adapter is swap.py's business."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lora_tune.adapter.door import AdapterFiles
from lora_tune.errors import LoraTuneError
from lora_tune.model.dense import BaseFiles
from lora_tune.recipe.schema import BaseSection

BASE = ""
"""The key of the base alone."""

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class ServedBase:
    """The one base that a server answers with, chosen by its operator."""

    name: str
    """What clients call it."""
    section: BaseSection
    files: BaseFiles
    tokenizer: Any
    """The base's own, with its own chat template."""
    ends: tuple[int, ...]
    """Ids that end an answer."""
    max_context_tokens: int
    """Most tokens of prompt and answer together."""
    weights_digest: str
    """sha256 of the base's weights, as in a passport's `base.weights`."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; checked where it comes in."""

    max_tokens: int
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 takes all."""
    seed: int | None = None
    """The same seed, prompt and adapter draw the same numbers, whatever else is being answered. In fp32 that gives the same
    answer; in bf16 a batch's other rows may change the last bits, and with them a close choice."""
    n_logprobs: int | None = None
    """None asks for none, 0 for the chosen token's alone, k also for the k likeliest tokens'; at most MAX_LOGPROBS."""
    ignore_end: bool = False
    """Go on to `max_tokens` past every end of turn; for measuring."""


@dataclass(frozen=True)
class Work:
    """One answer that is wanted."""

    prompt: tuple[int, ...]
    adapter: str
    """A key that `load` was given, or BASE."""
    sampling: Sampling


@dataclass(frozen=True)
class Token:
    """One token of an answer; the one that ends it is not among them."""

    id: int
    logprob: float | None = None
    """Of the model's own distribution, before temperature, top-k and top-p."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with their log-probabilities, likeliest first."""


@dataclass(frozen=True)
class Finish:
    """The last event of every answer."""

    reason: Literal["stop", "length", "cancelled", "failed"]
    n_generated: int = 0
    n_reused: int = 0
    """Tokens of the prompt whose keys and values were there already."""
    error: LoraTuneError | None = None
    """Why it failed."""


Event = Token | Finish
Sink = Callable[[Event], None]
"""Told every event of one answer in order, on the engine's thread: it must return at once and never raise."""


class Answering(Protocol):
    """An answer that is being made."""

    def cancel(self) -> None:
        """Stop it: at most one more token is made, then Finish("cancelled") comes. Any thread, any number of times."""


@dataclass(frozen=True)
class EngineFacts:
    """What an engine is doing at this moment."""

    n_running: int
    n_waiting: int
    n_adapters: int
    max_adapters: int
    n_tokens_generated: int
    """Since it began."""
    n_tokens_prefilled: int
    cache_bytes: int
    """Held for keys and values."""
    adapter_bytes: int


class Engine(Protocol):
    """One base, many adapters, many answers at once. Every method may be called from any thread."""

    name: str
    """`native`, `simple` or `vllm`."""
    max_context_tokens: int

    def submit(self, work: Work, sink: Sink) -> Answering:
        """Begin an answer.

        Raises:
            MissingInputError: no such adapter is loaded (404).
            RequestError: the prompt and one token do not fit the context (400).
            BusyError: too many answers are waiting (429).
            DrainingError: the engine is closing (503).
        """

    def load(self, key: str, files: AdapterFiles) -> None:
        """Bring an adapter's weights in beside those that answer, without disturbing them; loaded twice is an error.

        Raises:
            AdapterMismatchError: it does not fit the base (412).
            UnsupportedError: this engine cannot hold such an adapter, with the one that can (422).
            BusyError: every place is taken (429).
        """

    def unload(self, key: str) -> None:
        """Free an adapter's place; no answer may be using it.

        Raises:
            ConflictError: an answer is using it (409).
        """

    def facts(self) -> EngineFacts:
        """Return what it is doing."""

    def can_answer(self) -> bool:
        """Return whether it still answers: False once it is closing, its thread has died, or what it asks is gone."""

    def close(self) -> None:
        """Stop: what is being answered ends as cancelled, and the thread or process is gone when this returns."""
