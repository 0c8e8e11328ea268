"""NF4 and int8 through bitsandbytes. The only file that knows it."""

import logging
from pathlib import Path
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


def compute_as_in_training(model: Any) -> None:
    """Let int8 layers compute as they do while training; call it on a model that only answers.

    On a CPU that is a plain product with the dequantized weights. In evaluation they round their inputs to 8 bit too,
    which no weight can hold (measured: KL divergence 0.02 nats a token on SmolLM2-135M), and take five times as long.

    Source: bitsandbytes 0.50, autograd/_functions.py, `matmul`: MatMul8bitFp while training on a CPU, else MatMul8bitLt.
    """
    from bitsandbytes.nn import Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.train()


def is_quantized(model: Any) -> bool:
    """Return whether the model's weights are held in 4 or 8 bit."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def quantized_layers(folder: Path, quantization: str) -> dict[str, bool]:
    """Return path → transposed, of each layer that the base's model holds in 4 or 8 bit; no weight is read.

    `transposed` is True for a layer whose stored weight is [in, out] (GPT-2's Conv1D): it is turned before it is
    quantized.

    Args:
        folder: the base.
        quantization: `nf4` or `int8`; with `none` there are no such layers.

    Source: transformers 5.23, the same steps as `from_pretrained`: the model without weights, then
        `Bnb4BitHfQuantizer._process_model_before_weight_loading`, which leaves out the head and tied weights.
    """
    if quantization == "none":
        return {}
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations import replace_with_bnb_linear
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer

    plan = quantization_plan(quantization, torch.float32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder, trust_remote_code=False), trust_remote_code=False
        )
    left_out = HfQuantizer.get_modules_to_not_convert(model, plan.llm_int8_skip_modules, model._keep_in_fp32_modules)
    replace_with_bnb_linear(model, modules_to_not_convert=left_out, quantization_config=plan, pre_quantized=False)
    return {
        name: issubclass(module.source_cls, Conv1D)
        for name, module in model.named_modules()
        if hasattr(module, "source_cls")
    }


def round_trip(weight: Any, quantization: str, *, transposed: bool = False, device: str = "cpu") -> Any:
    """Return what a weight is worth once it is held in 4 or 8 bit: quantized as while training, and dequantized again.

    Args:
        weight: [D_out, D_in], in the dtype that the base is loaded in; it is taken from the files, never from a model,
            whose packed weights may have been rearranged by its first answer (see keep_unpacked).
        quantization: `nf4` or `int8`.
        transposed: the weight is [D_in, D_out], and so is what is returned; rows and blocks run along D_in all the same.
        device: where training quantized, `cuda:0` say; another device may round the last digit otherwise.

    Returns:
        As `weight`, on the CPU; fp32 for int8, and in its own dtype for nf4.

    Source: bitsandbytes 0.50, Params4bit and Int8Params, whose `.to(device)` quantizes when a base is loaded;
        MatMul8bitLt multiplies by SCB / 127.
    """
    import torch
    from bitsandbytes import functional
    from bitsandbytes.nn import Int8Params, Params4bit

    if transposed:
        return round_trip(weight.T, quantization, device=device).T
    plan = quantization_plan(quantization, weight.dtype)
    if quantization == "int8":
        rows = Int8Params(weight, requires_grad=False).to(device)
        return (rows.data.to(torch.float32) * (rows.SCB.to(torch.float32) / 127.0).unsqueeze(1)).cpu()
    packed = Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=plan.bnb_4bit_use_double_quant,
        quant_type=plan.bnb_4bit_quant_type,
        quant_storage=plan.bnb_4bit_quant_storage,
    ).to(device)
    return functional.dequantize_4bit(packed.data, packed.quant_state).cpu()
