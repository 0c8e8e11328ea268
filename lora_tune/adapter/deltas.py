"""The change of one weight by adapters: which tensor of the base a layer is, and what its weight becomes.

Computed from the files alone, in fp32; no model is built.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.adapter.door import AdapterFiles, read_weights
from lora_tune.adapter.live import tail_of
from lora_tune.errors import AdapterMismatchError, RefusedError

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HEADS = ("lm_head", "embed_out")
"""What transformers' models call their output head."""


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
            f"{module} is {wide_in} → {wide_out} in {files.folder.name}, but {name} in the base is {shape[1]} → {shape[0]}",
            hint="merge it into the base it was trained on",
        )


def check_not_tied(module: str, base: Path) -> None:
    """Check that the layer is no output head that shares its weight with the embeddings.

    Raises:
        RefusedError: it is; merged, the change would change the embeddings too (exit 77).
    """
    if module.rsplit(".", 1)[-1] not in _HEADS:
        return
    from transformers import AutoConfig

    if AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config().tie_word_embeddings:
        raise RefusedError(
            f"the adapter changes {module}, whose weight this base shares with its embeddings; merged, it would change both",
            hint="use the adapter as it is, with its base",
        )
