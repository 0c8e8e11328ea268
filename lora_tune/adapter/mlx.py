"""An adapter → `adapters.safetensors` and `adapter_config.json` as mlx-lm loads them (`--adapter-path`).

Source: mlx-lm, tuner/lora.py and dora.py: y = W x + scale · (x A) B with A as [in, R] and B as [R, out]; DoRA multiplies
by m / ‖W + scale · Bᵀ Aᵀ‖ by rows, which is PEFT's formula; tuner/utils.py reads the config.
"""

import json
import re
from pathlib import Path

from lora_tune.adapter.convert import AdapterOnBase, LoraPair, Matrix, Written, save_matrices
from lora_tune.errors import RefusedError
from lora_tune.model.fingerprint import read_config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
"""Model types whose layers have the same names and shapes in mlx-lm as in transformers."""
_LAYER = re.compile(r"model\.layers\.\d+\.(?P<inside>.+)")


def write_mlx(on_base: AdapterOnBase, stage: Path) -> Written:
    """Write the two files into `stage`.

    Raises:
        RefusedError: mlx-lm names this base's layers otherwise (exit 77).
    """
    family = read_config(on_base.base.folder).get("model_type")
    if family not in FAMILIES:
        raise RefusedError(
            f"bases of type {family} have other layer names in mlx-lm; known: {', '.join(FAMILIES)}",
            hint="merge it into its base (lora-tune merge ADAPTER OUT) and convert the merged model: mlx_lm.convert",
        )
    shape = on_base.files.shape
    keys = sorted({_key(pair.module) for pair in on_base.pairs})
    save_matrices(stage / "adapters.safetensors", mlx_matrices(on_base.pairs))
    config = {
        "fine_tune_type": "dora" if shape.variant == "dora" else "lora",
        # All of them: a layer that the adapter leaves alone gets B = 0, which changes nothing.
        "num_layers": -1,
        "lora_parameters": {"rank": shape.rank, "scale": shape.scaling, "dropout": 0.0, "keys": keys},
    }
    (stage / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Written(
        checks=("the base's layers have the same names in mlx-lm",),
        notes=("mlx-lm itself was not run: it needs Apple silicon",),
        next_command="mlx_lm.generate --model BASE --adapter-path OUT",
    )


def mlx_matrices(pairs: tuple[LoraPair, ...]) -> dict[str, Matrix]:
    """Return name → matrix as mlx-lm names and turns them: `lora_a` [D_in, R], `lora_b` [R, D_out], `m` [D_out]."""
    matrices = {}
    for pair in pairs:
        matrices[f"{pair.module}.lora_a"] = pair.a.T
        matrices[f"{pair.module}.lora_b"] = pair.b.T
        if pair.magnitude is not None:
            matrices[f"{pair.module}.m"] = pair.magnitude
    return matrices


def _key(module: str) -> str:
    match = _LAYER.fullmatch(module)
    if match is None:
        raise RefusedError(
            f"{module} is not in one of the base's numbered layers, where mlx-lm puts adapters",
            hint="train it without this target, or merge it: lora-tune merge ADAPTER OUT",
        )
    return match["inside"]
