"""Base + adapter → one plain model, with a receipt: how far it is from the adapter, measured after it was written."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lora_tune.adapter.door import AdapterFiles
from lora_tune.adapter.live import base_section, open_live
from lora_tune.adapter.manifest import Probe
from lora_tune.adapter.probes import PROMPTS, probe_logits, record_probes, replay_probes
from lora_tune.errors import CannotCreateError, RefusedError, TrainingError
from lora_tune.model.dense import BaseFiles, quiet
from lora_tune.model.load import detect_device, load_base, place
from lora_tune.model.resolve import Progress
from lora_tune.recipe.schema import BaseSection
from lora_tune.staging import staged_folder

MAX_KL = {"fp32": 1e-6, "bf16": 1e-2}
"""Largest mean KL divergence (nats a token) between adapter and merged model, by the dtype that is written."""


@dataclass(frozen=True)
class Receipt:
    """What merging changed: base + adapter against the written model, loaded back, on the golden prompts."""

    onto: Literal["trained", "original"]
    dtype: str
    max_abs_delta: float
    """Largest difference of a logit where the model answers."""
    max_abs_delta_prompt: float
    """The same where it reads the prompt."""
    kl: float
    """Mean KL divergence over all positions, in nats a token."""
    top1_agreement: float
    """Share of all positions with the same likeliest token."""
    kl_to_trained: float | None
    """KL divergence to what the passport recorded when it was trained; None without a passport."""


def merge_adapter(
    adapter: AdapterFiles,
    out: Path,
    progress: Progress,
    *,
    onto: Literal["trained", "original"],
    base_name: str | None = None,
) -> Receipt:
    """Write base + adapter as one model to `out`, load it back, and return how far it is from the adapter.

    Raises:
        RefusedError: the adapter was trained on a quantized base and `onto` is `trained` (exit 77).
        TrainingError: the written model differs beyond the bound; nothing is left in `out` (exit 65).
        CannotCreateError: `out` exists (exit 73).
    """
    wanted = base_section(adapter, base_name)
    if wanted.quantization != "none" and onto == "trained":
        raise RefusedError(
            f"{adapter.folder} was trained on a {wanted.quantization} base; merging inside quantized weights rounds the adapter away",
            hint="merge onto the full-precision base, where the receipt says what that changes: --onto original",
        )
    if out.exists():
        raise CannotCreateError(f"{out} exists already and is never overwritten", hint="give another folder")
    live = open_live(adapter, progress, base_name=base_name, quantization="none")
    progress("merging", 0.3)
    tokenizer, model, dtype = live.tokenizer, live.model, place(detect_device(), live.base).dtype
    del live
    probes = record_probes(model, tokenizer)
    before = [probe_logits(model, probe.input_ids, 1) for probe in probes]
    with staged_folder(out) as stage, quiet():
        merged = model.merge_and_unload()
        merged.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        del merged, model
        progress("loading the merged model back", 0.7)
        again = load_base(BaseFiles(out.name, None, stage), BaseSection(name=str(stage), dtype=dtype))
        receipt = _receipt(adapter, again, probes, before, onto=onto, dtype=dtype)
        if not receipt.kl <= MAX_KL[dtype]:
            raise TrainingError(
                f"the merged model differs from the adapter by a KL divergence of {receipt.kl:.3g} nats a token; "
                f"at most {MAX_KL[dtype]:g} is let through, so nothing was written",
                hint="please report it, with the adapter's passport",
            )
        (stage / "merge_receipt.json").write_text(
            json.dumps(asdict(receipt), indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        (stage / "README.md").write_text(_card(adapter, wanted, receipt), encoding="utf-8")
    progress("merging", 1.0)
    return receipt


def _receipt(
    adapter: AdapterFiles,
    merged: Any,
    probes: Sequence[Probe],
    before: Sequence[Any],
    *,
    onto: Literal["trained", "original"],
    dtype: str,
) -> Receipt:
    deltas: dict[str, list[float]] = {"prompt": [], "answer": []}
    kls, same = [], []
    for probe, was in zip(probes, before, strict=True):
        now = probe_logits(merged, probe.input_ids, 1)
        delta = (now.float() - was.float()).abs().amax(-1).tolist()
        first = probe.answer_start - 1  # the logits that predict the answer's first token
        deltas["prompt"] += delta[:first]
        deltas["answer"] += delta[first:]
        p, q = was.double().log_softmax(-1), now.double().log_softmax(-1)
        kls += (p.exp() * (p - q)).sum(-1).clamp_min(0).tolist()
        same += (was.argmax(-1) == now.argmax(-1)).tolist()
    to_trained = replay_probes(merged, adapter.manifest.probes).kl if adapter.manifest else None
    return Receipt(
        onto,
        dtype,
        max(deltas["answer"]),
        max(deltas["prompt"]),
        sum(kls) / len(kls),
        sum(same) / len(same),
        to_trained,
    )


def _card(adapter: AdapterFiles, base: BaseSection, receipt: Receipt) -> str:
    name = adapter.manifest.name if adapter.manifest else adapter.folder.name
    trained = (
        ""
        if receipt.kl_to_trained is None
        else f"| KL to the model as trained | {receipt.kl_to_trained:.3g} nats a token |\n"
    )
    return f"""---
base_model: {base.name}
library_name: transformers
tags: [lora_tune, merged]
---

# {name}, merged

`{base.name}` with the adapter `{name}` merged in, onto its {receipt.onto} weights, written in {receipt.dtype}.
Measured after writing, against base + adapter, on {len(PROMPTS)} fixed prompts:

| | |
|---|---|
| largest difference of a logit, answering | {receipt.max_abs_delta:.3g} |
| largest difference of a logit, reading the prompt | {receipt.max_abs_delta_prompt:.3g} |
| KL divergence | {receipt.kl:.3g} nats a token |
| same likeliest token | {receipt.top1_agreement:.1%} |
{trained}"""
