"""Base model and tokenizer into memory. Dtype and device are chosen here, in one tested table."""

from dataclasses import dataclass
from typing import Any, Literal

from lora_tune.adapter.fence import fence_template
from lora_tune.errors import MissingInputError, RecipeError
from lora_tune.model.dense import BaseFiles, quiet
from lora_tune.model.quantization import keep_unpacked, quantization_plan
from lora_tune.model.resolve import refuse_unfit
from lora_tune.recipe.schema import BaseSection
from lora_tune.recipe.template import PLAIN_TEMPLATE, read_template

__all__ = [
    "PLAIN_TEMPLATE",
    "Device",
    "Placement",
    "detect_device",
    "load_base",
    "load_tokenizer",
    "place",
    "read_template",
    "torch_dtype",
]

Dtype = Literal["bf16", "fp32"]

MERGE_RECEIPT = "merge_receipt.json"
"""What `lora-tune merge` leaves beside a model that it wrote: its chat template may be one that an adapter brought."""


@dataclass(frozen=True)
class Device:
    """What the choice of dtype and placement depends on."""

    kind: Literal["cpu", "cuda", "mps"]
    computes_bf16: bool
    """True when bf16 products run on units of their own; elsewhere they are emulated, about 7 × slower than fp32."""


@dataclass(frozen=True)
class Placement:
    """How a base is loaded and trained on a device."""

    dtype: Dtype
    """Of the base's weights (dequantized, for nf4) and of the activations."""
    adapter_dtype: Dtype
    """Of the LoRA weights and their optimizer state."""
    autocast_bf16: bool
    """Whether the trainer runs the forward pass under bf16 autocast."""
    device_map: str | None
    """Passed to from_pretrained."""


def device_name(device: Device) -> str:
    """Return what computes, as people call it: `cpu`, `mps`, or the GPU's name."""
    import torch

    return str(torch.cuda.get_device_name()) if device.kind == "cuda" else device.kind


def detect_device() -> Device:
    """Return the device at hand."""
    import torch

    if torch.cuda.is_available():
        return Device("cuda", torch.cuda.is_bf16_supported(including_emulation=False))
    if torch.backends.mps.is_available():
        return Device("mps", computes_bf16=False)
    capabilities = torch.cpu.get_capabilities()
    return Device(
        "cpu", bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
    )


def place(device: Device, base: BaseSection) -> Placement:
    """Return dtype and placement for a base on a device.

    LoRA weights: on a quantized base in bf16 as in the QLoRA paper; otherwise fp32, so that small updates are not
    rounded away. A bf16 base with fp32 LoRA weights needs autocast to meet in one dtype.
    """
    if base.dtype != "auto":
        dtype: Dtype = base.dtype
    else:
        dtype = "bf16" if device.computes_bf16 else "fp32"
    quantized = base.quantization != "none"
    return Placement(
        dtype=dtype,
        adapter_dtype="bf16" if quantized and dtype == "bf16" else "fp32",
        autocast_bf16=dtype == "bf16",
        device_map={"cpu": None, "cuda": "cuda:0", "mps": "mps"}[device.kind],
    )


def load_tokenizer(files: BaseFiles, *, template_text: str | None = None) -> Any:
    """Return the base's fast tokenizer, with the given chat template or its own, and a pad token.

    The template of a merged model is fenced, wherever it is used: it may be an adapter's, which is a stranger's program.

    Args:
        files: the base.
        template_text: the chat template itself (`read_template` gives that of a recipe), or None for the base's own.

    Raises:
        MissingInputError: there is no fast tokenizer.
        RecipeError: the base has no template and none is given.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(files.folder, use_fast=True)
    except (OSError, ValueError, KeyError, ImportError) as err:
        raise MissingInputError(
            f"no tokenizer can be read from {files.folder}: {err}", where=str(files.folder)
        ) from err
    if not tokenizer.is_fast:
        raise MissingInputError(
            f"{files.name} has no fast tokenizer (tokenizer.json), which is needed to know where each token stands"
        )
    if template_text is not None:
        tokenizer.chat_template = template_text
    if not tokenizer.chat_template:
        raise RecipeError(
            f"{files.name} has no chat template; rows of plain text need one too: `chat` and the golden probes ask with it",
            hint="set data.chat_template to a .jinja file, or to builtin:plain",
            where="data.chat_template",
        )
    if tokenizer.pad_token is None:
        # Harmless here: padding is masked by its position, never by its id.
        tokenizer.pad_token = tokenizer.eos_token
    return fence_template(tokenizer) if (files.folder / MERGE_RECEIPT).is_file() else tokenizer


def load_base(files: BaseFiles, base: BaseSection) -> Any:
    """Return the base in evaluation mode, in the dtype and place of the table, its weights frozen.

    Raises:
        MissingInputError: the weights cannot be read, or the architecture is unknown to transformers.
        RefusedError: the base is quantized already, or wants to run its own code (exit 77).
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    refuse_unfit(files.folder)
    placement = place(detect_device(), base)
    dtype = torch_dtype(placement.dtype)
    quantization = quantization_plan(base.quantization, dtype)
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                files.folder,
                dtype=dtype,
                device_map=placement.device_map,
                use_safetensors=True,
                trust_remote_code=False,
                # transformers asks whether it is given, not whether it is None
                **({} if quantization is None else {"quantization_config": quantization}),
            )
    except (OSError, ValueError, KeyError, SafetensorError) as err:
        raise MissingInputError(f"{files.name} cannot be loaded: {err}", where=str(files.folder)) from err
    keep_unpacked(model)
    model.eval()
    model.requires_grad_(requires_grad=False)
    return model


def torch_dtype(dtype: Dtype) -> Any:
    """Return torch's dtype of that name."""
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
