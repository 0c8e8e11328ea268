"""LoRA on a base: a new adapter from a recipe's section, or a checked one from its files."""

from typing import Any

from lora_tune.adapter.door import WEIGHTS, AdapterFiles, read_weights
from lora_tune.errors import AdapterError, AdapterMismatchError, RecipeError
from lora_tune.model.load import Dtype, torch_dtype
from lora_tune.recipe.schema import LoraSection


def apply_lora(model: Any, section: LoraSection, *, adapter_dtype: Dtype) -> Any:
    """Return the base with a fresh adapter on it; only the adapter's weights are trainable.

    A is drawn from torch's global generator, so seed it first; B is zero, so the model starts as the base.

    Raises:
        RecipeError: a target names no linear layer of this base.
    """
    import peft

    targets = resolve_targets(model, section.targets)
    settings = _peft_settings(model, section.rank, section.alpha, section.variant, targets, dropout=section.dropout)
    live = peft.get_peft_model(model, settings)
    _cast_adapter(live, "default", adapter_dtype)
    return live


def attach_adapter(model: Any, files: AdapterFiles, *, name: str, adapter_dtype: Dtype) -> Any:
    """Return the model with the adapter's weights on it under `name`, active and frozen.

    Args:
        model: a plain base, or one that already carries adapters.
        files: checked by the door.
        name: a name that the model does not carry yet.
        adapter_dtype: what the weights are held in.

    Raises:
        AdapterMismatchError: the weights were changed since they were checked, or do not cover exactly the layers that
            the targets name in this base, in their widths.
    """
    import peft

    state = read_state(files)
    shape = files.shape
    settings = _peft_settings(_plain(model), shape.rank, shape.alpha, shape.variant, list(shape.targets), dropout=0.0)
    carries = isinstance(model, peft.PeftModel)
    try:
        if carries:
            model.add_adapter(name, settings)
        live = model if carries else peft.PeftModel(model, settings, adapter_name=name)
    except ValueError as err:  # a target that names no layer, or one that LoRA cannot be put on
        if carries and name in model.peft_config:
            model.delete_adapter(name)
        raise _other_layers(str(err).splitlines()[0][:200]) from err
    try:
        result = peft.set_peft_model_state_dict(live, state, adapter_name=name)
    except RuntimeError as err:
        live.delete_adapter(name)
        if "size mismatch" not in str(err):
            raise
        raise _other_layers(next(line.strip() for line in str(err).splitlines() if "size mismatch" in line)) from err
    missing = [key for key in result.missing_keys if f".{name}" in key and "lora_" in key]
    if missing or result.unexpected_keys:
        live.delete_adapter(name)
        example = (missing or result.unexpected_keys)[0]
        raise _other_layers(f"{example} {'has no weights' if missing else 'has no layer'}")
    live.set_adapter(name)
    _cast_adapter(live, name, adapter_dtype)
    for parameter in live.parameters():
        parameter.requires_grad_(requires_grad=False)
    live.eval()
    return live


def resolve_targets(model: Any, targets: str | tuple[str, ...]) -> list[str]:
    """Return the names of the layers that get an adapter, sorted.

    `all-linear` is every linear layer (GPT-2's Conv1D and quantized ones too) but the output head.

    Raises:
        RecipeError: a name matches no linear layer.
    """
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if _is_linear(module) and module is not head]
    leaves = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if targets == "all-linear":
        return leaves
    unknown = [
        target for target in targets if not any(name == target or name.endswith(f".{target}") for name in linear)
    ]
    if unknown:
        raise RecipeError(
            f"lora.targets names {', '.join(unknown)}, but this base's linear layers are {', '.join(leaves)}",
            hint="take some of those, or all-linear",
            where="lora.targets",
        )
    return sorted(set(targets))


def trained_weights(model: Any) -> dict[str, Any]:
    """Return name → weight of everything that is trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def read_state(files: AdapterFiles) -> dict[str, Any]:
    """Return name → tensor, of the very bytes that the door checked."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        state: dict[str, Any] = load(read_weights(files))
    except SafetensorError as err:
        raise AdapterError(
            f"{files.folder / WEIGHTS} is not a safetensors file: {str(err)[:200]}", hint="fetch or export it again"
        ) from err
    return state


def _other_layers(detail: str) -> AdapterMismatchError:
    return AdapterMismatchError(
        f"the adapter covers other layers than its targets name in this base: {detail}",
        hint="load it on the base it was trained on",
    )


def _is_linear(module: Any) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)


def _peft_settings(model: Any, rank: int, alpha: float, variant: str, targets: list[str], *, dropout: float) -> Any:
    import peft
    from transformers.pytorch_utils import Conv1D

    suffixes = tuple(f".{target}" for target in targets)
    layers = [module for name, module in model.named_modules() if name in targets or name.endswith(suffixes)]
    return peft.LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
        # Conv1D holds its weight as [in, out], the transpose of Linear's.
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers),
        bias="none",
        task_type="CAUSAL_LM",
    )


def _plain(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _cast_adapter(model: Any, name: str, dtype: Dtype) -> None:
    # A DoRA magnitude stays fp32: its updates are smaller than bf16 can tell apart (trl #7268).
    for key, parameter in model.named_parameters():
        if f".{name}" in key and "lora_" in key and "lora_magnitude_vector" not in key:
            parameter.data = parameter.data.to(torch_dtype(dtype))
