"""Base + adapters → one plain model, tensor by tensor, with a receipt: how far it is from what was trained, measured."""

import gc
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from lora_tune.adapter.apply import attach_adapter
from lora_tune.adapter.deltas import Factors, base_tensors, changed_weight, check_change, check_not_tied, open_factors
from lora_tune.adapter.door import AdapterFiles
from lora_tune.adapter.fence import fence_template
from lora_tune.adapter.live import CONV1D_FAMILIES, base_section, check_belongs, open_live, own_template
from lora_tune.adapter.probes import replay_probes
from lora_tune.adapter.receipt import Onto, Part, Receipt, Said, ask, difference, merged_card, same_prompts
from lora_tune.errors import (
    CannotCreateError,
    CannotWriteError,
    RefusedError,
    TrainingError,
    UsageError,
)
from lora_tune.model.dense import BaseFiles, quiet, ready_base
from lora_tune.model.fingerprint import read_config
from lora_tune.model.load import Dtype, detect_device, load_base, load_tokenizer, place, torch_dtype
from lora_tune.model.quantization import compute_as_in_training, quantized_layers, round_trip
from lora_tune.model.resolve import Progress
from lora_tune.model.shards import (
    MAX_SHARD_BYTES,
    NewTensor,
    StoredTensor,
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
"""Largest mean KL divergence (nats a token) between adapter and merged model, by the dtype that is written."""

MAX_KL_INT8 = 5e-2
"""The same onto int8 weights on a GPU: there the inputs of every layer are rounded to 8 bit too, which no weight can hold."""

MAX_COMPARED_BYTES = 4 * 1024**3
"""Past this many bytes of weights only what was asked for is measured, and not the other weights beside it."""

_WRITTEN = {"bf16": ("BF16", "bfloat16"), "fp32": ("F32", "float32")}
"""safetensors' and torch's name of a dtype."""


@dataclass(frozen=True)
class MergePlan:
    """Everything that is decided before anything is written."""

    adapters: tuple[tuple[AdapterFiles, float], ...]
    base: BaseSection
    """As it was held while training; full precision when the adapters were trained on bases held differently."""
    base_name: str | None
    base_files: BaseFiles
    onto: Onto
    dtype: Dtype
    changed: Mapping[str, tuple[tuple[int, str], ...]]
    """Name of a tensor → (number of the adapter, its layer), for each adapter that changes it."""
    quantized: Mapping[str, bool]
    """Name of a tensor that was held in 4 or 8 bit while training → it is stored as [in, out]."""
    conv1d: bool
    """The adapted layers' weights are stored as [in, out]."""
    template_text: str | None
    """The chat template, when it is not the base's own."""


def merge_adapter(
    adapter: AdapterFiles, out: Path, progress: Progress, *, onto: Onto, base_name: str | None = None
) -> Receipt:
    """Write base + adapter as one model to `out`, and return how far it is from the adapter; see merge_adapters."""
    return merge_adapters([(adapter, 1.0)], out, progress, onto=onto, base_name=base_name)


def merge_adapters(
    adapters: Sequence[tuple[AdapterFiles, float]],
    out: Path,
    progress: Progress,
    *,
    onto: Onto,
    base_name: str | None = None,
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
        max_shard_bytes: weights in one file, unless a single tensor is larger.

    Raises:
        AdapterMismatchError: an adapter does not belong to this base (exit 77).
        RefusedError: these adapters cannot be merged, or not together (exit 77).
        TrainingError: the written model differs beyond the bound; nothing is left in `out` (exit 65).
        CannotCreateError, CannotWriteError: `out` exists, or the disk is full (exit 73, 74).
    """
    if out.exists():
        raise CannotCreateError(f"{out} exists already and is never overwritten", hint="give another folder")
    plan = plan_merge(adapters, progress, onto=onto, base_name=base_name)
    _refuse_full_disk(plan, out)
    progress("asking the model as it was trained", 0.1)
    trained = _ask_live(plan, progress, quantization=plan.base.quantization)
    unquantized = None
    if plan.base.quantization != "none" and (onto == "original" or _weight_bytes(plan) <= MAX_COMPARED_BYTES):
        unquantized = _ask_live(plan, progress, quantization="none", questions=trained)
    with staged_folder(out) as stage, quiet():
        files = write_merged(plan, stage, progress, max_shard_bytes=max_shard_bytes)
        progress("measuring the merged model", 0.7)
        receipt = _measure(plan, stage, files, trained, unquantized)
        text = json.dumps(asdict(receipt), indent=2, sort_keys=True, allow_nan=False) + "\n"
        (stage / "merge_receipt.json").write_text(text, encoding="utf-8")
        (stage / "README.md").write_text(merged_card(_public_base(plan), receipt), encoding="utf-8")
    progress("merging", 1.0)
    return receipt


def plan_merge(
    adapters: Sequence[tuple[AdapterFiles, float]], progress: Progress, *, onto: Onto, base_name: str | None = None
) -> MergePlan:
    """Return what will be written, after every check that needs no model.

    Raises:
        AdapterMismatchError, RefusedError: as merge_adapters (exit 77).
        UsageError: there is no adapter, or a weight is 0 (exit 2).
    """
    _refuse_together(adapters)
    sections = [base_section(files, base_name) for files, _ in adapters]
    base = sections[0]
    if len({section.quantization for section in sections}) > 1:
        if onto == "trained":
            raise RefusedError(
                f"these adapters were trained on bases held differently: {', '.join(s.quantization for s in sections)}",
                hint="merge them onto the full-precision weights: --onto original",
            )
        base = base.model_copy(update={"quantization": "none"})
    base_files = ready_base(base, progress)
    for files, _ in adapters:
        check_belongs(files, base_files)
    shapes = {name: stored.info.shape for name, stored in stored_tensors(base_files.folder).items()}
    conv1d = read_config(base_files.folder).get("model_type") in CONV1D_FAMILIES
    changed: dict[str, tuple[tuple[int, str], ...]] = {}
    for number, (files, _) in enumerate(adapters):
        for module, name in base_tensors(files.shape.modules, shapes).items():
            check_change(files, module, name, shape=shapes[name][::-1] if conv1d else shapes[name])
            check_not_tied(module, base_files.folder)
            changed[name] = (*changed.get(name, ()), (number, module))
    layers = quantized_layers(base_files.folder, base.quantization) if onto == "trained" else {}
    quantized = {name: layers[path] for path, name in base_tensors(layers, shapes).items()}
    return MergePlan(
        tuple(adapters), base, base_name, base_files, onto, place(detect_device(), base).dtype,
        changed, quantized, conv1d, own_template(adapters[0][0]),
    )  # fmt: skip


def _refuse_together(adapters: Sequence[tuple[AdapterFiles, float]]) -> None:
    if not adapters or not all(0 < abs(weight) <= 1000 for _, weight in adapters):
        raise UsageError(
            "merging takes at least one adapter, each with a weight other than 0, between -1000 and 1000",
            hint="leave out the adapters that are not wanted",
        )
    names = [_name(files) for files, _ in adapters]
    dora = [name for name, (files, _) in zip(names, adapters, strict=True) if files.shape.variant == "dora"]
    if dora and (len(adapters) > 1 or adapters[0][1] != 1.0):
        raise RefusedError(
            f"{dora[0]} is a DoRA adapter: it sets the length of each row, which cannot be added up or weighted",
            hint="merge it alone, with weight 1",
        )
    if len({own_template(files) for files, _ in adapters}) > 1:
        raise RefusedError(
            f"{', '.join(names)} were trained with different chat templates; one model has one",
            hint="merge adapters that were trained with the same data.chat_template",
        )


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
        # As it was loaded: in the compute dtype first.
        weight = round_trip(weight.to(dtype), plan.base.quantization, transposed=plan.quantized[name], device=device)
    changes = [
        factors[number].of(module, weight=plan.adapters[number][1]) for number, module in plan.changed.get(name, ())
    ]
    weight = changed_weight(weight, changes, conv1d=plan.conv1d).to(dtype)
    if not bool(torch.isfinite(weight).all()):
        raise TrainingError(
            f"{name} is not finite after merging; nothing was written", hint="the adapter or its weight is too large"
        )
    yield weight


def _ask_live(
    plan: MergePlan, progress: Progress, *, quantization: Any, questions: Sequence[Said] = ()
) -> tuple[Said, ...]:
    """Return what base + adapters say, the adapters' outputs added up by peft: nothing here is computed by us."""
    live = open_live(plan.adapters[0][0], progress, base_name=plan.base_name, quantization=quantization)
    names = ["default"]
    for number, (files, _) in enumerate(plan.adapters[1:], start=1):
        names.append(f"adapter{number}")
        adapter_dtype = place(detect_device(), live.base).adapter_dtype
        attach_adapter(live.model, files, name=names[-1], adapter_dtype=adapter_dtype)
    live.model.base_model.set_adapter(names)
    for module in live.model.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):  # peft's layers; attention layers have a plain number of that name
            for name, (_, weight) in zip(names, plan.adapters, strict=True):
                if name in scaling:
                    scaling[name] *= weight
    if quantization == "int8":
        compute_as_in_training(live.model)
    with quiet():
        said = ask(live.model, live.tokenizer, questions)
    del live, module
    gc.collect()  # a peft model refers to itself; the next model needs its memory
    return said


def _measure(
    plan: MergePlan, stage: Path, files: Sequence[Path], trained: Sequence[Said], unquantized: Sequence[Said] | None
) -> Receipt:
    """Return the receipt of the model in `stage`.

    Raises:
        TrainingError: it is beyond its bound (exit 65).
    """
    said, kl_to_trained = _ask_written(plan, stage, trained)
    found = difference(trained, said)
    held = plan.base.quantization
    # Onto the original weights, what was trained is no measure of whether the sum was written right: these weights are.
    as_written = found if unquantized is None or plan.onto == "trained" else difference(unquantized, said)
    rounds_inputs = held == "int8" and plan.onto == "trained" and detect_device().kind != "cpu"
    max_kl = MAX_KL_INT8 if rounds_inputs else MAX_KL[plan.dtype]
    if not as_written.kl <= max_kl:
        raise TrainingError(
            f"the merged model differs from the adapter by a KL divergence of {as_written.kl:.3g} nats a token; "
            f"at most {max_kl:g} is let through, so nothing was written",
            hint="please report it, with the adapter's passport",
        )
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
        adapters=tuple(Part(_name(adapter), weight, adapter.weights_digest) for adapter, weight in plan.adapters),
        compared_with=_compared_with(plan),
        diverges_first_at=min((at for at in found.diverges_at if at is not None), default=None),
        kl_to_trained=kl_to_trained,
        kl_of_writing=as_written.kl,
        max_kl=max_kl,
        kl_onto_trained=onto_trained,
        kl_onto_original=onto_original,
        closer_base=closer,
        weight_files=len(files),
        weight_bytes=sum(path.stat().st_size for path in files),
    )


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
        other = plan_merge(plan.adapters, _unheard, onto="trained", base_name=plan.base_name)
    except RefusedError:  # a quantized layer has no weight of its own in the files
        return None
    with tempfile.TemporaryDirectory(dir=stage) as folder:
        write_merged(other, Path(folder), _unheard)
        return difference(trained, _ask_written(other, Path(folder), trained)[0]).kl


