"""Base + adapters → one plain model, tensor by tensor, with a receipt: how far it is from what was trained, measured."""

import gc
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from lora_tune.adapter.deltas import (
    Factors,
    MergePlan,
    adapter_name,
    changed_weight,
    open_factors,
    plan_base,
    plan_merge,
)
from lora_tune.adapter.door import AdapterFiles
from lora_tune.adapter.fence import fence_template
from lora_tune.adapter.live import activate_sum, add_adapters, is_turned, open_live
from lora_tune.adapter.probes import replay_probes
from lora_tune.adapter.receipt import (
    Heard,
    Onto,
    Part,
    Receipt,
    Said,
    ask,
    ask_with_and_without,
    difference,
    kl_bound,
    merged_card,
    same_prompts,
)
from lora_tune.errors import AdapterMismatchError, RefusedError, TrainingError
from lora_tune.model.dense import BaseFiles, quiet
from lora_tune.model.load import MERGE_RECEIPT, Dtype, detect_device, load_base, load_tokenizer, place, torch_dtype
from lora_tune.model.quantization import compute_as_in_training, round_trip
from lora_tune.model.resolve import Progress
from lora_tune.model.shards import (
    MAX_SHARD_BYTES,
    NewTensor,
    StoredTensor,
    check_room,
    copy_beside,
    copy_pieces,
    main_dtype,
    plan_shards,
    read_tensor,
    stored_tensors,
    write_shards,
)
from lora_tune.recipe.schema import BaseSection
from lora_tune.staging import staged_folder

MAX_KL = {"fp32": 1e-6, "bf16": 1e-2}
"""Largest mean KL divergence (nats a token) between adapter and merged model, by the dtype that is written.

It is also at most a tenth of what the adapter changes: see kl_bound.
"""

MAX_KL_INT8 = 5e-2
"""The same onto int8 weights on a GPU: there the inputs of every layer are rounded to 8 bit too, which no weight can hold."""

MAX_COMPARED_BYTES = 4 * 1024**3
"""Past this many bytes of weights only what was asked for is measured, and not the other weights beside it."""

_WRITTEN = {"bf16": ("BF16", "bfloat16"), "fp32": ("F32", "float32")}
"""safetensors' and torch's name of a dtype."""


def merge_adapter(
    adapter: AdapterFiles,
    out: Path,
    progress: Progress,
    *,
    onto: Onto,
    base_name: str | None = None,
    dtype: Dtype | None = None,
) -> Receipt:
    """Write base + adapter as one model to `out`, and return how far it is from the adapter; see merge_adapters."""
    return merge_adapters([(adapter, 1.0)], out, progress, onto=onto, base_name=base_name, dtype=dtype)


