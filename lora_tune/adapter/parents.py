"""The adapters that another is made from: do they belong together, and what does their exact sum say, live on the base."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lora_tune.adapter.apply import attach_adapter
from lora_tune.adapter.deltas import open_factors
from lora_tune.adapter.door import AdapterFiles
from lora_tune.adapter.live import LiveModel, check_belongs, open_live
from lora_tune.adapter.lowrank import LowRank, scaled
from lora_tune.adapter.manifest import ParentFacts, Probe
from lora_tune.adapter.probes import probe_logits, record_probes
from lora_tune.adapter.registry import content_digest
from lora_tune.errors import AdapterMismatchError, CannotCreateError, RefusedError, UsageError
from lora_tune.model.dense import quiet
from lora_tune.model.load import Dtype, detect_device, place
from lora_tune.model.resolve import Progress

Part = tuple[AdapterFiles, float]
"""An adapter and the factor in front of its change."""

MAX_FACTOR = 100.0
_ALIKE = (
    "base.config", "base.tensors", "base.weights", "base.quantization", "tokenizer.tokenizer", "tokenizer.chat_template",
)  # fmt: skip
"""Facts in which the passports of all parents agree."""


@dataclass(frozen=True)
class Reference:
    """The parents live on their base, and what their exact sum and each of them says to the golden prompts."""

    parts: tuple[Part, ...]
    lead: AdapterFiles
    """The first parent with a passport, which says what the base is; without any, the first parent."""
    live: LiveModel
    dtype: Dtype
    """That the base computes in."""
    adapter_dtype: Dtype
    probes: tuple[Probe, ...]
    """The sum's greedy answers."""
    logits: tuple[Any, ...]
    """Of the sum, one [A, V] for each probe."""
    logits_of_parts: tuple[tuple[Any, ...], ...]


def check_parts(parts: Sequence[Part], *, allow_unverified: bool) -> None:
    """Check that the adapters can be added up.

    Raises:
        UsageError: a weight is no usable factor (exit 2).
        RefusedError: one is a DoRA, or has no passport and that was not allowed (exit 77).
        AdapterMismatchError: passports or layers' widths differ (exit 77).
    """
    for files, weight in parts:
        if not (math.isfinite(weight) and 0 < abs(weight) <= MAX_FACTOR):
            raise UsageError(
                f"the weight of {files.folder} is {weight:g}; expected a number other than 0, "
                f"from -{MAX_FACTOR:g} to {MAX_FACTOR:g}",
                hint="to give an adapter no weight, leave it out",
            )
        if files.shape.variant == "dora":
            raise RefusedError(
                f"{files.folder} is a DoRA: its magnitudes depend on the base's weights, so it is no sum of thin matrices",
                hint="merge it into the base instead: `lora-tune merge`",
                where=str(files.folder),
            )
        if files.manifest is None and not allow_unverified:
            raise RefusedError(
                f"{files.folder} has no passport, so nothing says that it was trained on the same base as the others",
                hint="if you know that it was, say so with --allow-unverified",
                where=str(files.folder),
            )
    _check_alike([files for files, _ in parts])
    _check_widths([files for files, _ in parts])


def open_reference(parts: Sequence[Part], out: Path, progress: Progress, *, base_name: str | None) -> Reference:
    """Return the parents on their base, all active at once, each times its weight, and what they say.

    PEFT adds up the active adapters itself, so the sum is not one that this project computed.

    Raises:
        AdapterMismatchError, AdapterError, MissingInputError: as `open_live`.
        CannotCreateError: `out` exists (exit 73).
    """
    if out.exists():
        raise CannotCreateError(f"{out} exists already and is never overwritten", hint="give another folder")
    first = next((number for number, (files, _) in enumerate(parts) if files.manifest), 0)
    lead = parts[first][0]
    live = open_live(lead, progress, base_name=base_name)
    placement = place(detect_device(), live.base)
    # PEFT tells adapters apart by parts of names, so none is the beginning of another.
    names = ["default" if number == first else f"parent-{number:02d}" for number in range(len(parts))]
    with quiet():
        for name, (files, _) in zip(names, parts, strict=True):
            if name != "default":
                check_belongs(files, live.base_files)
                attach_adapter(live.model, files, name=name, adapter_dtype=placement.adapter_dtype)
    _activate(live.model, {name: weight for name, (_, weight) in zip(names, parts, strict=True)})
    probes = record_probes(live.model, live.tokenizer)
    logits = answer_logits(live.model, probes)
    alone = []
    for name in names:
        _activate(live.model, {name: 1.0})
        alone.append(answer_logits(live.model, probes))
    return Reference(
        tuple(parts), lead, live, placement.dtype, placement.adapter_dtype, probes, logits, tuple(alone)
    )  # fmt: skip


def read_layers(files: AdapterFiles, weight: float = 1.0) -> dict[str, LowRank]:
    """Return module → weight · scaling · B·A, of the very bytes that the door checked."""
    factors = open_factors(files)
    changes = {module: factors.of(module, weight=weight) for module in files.shape.modules}
    return {module: scaled(change.a, change.b, factor=change.scaling) for module, change in changes.items()}


def parent_facts(parts: Sequence[Part]) -> tuple[ParentFacts, ...]:
    """Return what the new passport says of its parents."""
    return tuple(
        ParentFacts(
            name=name_of(files), digest=content_digest(files), weight=weight, verified=files.manifest is not None
        )
        for files, weight in parts
    )


def name_of(files: AdapterFiles) -> str:
    """Return the adapter's own name; for one without a passport, its folder's or the version's."""
    return files.manifest.name if files.manifest is not None else files.label


def answer_logits(model: Any, probes: Sequence[Probe]) -> tuple[Any, ...]:
    """Return the logits at the answers' positions, one [A, V] for each probe."""
    return tuple(probe_logits(model, probe.input_ids, probe.answer_start) for probe in probes)


def _check_alike(adapters: Sequence[AdapterFiles]) -> None:
    verified = [(files, files.manifest) for files in adapters if files.manifest is not None]
    for (files, one), (other_files, other) in pairwise(verified):
        for field in _ALIKE:
            section, _, key = field.partition(".")
            said, found = (str(getattr(getattr(passport, section), key)) for passport in (one, other))
            if said != found:
                raise AdapterMismatchError(
                    f"{files.folder} and {other_files.folder} were not trained on the same base, tokenizer and template: "
                    f"{field} is {said[:12]} in the one's passport and {found[:12]} in the other's",
                    hint="only adapters of one base can be added up; train one of them anew on the other's base",
                    where=field,
                )


def _check_widths(adapters: Sequence[AdapterFiles]) -> None:
    seen: dict[str, tuple[AdapterFiles, tuple[int, int]]] = {}
    for files in adapters:
        for module in files.shape.modules:
            key = f"base_model.model.{module}"
            widths = (
                files.tensors[f"{key}.lora_A.weight"].shape[1],
                files.tensors[f"{key}.lora_B.weight"].shape[0],
            )
            first, expected = seen.setdefault(module, (files, widths))
            if widths != expected:
                raise AdapterMismatchError(
                    f"{module} is {expected[0]} → {expected[1]} in {first.folder}, but {widths[0]} → {widths[1]} in {files.folder}",
                    hint="only adapters of one base can be added up",
                    where=module,
                )


def _activate(model: Any, weights: Mapping[str, float]) -> None:
    """Make these adapters the active ones, each with its own scaling times its weight."""
    from peft.tuners.lora import LoraLayer

    model.base_model.set_adapter(list(weights), inference_mode=True)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, weight in weights.items():
                module.set_scale(name, weight)
