"""An adapter made from others without training: its layers written, loaded back, measured against its parents.

What the layers are is `compose.py`'s and `resize.py`'s business.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_tune.adapter.apply import attach_adapter
from lora_tune.adapter.card import code, model_card, plain, unverified_card
from lora_tune.adapter.door import CONFIG, MAX_RANK, WEIGHTS, AdapterFiles, open_adapter
from lora_tune.adapter.export import library_versions
from lora_tune.adapter.live import check_belongs
from lora_tune.adapter.lowrank import Kept, LowRank, total
from lora_tune.adapter.manifest import FILE_NAME, AdapterManifest, DataFacts, LoraFacts, MadeFrom, dump_manifest
from lora_tune.adapter.parents import Reference, answer_logits
from lora_tune.adapter.probes import record_probes
from lora_tune.adapter.receipt import kl_bound
from lora_tune.adapter.safetensors_header import MAX_WEIGHT
from lora_tune.errors import AdapterError, TrainingError, UsageError
from lora_tune.model.dense import quiet
from lora_tune.model.fingerprint import canonical_digest
from lora_tune.model.resolve import Progress
from lora_tune.staging import staged_folder

EXACT_KL = {"fp32": 1e-6, "bf16": 1e-2, "int8": 1e-2}
"""Largest mean KL divergence (nats a token) of what must be exact, by how the base computes: rounding, no more.

It is also at most a tenth of what the parents' sum changes: see kl_bound.
"""


@dataclass(frozen=True)
class DerivedReport:
    """What was made, and how far it is from the exact sum of its parents, on the golden prompts."""

    folder: Path
    made_from: MadeFrom
    verified: bool
    """Whether the new adapter has a passport: it does when one of its parents has."""
    rank: int
    norm_kept: float
    """Frobenius norm after the cut to the rank, over that before, all layers together; 0 to 1."""
    norm_kept_by_layer: Mapping[str, float]
    kl: float
    """Mean KL divergence from the exact weighted sum of the parents, over the answers' positions, in nats a token."""
    top1_agreement: float
    """Share of those positions with the same likeliest token."""
    kl_to_parents: tuple[float, ...]
    """The same divergence from each parent alone, in the order given."""

    def as_dict(self) -> dict[str, Any]:
        """The report as `--json` prints it."""
        return vars(self) | {
            "folder": str(self.folder),
            "made_from": self.made_from.model_dump(mode="json"),
            "norm_kept_by_layer": dict(self.norm_kept_by_layer),
            "kl_to_parents": list(self.kl_to_parents),
        }


@dataclass(frozen=True)
class Derived:
    """A new adapter's layers, computed and not yet written."""

    name: str
    rank: int
    layers: Mapping[str, LowRank]
    """Module → its change, at `rank`."""
    kept: Mapping[str, Kept]
    """Module → how much of it the cut to `rank` kept."""
    made_from: MadeFrom
    exact: bool
    """Whether it must answer as the sum does."""


def checked_rank(rank: int) -> int:
    """Return the rank, which must be one that the door lets in.

    Raises:
        UsageError: it is not (exit 2).
    """
    if not 1 <= rank <= MAX_RANK:
        raise UsageError(f"--rank is {rank}; expected 1 to {MAX_RANK}")
    return rank


def write_derived(reference: Reference, derived: Derived, out: Path, progress: Progress) -> DerivedReport:
    """Write the new adapter to `out`, with golden probes of its own, loaded back through the door and measured.

    Raises:
        TrainingError: it must be exact, and does not answer as the parents' sum does (exit 65).
        AdapterError: the weights make its numbers too large (exit 77).
        CannotCreateError, CannotWriteError: the folder exists, or the disk is full (exit 73, 74).
    """
    progress("writing and measuring", 0.0)
    with staged_folder(out) as stage, quiet():
        _write_peft_files(reference, derived, stage)
        written = open_adapter(stage)
        attach_adapter(reference.live.model, written, name="derived", adapter_dtype=reference.adapter_dtype)
        report = _measured(reference, derived, out)
        _check_exact(reference, derived, report)
        if reference.lead.manifest is None:
            card = _unverified_card(written, derived, report)
        else:
            manifest = _passport(reference, derived, written, report)
            (stage / FILE_NAME).write_text(dump_manifest(manifest), encoding="utf-8")
            card = model_card(manifest)
        (stage / "README.md").write_text(card, encoding="utf-8")
        # What could never be opened again is not written.
        check_belongs(open_adapter(stage), reference.live.base_files)
    progress("writing and measuring", 1.0)
    return report


def _measured(reference: Reference, derived: Derived, out: Path) -> DerivedReport:
    found = answer_logits(reference.live.model, reference.probes)
    same = [
        agree
        for was, now in zip(reference.logits, found, strict=True)
        for agree in (was.argmax(-1) == now.argmax(-1)).tolist()
    ]
    return DerivedReport(
        folder=out,
        made_from=derived.made_from,
        verified=reference.lead.manifest is not None,
        rank=derived.rank,
        norm_kept=total(derived.kept.values()).share,
        norm_kept_by_layer={module: kept.share for module, kept in derived.kept.items()},
        kl=_mean_kl(reference.logits, found),
        top1_agreement=sum(same) / len(same),
        kl_to_parents=tuple(_mean_kl(logits, found) for logits in reference.logits_of_parts),
    )


