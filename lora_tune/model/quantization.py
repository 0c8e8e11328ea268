"""NF4 and int8 through bitsandbytes. The only file that knows it."""

import logging
from typing import Any

from lora_tune.errors import MissingInputError


def quantization_plan(quantization: str, compute_dtype: Any) -> Any:
    """Return what `from_pretrained` takes as `quantization_config`; None for `none`.

    NF4 follows the QLoRA paper (https://arxiv.org/abs/2305.14314, section 3): normal-float weights and double
    quantization of the block constants.
    """
    if quantization == "none":
        return None
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401 - fails early, with a reason, where its binary does not load
    except (ImportError, OSError, RuntimeError) as err:
        raise MissingInputError(
            f"bitsandbytes does not load: {err}", hint="reinstall it, or set base.quantization to none"
        ) from err
    if quantization == "int8":
        # It says at every product, not once, that fp32 inputs are rounded to fp16 on their way to int8.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def keep_unpacked(model: Any) -> None:
    """Stop bitsandbytes from repacking nf4 weights in place at the first evaluation on a CPU with AVX512-BF16.

    Training goes on with the same weights after a held-out measurement, and what is dequantized from repacked weights is
    garbage (observed with bitsandbytes 0.50: KL divergence 0.1, top-1 agreement 0 after a merge).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantized(model: Any) -> bool:
    """Return whether the model's weights are held in 4 or 8 bit."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))
