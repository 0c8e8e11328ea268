"""A merge's receipt: the same fixed prompts put to what was trained and to what was written, and how far apart they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lora_tune.adapter.card import code, hub_id, plain, yaml_text
from lora_tune.adapter.probes import CLOSE_SHARE, PROMPTS, probe_logits
from lora_tune.data.messages import Message
from lora_tune.data.tokens import prompt_ids
from lora_tune.model.generate import generate_answers, stop_ids

Onto = Literal["trained", "original"]

GREEDY_TOKENS = 16
"""Longest answer; the first token that differs is reported."""

NO_EFFECT_KL = 1e-9
"""Nats a token: what the rounding of fp32 alone can be. An adapter that changes no more changes nothing."""


@dataclass(frozen=True)
class Said:
    """What a model says to one prompt."""

    ids: tuple[int, ...]
    """Prompt and the trained model's greedy answer, [T]: what all models are compared on."""
    prompt: tuple[int, ...]
    """The prompt as this model's own tokenizer and template make it."""
    logits: Any
    """After each of the ids, fp32, [T, V]."""


@dataclass(frozen=True)
class Heard:
    """What adapters on their base say, and how much of that is theirs."""

    said: tuple[Said, ...]
    kl_of_effect: float
    """KL divergence from the adapters to their base alone, in nats a token: what there is to lose."""


@dataclass(frozen=True)
class Difference:
    """How far one model is from another, over all prompts."""

    max_abs_delta: float
    """Largest difference of a logit where the model answers."""
    max_abs_delta_prompt: float
    """The same where it reads the prompt."""
    kl: float
    """Mean KL divergence over all positions, in nats a token."""
    top1_agreement: float
    """Share of all positions with the same likeliest token."""
    diverges_at: tuple[int | None, ...]
    """For each prompt, the first token of the greedy answer that differs, counted from 0; None when none does."""


@dataclass(frozen=True)
class Part:
    """One adapter of a merge."""

    name: str
    weight: float
    """What its change is multiplied by."""
    weights_digest: str
    verified: bool
    """Whether it has a passport; without one, nothing says which base it was trained on, and how that was held."""


@dataclass(frozen=True)
class Receipt(Difference):
    """What merging changed: the model as it was trained against the written one, loaded back."""

    onto: Onto
    quantization: Literal["none", "nf4", "int8"]
    """How the base was held while training; of an adapter without a passport that is unknown, and `none` here."""
    dtype: str
    """Of the written weights."""
    adapters: tuple[Part, ...]
    compared_with: str
    diverges_first_at: int | None
    """The smallest of `diverges_at`."""
    kl_to_trained: float | None
    """KL divergence to what the passport recorded when it was trained; None without one, or for several adapters."""
    kl_of_writing: float
    """KL divergence to the adapters on the very weights that were merged onto: this is what is bounded."""
    max_kl: float
    """Its bound: beyond it nothing is written."""
    kl_of_effect: float
    """KL divergence from the adapters to those weights alone: the bound is at most a tenth of it."""
    kl_onto_trained: float | None
    """`kl` of merging onto the weights it was trained on; None where that was not measured."""
    kl_onto_original: float | None
    """`kl` of merging onto the full-precision weights; None where that was not measured."""
    closer_base: Onto | None
    """Which of the two is closer to what was trained; None when both were not measured."""
    weight_files: int
    weight_bytes: int


def ask(model: Any, tokenizer: Any, questions: Sequence[Said] = ()) -> tuple[Said, ...]:
    """Return what the model says to the fixed prompts.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        questions: what another model said; this one is measured on the same tokens. With none, on its own answers.
    """
    prompts = [prompt_ids(tokenizer, [Message("user", words)]) for words in PROMPTS]
    if questions:
        texts = [question.ids for question in questions]
    else:
        ends = stop_ids(model, tokenizer)
        answers = generate_answers(model, tokenizer, prompts, max_tokens=GREEDY_TOKENS, ends=ends)
        texts = [(*prompt, *answer) for prompt, answer in zip(prompts, answers, strict=True)]
    # One token more, which is never read: so that what follows the last one is measured too.
    logits = [probe_logits(model, [*ids, ids[-1]], 1).float().cpu() for ids in texts]
    return tuple(Said(ids, tuple(prompt), found) for ids, prompt, found in zip(texts, prompts, logits, strict=True))


def ask_with_and_without(model: Any, tokenizer: Any, questions: Sequence[Said] = ()) -> Heard:
    """Return what a peft model says, and how far that is from what its base says to the same."""
    said = ask(model, tokenizer, questions)
    with model.disable_adapter():
        alone = ask(model, tokenizer, said)
    return Heard(said, difference(said, alone).kl)


def kl_bound(max_kl: float, kl_of_effect: float) -> float:
    """Return how far a merged model may be from its adapters: never so far that their effect could be lost.

    Args:
        max_kl: what the rounding of the written dtype may come to.
        kl_of_effect: how far the adapters are from their base.
    """
    return max_kl if kl_of_effect <= NO_EFFECT_KL else min(max_kl, CLOSE_SHARE * kl_of_effect)


