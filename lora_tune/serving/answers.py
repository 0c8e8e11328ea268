"""Answers in the making: events of the engine's thread → texts on the event loop, and the lease that they hold meanwhile."""

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from lora_tune.errors import BusyError, DrainingError, LoraTuneError, RequestError
from lora_tune.serving.bodies import COMPLETION_TOKENS, ChatBody, CompletionBody
from lora_tune.serving.deployed import Deployed, Lease
from lora_tune.serving.engine import BASE, Answering, Event, Finish, Token, Work
from lora_tune.serving.guard import Receive, log_event
from lora_tune.serving.metrics import Metrics
from lora_tune.serving.swap import Fleet
from lora_tune.serving.text import AnswerText

Value = TypeVar("Value")
_LOGGED_CHARS = 500


class EngineFailedError(LoraTuneError):
    """The engine failed by a bug; only the log says which."""

    code = "engine_failed"

    def __init__(self) -> None:
        super().__init__("the engine failed", hint="the server's log says why")


def told_outside(err: LoraTuneError) -> LoraTuneError:
    """Return what a client is told: an error without a class of its own is a bug, and its words may quote a prompt."""
    return EngineFailedError() if type(err) is LoraTuneError else err


class Mailbox:
    """Takes events on engines' threads and gives them to the loop's answers: one wake-up for many events."""

    def __init__(self) -> None:
        self._events: deque[tuple[Answer, Event]] = deque()
        self._woken = False

    def sink(self, answer: "Answer", loop: asyncio.AbstractEventLoop) -> Callable[[Event], None]:
        """Return the engine's sink for an answer."""

        def take(event: Event) -> None:
            self._events.append((answer, event))
            if not self._woken:
                self._woken = True
                try:
                    loop.call_soon_threadsafe(self._deliver)
                except RuntimeError:  # the loop is closed: nobody listens any more, but leases are given back
                    with suppress(RuntimeError):
                        self._deliver()

        return take

    def _deliver(self) -> None:
        # Before the first look, so that an event that comes during the last one wakes us again.
        self._woken = False
        touched = set()
        while self._events:
            answer, event = self._events.popleft()
            answer.feed(event)
            touched.add(answer.request)
        for request in touched:
            request.settle()


@dataclass
class Piece:
    """What an answer has gained since it was last asked."""

    text: str
    tokens: list[Token]
    """With log-probabilities, where they were asked for: those whose text began by now."""
    offsets: list[int]
    """Where each token's text begins in the answer."""
    finish: Literal["stop", "length"] | None = None


class Answer:
    """One answer as it grows; only the event loop touches it."""

    def __init__(self, request: "Running", version: Deployed | None, work: Work, stops: Sequence[str]) -> None:
        self.request = request
        self.version = version
        self.work = work
        self.answering: Answering | None = None
        self.n_tokens = 0
        self.n_reused = 0
        self.finish: Literal["stop", "length", "cancelled", "failed"] | None = None
        self.error: LoraTuneError | None = None
        """What the client is told."""
        self.failure: LoraTuneError | None = None
        """What the engine said, for the operator."""
        self._text = AnswerText(request.serving.fleet.base.tokenizer, stops)
        self._given: list[str] = []
        self._tokens: deque[tuple[Token, int]] = deque()
        self._told = False

    def feed(self, event: Event) -> None:
        """Take one event."""
        if isinstance(event, Finish):
            self._end(event)
        elif not self._text.stopped and self.finish is None:
            self.n_tokens += 1
            if event.logprob is not None:
                self._tokens.append((event, self._text.n_decoded))
            text = self._text.feed(event.id)
            if text:
                self._given.append(text)
            if self._text.stopped:
                self.cancel()

    def cancel(self) -> None:
        """Stop the engine, if it is still at it."""
        if self.finish is None and self.answering is not None:
            self.answering.cancel()

    def take(self) -> Piece | None:
        """Return what is new; None when there is nothing."""
        ended = self.finish is not None and not self._told
        text = "".join(self._given)
        self._given.clear()
        tokens, offsets = [], []
        # At the end also those without text of their own, unless they are part of a stop string.
        whole = ended and not self._text.stopped
        while self._tokens and (whole or self._tokens[0][1] < self._text.n_given):
            token, offset = self._tokens.popleft()
            tokens.append(token)
            offsets.append(offset)
        if not (text or tokens or ended):
            return None
        self._told = self._told or ended
        reason = self.finish if ended and self.finish in ("stop", "length") else None
        return Piece(text, tokens, offsets, reason)

    def _end(self, finish: Finish) -> None:
        rest = self._text.finish()
        if rest:
            self._given.append(rest)
        self.n_reused = finish.n_reused
        self.finish = "stop" if self._text.stopped else finish.reason
        if self.finish == "failed":
            self.failure = finish.error or EngineFailedError()
            self.error = told_outside(self.failure)
        elif self.finish == "cancelled" and not self.request.cancelled:
            self.error = DrainingError("the server is shutting down", hint="ask again later")


