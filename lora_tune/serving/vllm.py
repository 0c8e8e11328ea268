"""The engine of many GPUs and machines: one or several vLLM servers, ours or given, with adapters under never-reused names.

An adapter counts as loaded when every replica has it; an answer goes to the replica with the fewest.
"""

import asyncio
import secrets
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError as FutureCancelledError
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from lora_tune.adapter.door import AdapterFiles
from lora_tune.adapter.live import check_fits
from lora_tune.adapter.portability import lint_for
from lora_tune.errors import ConflictError, DrainingError, LoraTuneError, UnreachableError, UnsupportedError
from lora_tune.model.fingerprint import read_config, read_shapes
from lora_tune.model.resolve import Progress
from lora_tune.serving.engine import BASE, Answering, EngineFacts, Finish, ServedBase, Sink, Work
from lora_tune.serving.limits import MAX_WAITING, EngineLimits
from lora_tune.serving.vllm_child import ChildLimits, VllmChild, find_vllm
from lora_tune.serving.vllm_folder import HeldAdapter, os_translated, write_adapter
from lora_tune.serving.vllm_replica import (
    Address,
    ModelLostError,
    Replica,
    ReplicaGoneError,
    all_or_first_error,
    request_body,
)

_LOOK_SECONDS = 2.0
"""How often a replica that went away is looked for."""
_Result = TypeVar("_Result")


def start_vllm(
    base: ServedBase, limits: ChildLimits, progress: Progress, environment: Mapping[str, str]
) -> "VllmEngine":
    """Start a vLLM of our own on the base and return the engine over it.

    Raises:
        UnreachableError: there is no vLLM, or it does not start (exit 69).
        UnsupportedError: it cannot hold the base or such ranks.
    """
    child = VllmChild(find_vllm(environment), base, limits, environment)
    try:
        child.wait_until_up(progress)
        address = Address("http://vllm", child.api_key, child.socket)
        return VllmEngine(base, [address], limits, folder=child.folder / "adapters", child=child)
    except BaseException:
        child.close()
        raise