def same_prompts(first: Sequence[Said], second: Sequence[Said]) -> bool:
    """Return whether both models were asked with the same tokens: whether their tokenizers and templates agree."""
    return [was.prompt for was in first] == [now.prompt for now in second]


def difference(reference: Sequence[Said], found: Sequence[Said]) -> Difference:
    """Return how far `found` is from `reference`, asked the same; the KL divergence is that of the reference."""
    deltas: dict[str, list[float]] = {"prompt": [0.0], "answer": [0.0]}
    kls: list[float] = []
    same: list[bool] = []
    for was, now in zip(reference, found, strict=True):
        delta = (now.logits - was.logits).abs().amax(-1).tolist()
        deltas["prompt"] += delta[: len(was.prompt) - 1]
        deltas["answer"] += delta[len(was.prompt) - 1 :]
        p, q = was.logits.double().log_softmax(-1), now.logits.double().log_softmax(-1)
        kls += (p.exp() * (p - q)).sum(-1).clamp_min(0).tolist()
        same += (was.logits.argmax(-1) == now.logits.argmax(-1)).tolist()
    return Difference(
        max_abs_delta=max(deltas["answer"]),
        max_abs_delta_prompt=max(deltas["prompt"]),
        kl=sum(kls) / len(kls),
        top1_agreement=sum(same) / len(same),
        diverges_at=tuple(_diverges_at(was, now) for was, now in zip(reference, found, strict=True)),
    )


def _diverges_at(was: Said, now: Said) -> int | None:
    """Return the first token of the reference's greedy answer, its end included, that `now` would not have chosen.

    Up to there both were given the same tokens, so this is where two greedy answers part.
    """
    answered = slice(len(was.prompt) - 1, len(was.prompt) - 1 + GREEDY_TOKENS)
    differs = was.logits[answered].argmax(-1) != now.logits[answered].argmax(-1)
    return int(differs.nonzero()[0]) if bool(differs.any()) else None


def merged_card(base_name: str, receipt: Receipt) -> str:
    """Return the merged model's card, with the receipt in it. Names may be a stranger's words, and are escaped.

    Args:
        base_name: what others may know the base by; a card's head names it only when the hub does.
        receipt: of the merge.
    """
    names = " + ".join(
        code(part.name) if part.weight == 1 else f"{part.weight:g} · {code(part.name)}" for part in receipt.adapters
    )
    weights = {
        "original": "its full-precision weights",
        "trained": "its weights" if receipt.quantization == "none" else f"its {receipt.quantization} weights, dequantized",
    }[receipt.onto]  # fmt: skip
    base = hub_id(base_name)
    table = "".join(f"| {name} | {value} |\n" for name, value in _rows(receipt).items() if value)
    return f"""---
{f"base_model: {yaml_text(base)}{chr(10)}" if base else ""}library_name: transformers
tags: [lora_tune, merged]
---

# {" + ".join(plain(part.name) for part in receipt.adapters)}, merged

{code(base_name)} with {names} merged in, onto {weights}, written in {receipt.dtype}. {_origin(receipt)}
Measured after writing, against {receipt.compared_with}, on {len(PROMPTS)} fixed prompts:

| | |
|---|---|
{table}"""


def _origin(receipt: Receipt) -> str:
    unverified = [part for part in receipt.adapters if not part.verified]
    if unverified:
        return (
            f"**Unverified**: {', '.join(code(part.name) for part in unverified)} has no passport, so nothing says on which "
            "base it was trained, how that was held, or with which chat template; only its layers' widths were compared."
        )
    return f"It was trained on a base held in {'full precision' if receipt.quantization == 'none' else receipt.quantization}."


def _rows(receipt: Receipt) -> dict[str, str]:
    first = receipt.diverges_first_at
    return {
        "largest difference of a logit, answering": f"{receipt.max_abs_delta:.3g}",
        "largest difference of a logit, reading the prompt": f"{receipt.max_abs_delta_prompt:.3g}",
        "KL divergence": f"{receipt.kl:.3g} nats a token",
        "same likeliest token": f"{receipt.top1_agreement:.1%}",
        "first token of an answer that differs": f"none in {GREEDY_TOKENS}" if first is None else f"number {first + 1}",
        "KL divergence to the weights it was merged onto": f"{receipt.kl_of_writing:.3g}, at most {receipt.max_kl:.3g}",
        "what the adapter changes": f"{receipt.kl_of_effect:.3g} nats a token",
        "KL to what the passport recorded": _number(receipt.kl_to_trained),
        "KL of merging onto the weights it was trained on": _number(receipt.kl_onto_trained),
        "KL of merging onto the full-precision weights": _number(receipt.kl_onto_original),
        "closer to what was trained": receipt.closer_base or "",
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} nats a token"