@dataclass
class Serving:
    """What every route of one server works with."""

    fleet: Fleet
    metrics: Metrics
    max_preparing: int
    """Requests whose prompts are prepared at once."""
    mailbox: Mailbox = field(default_factory=Mailbox)
    prompts: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, thread_name_prefix="prompt"))
    changes: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, thread_name_prefix="admin"))
    """Loads and swaps, which may wait long; prompts never wait for them."""
    looks: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="look"))
    """Figures and lists, which are short; they never wait for loads."""
    n_preparing: int = 0

    @contextmanager
    def preparing(self) -> Any:
        """Hold a place among the requests that are prepared.

        Raises:
            BusyError: there is none (429).
        """
        if self.n_preparing >= self.max_preparing:
            raise BusyError(f"{self.max_preparing} requests are being prepared", hint="ask again in a moment")
        self.n_preparing += 1
        try:
            yield
        finally:
            self.n_preparing -= 1

    async def beside(self, call: Callable[[], Value], *, pool: ThreadPoolExecutor | None = None) -> Value:
        """Return what a slow call gives, made in a thread."""
        return await asyncio.get_running_loop().run_in_executor(pool or self.prompts, call)

    def close(self) -> None:
        """End the threads once they are idle."""
        self.prompts.shutdown(wait=False)
        self.changes.shutdown(wait=False)
        self.looks.shutdown(wait=False)


