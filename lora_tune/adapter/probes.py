"""Golden probes: fixed prompts whose answers prove that an adapter behaves as when it was trained."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lora_tune.adapter.manifest import Probe
from lora_tune.data.messages import Message
from lora_tune.data.tokens import prompt_ids
from lora_tune.model.generate import generate_answers, stop_ids

PROMPTS = (
    "What is the capital of France?",
    "Turn on the lights in the kitchen.",
    "Write one sentence about the sea.",
    "List three prime numbers.",
)
"""The tool's own: a passport never carries training data."""

ANSWER_TOKENS = 8
TOP_K = 16
EQUAL_DELTA = 1e-4
"""Largest difference of log-probabilities that still counts as equal: rounding of fp32 sums in another order."""
CLOSE_KL = 0.02
"""Largest mean KL divergence (nats a token) that counts as close: another dtype or quantization of the same base."""

CLOSE_SHARE = 0.1
"""And the largest share of the adapter's own effect: without the adapter, nothing is ever close."""


@dataclass(frozen=True)
class ProbeResult:
    """How far a live adapter is from its passport."""

    verdict: Literal["equal", "close", "different"]
    max_abs_delta: float
    """Largest difference of a recorded log-probability."""
    kl: float
    """Mean KL divergence over the answer positions, in nats, on the recorded tokens and the rest as one."""
    top1_agreement: float
    """Share of positions with the same likeliest token."""
    kl_of_base: float
    """The same for the base without the adapter, as recorded: how much there is to lose."""

    def as_dict(self) -> dict[str, float | str]:
        """The result as `--json` prints it."""
        return asdict(self)


def record_probes(model: Any, tokenizer: Any) -> tuple[Probe, ...]:
    """Return what the trained model says to each prompt, and what the base says to the same tokens."""
    probes = []
    for words in PROMPTS:
        prompt = prompt_ids(tokenizer, [Message("user", words)])
        answer = generate_answers(
            model, tokenizer, [prompt], max_tokens=ANSWER_TOKENS, ends=stop_ids(model, tokenizer)
        )[0]
        ids = [*prompt, *answer]
        logprobs = answer_logprobs(model, ids, len(prompt))
        top = logprobs.topk(min(TOP_K, logprobs.shape[-1]), dim=-1)
        with model.disable_adapter():
            base = answer_logprobs(model, ids, len(prompt)).gather(-1, top.indices)
        probes.append(
            Probe(
                prompt=words,
                input_ids=tuple(ids),
                answer_start=len(prompt),
                top_ids=tuple(map(tuple, top.indices.tolist())),
                top_logprobs=tuple(map(tuple, top.values.tolist())),
                base_logprobs=tuple(map(tuple, base.tolist())),
            )
        )
    return tuple(probes)


def replay_probes(model: Any, probes: Sequence[Probe]) -> ProbeResult:
    """Return how far the live model is from what the passport recorded."""
    import torch

    deltas, kls, base_kls, same = [], [], [], []
    for probe in probes:
        found = answer_logprobs(model, probe.input_ids, probe.answer_start)
        top = torch.tensor(probe.top_ids, device=found.device)
        recorded = torch.tensor(probe.top_logprobs, dtype=torch.float32, device=found.device)
        live = found.gather(-1, top)
        deltas.append((live - recorded).abs().max().item())
        kls += _kl(recorded, live)
        base_kls += _kl(recorded, torch.tensor(probe.base_logprobs, dtype=torch.float32, device=found.device))
        same += (found.argmax(-1) == top[:, 0]).tolist()
    # Of tensors, for `max` passes over NaN.
    delta, kl = torch.tensor(deltas, dtype=torch.float64).max().item(), math.fsum(kls) / len(kls)
    kl_of_base = math.fsum(base_kls) / len(base_kls)
    return ProbeResult(_verdict(delta, kl, kl_of_base), delta, kl, sum(same) / len(same), kl_of_base)


def _verdict(delta: float, kl: float, kl_of_base: float) -> Literal["equal", "close", "different"]:
    """NaN compares as neither equal nor close, so it is different."""
    if delta <= EQUAL_DELTA:
        return "equal"
    return "close" if kl <= CLOSE_KL and kl <= CLOSE_SHARE * kl_of_base else "different"


def answer_logprobs(model: Any, ids: Sequence[int], answer_start: int) -> Any:
    """Return log-probabilities of each answer token's position, fp32, [A, V]; with no answer, of the first position."""
    return probe_logits(model, ids, answer_start).float().log_softmax(-1)


def probe_logits(model: Any, ids: Sequence[int], answer_start: int) -> Any:
    """Return the logits that predict each answer token, [A, V], in the model's dtype."""
    import torch

    with torch.no_grad():
        tokens = torch.tensor([list(ids)], device=model.device)
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0]
    return logits[answer_start - 1 : max(len(ids) - 1, answer_start)]


def _kl(recorded: Any, live: Any) -> list[float]:
    """KL(recorded ‖ live) per position over the recorded tokens, all others as one outcome."""
    import torch

    def with_rest(logprobs: Any) -> Any:
        rest = (1 - logprobs.double().exp().sum(-1, keepdim=True)).clamp_min(1e-12).log()
        return torch.cat([logprobs.double(), rest], dim=-1)

    p, q = with_rest(recorded), with_rest(live)
    found: list[float] = (p.exp() * (p - q)).sum(-1).clamp_min(0.0).tolist()  # NaN stays NaN
    return found
