"""What adapters change of a base: which of its tensors a layer is, what each weight becomes, and the plan of a merge.

Computed from the files alone, in fp32; no model is built.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_tune.adapter.door import AdapterFiles, read_weights
from lora_tune.adapter.live import (
    CONV1D_FAMILIES,
    HEADS,
    base_section,
    check_belongs,
    is_turned,
    own_template,
    tail_of,
)
from lora_tune.adapter.receipt import Onto
from lora_tune.errors import AdapterMismatchError, RefusedError, UsageError
from lora_tune.model.dense import BaseFiles, ready_base
from lora_tune.model.fingerprint import read_config
from lora_tune.model.load import Dtype, detect_device, place
from lora_tune.model.quantization import quantized_layers
from lora_tune.model.resolve import Progress
from lora_tune.model.shards import stored_tensors
from lora_tune.recipe.schema import BaseSection

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Change:
    """What one adapter does to one weight."""

    a: Any
    """A, fp32, [R, D_in]."""
    b: Any
    """B, fp32, [D_out, R]."""
    scaling: float
    """What B A is multiplied by: alpha / rank (rsLoRA: alpha / √rank), times the adapter's weight in a sum."""
    magnitude: Any | None = None
    """DoRA's length of each row, fp32, [D_out]; None for any other variant."""


@dataclass(frozen=True)
class Factors:
    """An adapter's weights in memory: the very bytes that the door checked."""

    files: AdapterFiles
    content: bytes

    def of(self, module: str, *, weight: float = 1.0) -> Change:
        """Return what the adapter does to a layer.

        Args:
            module: the layer's path, one of the adapter's.
            weight: what the change is multiplied by, in a sum of several adapters.
        """
        a, b = self._tensor(module, "lora_A.weight"), self._tensor(module, "lora_B.weight")
        magnitude = self._tensor(module, "lora_magnitude_vector") if self.files.shape.variant == "dora" else None
        return Change(a, b, self.files.shape.scaling * weight, magnitude)

    def _tensor(self, module: str, part: str) -> Any:
        import torch

        info = self.files.tensors[f"base_model.model.{module}.{part}"]
        # A copy of one tensor: torch warns of bytes that cannot be written.
        flat = torch.frombuffer(
            bytearray(self.content[info.start : info.end]), dtype=getattr(torch, _DTYPES[info.dtype])
        )
        return flat.reshape(info.shape).float()


def open_factors(files: AdapterFiles) -> Factors:
    """Return the adapter's weights.

    Raises:
        AdapterMismatchError: the file was changed since the door checked it (exit 77).
    """
    return Factors(files, read_weights(files))


def changed_weight(weight: Any, changes: Sequence[Change], *, conv1d: bool) -> Any:
    """Return the weight with the changes added, fp32, as it is stored: [D_out, D_in], or [D_in, D_out] for a Conv1D.

    LoRA and rsLoRA: W + Σ scaling B A. DoRA: the rows of W + scaling B A, each brought to its own length.

    Args:
        weight: the base's, as it is stored.
        changes: of all adapters; one with a magnitude stands alone.
        conv1d: the weight is stored as [D_in, D_out].

    Source: https://arxiv.org/abs/2106.09685 section 4.1; https://arxiv.org/abs/2402.09353 equation 5; peft 0.21,
        DoraLinearVariant.merge_safe.
    """
    import torch

    total = weight.float()
    for change in changes:
        left, right = (change.a.T, change.b.T) if conv1d else (change.b, change.a)
        total = torch.addmm(total, left, right, alpha=change.scaling)
    magnitude = changes[0].magnitude if changes else None
    if magnitude is None:
        return total
    assert len(changes) == 1, "a DoRA adapter is merged alone"
    lengths = torch.linalg.norm(total, dim=0 if conv1d else 1)
    factor = magnitude / lengths
    return total * (factor.unsqueeze(0) if conv1d else factor.unsqueeze(1))