class Running:
    """All answers of one request, those of its shadow too, and its lease: given back once, when the last of them ended."""

    def __init__(self, serving: Serving, lease: Lease, request_id: str) -> None:
        self.serving = serving
        self.lease = lease
        self.request_id = request_id
        self.answers: list[Answer] = []
        self.shadows: list[Answer] = []
        self.n_prompt = 0
        self.cancelled = False
        self._changed = asyncio.Event()
        self._admitted = False
        self._begun_at = time.monotonic()
        self._first_at: float | None = None
        self._counted = False

    def begin(self, ids: Sequence[int], shadow_ids: Sequence[int] | None, asked: ChatBody | CompletionBody) -> None:
        """Hand all works to the engine.

        Raises:
            LoraTuneError: the engine does not take one of them; those before it are stopped again.
        """
        fleet = self.serving.fleet
        self.n_prompt = len(ids)
        most = _longest_answer(len(ids), asked, min(fleet.base.max_context_tokens, fleet.engine.max_context_tokens))
        self.serving.metrics.asked(self.lease.model, len(ids))
        for index in range(asked.n_answers):
            self.answers.append(self._submitted(self.lease.version, ids, asked, most, index))
        if shadow_ids is not None:
            try:
                most = _longest_answer(len(shadow_ids), asked, fleet.engine.max_context_tokens, most=most)
                for index in range(asked.n_answers):
                    self.shadows.append(self._submitted(self.lease.shadow, shadow_ids, asked, most, index))
            except LoraTuneError as err:
                self.shadow_failed(err)
        self._admitted = True
        self.settle()

    def shadow_failed(self, err: LoraTuneError) -> None:
        """Count a shadow that could not run; the request goes on without it."""
        assert self.lease.shadow is not None
        self.serving.metrics.shadow_answered(self.lease.shadow.id, "refused", 0)
        log_event("shadow_refused", id=self.request_id, version=self.lease.shadow.id, code=err.code)

    def give_up(self) -> None:
        """Stop what was begun of a request that failed before its answers could be sent."""
        self.cancel()
        self._admitted = True
        self.settle()

    def cancel(self) -> None:
        """Stop every answer: at most one more token of each is made."""
        self.cancelled = True
        for answer in (*self.answers, *self.shadows):
            answer.cancel()
        self._changed.set()

    def settle(self) -> None:
        """Look at what came in: count, wake who waits, and give the lease back after the last event."""
        now = time.monotonic()
        if self._first_at is None and any(answer.n_tokens for answer in self.answers):
            self._first_at = now
            self.serving.metrics.first_token(self.lease.model, now - self._begun_at)
        everything = (*self.answers, *self.shadows)
        if self._admitted and all(answer.finish is not None for answer in everything):
            if not self._counted:
                self._counted = True
                self._count(now)
            self.lease.release()
        self._changed.set()

    async def changes(self) -> AsyncIterator[None]:
        """Yield whenever something came in, a last time when all answers have ended or the request was cancelled."""
        ended = False
        while not ended:
            await self._changed.wait()
            self._changed.clear()
            ended = self.cancelled or all(answer.finish is not None for answer in self.answers)
            yield

    async def watch(self, receive: Receive) -> None:
        """Cancel when the client is gone."""
        while (await receive())["type"] != "http.disconnect":
            continue
        self.cancel()

    @property
    def error(self) -> LoraTuneError | None:
        """Why one of the answers failed, if one did."""
        return next((answer.error for answer in self.answers if answer.error is not None), None)

    @property
    def usage(self) -> dict[str, Any]:
        """The token counts as OpenAI's clients read them."""
        generated = sum(answer.n_tokens for answer in self.answers)
        reused = max((answer.n_reused for answer in self.answers), default=0)
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": generated,
            "total_tokens": self.n_prompt + generated,
            "prompt_tokens_details": {"cached_tokens": reused},
        }

    def _submitted(
        self, version: Deployed | None, ids: Sequence[int], asked: ChatBody | CompletionBody, most: int, index: int
    ) -> Answer:
        key = version.key if version is not None else BASE
        answer = Answer(self, version, Work(tuple(ids), key, asked.sampling(most, index)), asked.stops)
        sink = self.serving.mailbox.sink(answer, asyncio.get_running_loop())
        answer.answering = self.serving.fleet.engine.submit(answer.work, sink)
        return answer

    def _count(self, now: float) -> None:
        for index, answer in enumerate(self.answers):
            # The prompt is counted once, so what was reused of it is too.
            self.serving.metrics.answered(
                self.lease.model, answer.finish or "failed", n_tokens=answer.n_tokens, n_reused=0 if index else answer.n_reused,
                seconds=now - self._begun_at,
            )  # fmt: skip
        for answer in self.shadows:
            assert answer.version is not None
            self.serving.metrics.shadow_answered(answer.version.id, answer.finish or "failed", answer.n_tokens)
        failure = next((answer.failure for answer in (*self.answers, *self.shadows) if answer.failure), None)
        if failure is not None:
            log_failure(self.request_id, failure)
        first = None if self._first_at is None else round(self._first_at - self._begun_at, 4)
        log_event(
            "answer", id=self.request_id, version=self.lease.model, n_prompt=self.n_prompt,
            n_generated=[answer.n_tokens for answer in self.answers], finish=[answer.finish for answer in self.answers],
            first_token_seconds=first, seconds=round(now - self._begun_at, 4),
        )  # fmt: skip


def log_failure(request_id: str, err: LoraTuneError) -> None:
    """Write one line about what went wrong inside, with the words that no client is told."""
    log_event("failure", id=request_id, kind=type(err).__name__, message=err.message[:_LOGGED_CHARS])


def take_lease(serving: Serving, model: str) -> Lease:
    """Return the hold on what `model` means now; which version of a split answers is drawn here."""
    return serving.fleet.lease(model, draw=random.random())  # noqa: S311 - no secret depends on it


def _longest_answer(n_prompt: int, asked: ChatBody | CompletionBody, context: int, *, most: int | None = None) -> int:
    """Return the most tokens of an answer.

    Raises:
        RequestError: prompt and answer do not fit the context (400).
    """
    wanted, room = most or asked.wanted_tokens, context - n_prompt
    is_text = isinstance(asked, CompletionBody)
    if room < 1:
        raise RequestError(
            f"the prompt has {n_prompt:,} tokens; with one of the answer, at most {context:,} fit",
            hint="send a shorter prompt", where="prompt" if is_text else "messages",
        )  # fmt: skip
    if most is None and asked.wanted_tokens is not None and asked.wanted_tokens > room:
        raise RequestError(
            f"max_tokens is {wanted:,}, but {n_prompt:,} of the {context:,} tokens that fit are the prompt's",
            hint=f"ask for at most {room:,}", where="max_tokens",
        )  # fmt: skip
    return min(wanted or (COMPLETION_TOKENS if is_text else room), room)