def _mean_kl(before: Sequence[Any], after: Sequence[Any]) -> float:
    """KL(before ‖ after), mean over all positions, in nats."""
    values: list[float] = []
    for was, now in zip(before, after, strict=True):
        p, q = was.double().log_softmax(-1), now.double().log_softmax(-1)
        values += (p.exp() * (p - q)).sum(-1).clamp_min(0).tolist()
    return math.fsum(values) / len(values)


def _check_exact(reference: Reference, derived: Derived, report: DerivedReport) -> None:
    if not derived.exact:
        return
    rounding = EXACT_KL["int8" if reference.live.base.quantization == "int8" else reference.dtype]
    with reference.live.model.disable_adapter():
        alone = answer_logits(reference.live.model, reference.probes)
    effect = _mean_kl(reference.logits, alone)
    bound = kl_bound(rounding, effect)
    if not report.kl <= bound:
        raise TrainingError(
            f"the new adapter differs from what it was made from by a KL divergence of {report.kl:.3g} nats a token; at most "
            f"{bound:.3g} is let through (together they change {effect:.3g}), so nothing was written",
            hint="merge them into the base instead: lora-tune merge, with --dtype fp32"
            if bound < rounding
            else "please report it, with the adapters' passports",
        )


def _write_peft_files(reference: Reference, derived: Derived, stage: Path) -> None:
    from safetensors.torch import save

    tensors = {}
    for module, layer in derived.layers.items():
        # The door takes no larger numbers; said here in words of what the user can change.
        largest = max(float(layer.a.abs().max()), float(layer.b.abs().max()))
        if not largest < MAX_WEIGHT:
            raise AdapterError(
                f"{module} would hold {largest:.3g}; at most {MAX_WEIGHT:g} is let in", hint="give smaller weights"
            )
        tensors[f"base_model.model.{module}.lora_A.weight"] = layer.a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = layer.b.contiguous()
    (stage / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    lead, targets = reference.lead, {target for files, _ in reference.parts for target in files.shape.targets}
    settings = replace(
        reference.live.model.peft_config["default"],
        r=derived.rank,
        # Scaling 1: right in engines that ignore rsLoRA or compute the scaling their own way.
        lora_alpha=derived.rank,
        use_rslora=False,
        inference_mode=True,
        base_model_name_or_path=lead.manifest.base.name if lead.manifest else lead.base_name,
    )
    config = settings.to_dict() | {"target_modules": sorted(targets)}
    (stage / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _passport(reference: Reference, derived: Derived, written: AdapterFiles, report: DerivedReport) -> AdapterManifest:
    lead = reference.lead.manifest
    assert lead is not None
    parents = [files.manifest for files, _ in reference.parts if files.manifest is not None]
    return AdapterManifest(
        name=derived.name,
        # The probes below were computed here, perhaps in another dtype than the parent was trained in.
        base=lead.base.model_copy(update={"dtype": reference.dtype}),
        tokenizer=lead.tokenizer,
        lora=LoraFacts(
            rank=derived.rank,
            alpha=float(derived.rank),
            scaling=1.0,
            dropout=0.0,
            variant="lora",
            targets=written.shape.targets,
            n_parameters=sum(math.prod(info.shape) for info in written.tensors.values()),
        ),
        data=_data([passport.data for passport in parents]),
        recipe=lead.recipe,
        recipe_digest=canonical_digest(lead.recipe),
        weights_digest=written.weights_digest,
        config_digest=written.config_digest,
        versions=library_versions(),
        figures={"norm_kept": report.norm_kept, "kl_to_exact": report.kl},
        probes=record_probes(reference.live.model, reference.live.tokenizer),
        made_from=derived.made_from,
    )


def _data(parents: Sequence[DataFacts]) -> DataFacts:
    """The parents' data together; what they do not share is left open."""
    first = parents[0]
    if all(data == first for data in parents):
        return first
    return DataFacts(
        digest=canonical_digest([data.digest for data in parents]),
        rows=sum(data.rows for data in parents),
        tokens=sum(data.tokens for data in parents),
        trained_tokens=sum(data.trained_tokens for data in parents),
        train_on=first.train_on if all(data.train_on == first.train_on for data in parents) else "mixed",
        max_seq_tokens=max(data.max_seq_tokens for data in parents),
        system_message=(
            first.system_message if all(data.system_message == first.system_message for data in parents) else None
        ),
    )


def _unverified_card(written: AdapterFiles, derived: Derived, report: DerivedReport) -> str:
    parents = "\n".join(
        f"* {parent.weight:g} × {plain(parent.name)}, {code(parent.digest)}" for parent in derived.made_from.parents
    )
    return f"""{unverified_card(written, name=derived.name)}
## Made from others

Made by {derived.made_from.method} with lora_tune, of adapters without a passport (weight, name, content digest):

{parents}

It keeps {report.norm_kept:.4g} of their norm. KL divergence from their exact sum: {report.kl:.3g} nats a token, on fixed prompts.
"""
