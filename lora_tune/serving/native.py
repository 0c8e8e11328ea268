"""The native engine: one thread owns the model; answers of the base and of any adapters join and leave at every step."""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from lora_tune.adapter.apply import read_state
from lora_tune.adapter.door import AdapterFiles
from lora_tune.errors import (
    ConflictError,
    DrainingError,
    LoraTuneError,
    OutOfMemoryError,
    TrainingError,
    UnsupportedError,
)
from lora_tune.serving import threads
from lora_tune.serving.cache import KeyValueRows
from lora_tune.serving.engine import EngineFacts, Finish, Sink, Work
from lora_tune.serving.forward import Forward
from lora_tune.serving.limits import MAX_WAITING, EngineLimits
from lora_tune.serving.prefixes import MIN_REUSED_TOKENS, Prefixes, common_length
from lora_tune.serving.running import RunningAnswer, begins_like, prefill_budget, told
from lora_tune.serving.sampling import choose, generator_for
from lora_tune.serving.slots import SlotPool

_LOG = logging.getLogger(__name__)


class NativeEngine:
    """Continuous batching over a dense cache; adapters in a slot pool."""

    name = "native"

    def __init__(
        self,
        model: Any,
        ends: Sequence[int],
        *,
        max_context_tokens: int,
        max_running: int = 16,
        max_waiting: int = MAX_WAITING,
        max_adapters: int = 16,
        max_rank: int = 64,
        prefix_bytes: int = 256 * 1024**2,
    ) -> None:
        """Take over the model, and prove on it that rows do not see each other.

        Args:
            model: of no use for anything else afterwards.
            ends: ids that end an answer.
            max_context_tokens: most tokens of prompt and answer together.
            max_running: answers at once.
            max_waiting: answers that may wait.
            max_adapters: adapters at once.
            max_rank: largest rank of one.
            prefix_bytes: kept beginnings of prompts.

        Raises:
            UnsupportedError: this model's answers would not be its own.
        """
        self.max_context_tokens = max_context_tokens
        n_vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._limits = EngineLimits(max_context_tokens, n_vocabulary, max_waiting, max_adapters)
        self._max_running, self._max_rank = max_running, max_rank
        self._ends = frozenset(ends)
        self._prefixes = Prefixes(prefix_bytes)
        self._running: list[RunningAnswer] = []
        self._waiting: deque[RunningAnswer] = deque()
        self._commands: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._loading: set[str] = set()
        self._wake = threading.Condition()
        self._closing = False
        self._defect: LoraTuneError | None = None
        """What ended the thread, if anything but `close` did."""
        self._n_generated = self._n_prefilled = 0
        ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(model, ready), name="lora-tune-engine", daemon=True)
        self._thread.start()
        failure = ready.get()
        if failure is not None:
            raise failure

    def submit(self, work: Work, sink: Sink) -> RunningAnswer:
        """Begin an answer; see Engine."""
        self._limits.check_work(work)
        self._forward.check_holdable(work.prompt)
        stops = frozenset() if work.sampling.ignore_end else self._ends
        answer = RunningAnswer(work, sink, generator_for(work.sampling), list(work.prompt), stops=stops)
        with self._wake:
            self._refuse_when_closing()
            self._limits.check_place(work, held=self._pool.loaded(), n_waiting=len(self._waiting))
            self._waiting.append(answer)
            self._wake.notify()
        return answer

    def load(self, key: str, files: AdapterFiles) -> None:
        """Bring an adapter in; see Engine. Runs on the caller's thread: what answers is not held up."""
        if files.shape.rank > self._max_rank:
            raise UnsupportedError(
                f"{files.folder.name} has rank {files.shape.rank}; this server holds ranks up to {self._max_rank}",
                hint=f"start it with --max-rank {files.shape.rank}, or `lora-tune adapters resize` the adapter",
            )
        with self._wake:
            self._refuse_when_closing()
            self._limits.check_arrival(key, held=self._pool.loaded(), arriving=self._loading)
            self._loading.add(key)
        try:
            self._pool.load(key, files, read_state(files))
        finally:
            with self._wake:
                self._loading.discard(key)

    def unload(self, key: str) -> None:
        """Free an adapter's place; see Engine."""

        def free() -> None:
            with self._wake:
                users = sum(answer.work.adapter == key for answer in (*self._running, *self._waiting))
                if users:
                    raise ConflictError(f"{users} answers are using {key}", hint="wait until they are done")
                if key in self._pool.loaded():
                    self._pool.unload(key)
            self._prefixes.forget(key)

        self._on_thread(free)

    def facts(self) -> EngineFacts:
        """Return what it is doing; see Engine."""
        with self._wake:
            return EngineFacts(
                n_running=len(self._running),
                n_waiting=len(self._waiting),
                n_adapters=self._pool.n_adapters(),
                max_adapters=self._limits.max_adapters,
                n_tokens_generated=self._n_generated,
                n_tokens_prefilled=self._n_prefilled,
                cache_bytes=self._cache.n_bytes() + self._prefixes.n_bytes,
                adapter_bytes=self._pool.n_bytes(),
            )

    def can_answer(self) -> bool:
        """Return whether its thread lives; see Engine."""
        return not self._closing and self._thread.is_alive()

    def close(self) -> None:
        """Stop; see Engine."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _refuse_when_closing(self) -> None:
        if self._defect is not None:
            raise DrainingError("the engine has stopped after a failure", hint="start the server again")
        if self._closing:
            raise DrainingError("the engine is closing", hint="ask another server")

    def _on_thread(self, command: Callable[[], None]) -> None:
        """Run something between two steps and wait for it; its error is raised here."""
        done: Future[None] = Future()
        with self._wake:
            self._refuse_when_closing()
            self._commands.append((command, done))
            self._wake.notify()
        done.result()

    def _run(self, model: Any, ready: "queue.SimpleQueue[BaseException | None]") -> None:
        import torch

        try:
            threads.take()
            # Built here, so that whatever is measured is measured on the thread that will do it.
            self._pool = SlotPool(model, max_places=self._max_running)
            n_layers = model.config.get_text_config().num_hidden_layers
            self._cache = KeyValueRows(n_layers, max(self._max_running, 2))
            self._forward = Forward(model, self._cache)
            self._forward.prove()
        except BaseException as err:  # noqa: BLE001 - raised where the engine was asked for
            ready.put(err)
            return
        ready.put(None)
        defect = None
        try:
            with torch.inference_mode():
                while self._await_work():
                    try:
                        self._step()
                    except Exception as err:  # noqa: BLE001 - one bad batch must not end the thread that answers all others
                        self._fail_all(err)
        except BaseException as err:  # noqa: BLE001 - nobody would be told that the thread is gone
            _LOG.critical("the native engine has stopped", exc_info=err)
            defect = told(err)
        self._end_all(defect)

    def _end_all(self, defect: LoraTuneError | None) -> None:
        """Tell everybody that nothing more comes; the last that the thread does."""
        with self._wake:
            self._defect = defect
            left = [*self._running, *self._waiting]
            self._running, self._waiting = [], deque()
            commands, self._commands = self._commands, deque()
        for answer in left:
            answer.sink(answer.finish("failed" if defect else "cancelled", defect))
        for _, done in commands:
            done.set_exception(DrainingError("the engine has stopped"))

    def _await_work(self) -> bool:
        """Wait until there is something to do, take in what waits, and return False when it is time to end."""
        with self._wake:
            while not (self._closing or self._running or self._waiting or self._commands):
                if self._cache.n_tokens:
                    self._cache.shrink()  # an idle server gives its memory back
                self._wake.wait()
            commands, self._commands = self._commands, deque()
            while self._waiting and len(self._running) < self._max_running and not self._closing:
                self._running.append(self._waiting.popleft())
        for command, done in commands:
            try:
                command()
            except Exception as err:  # noqa: BLE001 - raised on the thread that asked
                done.set_exception(err)
            else:
                done.set_result(None)
        return not self._closing

    def _step(self) -> None:
        """Read what new prompts may be read, then make one token of every answer that is being made."""
        for row in reversed(range(len(self._running))):
            if self._running[row].cancelled:
                self._leave(row, self._running[row].finish("cancelled"))
        self._drop_cancelled_waiting()
        n_answering = sum(not answer.reading for answer in self._running)
        self._read_prompts(n_answering)
        n_answering -= self._make_room([(answer, len(answer.tokens)) for answer in self._running[:n_answering]])
        answering = self._running[:n_answering]
        if answering:
            logits = self._forward(
                [answer.tokens[-1:] for answer in answering],
                [answer.n_cached for answer in answering],
                first_row=0,
                route=self._route(answering),
            )
            for answer in answering:
                answer.n_cached += 1
            self._next_tokens(logits, answering)

    def _read_prompts(self, n_answering: int) -> None:
        """Read the next prompts, or a part of the next one; those read to the end get their first token."""
        group = self._next_prompts(n_answering)
        if not group:
            return None
        budget = prefill_budget(len(self._running), n_answering)
        left = len(group) - self._make_room([(one, min(one.n_prompt, one.n_cached + budget)) for one in group])
        group = self._running[n_answering : n_answering + left]
        if not group:
            return None
        parts = [answer.tokens[answer.n_cached : answer.n_cached + budget] for answer in group]
        starts = [answer.n_cached for answer in group]
        try:
            logits = self._forward(parts, starts, first_row=n_answering, route=self._route(group))
        except Exception as err:  # noqa: BLE001 - only these rows were written to: the answers beside them go on
            return self._fail(group, err)
        for answer, part in zip(group, parts, strict=True):
            answer.n_cached += len(part)
        self._n_prefilled += sum(map(len, parts))
        if not group[0].reading:
            self._next_tokens(logits, group)
        return None

    def _make_room(self, wanted: Sequence[tuple[RunningAnswer, int]]) -> int:
        """Make room for so many tokens of each answer; those for which there is no memory fail, and are counted."""
        try:
            self._cache.reserve(max((n_tokens for _, n_tokens in wanted), default=0))
        except OutOfMemoryError as err:
            failed = [answer for answer, n_tokens in wanted if n_tokens > self._cache.n_tokens]
            self._fail(failed, err)
            return len(failed)
        return 0

    def _next_prompts(self, n_answering: int) -> list[RunningAnswer]:
        """Return the prompts that are read together: as many of the next ones as fit, padded by less than a third.

        One that begins like another of the group waits for it, and then takes over that beginning.
        """
        budget = prefill_budget(len(self._running), n_answering)
        group: list[RunningAnswer] = []
        for row, answer in enumerate(self._running[n_answering:], start=n_answering):
            if any(begins_like(answer, other) for other in group):
                break
            if not answer.placed:
                self._take_over_beginning(row)
            left = [item.n_prompt - item.n_cached for item in (*group, answer)]
            if group and (max(left) * len(left) > budget or max(left) * len(left) > 1.5 * sum(left)):
                break
            group.append(answer)
            if left[-1] > budget:
                break
        return group

    def _take_over_beginning(self, row: int) -> None:
        """Copy the longest known beginning of a prompt into its row: of another answer, or of what is kept."""
        answer = self._running[row]
        answer.placed = True
        prompt, adapter = answer.work.prompt, answer.work.adapter
        best, source = 0, -1
        for other_row, other in enumerate(self._running):
            if other is not answer and other.work.adapter == adapter and other.n_cached > best:
                n_common = common_length(other.tokens[: other.n_cached], prompt)
                if n_common > best:
                    best, source = n_common, other_row
        best = min(best, len(prompt) - 1)
        n_kept, kept = self._prefixes.longest(adapter, prompt)
        if max(best, n_kept) < MIN_REUSED_TOKENS:
            return
        try:
            self._cache.reserve(len(prompt))
        except OutOfMemoryError:
            return  # it is read from its first token on, as far as there is room
        if kept is not None and n_kept >= best:
            self._cache.copy_in(row, kept, n_kept)
        else:
            self._cache.move(source, row, best)
        answer.n_cached = answer.n_reused = max(best, n_kept)

    def _route(self, answers: Sequence[RunningAnswer]) -> Callable[[], None]:
        keys = [answer.work.adapter for answer in answers]
        return lambda: self._pool.route(keys)

    def _next_tokens(self, logits_bv: Any, answers: Sequence[RunningAnswer]) -> None:
        """Choose the next token of each answer, tell it, and let go of those that are done."""
        most_tokens = min(self.max_context_tokens, self._forward.most_tokens())
        finite = logits_bv.amax(-1).isfinite().tolist()
        samplings, generators = [a.work.sampling for a in answers], [a.generator for a in answers]
        chosen = choose(logits_bv, samplings, generators)
        done: list[tuple[RunningAnswer, Finish]] = []
        for answer, token, is_finite in zip(answers, chosen, finite, strict=True):
            if not is_finite:
                error = TrainingError(
                    "the model's numbers are not finite", hint="`lora-tune adapters verify` the adapter"
                )
                done.append((answer, answer.finish("failed", error)))
            elif token.id in answer.stops:
                done.append((answer, answer.finish("stop")))
            else:
                answer.tokens.append(token.id)
                self._n_generated += 1
                answer.sink(token)
                if answer.n_generated >= answer.work.sampling.max_tokens or len(answer.tokens) >= most_tokens:
                    done.append((answer, answer.finish("length")))
        for answer, finish in done:
            self._leave(self._running.index(answer), finish)

    def _leave(self, row: int, finish: Finish) -> None:
        """End an answer and close the gap: answering rows stay the first ones, and prompts are read in their order."""
        answer = self._running[row]
        if finish.reason in ("stop", "length") and not self._prefixes.covers(answer.work.adapter, answer.tokens):
            kept = answer.tokens[: answer.n_cached]
            self._prefixes.keep(answer.work.adapter, kept, self._cache.copy_out(row, answer.n_cached))
        last_answering = max((i for i, other in enumerate(self._running) if not other.reading), default=row)
        moves = [(last_answering, row)] if last_answering > row else []
        moves += [(i + 1, i) for i in range(max(row, last_answering), len(self._running) - 1)]
        for mover, hole in moves:
            self._cache.move(mover, hole, self._running[mover].n_cached)
            self._running[hole] = self._running[mover]
        # What is masked is still multiplied by zero: numbers that are not finite must not stay for a later answer.
        self._cache.clear(len(self._running) - 1)
        with self._wake:
            self._running.pop()
        answer.sink(finish)

    def _drop_cancelled_waiting(self) -> None:
        with self._wake:
            dropped = [answer for answer in self._waiting if answer.cancelled]
            for answer in dropped:
                self._waiting.remove(answer)
        for answer in dropped:
            answer.sink(Finish("cancelled"))

    def _fail(self, answers: Sequence[RunningAnswer], err: Exception) -> None:
        """End these answers with the error; the others go on."""
        _LOG.error("%d answers failed: %s: %s", len(answers), type(err).__name__, err)
        for answer in answers:
            self._leave(self._running.index(answer), answer.finish("failed", told(err)))

    def _fail_all(self, err: Exception) -> None:
        """End every running answer with the error; the engine goes on with the next ones."""
        _LOG.error("a batch failed: %s: %s", type(err).__name__, err)
        with self._wake:
            failed, self._running = self._running, []
        self._cache.shrink()
        self._prefixes.clear()
        for answer in failed:
            answer.sink(answer.finish("failed", told(err)))
