"""An engine without a model: what it answers is a pure function of the adapter's weights, the prompt and the seed.

It steps all running answers in turns on one thread, as a real one does, and looks the adapter's content up anew at every
token: an answer whose adapter was changed, freed or mixed up is no answer of one version, and `violations` says so.
"""

import hashlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lora_tune.adapter.door import AdapterFiles
from lora_tune.adapter.manifest import Probe
from lora_tune.adapter.shelf import content_digest
from lora_tune.errors import BusyError, ConflictError, DrainingError, LoraTuneError, MissingInputError, RequestError
from lora_tune.serving.engine import BASE, EngineFacts, Finish, Sampling, Sink, Token, Work

VOCABULARY = 300
"""Ids it answers with: those of the tiny tokenizer, and of every tiny base."""
_N_TOP = 20


def distribution(content: str, ids: Sequence[int]) -> list[tuple[int, float]]:
    """Return the likeliest next tokens after `ids` with their log-probabilities, likeliest first.

    Args:
        content: an adapter's content digest, or "" for the base.
        ids: prompt and answer so far.
    """
    seed = hashlib.sha256(f"{content}|{','.join(map(str, ids))}".encode()).digest()
    first = int.from_bytes(seed[:4], "big")
    # The end of turn (2) and other special ids are never among them: answers go on to max_tokens.
    tokens = [3 + (first + 7 * n) % (VOCABULARY - 3) for n in range(_N_TOP)]
    return [(token, math.log(0.5) * (n + 1)) for n, token in enumerate(tokens)]


def script(content: str, prompt: Sequence[int], n_tokens: int, *, salt: str = "") -> list[int]:
    """Return the greedy answer to a prompt; a salt stands for a temperature and a seed."""
    ids = list(prompt)
    for _ in range(n_tokens):
        ids.append(distribution(content + salt, ids)[0][0])
    return ids[len(prompt) :]


def recorded_probe(content: str, prompt: Sequence[int], words: str, *, n_tokens: int = 8, top: int = 16) -> Probe:
    """Return the probe that training would have recorded, had it trained this engine."""
    ids = [*prompt, *script(content, prompt, n_tokens)]
    rows = [distribution(content, ids[:n])[:top] for n in range(len(prompt), len(ids))]
    return Probe(
        prompt=words,
        input_ids=tuple(ids),
        answer_start=len(prompt),
        top_ids=tuple(tuple(token for token, _ in row) for row in rows),
        top_logprobs=tuple(tuple(logprob for _, logprob in row) for row in rows),
        base_logprobs=tuple((-9.0,) * len(row) for row in rows),
    )


@dataclass(eq=False)
class _Answer:
    engine: "ScriptedEngine"
    work: Work
    sink: Sink
    content: str
    ids: list[int] = field(default_factory=list)
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True
        self.engine.wake()