def _unheard(_label: str, _share: float) -> None:
    """Take no note of progress."""


def _refuse_full_disk(plan: MergePlan, out: Path) -> None:
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    compared = (
        plan.onto == "original" and plan.base.quantization != "none" and _weight_bytes(plan) <= MAX_COMPARED_BYTES
    )
    wanted, free = _weight_bytes(plan) * (2 if compared else 1), shutil.disk_usage(folder).free
    if wanted > free:
        raise CannotWriteError(
            f"the merged model takes {wanted / 1e9:.2f} GB, but {folder} has {free / 1e9:.2f} GB free; nothing was written",
            hint="free some space, or give another folder",
        )


def _weight_bytes(plan: MergePlan) -> int:
    """Return about how large the merged model's weights are."""
    numbers = sum(prod(stored.info.shape) for stored in stored_tensors(plan.base_files.folder).values())
    return numbers * (2 if plan.dtype == "bf16" else 4)


def _compared_with(plan: MergePlan) -> str:
    held = (
        "its full-precision base"
        if plan.base.quantization == "none"
        else f"its {plan.base.quantization} base, as while training"
    )
    if len(plan.adapters) == 1:
        return f"the adapter on {held}"
    return f"the {len(plan.adapters)} adapters on {held}, active at once and their outputs added up by peft"


def _name(adapter: AdapterFiles) -> str:
    return adapter.manifest.name if adapter.manifest else adapter.folder.name


def _public_base(plan: MergePlan) -> str:
    """What others may know the base by: never a path of this machine."""
    manifest, path = plan.adapters[0][0].manifest, Path(plan.base.name)
    return manifest.base.name if manifest else path.name if path.is_absolute() else plan.base.name
