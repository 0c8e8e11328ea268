"""The plain engine: one thread owns a peft model and answers in small batches of one adapter each.

It holds whatever peft and transformers do (DoRA, any architecture), and is what the faster engines are measured against.
"""

import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from lora_tune.adapter.door import AdapterFiles
from lora_tune.errors import (
    ConflictError,
    DrainingError,
    LoraTuneError,
    OutOfMemoryError,
    TrainingError,
    UnsupportedError,
)
from lora_tune.model.load import Dtype
from lora_tune.serving import threads
from lora_tune.serving.attached import AttachedAdapters, held_bytes
from lora_tune.serving.batches import Batch, only_attends, rereads_from, stretching
from lora_tune.serving.engine import EngineFacts, Finish, Sink, Token, Work
from lora_tune.serving.limits import MAX_WAITING, EngineLimits
from lora_tune.serving.sampling import choose, generator_for

_LOG = logging.getLogger(__name__)

MAX_BATCH = 8
"""Answers that go on together."""
MAX_RUNNING = 16
"""Answers of all batches."""
_MAX_PREFILL_TOKENS = 8192
"""Of one batch's prompts with their padding; a longer prompt is read alone."""


class _Row:
    """One answer that is being made, or waits."""

    def __init__(self, work: Work, sink: Sink, *, limit: int) -> None:
        self.work = work
        self.sink = sink
        self.limit = limit
        """Most tokens that may be made."""
        self.generator = generator_for(work.sampling)
        self.n_generated = 0
        self.cancelled = False
        self.over = False

    def cancel(self) -> None:
        """Stop it before its next token."""
        self.cancelled = True

    def finish(self, reason: Any, error: LoraTuneError | None = None) -> None:
        """Say that nothing more comes, once."""
        if self.over:
            return
        self.over = True
        try:
            self.sink(Finish(reason, self.n_generated, 0, error))
        except Exception:  # noqa: BLE001 - it must not keep the others from their ends
            _LOG.exception("an answer's end was told to a listener that failed")