def merge_adapters(
    adapters: Sequence[tuple[AdapterFiles, float]],
    out: Path,
    progress: Progress,
    *,
    onto: Onto,
    base_name: str | None = None,
    dtype: Dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Receipt:
    """Write base + Σ weight · adapter as one plain model to `out`, load it back, and return how far it is from them.

    Only one model is in memory at a time.

    Args:
        adapters: each with its weight in the sum.
        out: a folder that does not exist.
        progress: told what is being done.
        onto: `trained` adds to the weights as they were while training (for a quantized base: quantized and dequantized
            again), `original` to those in the base's files.
        base_name: another place of the same base; None takes the passport's.
        dtype: what is written; None takes what the base computed in while training.
        max_shard_bytes: weights in one file, unless a single tensor is larger.

    Raises:
        AdapterMismatchError: an adapter does not belong to this base, or does not behave on it as its passport says (exit 77).
        RefusedError: these adapters cannot be merged, or not together (exit 77).
        TrainingError: the written model differs beyond the bound; nothing is left in `out` (exit 65).
        CannotCreateError, CannotWriteError: `out` exists, or the disk is full (exit 73, 74).
    """
    check_room(out, 0)
    plan = plan_merge(adapters, progress, onto=onto, base_name=base_name, dtype=dtype)
    held, compared = plan.base.quantization, _weight_bytes(plan) <= MAX_COMPARED_BYTES
    check_room(out, _weight_bytes(plan) * (2 if compared and held != "none" and onto == "original" else 1))
    progress("asking the model as it was trained", 0.1)
    trained = _ask_live(plan, progress, quantization=held, dtype=plan.computed)
    unquantized = None
    if held != "none" and (onto == "original" or compared):
        unquantized = _ask_live(plan, progress, quantization="none", dtype=plan.dtype, questions=trained.said)
    wanted = unquantized if unquantized is not None and onto == "original" else trained
    if wanted is trained and plan.dtype != plan.computed:
        wanted = _ask_live(plan, progress, quantization=held, dtype=plan.dtype, questions=trained.said)
    asked = _Asked(trained.said, wanted, unquantized.said if unquantized else None)
    with staged_folder(out) as stage, quiet():
        files = write_merged(plan, stage, progress, max_shard_bytes=max_shard_bytes)
        progress("measuring the merged model", 0.7)
        receipt = _measure(plan, stage, files, asked)
        text = json.dumps(asdict(receipt), indent=2, sort_keys=True, allow_nan=False) + "\n"
        (stage / MERGE_RECEIPT).write_text(text, encoding="utf-8")
        (stage / "README.md").write_text(merged_card(_public_base(plan), receipt), encoding="utf-8")
    progress("merging", 1.0)
    return receipt


def write_merged(
    plan: MergePlan, folder: Path, progress: Progress, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Path]:
    """Write the merged model to `folder`, one tensor in memory at a time, and return its weight files.

    Raises:
        TrainingError: a merged weight is not finite (exit 65).
        OSError: the disk is full or failing.
    """
    stored = stored_tensors(plan.base_files.folder)
    factors = [open_factors(files) for files, _ in plan.adapters]
    shards = plan_shards(_new_tensors(plan, stored, factors), max_shard_bytes=max_shard_bytes)
    files = write_shards(folder, shards, lambda share: progress("merging", 0.3 + 0.4 * share))
    copy_beside(plan.base_files.folder, folder, dtype=_WRITTEN[plan.dtype][1], template_text=plan.template_text)
    return files


def _new_tensors(
    plan: MergePlan, stored: Mapping[str, StoredTensor], factors: Sequence[Factors]
) -> Iterator[NewTensor]:
    main = main_dtype(stored)
    for name, tensor in stored.items():
        dtype = tensor.info.dtype
        pieces: Callable[[], Iterator[Any]]
        if name in plan.changed or name in plan.quantized:
            dtype = _WRITTEN[plan.dtype][0]
            pieces = partial(_merged_piece, plan, name, tensor, factors)
        else:
            # What the author kept wider than the rest (a router's bias in fp32) stays so.
            kept_wide = plan.dtype == "bf16" and dtype == "F32" and main != "F32"
            dtype = _WRITTEN[plan.dtype][0] if tensor.is_float and not kept_wide else dtype
            pieces = partial(copy_pieces, tensor, dtype)
        yield NewTensor(name, dtype, tensor.info.shape, pieces)


def _merged_piece(plan: MergePlan, name: str, tensor: StoredTensor, factors: Sequence[Factors]) -> Iterator[Any]:
    import torch

    dtype = torch_dtype(plan.dtype)
    weight = read_tensor(tensor)
    if name in plan.quantized:
        device = place(detect_device(), plan.base).device_map or "cpu"
        # As it is loaded: in the dtype first.
        weight = round_trip(weight.to(dtype), plan.base.quantization, transposed=plan.quantized[name], device=device)
    parts = plan.changed.get(name, ())
    changes = [factors[number].of(module, weight=plan.adapters[number][1]) for number, module in parts]
    turned = bool(parts) and is_turned(parts[0][1], conv1d=plan.conv1d)
    weight = changed_weight(weight, changes, conv1d=turned).to(dtype)
    if not bool(torch.isfinite(weight).all()):
        raise TrainingError(
            f"{name} is not finite after merging; nothing was written", hint="the adapter or its weight is too large"
        )
    yield weight


@dataclass(frozen=True)
class _Asked:
    """What the live models said before anything was written."""

    trained: tuple[Said, ...]
    wanted: Heard
    """The adapters on the very weights that are merged onto, computed in the written dtype."""
    unquantized: tuple[Said, ...] | None


def _ask_live(
    plan: MergePlan, progress: Progress, *, quantization: Any, dtype: Dtype, questions: Sequence[Said] = ()
) -> Heard:
    """Return what base + adapters say, the adapters' outputs added up by peft: nothing here is computed by us.

    Raises:
        AdapterMismatchError: the model as it was trained does not behave as an adapter's passport says (exit 77).
    """
    first, *others = (files for files, _ in plan.adapters)
    live = open_live(first, progress, base_name=plan.base_name, quantization=quantization, dtype=dtype)
    names = add_adapters(live, others)
    with quiet():
        if not questions:
            _check_probes(plan, live.model, names)
        activate_sum(live, {name: weight for name, (_, weight) in zip(names, plan.adapters, strict=True)})
        if quantization == "int8":
            compute_as_in_training(live.model)
        heard = ask_with_and_without(live.model, live.tokenizer, questions)
    del live
    gc.collect()  # a peft model refers to itself; the next model needs its memory
    return heard


def _check_probes(plan: MergePlan, model: Any, names: Sequence[str]) -> None:
    for name, (files, _) in zip(names, plan.adapters, strict=True):
        # Onto the original weights, adapters of bases held differently have none in common that they were trained on.
        if files.manifest is None or files.manifest.base.quantization != plan.base.quantization:
            continue
        model.base_model.set_adapter([name])
        found = replay_probes(model, files.manifest.probes)
        if found.verdict == "different":
            raise AdapterMismatchError(
                f"{files.folder} does not behave on {plan.base.name} as when it was trained: KL divergence {found.kl:.3g} "
                f"nats a token (the base alone: {found.kl_of_base:.3g}), top-1 agreement {found.top1_agreement:.0%}; "
                "nothing was written",
                hint="compare the base, and the versions in its passport with those installed: `lora-tune adapters inspect`",
                where="probes",
            )


def _measure(plan: MergePlan, stage: Path, files: Sequence[Path], asked: _Asked) -> Receipt:
    """Return the receipt of the model in `stage`.

    Raises:
        TrainingError: it is beyond its bound (exit 65).
    """
    trained, held = asked.trained, plan.base.quantization
    said, kl_to_trained = _ask_written(plan, stage, trained)
    found = difference(trained, said)
    # Onto the original weights, what was trained is no measure of whether the sum was written right: these weights are.
    as_written = difference(asked.wanted.said, said)
    max_kl = _check_kept(plan, as_written.kl, asked.wanted.kl_of_effect)
    unquantized = asked.unquantized
    onto_trained = onto_original = None
    if held != "none" and plan.onto == "trained":
        onto_trained, onto_original = found.kl, difference(trained, unquantized).kl if unquantized else None
    elif held != "none":
        onto_trained, onto_original = _kl_onto_trained(plan, stage, trained), found.kl
    closer: Onto | None = None
    if onto_trained is not None and onto_original is not None:
        closer = "trained" if onto_trained <= onto_original else "original"
    return Receipt(
        **vars(found),
        onto=plan.onto,
        quantization=held,
        dtype=plan.dtype,
        adapters=tuple(
            Part(adapter_name(adapter), weight, adapter.weights_digest, adapter.manifest is not None)
            for adapter, weight in plan.adapters
        ),
        compared_with=_compared_with(plan),
        diverges_first_at=min((at for at in found.diverges_at if at is not None), default=None),
        kl_to_trained=kl_to_trained,
        kl_of_writing=as_written.kl,
        max_kl=max_kl,
        kl_of_effect=asked.wanted.kl_of_effect,
        kl_onto_trained=onto_trained,
        kl_onto_original=onto_original,
        closer_base=closer,
        weight_files=len(files),
        weight_bytes=sum(path.stat().st_size for path in files),
    )


def _check_kept(plan: MergePlan, kl: float, kl_of_effect: float) -> float:
    """Return the bound of the KL divergence to the adapters, which it keeps.

    Raises:
        TrainingError: it does not (exit 65).
    """
    rounds_inputs = plan.base.quantization == "int8" and plan.onto == "trained" and detect_device().kind != "cpu"
    bound = kl_bound(MAX_KL_INT8 if rounds_inputs else MAX_KL[plan.dtype], kl_of_effect)
    if not kl <= bound:
        raise TrainingError(
            f"the merged model differs from the adapter by a KL divergence of {kl:.3g} nats a token; at most {bound:.3g} is "
            f"let through (the adapter changes {kl_of_effect:.3g}, and {plan.dtype} rounds), so nothing was written",
            hint="write it in a dtype that keeps it: --dtype fp32"
            if plan.dtype == "bf16"
            else "please report it, with the adapter's passport",
        )
    return bound


def _ask_written(plan: MergePlan, folder: Path, trained: Sequence[Said]) -> tuple[tuple[Said, ...], float | None]:
    """Return what the written model says, and its KL divergence to the passport of the one adapter in it."""
    files = BaseFiles(folder.name, None, folder)
    model = load_base(files, BaseSection(name=str(folder), dtype=plan.dtype))
    # An adapter's own template is a stranger's program, in this folder too.
    tokenizer = load_tokenizer(files)
    said = ask(model, tokenizer if plan.template_text is None else fence_template(tokenizer), trained)
    if not same_prompts(trained, said):
        raise TrainingError(
            "the merged model's tokenizer and chat template make other tokens of a prompt than while training; nothing was written",
            hint="please report it, with the adapter's passport",
        )
    adapter, weight = plan.adapters[0]
    manifest = adapter.manifest if len(plan.adapters) == 1 and weight == 1 else None
    kl = replay_probes(model, manifest.probes).kl if manifest else None
    del model
    gc.collect()
    return said, kl


def _kl_onto_trained(plan: MergePlan, stage: Path, trained: Sequence[Said]) -> float | None:
    """Return how far the other merge would have been: onto the dequantized weights, written for this measurement only."""
    if _weight_bytes(plan) > MAX_COMPARED_BYTES:
        return None
    try:
        other = plan_merge(plan.adapters, _unheard, onto="trained", base_name=plan.base_name, dtype=plan.dtype)
    except RefusedError:  # a quantized layer has no weight of its own in the files
        return None
    with tempfile.TemporaryDirectory(dir=stage) as folder:
        write_merged(other, Path(folder), _unheard)
        return difference(trained, _ask_written(other, Path(folder), trained)[0]).kl


def _unheard(_label: str, _share: float) -> None:
    """Take no note of progress."""


def _weight_bytes(plan: MergePlan) -> int:
    """Return about how large the merged model's weights are."""
    numbers = sum(prod(stored.info.shape) for stored in stored_tensors(plan.base_files.folder).values())
    return numbers * (2 if plan.dtype == "bf16" else 4)


def _compared_with(plan: MergePlan) -> str:
    held = (
        "full-precision base"
        if plan.base.quantization == "none"
        else f"{plan.base.quantization} base, as while training"
    )
    if any(files.manifest is None for files, _ in plan.adapters):
        held = f"base that it was merged into ({plan.base.quantization}, unverified)"
    if len(plan.adapters) == 1:
        return f"the adapter on {'the' if plan.adapters[0][0].manifest is None else 'its'} {held}"
    return f"the {len(plan.adapters)} adapters on the {held}, active at once and their outputs added up by peft"


def _public_base(plan: MergePlan) -> str:
    """What others may know the base by: never a path of this machine."""
    manifest, path = plan.adapters[0][0].manifest, Path(plan.base.name)
    return manifest.base.name if manifest else path.name if path.is_absolute() else plan.base.name


def write_trained_base(section: BaseSection, files: BaseFiles, folder: Path, progress: Progress) -> None:
    """Write the base as it was while training to `folder`: quantized, and dequantized again."""
    write_merged(plan_base(section, files), folder, progress)
