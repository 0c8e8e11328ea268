"""Golden probes through an engine: does it answer with an adapter as the adapter's passport says it answered in training?

Unlike adapter/probes.py there are no logits of chosen positions here, only greedy answers with their likeliest tokens: they
are compared position by position, for as long as the answer is the recorded one.
"""

import math
import queue
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lora_tune.adapter.door import AdapterFiles
from lora_tune.adapter.manifest import Probe
from lora_tune.adapter.probes import ANSWER_TOKENS, CLOSE_KL, CLOSE_SHARE, EQUAL_DELTA, ProbeResult
from lora_tune.errors import AdapterError, BusyError, LoraTuneError, UsageError
from lora_tune.model.fingerprint import read_config, read_shapes
from lora_tune.serving.engine import MAX_LOGPROBS, Answering, Engine, Event, Sampling, ServedBase, Token, Work

MAX_SECONDS = 120.0
"""Longest that all probes of one adapter may take, waiting behind other answers included."""
_MAX_POSITIONS = 4 * ANSWER_TOKENS
"""Of one probe: a passport's author decides neither how long a server computes nor how long others wait."""
_RETRY_SECONDS = 0.05
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)


@dataclass(frozen=True)
class _Position:
    """One compared token: recorded log-probabilities of the trained model and of the base, and what was found."""

    recorded: tuple[float, ...]
    base: tuple[float, ...]
    found: tuple[float, ...]
    same: bool
    """Whether the likeliest token is the recorded one."""


def probe(engine: Engine, base: ServedBase, key: str, files: AdapterFiles) -> ProbeResult:
    """Return how far the engine's answers under `key` are from what the passport of `files` recorded.

    Raises:
        UsageError: the adapter has no passport.
        AdapterError: a probe's prompt is not of this base (412).
        BusyError: the engine had no place for them, or did not answer in time (429).
        LoraTuneError: the engine failed, in its own words.
    """
    if files.manifest is None:
        raise UsageError(f"{files.folder} has no passport, so there is nothing to compare with")
    probes = files.manifest.probes
    _check_ids(probes, base, files)
    until = time.monotonic() + MAX_SECONDS
    begun: list[tuple[Probe, Answering, queue.SimpleQueue[Event]]] = []
    try:
        for one in probes:
            work = _work(one, key, context=engine.max_context_tokens)
            events: queue.SimpleQueue[Event] = queue.SimpleQueue()
            begun.append((one, _submitted(engine, work, events, until), events))
        answers = [_answer(events, until) for _, _, events in begun]
    finally:
        for _, answering, _ in begun:
            answering.cancel()
    return compare(probes, answers)


def compare(probes: Sequence[Probe], answers: Sequence[Sequence[Token]]) -> ProbeResult:
    """Return how far the answers are from the recorded ones."""
    positions = [position for one, answer in zip(probes, answers, strict=True) for position in _positions(one, answer)]
    if not positions:
        return ProbeResult("different", math.inf, math.inf, 0.0, 0.0)
    delta = _largest(abs(live - said) for p in positions for said, live in zip(p.recorded, p.found, strict=True))
    kl = math.fsum(_kl(p.recorded, p.found) for p in positions) / len(positions)
    kl_of_base = math.fsum(_kl(p.recorded, p.base) for p in positions) / len(positions)
    agreement = sum(p.same for p in positions) / len(positions)
    return ProbeResult(_verdict(delta, kl, kl_of_base), delta, kl, agreement, kl_of_base)


def _check_ids(probes: Sequence[Probe], base: ServedBase, files: AdapterFiles) -> None:
    """The passport's tokens go into the base's embedding as they are, so they must have a row there."""
    shapes = read_shapes(base.files.folder)
    rows = [shape[0] for name, shape in shapes.items() if name.endswith(_EMBEDDINGS)]
    n_known = min(rows) if rows else read_config(base.files.folder).get("vocab_size", 0)
    for number, one in enumerate(probes):
        if max(one.input_ids) >= n_known:
            raise AdapterError(
                f"{files.folder}: probe {number} holds token {max(one.input_ids)}, but the base knows {n_known} tokens",
                hint="the passport was changed; fetch the adapter again",
                where=f"probes.{number}",
            )


def _work(one: Probe, key: str, *, context: int) -> Work:
    room = max(1, context - one.answer_start)  # without room for one token, the engine says so itself
    return Work(
        prompt=one.input_ids[: one.answer_start],
        adapter=key,
        # An answer that ended at once was recorded by the token that ended it.
        sampling=Sampling(
            max_tokens=min(len(one.top_ids), _MAX_POSITIONS, room), n_logprobs=MAX_LOGPROBS, ignore_end=True
        ),
    )


def _submitted(engine: Engine, work: Work, events: "queue.SimpleQueue[Event]", until: float) -> Answering:
    while True:
        try:
            return engine.submit(work, events.put)
        except BusyError:
            if time.monotonic() > until:
                raise
            time.sleep(_RETRY_SECONDS)


def _answer(events: "queue.SimpleQueue[Event]", until: float) -> list[Token]:
    tokens: list[Token] = []
    while True:
        try:
            event = events.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise BusyError(
                f"the adapter's probes were not answered within {MAX_SECONDS:.0f} seconds",
                hint="load it again when fewer answers are being made",
            ) from None
        if isinstance(event, Token):
            tokens.append(event)
        elif event.reason in ("failed", "cancelled"):
            raise event.error or LoraTuneError(f"the engine ended the adapter's probe: {event.reason}")
        else:
            return tokens


def _positions(one: Probe, answer: Sequence[Token]) -> list[_Position]:
    """Compare for as long as what stands before a token is what stood there in training."""
    expected = one.input_ids[one.answer_start :]
    positions = []
    for i, (token, ids) in enumerate(zip(answer, one.top_ids, strict=False)):
        found = dict(token.top) | ({token.id: token.logprob} if token.logprob is not None else {})
        likeliest = token.top[0][0] if token.top else token.id
        positions.append(_Position(one.top_logprobs[i], one.base_logprobs[i], _found(ids, found), likeliest == ids[0]))
        if token.id not in expected[i : i + 1]:
            break
    return positions


def _found(ids: Sequence[int], found: Mapping[int, float]) -> tuple[float, ...]:
    """A token that is not among the likeliest is at most as likely as the last of them, and is taken to be that likely."""
    least = min(found.values(), default=-math.inf)
    return tuple(found.get(id, least) for id in ids)


def _kl(recorded: Sequence[float], live: Sequence[float]) -> float:
    """KL(recorded ‖ live) over the recorded tokens, all others as one outcome."""

    def with_rest(logprobs: Sequence[float]) -> list[float]:
        return [*logprobs, math.log(max(1e-12, 1.0 - math.fsum(map(math.exp, logprobs))))]

    pairs = zip(with_rest(recorded), with_rest(live), strict=True)
    return _largest((0.0, math.fsum(math.exp(p) * (p - q) for p, q in pairs if p > -math.inf)))


def _largest(values: Iterable[float]) -> float:
    """The largest, or NaN when one is: `max` would pass over it."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found)


def _verdict(delta: float, kl: float, kl_of_base: float) -> Literal["equal", "close", "different"]:
    """The rule of adapter/probes.py; NaN compares as neither equal nor close, so it is different."""
    if delta <= EQUAL_DELTA:
        return "equal"
    return "close" if kl <= CLOSE_KL and kl <= CLOSE_SHARE * kl_of_base else "different"