class SimpleEngine:
    """Every method may be called from any thread; the model is touched by one only."""

    name = "simple"

    def __init__(
        self,
        model: Any,
        ends: Sequence[int],
        *,
        max_context_tokens: int,
        max_waiting: int = MAX_WAITING,
        max_adapters: int = 16,
        adapter_dtype: Dtype = "fp32",
    ) -> None:
        """Take over the model.

        Raises:
            UnsupportedError: an answer would depend on those that were made before it.
        """
        config = model.config.get_text_config()
        if stretching(config) == "dynamic":
            raise UnsupportedError(
                "this base's positions depend on the longest answer that was ever made, so that answers would not be its own",
                hint="serve it with --engine vllm",
            )
        self.max_context_tokens = max_context_tokens
        self._ends = frozenset(ends)
        n_vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._limits = EngineLimits(max_context_tokens, n_vocabulary, max_waiting, max_adapters)
        # Where a batch's longest row stretches the positions of all, each answer is a batch of its own.
        self._max_batch = 1 if stretching(config) else MAX_BATCH
        self._rereads_from = rereads_from(config)
        self._weights = AttachedAdapters(model, adapter_dtype)
        takes = inspect.signature(model.forward).parameters
        self._pads = "position_ids" in takes and only_attends(model)
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._lock = threading.Condition()
        self._waiting: deque[_Row] = deque()
        self._batches: list[Batch] = []
        self._chores: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._keys: set[str] = set()
        self._n_generated = self._n_prefilled = 0
        self._closing = False
        self._defect: LoraTuneError | None = None
        """What ended the thread, if anything but `close` did."""
        self._thread = threading.Thread(target=self._run, name="simple-engine", daemon=True)
        self._thread.start()

    def submit(self, work: Work, sink: Sink) -> _Row:
        """Begin an answer; see Engine."""
        self._limits.check_work(work)
        row = _Row(work, sink, limit=self._limits.room_tokens(work))
        with self._lock:
            self._refuse_when_closing()
            self._limits.check_place(work, held=self._keys, n_waiting=len(self._waiting))
            self._waiting.append(row)
            self._lock.notify()
        return row

    def load(self, key: str, files: AdapterFiles) -> None:
        """Bring an adapter in between two tokens; see Engine."""

        def attach() -> None:
            self._limits.check_arrival(key, held=self._keys)
            self._weights.attach(key, files)
            with self._lock:
                self._keys.add(key)

        self._on_thread(attach)

    def unload(self, key: str) -> None:
        """Free an adapter's place; see Engine."""

        def detach() -> None:
            with self._lock:
                if key not in self._keys:
                    return
                users = sum(row.work.adapter == key for row in (*self._waiting, *self._running()))
                if users:
                    raise ConflictError(f"{users} answers are using {key}", hint="wait until they are done")
                self._keys.remove(key)
            self._weights.detach(key)

        self._on_thread(detach)

    def facts(self) -> EngineFacts:
        """Return what it is doing; see Engine."""
        with self._lock:
            return EngineFacts(
                n_running=len(self._running()),
                n_waiting=len(self._waiting),
                n_adapters=len(self._keys),
                max_adapters=self._limits.max_adapters,
                n_tokens_generated=self._n_generated,
                n_tokens_prefilled=self._n_prefilled,
                cache_bytes=sum(held_bytes(batch.cache) for batch in self._batches),
                adapter_bytes=self._weights.n_bytes,
            )

    def can_answer(self) -> bool:
        """Return whether its thread lives; see Engine."""
        return not self._closing and self._thread.is_alive()

    def close(self) -> None:
        """Stop; see Engine."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _running(self) -> list[_Row]:
        return [row for batch in self._batches for row in batch.rows]

    def _refuse_when_closing(self) -> None:
        if self._defect is not None:
            raise DrainingError("the engine has stopped after a failure", hint="start the server again")
        if self._closing:
            raise DrainingError("the engine is closing", hint="ask another server")

    def _on_thread(self, chore: Callable[[], None]) -> None:
        """Have it done between two tokens, and wait; its error is raised here."""
        done: Future[None] = Future()
        with self._lock:
            self._refuse_when_closing()
            self._chores.append((chore, done))
            self._lock.notify()
        done.result()

    def _run(self) -> None:
        import torch

        try:
            threads.take()
            with torch.no_grad():
                while self._await_work():
                    try:
                        self._admit()
                        for batch in tuple(self._batches):
                            self._step(batch)
                    except Exception as err:  # noqa: BLE001 - one bad step must not end the thread that answers all others
                        _LOG.exception("a step of the simple engine failed")
                        self._end_all("failed", _translated(err))
        except BaseException as err:  # noqa: BLE001 - nobody would be told that the thread is gone
            _LOG.critical("the simple engine has stopped", exc_info=err)
            with self._lock:
                self._defect = _translated(err)
        self._end_all("failed" if self._defect else "cancelled", self._defect, also_waiting=True)
        with self._lock:
            chores, self._chores = self._chores, deque()
        for _, done in chores:
            done.set_exception(DrainingError("the engine has stopped"))

    def _end_all(self, reason: str, error: LoraTuneError | None, *, also_waiting: bool = False) -> None:
        """End what is being answered, and what waits too when nothing more will be."""
        with self._lock:
            left = self._running()
            self._batches = []
            if also_waiting:
                left += self._waiting
                self._waiting = deque()
        for row in left:
            row.finish(reason, error)

    def _await_work(self) -> bool:
        """Wait until there is something to do, do the chores, and return False when it is time to end."""
        with self._lock:
            while not (self._closing or self._chores or self._waiting or self._batches):
                self._lock.wait()
            if self._closing:
                return False
            chores, self._chores = self._chores, deque()
        for chore, done in chores:
            try:
                chore()
            except Exception as err:  # noqa: BLE001 - carried to the thread that asked, and raised there
                done.set_exception(_translated(err))
            else:
                done.set_result(None)
        return True

    def _admit(self) -> None:
        """Let waiting answers begin, those of one adapter together, the longest waiting first."""
        with self._lock:
            cancelled = [row for row in self._waiting if row.cancelled]
            self._waiting = deque(row for row in self._waiting if not row.cancelled)
            groups = []
            n_free = MAX_RUNNING - len(self._running())
            while self._waiting and n_free > 0:
                groups.append(self._take_group(min(self._max_batch, n_free)))
                n_free -= len(groups[-1])
        for row in cancelled:
            row.finish("cancelled")
        for group in groups:
            self._start(group)

    def _start(self, group: list[_Row]) -> None:
        try:
            batch = Batch(group, self._weights.model.device)
        except Exception as err:  # noqa: BLE001 - carried to every answer of the group
            for row in group:
                row.finish("failed", _translated(err))
        else:
            with self._lock:
                self._batches.append(batch)

    def _take_group(self, most: int) -> list[_Row]:
        """Take the first waiting answer, and others that can go on with it."""
        group, others = [self._waiting.popleft()], deque[_Row]()
        width = len(group[0].work.prompt)
        for row in self._waiting:
            n_prompt = len(row.work.prompt)
            wider = max(width, n_prompt)
            fits = len(group) < most and wider * (len(group) + 1) <= _MAX_PREFILL_TOKENS
            if row.work.adapter == group[0].work.adapter and fits and (self._pads or n_prompt == width):
                group.append(row)
                width = wider
            else:
                others.append(row)
        self._waiting = others
        return group

    def _step(self, batch: Batch) -> None:
        """Make one token of each answer of the batch, tell it, and let go of those that are done."""
        if all(row.cancelled for row in batch.rows):
            return self._end(batch, [(row, "cancelled", None) for row in batch.rows])
        try:
            logits = self._forward(batch)
            finite = logits.amax(-1).isfinite().tolist()
            tokens = choose(logits, [row.work.sampling for row in batch.rows], [row.generator for row in batch.rows])
        except Exception as err:  # noqa: BLE001 - carried to every answer of the batch; the thread serves all the others
            return self._end(batch, [(row, "failed", _translated(err)) for row in batch.rows])
        going, over = [], []
        for number, (row, token) in enumerate(zip(batch.rows, tokens, strict=True)):
            reason, error = self._take(row, token, is_finite=finite[number])
            if reason is None:
                going.append(number)
            else:
                over.append((row, reason, error))
        if not going:
            return self._end(batch, over)
        try:
            with self._lock:
                batch.go_on(going, tokens)
        except Exception as err:  # noqa: BLE001 - as above; copying the cache may be what does not fit
            return self._end(batch, over + [(batch.rows[number], "failed", _translated(err)) for number in going])
        for row, reason, error in over:
            row.finish(reason, error)
        return None

    def _take(self, row: _Row, token: Token, *, is_finite: bool) -> tuple[str | None, LoraTuneError | None]:
        """Tell an answer its token; return why it is over, or None."""
        if row.cancelled:
            return "cancelled", None
        if not is_finite:
            return "failed", TrainingError(
                "the model's numbers are not finite", hint="`lora-tune adapters verify` the adapter"
            )
        if token.id in self._ends and not row.work.sampling.ignore_end:
            return "stop", None
        row.n_generated += 1
        self._n_generated += 1
        row.sink(token)
        return ("length" if row.n_generated >= row.limit else None), None

    def _end(self, batch: Batch, over: Sequence[tuple[_Row, str, LoraTuneError | None]]) -> None:
        with self._lock:
            self._batches.remove(batch)
        for row, reason, error in over:
            row.finish(reason, error)

    def _forward(self, batch: Batch) -> Any:
        """Return the logits that predict the next token of each row, [B, V]."""
        self._weights.act(batch.adapter)
        if batch.ids.shape[1] == self._rereads_from:
            batch.cache = None
        n_new = 1 if batch.cache is not None else batch.ids.shape[1]
        if all(row.n_generated == 0 for row in batch.rows):
            self._n_prefilled += sum(len(row.work.prompt) for row in batch.rows)
        more: dict[str, Any] = dict(self._last_only)
        if self._pads:
            more["position_ids"] = (batch.attended.cumsum(-1) - 1).clamp_min(0)[:, -n_new:]
        if batch.cache is not None:
            more["past_key_values"] = batch.cache
        output = self._weights.model(
            input_ids=batch.ids[:, -n_new:],
            attention_mask=batch.attended,
            use_cache=True,
            **more,
        )
        # A model that gives back nothing to remember reads everything again for each token.
        batch.cache = getattr(output, "past_key_values", None)
        return output.logits[:, -1]


def _translated(err: BaseException) -> LoraTuneError:
    import torch

    if isinstance(err, LoraTuneError):
        return err
    if isinstance(err, torch.OutOfMemoryError):
        return OutOfMemoryError(
            "the answers do not fit the device's memory", hint="start the server with a smaller --max-context"
        )
    return LoraTuneError(f"{type(err).__name__}: {err}", hint="this is a bug of lora_tune: please report it")