class ScriptedEngine:
    """The Engine protocol; delays and failures are set on it at any time."""

    name = "scripted"

    def __init__(
        self,
        *,
        max_context_tokens: int = 512,
        max_adapters: int = 16,
        max_running: int = 16,
        max_waiting: int = 256,
        token_seconds: float = 0.0,
        content_of: Callable[[AdapterFiles], str] = content_digest,
    ) -> None:
        self.max_context_tokens = max_context_tokens
        self.max_adapters = max_adapters
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.token_seconds = token_seconds
        """How long one step takes."""
        self.load_seconds = 0.0
        self.load_error: Exception | None = None
        """Raised by the next load, once."""
        self.token_error: LoraTuneError | None = None
        """Ends the next answer as failed, once."""
        self.deaf: set[str] = set()
        """Keys that are answered by the base, as an engine does that does not apply them."""
        self.violations: list[str] = []
        self.loads: list[str] = []
        """Every key that was ever loaded, in order."""
        self._content_of = content_of
        self._adapters: dict[str, str] = {}
        self._loading: set[str] = set()
        self._running: list[_Answer] = []
        self._waiting: list[_Answer] = []
        self._ending: set[_Answer] = set()
        self._n_generated = 0
        self._n_prefilled = 0
        self._closing = False
        self._paused = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="scripted-engine", daemon=True)
        self._thread.start()

    def submit(self, work: Work, sink: Sink) -> _Answer:
        with self._change:
            if self._closing:
                raise DrainingError("the engine is closing")
            if work.adapter != BASE and work.adapter not in self._adapters:
                raise MissingInputError(f"no adapter {work.adapter!r} is loaded")
            if len(work.prompt) + 1 > self.max_context_tokens:
                raise RequestError(
                    f"the prompt has {len(work.prompt)} tokens; at most {self.max_context_tokens - 1} fit"
                )
            if len(self._waiting) >= self.max_waiting:
                raise BusyError("too many answers are waiting")
            answer = _Answer(self, work, sink, self._adapters.get(work.adapter, ""))
            self._waiting.append(answer)
            self._change.notify_all()
            return answer

    def load(self, key: str, files: AdapterFiles) -> None:
        with self._change:
            error, self.load_error = self.load_error, None
            if error is not None:
                raise error
            if key in self._adapters or key in self._loading:
                self.violations.append(f"{key} was loaded twice")
                raise ConflictError(f"{key} is loaded already")
            if len(self._adapters) + len(self._loading) >= self.max_adapters:
                raise BusyError(f"all {self.max_adapters} places for adapters are taken")
            self._loading.add(key)
        time.sleep(self.load_seconds)
        with self._change:
            self._loading.discard(key)
            self._adapters[key] = self._content_of(files)
            self.loads.append(key)

    def unload(self, key: str) -> None:
        with self._change:
            if key not in self._adapters:
                self.violations.append(f"{key} was unloaded, but was not there")
                raise MissingInputError(f"no adapter {key!r} is loaded")
            if any(answer.work.adapter == key for answer in self._unfinished()):
                raise ConflictError(f"an answer is using {key}")
            del self._adapters[key]

    def facts(self) -> EngineFacts:
        with self._change:
            return EngineFacts(
                n_running=len(self._running), n_waiting=len(self._waiting), n_adapters=len(self._adapters),
                max_adapters=self.max_adapters, n_tokens_generated=self._n_generated, n_tokens_prefilled=self._n_prefilled,
                cache_bytes=0, adapter_bytes=0,
            )  # fmt: skip

    def close(self) -> None:
        with self._change:
            self._closing, self._paused = True, False
            self._change.notify_all()
        self._thread.join()

    def can_answer(self) -> bool:
        return not self._closing and self._thread.is_alive()

    def pause(self) -> None:
        """Make no more tokens until `resume`; submitting and cancelling go on."""
        with self._change:
            self._paused = True

    def resume(self) -> None:
        with self._change:
            self._paused = False
            self._change.notify_all()

    def wake(self) -> None:
        """Look again, since something changed."""
        with self._change:
            self._change.notify_all()

    def keys(self) -> set[str]:
        """Return the keys of what is loaded."""
        with self._change:
            return set(self._adapters)

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._closing and not self._has_work():
                    self._change.wait()
                while self._waiting and len(self._running) < self.max_running:
                    self._running.append(self._waiting.pop(0))
                    self._n_prefilled += len(self._running[-1].work.prompt)
                batch, closing, paused = list(self._running), self._closing, self._paused
                batch += [answer for answer in self._waiting if closing or answer.cancelled]
                self._waiting = [answer for answer in self._waiting if answer not in batch]
                self._ending |= {answer for answer in batch if answer not in self._running}
            if self.token_seconds and batch and not closing:
                time.sleep(self.token_seconds)
            for answer in batch:
                if closing:
                    answer.cancelled = True
                if answer.cancelled or not paused:
                    self._step(answer)
            if closing:
                return

    def _unfinished(self) -> list[_Answer]:
        return [*self._running, *self._waiting, *self._ending]

    def _has_work(self) -> bool:
        if self._paused:
            return any(answer.cancelled for answer in (*self._running, *self._waiting))
        return bool(self._running or self._waiting)

    def _step(self, answer: _Answer) -> None:
        sampling = answer.work.sampling
        if answer.cancelled:
            return self._finish(answer, "cancelled")
        if self.token_error is not None:
            error, self.token_error = self.token_error, None
            return self._finish(answer, "failed", error)
        with self._change:
            key = answer.work.adapter
            content = self._adapters.get(key, "") if key != BASE else ""
            if content != answer.content:
                self.violations.append(f"{key} changed under an answer")
            self._n_generated += 1
        ids = [*answer.work.prompt, *answer.ids]
        likeliest = distribution(("" if key in self.deaf else content) + _salt(sampling), ids)
        token, logprob = likeliest[0]
        answer.ids.append(token)
        asked = sampling.n_logprobs
        answer.sink(Token(token) if asked is None else Token(token, logprob=logprob, top=tuple(likeliest[:asked])))
        room = min(sampling.max_tokens, self.max_context_tokens - len(answer.work.prompt))
        if len(answer.ids) >= room:
            self._finish(answer, "length")

    def _finish(self, answer: _Answer, reason: str, error: LoraTuneError | None = None) -> None:
        with self._change:
            self._running = [other for other in self._running if other is not answer]
            self._ending.discard(answer)
        answer.sink(Finish(reason, n_generated=len(answer.ids), error=error))  # type: ignore[arg-type]


def _salt(sampling: Sampling) -> str:
    return "" if sampling.temperature == 0 else f"|{sampling.temperature}|{sampling.seed}"