def connect_vllm(
    base: ServedBase, urls: Sequence[str], limits: ChildLimits, environment: Mapping[str, str]
) -> "VllmEngine":
    """Return the engine over servers that run already, each on the same base; their key is LORA_TUNE_VLLM_API_KEY.

    Raises:
        UnreachableError: one of them cannot be reached (exit 69).
    """
    key, shared = environment.get("LORA_TUNE_VLLM_API_KEY", ""), environment.get("LORA_TUNE_VLLM_SHARED")
    with os_translated(Path(shared or tempfile.gettempdir())):
        folder = Path(tempfile.mkdtemp(prefix="lora-tune-adapters-", dir=shared))
        if shared:
            folder.chmod(0o755)  # a server on another machine may run as another user
    try:
        return VllmEngine(base, [Address(url.rstrip("/"), key) for url in urls], limits, folder=folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


class VllmEngine:
    """See Engine. Answers run on one event loop in a thread of its own, and so does all talk with the replicas."""

    name = "vllm"

    def __init__(
        self, base: ServedBase, addresses: Sequence[Address], limits: ChildLimits, *, folder: Path,
        child: VllmChild | None = None,
    ) -> None:  # fmt: skip
        """Connect; `folder` is for the adapters' files, is ours, and is removed in the end.

        Raises:
            UnreachableError: a replica cannot be reached, or is no vLLM.
        """
        config = read_config(base.files.folder)
        self._base, self._limits, self._folder, self._child = base, limits, folder, child
        self._model_type, self._shapes = config.get("model_type"), read_shapes(base.files.folder)
        self._lock = threading.Lock()
        self._instance, self._n_named = secrets.token_hex(4), 0
        self._held: dict[str, HeldAdapter] = {}
        self._arriving: set[str] = set()
        self._in_use: Counter[str] = Counter()
        self._answers: set[_Answer] = set()
        self._closing = False
        self.n_tokens_generated = self.n_tokens_prefilled = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        self._replicas: list[Replica] = []
        try:
            self._call(self._connect(addresses))
        except BaseException:
            self._stop_loop()
            raise
        self.max_context_tokens = min(base.max_context_tokens, *(r.max_context_tokens for r in self._replicas))
        n_vocabulary = int((config.get("text_config") or config).get("vocab_size") or sys.maxsize)
        self._bounds = EngineLimits(self.max_context_tokens, n_vocabulary, MAX_WAITING, limits.max_adapters)

    def submit(self, work: Work, sink: Sink) -> Answering:
        """See Engine.submit."""
        self._bounds.check_work(work)
        with self._lock:
            if self._closing:
                raise DrainingError("the server is shutting down")
            n_waiting = len(self._answers) - self._limits.max_running * len(self._replicas)
            self._bounds.check_place(work, held=self._held, n_waiting=n_waiting)
            name = self._held[work.adapter].name if work.adapter != BASE else BASE
            answer = _Answer(self, work, sink, name)
            self._answers.add(answer)
            self._in_use[work.adapter] += 1
        self._loop.call_soon_threadsafe(answer.begin)
        return answer

    def load(self, key: str, files: AdapterFiles) -> None:
        """See Engine.load. vLLM reads a private copy of exactly the bytes that the door checked."""
        of_base = self._base.section.quantization
        verdict = lint_for(files, "vllm", max_rank=self._limits.max_rank, model_type=self._model_type, held=of_base)
        for finding in verdict.reasons:
            if finding.level != "note":
                raise UnsupportedError(
                    f"vLLM does not load {files.folder.name}: {finding.what}; {finding.why}",
                    hint=f"{finding.what_to_do}; or use --engine native or simple",
                )
        check_fits(files, self._shapes, conv1d=False)  # vLLM passes over layers that the base does not have
        with self._place(key) as name:
            held = HeldAdapter(name, self._folder / name, files.weights_bytes)
            try:
                write_adapter(held.folder, files)
                self._call(self._load_everywhere(held))
            except BaseException:
                shutil.rmtree(held.folder, ignore_errors=True)
                raise
            with self._lock:
                self._held[key] = held

    def unload(self, key: str) -> None:
        """See Engine.unload. A replica that cannot be reached keeps the weights until it is started anew."""
        with self._lock:
            if self._in_use[key]:
                raise ConflictError(f"{self._in_use[key]} answers are using {key}", hint="wait until they have ended")
            held = self._held.pop(key, None)
            closing = self._closing
        if held is None or closing:
            return
        # From here on nobody is sent to it, also where vLLM goes on answering for it (vllm-project/vllm#54839).
        with suppress(UnreachableError):
            self._call(all_or_first_error([replica.unload(held.name) for replica in self._replicas]))
        shutil.rmtree(held.folder, ignore_errors=True)

    def facts(self) -> EngineFacts:
        """See Engine.facts. What vLLM holds for keys and values, its own /metrics says; here it is 0."""
        with self._lock:
            n_running = sum(answer.n_told > 0 for answer in self._answers)
            return EngineFacts(
                n_running=n_running,
                n_waiting=len(self._answers) - n_running,
                n_adapters=len(self._held),
                max_adapters=self._limits.max_adapters,
                n_tokens_generated=self.n_tokens_generated,
                n_tokens_prefilled=self.n_tokens_prefilled,
                cache_bytes=0,
                adapter_bytes=sum(held.weights_bytes for held in self._held.values()),
            )

    def can_answer(self) -> bool:
        """See Engine.can_answer: one replica that can be reached is enough."""
        if self._child is not None:
            try:
                self._child.check_alive()
            except UnreachableError:
                return False
        return not self._closing and self._thread.is_alive() and any(replica.is_up for replica in self._replicas)

    def close(self) -> None:
        """See Engine.close. Adapters are taken from given servers again; a server of our own is ended."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            held = list(self._held.values())
        self._call(self._end_answers())
        if self._child is None:
            with suppress(UnreachableError):
                self._call(all_or_first_error([replica.unload(one.name) for one in held for replica in self._replicas]))
        self._stop_loop()
        if self._child is not None:
            self._child.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def release(self, answer: "_Answer") -> None:
        """Forget an answer that has ended."""
        with self._lock:
            self._answers.discard(answer)
            self._in_use[answer.work.adapter] -= 1

    async def answer_on_some(self, answer: "_Answer") -> Finish:
        """Make the answer on the replica with the fewest; on another one if that fails before the first token."""
        tried: set[Replica] = set()
        while True:
            replica = self._least_busy(tried)
            tried.add(replica)
            try:
                return await self._answer_on(replica, answer)
            except UnreachableError as err:
                # One odd answer is no reason to keep all others from it.
                replica.is_up &= not isinstance(err, ReplicaGoneError)
                replica.has_lost_models |= isinstance(err, ModelLostError)
                if answer.n_told or not any(r.is_up for r in self._replicas if r not in tried):
                    raise

    async def _answer_on(self, replica: Replica, answer: "_Answer") -> Finish:
        work = answer.work
        body = request_body(
            answer.name or replica.base_model, work.prompt, work.sampling, ends=self._base.ends,
            max_tokens=self._bounds.room_tokens(work),
        )  # fmt: skip
        replica.n_running += 1
        reason, n_reused = None, 0
        pieces = replica.answer(body)
        try:
            async for piece in pieces:
                for token in piece.tokens:
                    answer.tell(token)
                reason, n_reused = piece.reason or reason, piece.n_reused or n_reused
        finally:
            replica.n_running -= 1
            await pieces.aclose()
        if reason not in ("stop", "length"):
            raise UnreachableError(f"{replica.label} ended an answer without saying why")
        self.n_tokens_prefilled += len(work.prompt) - n_reused
        return Finish("stop" if reason == "stop" else "length", answer.n_told, n_reused)

    def _least_busy(self, tried: set[Replica]) -> Replica:
        up = [replica for replica in self._replicas if replica.is_up and replica not in tried]
        if up:
            return min(up, key=lambda replica: replica.n_running)
        if self._child is not None:
            self._child.check_alive()
        raise UnreachableError(
            f"{', '.join(replica.label for replica in self._replicas)} cannot be reached",
            hint="look whether vLLM still runs",
        )

    async def _connect(self, addresses: Sequence[Address]) -> None:
        self._replicas = [Replica(address) for address in addresses]
        await all_or_first_error([replica.learn() for replica in self._replicas])
        self._looking = self._loop.create_task(self._look_for_lost())

    async def _load_everywhere(self, held: HeldAdapter) -> None:
        try:
            await all_or_first_error([replica.load(held.name, held.folder) for replica in self._replicas])
        except LoraTuneError:
            undone = [replica.unload(held.name) for replica in self._replicas]
            await asyncio.gather(*undone, return_exceptions=True)
            raise

    async def _look_for_lost(self) -> None:
        """Take back replicas that answer again, once they have every adapter: one that was restarted has none."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            for replica in [r for r in self._replicas if r.has_lost_models or not r.is_up]:
                with suppress(LoraTuneError):
                    if not await replica.is_healthy():
                        continue
                    has = await replica.learn()
                    with self._lock:
                        missing = [held for held in self._held.values() if held.name not in has]
                    for held in missing:
                        await replica.load(held.name, held.folder)
                    replica.is_up, replica.has_lost_models = True, False

    async def _end_answers(self) -> None:
        with self._lock:
            answers = list(self._answers)
        for answer in answers:
            answer.stop()
        await asyncio.gather(*(answer.ended.wait() for answer in answers))

    @contextmanager
    def _place(self, key: str) -> Iterator[str]:
        """Keep a place for the adapter while it is brought in, and give it a name that it never had."""
        with self._lock:
            if self._closing:
                raise DrainingError("the server is shutting down")
            self._bounds.check_arrival(key, held=self._held, arriving=self._arriving)
            self._arriving.add(key)
            self._n_named += 1
            name = f"{key}--{self._instance}-{self._n_named}"
        try:
            yield name
        finally:
            with self._lock:
                self._arriving.discard(key)

    def _call(self, job: Coroutine[Any, Any, _Result]) -> _Result:
        try:
            return asyncio.run_coroutine_threadsafe(job, self._loop).result()
        except FutureCancelledError as err:
            raise DrainingError("the server is shutting down") from err

    def _stop_loop(self) -> None:
        async def close_all() -> None:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, *(replica.close() for replica in self._replicas), return_exceptions=True)

        self._call(close_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Answer:
    """One answer: a task on the engine's loop, and what its sink was told. Its end is told exactly once."""

    def __init__(self, engine: VllmEngine, work: Work, sink: Sink, name: str) -> None:
        self.work, self.name, self.n_told = work, name, 0
        self.ended = asyncio.Event()
        self._engine, self._sink, self._cancelled = engine, sink, False
        self._task: asyncio.Task[Finish] | None = None

    def cancel(self) -> None:
        """See Answering.cancel. Closing the connection is what makes vLLM stop."""
        self._cancelled = True
        with suppress(RuntimeError):  # the loop is closed, so the answer has ended
            self._engine._loop.call_soon_threadsafe(self.stop)

    def begin(self) -> None:
        """Start it; on the loop."""
        self._task = asyncio.get_running_loop().create_task(self._engine.answer_on_some(self))
        self._task.add_done_callback(self._finish)
        if self._cancelled:
            self._task.cancel()

    def stop(self) -> None:
        """Cancel it; on the loop."""
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()

    def tell(self, token: Any) -> None:
        """Pass a token on; on the loop."""
        if self._cancelled:
            return
        self.n_told += 1
        self._engine.n_tokens_generated += 1
        self._sink(token)

    def _finish(self, task: "asyncio.Task[Finish]") -> None:
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or self._cancelled:
            finish = Finish("cancelled", self.n_told)
        elif error is None:
            finish = task.result()
        elif isinstance(error, LoraTuneError):
            finish = Finish("failed", self.n_told, error=error)
        else:
            finish = Finish(
                "failed", self.n_told, error=LoraTuneError(f"the answer failed: {type(error).__name__}: {error}")
            )
        self._engine.release(self)
        self._sink(finish)
        self.ended.set()