def base_tensors(modules: Iterable[str], base_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return layer → name of its weight in the base's files.

    A model's paths and the names in its files may differ before the first number (GPT-2's files lack `transformer.`).
    Among several towers that share the rest, the one that shares most of the front too is taken.

    Args:
        modules: paths of layers in the model.
        base_shapes: tensor name → shape of the base.

    Raises:
        AdapterMismatchError: a layer has no weight of its own in the files: they keep it fused with others (exit 77).
        RefusedError: its weight is no matrix, or several weights could be meant (exit 77).
    """
    weights = {name.removesuffix(".weight"): name for name in base_shapes if name.endswith(".weight")}
    by_tail: dict[str, list[str]] = {}
    for path in weights:
        by_tail.setdefault(tail_of(path), []).append(path)
    return {module: _one_tensor(module, weights, by_tail, base_shapes) for module in modules}


def _one_tensor(
    module: str,
    weights: Mapping[str, str],
    by_tail: Mapping[str, Sequence[str]],
    base_shapes: Mapping[str, tuple[int, ...]],
) -> str:
    found = [module] if module in weights else list(by_tail.get(tail_of(module), ()))
    if not found:
        raise AdapterMismatchError(
            f"the base's files hold no weight of the layer {module}: it is not there, or fused with others into one tensor",
            hint="such an adapter cannot be merged; use it as it is, with the base it was trained on",
        )
    front = set(module.split("."))
    shared = {path: len(front & set(path.split("."))) for path in found}
    best = [path for path in found if shared[path] == max(shared.values())]
    if len(best) > 1:
        raise RefusedError(
            f"{module} could be any of {', '.join(sorted(best)[:3])} in the base's files",
            hint="such an adapter cannot be merged; use it as it is",
        )
    name = weights[best[0]]
    if len(base_shapes[name]) != 2:
        raise RefusedError(
            f"{name} of the base has shape {list(base_shapes[name])}; only matrices are merged, one layer each",
            hint="fused experts and convolutions cannot be merged; use the adapter as it is",
        )
    return name


def check_change(files: AdapterFiles, module: str, name: str, *, shape: tuple[int, ...]) -> None:
    """Check that what the adapter adds to a layer is as wide as the weight that was found for it.

    Args:
        files: the adapter.
        module: its layer.
        name: the tensor of the base.
        shape: of that tensor as [D_out, D_in].

    Raises:
        AdapterMismatchError: it is not (exit 77).
    """
    wide_in = files.tensors[f"base_model.model.{module}.lora_A.weight"].shape[1]
    wide_out = files.tensors[f"base_model.model.{module}.lora_B.weight"].shape[0]
    if shape != (wide_out, wide_in):
        raise AdapterMismatchError(
            f"{module} is {wide_in} → {wide_out} in {files.folder}, but {name} in the base is {shape[1]} → {shape[0]}",
            hint="merge it into the base it was trained on",
        )


def check_not_tied(module: str, base: Path) -> None:
    """Check that the layer is no output head that shares its weight with the embeddings.

    Raises:
        RefusedError: it is; merged, the change would change the embeddings too (exit 77).
    """
    if module.rsplit(".", 1)[-1] not in HEADS:
        return
    from transformers import AutoConfig

    if AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config().tie_word_embeddings:
        raise RefusedError(
            f"the adapter changes {module}, whose weight this base shares with its embeddings; merged, it would change both",
            hint="use the adapter as it is, with its base",
        )


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
    """That is written."""
    computed: Dtype
    """That the base computed in while training."""
    changed: Mapping[str, tuple[tuple[int, str], ...]]
    """Name of a tensor → (number of the adapter, its layer), for each adapter that changes it."""
    quantized: Mapping[str, bool]
    """Name of a tensor that was held in 4 or 8 bit while training → it is stored as [in, out]."""
    conv1d: bool
    """The adapted layers' weights are stored as [in, out], but for the head's."""
    template_text: str | None
    """The chat template, when it is not the base's own."""


def plan_merge(
    adapters: Sequence[tuple[AdapterFiles, float]],
    progress: Progress,
    *,
    onto: Onto,
    base_name: str | None = None,
    dtype: Dtype | None = None,
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
    plan = plan_base(base, base_files, onto=onto)
    return replace(
        plan,
        adapters=tuple(adapters),
        base_name=base_name,
        dtype=dtype or plan.computed,
        changed=_changed_tensors(adapters, plan),
        template_text=own_template(adapters[0][0]),
    )


def plan_base(base: BaseSection, base_files: BaseFiles, *, onto: Onto = "trained") -> MergePlan:
    """Return the plan that writes the base alone: onto `trained` as it was while training, dequantized."""
    shapes = _shapes(base_files)
    layers = quantized_layers(base_files.folder, base.quantization) if onto == "trained" else {}
    computed = place(detect_device(), base).dtype
    return MergePlan(
        adapters=(),
        base=base,
        base_name=None,
        base_files=base_files,
        onto=onto,
        dtype=computed,
        computed=computed,
        changed={},
        quantized={name: layers[path] for path, name in base_tensors(layers, shapes).items()},
        conv1d=read_config(base_files.folder).get("model_type") in CONV1D_FAMILIES,
        template_text=None,
    )


def _changed_tensors(
    adapters: Sequence[tuple[AdapterFiles, float]], plan: MergePlan
) -> dict[str, tuple[tuple[int, str], ...]]:
    shapes, changed = _shapes(plan.base_files), dict[str, tuple[tuple[int, str], ...]]()
    for number, (files, _) in enumerate(adapters):
        for module, name in base_tensors(files.shape.modules, shapes).items():
            turned = is_turned(module, conv1d=plan.conv1d)
            check_change(files, module, name, shape=shapes[name][::-1] if turned else shapes[name])
            check_not_tied(module, plan.base_files.folder)
            changed[name] = (*changed.get(name, ()), (number, module))
    return changed


def _shapes(files: BaseFiles) -> dict[str, tuple[int, ...]]:
    return {name: stored.info.shape for name, stored in stored_tensors(files.folder).items()}


def _refuse_together(adapters: Sequence[tuple[AdapterFiles, float]]) -> None:
    if not adapters or not all(0 < abs(weight) <= 1000 for _, weight in adapters):
        raise UsageError(
            "merging takes at least one adapter, each with a weight other than 0, between -1000 and 1000",
            hint="leave out the adapters that are not wanted",
        )
    names = [adapter_name(files) for files, _ in adapters]
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


def adapter_name(adapter: AdapterFiles) -> str:
    """Return the adapter's own name; without a passport its folder's, of a registry's version as `name@number`."""
    if adapter.manifest is not None:
        return adapter.manifest.name
    folder = adapter.folder.resolve()
    return f"{folder.parent.name}@{folder.name}" if folder.name.isdigit() else folder.name
