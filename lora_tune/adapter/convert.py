"""An adapter → the files of another engine: GGUF (llama.cpp), Ollama, MLX, or PEFT's plainest form.

What all of them share stands here: the checked matrices, the base they belong to, the report. One file per engine
knows that engine's format.
"""

import hashlib
import json
import re
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lora_tune.adapter.door import CONFIG, WEIGHTS, AdapterFiles, open_adapter, read_weights
from lora_tune.adapter.live import base_section, check_belongs
from lora_tune.adapter.manifest import FILE_NAME, dump_manifest
from lora_tune.adapter.portability import BY_TRANSFORMERS, MERGE_ONTO_TRAINED
from lora_tune.errors import AdapterError, AdapterMismatchError, RefusedError, UsageError
from lora_tune.model.dense import BaseFiles, ready_base
from lora_tune.model.fingerprint import TensorInfo, file_digest
from lora_tune.model.resolve import Progress
from lora_tune.model.shards import check_room
from lora_tune.staging import staged_folder

Engine = Literal["gguf", "ollama", "mlx", "peft"]
ENGINES: tuple[Engine, ...] = ("gguf", "ollama", "mlx", "peft")
GgufDtype = Literal["f16", "bf16", "q8_0"]
"""What a whole model's matrices are held in; vectors stay fp32."""

Matrix = NDArray[np.float32]
_PART = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
_MERGE_FIRST = "merge it into its base (lora-tune merge ADAPTER OUT) and convert the merged model"


@dataclass(frozen=True)
class LoraPair:
    """The matrices of one adapted layer, in fp32."""

    module: str
    """The layer's path in transformers' model."""
    a: Matrix
    """[R, D_in]."""
    b: Matrix
    """[D_out, R]."""
    magnitude: Matrix | None
    """DoRA's, [D_out]; None otherwise."""


@dataclass(frozen=True)
class AdapterOnBase:
    """A checked adapter, and the base that it was found to belong to."""

    files: AdapterFiles
    pairs: tuple[LoraPair, ...]
    """Every adapted layer, sorted by name."""
    base: BaseFiles


@dataclass(frozen=True)
class ExportReport:
    """What was written for another engine."""

    to: Engine
    folder: str
    files: tuple[str, ...]
    """Names of the files in the folder, sorted."""
    base: str
    """The base that the adapter belongs to, as it names it."""
    layers: int
    """Adapted layers."""
    checks: tuple[str, ...]
    """What was compared before the folder appeared."""
    notes: tuple[str, ...]
    """What the user should know before using it there."""
    next_command: str
    """How to use it there."""

    def as_dict(self) -> dict[str, Any]:
        """The report as `--json` prints it."""
        return asdict(self)


@dataclass(frozen=True)
class Written:
    """What one engine's file says about what it wrote."""

    checks: tuple[str, ...]
    notes: tuple[str, ...]
    next_command: str


def export_adapter_to(
    adapter: AdapterFiles,
    out: Path,
    progress: Progress,
    *,
    to: Engine,
    base_name: str | None = None,
    base_dtype: GgufDtype | None = None,
) -> ExportReport:
    """Write the adapter to the new folder `out` as another engine reads it.

    Args:
        adapter: checked by the door.
        out: a folder that is not there yet.
        progress: told what is being done.
        to: the engine.
        base_name: another place of the same base; None takes what the adapter names. `peft` needs no base.
        base_dtype: for `ollama`, what the base is written in; None takes bf16 for a bf16 base and f16 otherwise.

    Raises:
        RefusedError: the engine cannot hold this adapter as it was trained; the hint is the way out (exit 77).
        AdapterMismatchError: base, tokenizer or template are not those it was trained with (exit 77).
        MissingInputError: the base is not there (exit 66).
        CannotCreateError, CannotWriteError: `out` exists, or the disk is full (exit 73, 74).
    """
    if to not in ENGINES:
        raise UsageError(f"--to is {to!r}; known: {', '.join(ENGINES)}")
    if base_dtype is not None and to != "ollama":
        raise UsageError(f"--to {to} writes no base, so there is no dtype to choose for it")
    check_room(out, 0)
    pairs = lora_pairs(adapter)
    if to != "mlx":
        _refuse_dora(adapter, to)
    base = None if to == "peft" else _base_of(adapter, base_name, progress)
    progress(f"writing for {to}", 0.5)
    with staged_folder(out) as stage:
        if base is None:
            written = _write_peft(adapter, pairs, stage)
        else:
            on_base = AdapterOnBase(adapter, pairs, base)
            written = _write(on_base, stage, progress, to=to, base_dtype=base_dtype)
        written = replace(written, notes=(*written.notes, *_base_notes(adapter, to)))
        if adapter.manifest is not None and to != "peft":
            (stage / FILE_NAME).write_text(dump_manifest(adapter.manifest), encoding="utf-8")
        files = tuple(sorted(path.name for path in stage.iterdir()))
    progress(f"writing for {to}", 1.0)
    return ExportReport(
        to, str(out), files, _named_base(adapter), len(pairs), written.checks, written.notes,
        written.next_command.replace("OUT", shlex.quote(str(out))),
    )  # fmt: skip


def lora_pairs(adapter: AdapterFiles) -> tuple[LoraPair, ...]:
    """Return the matrices of every adapted layer, sorted by layer, from the very bytes that the door checked.

    Raises:
        AdapterMismatchError: the weights were changed since (exit 77).
        AdapterError: it holds more than LoRA matrices of one rank (exit 77).
    """
    content = read_weights(adapter)
    found: dict[str, dict[str, Matrix]] = {}
    for name, info in adapter.tensors.items():
        match = _PART.fullmatch(name)
        if match is None:
            raise AdapterError(
                f"{adapter.folder}: {name} is no LoRA matrix, and other engines take nothing else", hint=_MERGE_FIRST
            )
        found.setdefault(match["module"], {})[match["part"]] = as_float32(content, info)
    pairs = tuple(
        LoraPair(module, parts["lora_A.weight"], parts["lora_B.weight"], parts.get("lora_magnitude_vector"))
        for module, parts in sorted(found.items())
    )
    other = next((pair for pair in pairs if pair.a.shape[0] != adapter.shape.rank), None)
    if other is not None:
        raise AdapterError(
            f"{adapter.folder}: {other.module} has rank {other.a.shape[0]}, the adapter {adapter.shape.rank}; "
            "other engines take one rank",
            hint=_MERGE_FIRST,
        )
    return pairs


def as_float32(content: bytes, info: TensorInfo) -> Matrix:
    """Return a safetensors tensor's bytes as fp32, which holds fp16 and bf16 exactly.

    Args:
        content: what the tensor's `start` and `end` count in.
        info: dtype, shape and place.

    Raises:
        RefusedError: it is of another dtype (exit 77).
    """
    raw = memoryview(content)[info.start : info.end]
    if info.dtype == "BF16":
        flat = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    elif info.dtype in ("F32", "F16"):
        flat = np.frombuffer(raw, np.float32 if info.dtype == "F32" else np.float16).astype(np.float32)
    else:
        raise RefusedError(f"a tensor is held as {info.dtype}; known: F32, F16, BF16", hint="save the model in bf16")
    return flat.reshape(info.shape)


def save_matrices(path: Path, matrices: dict[str, Matrix]) -> None:
    """Write fp32 matrices as a safetensors file."""
    from safetensors.numpy import save

    path.write_bytes(save({name: np.ascontiguousarray(matrix) for name, matrix in matrices.items()}))


def _write(
    on_base: AdapterOnBase, stage: Path, progress: Progress, *, to: Engine, base_dtype: GgufDtype | None
) -> Written:
    if to == "mlx":
        from lora_tune.adapter.mlx import write_mlx

        return write_mlx(on_base, stage)
    if to == "ollama":
        from lora_tune.adapter.ollama import write_ollama

        return write_ollama(on_base, stage, progress, dtype=base_dtype)
    from lora_tune.adapter.gguf_files import write_adapter_gguf

    write_adapter_gguf(on_base, stage / "adapter.gguf")
    return Written(
        checks=("every layer has a place in the model's GGUF",),
        notes=("the model's GGUF must be made of the same base; its dtype may be another",),
        next_command="llama-cli -m BASE.gguf --lora OUT/adapter.gguf",
    )


def _base_of(adapter: AdapterFiles, base_name: str | None, progress: Progress) -> BaseFiles:
    files = ready_base(base_section(adapter, base_name), progress)
    check_belongs(adapter, files)
    return files


def _base_notes(adapter: AdapterFiles, to: Engine) -> tuple[str, ...]:
    """Return what to know of the base when it was quantized while training; ollama's folder holds the right one."""
    held = adapter.manifest.base.quantization if adapter.manifest else "none"
    if held == "none" or to == "ollama":
        return ()
    own_way = f", or load the base with quantization_config={BY_TRANSFORMERS[held]}" if to == "peft" else ""
    return (
        f"it was trained on the {held} base: on the full-precision one it answers otherwise than it was trained; "
        f"{MERGE_ONTO_TRAINED}{own_way}",
    )


def _named_base(adapter: AdapterFiles) -> str:
    return adapter.manifest.base.name if adapter.manifest else adapter.base_name


def _refuse_dora(adapter: AdapterFiles, to: Engine) -> None:
    if adapter.shape.variant == "dora":
        raise RefusedError(
            f"{adapter.folder} is a DoRA adapter; {to} knows A and B only, and without its magnitudes it answers worse "
            "than the base",
            hint=_MERGE_FIRST,
        )


def _write_peft(adapter: AdapterFiles, pairs: tuple[LoraPair, ...], stage: Path) -> Written:
    """Plain LoRA in fp32 with the shortest config: every engine that reads PEFT's layout reads this.

    rsLoRA becomes plain LoRA by a larger alpha where that is a whole number, else by a larger B: readers that ignore
    `use_rslora`, or take alpha for a whole number, are then right too.
    """
    shape = adapter.shape
    alpha = adapter.shape.scaling * shape.rank
    gain = 1.0
    if shape.variant == "rslora" and not alpha.is_integer():
        alpha, gain = shape.alpha, alpha / shape.alpha
    tensors = {}
    for pair in pairs:
        tensors[f"base_model.model.{pair.module}.lora_A.weight"] = pair.a
        tensors[f"base_model.model.{pair.module}.lora_B.weight"] = pair.b if gain == 1.0 else _times(pair.b, gain)
    save_matrices(stage / WEIGHTS, tensors)
    config = {
        "base_model_name_or_path": _named_base(adapter) or None,
        "bias": "none",
        "fan_in_fan_out": _fan_in_fan_out(adapter),
        "inference_mode": True,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": shape.rank,
        "target_modules": list(shape.targets),
        "task_type": "CAUSAL_LM",
    }
    (stage / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _write_passport(adapter, stage, alpha=alpha)
    _check_same_update(pairs, adapter.shape.scaling, open_adapter(stage))
    folded = (f"rsLoRA was folded into plain LoRA: {'alpha' if gain == 1.0 else 'B'} × √{shape.rank}",)
    return Written(
        checks=("read back through the door: every layer's update is the same",),
        notes=folded if shape.variant == "rslora" else (),
        next_command="lora-tune chat OUT",
    )


def _times(matrix: Matrix, gain: float) -> Matrix:
    return (matrix.astype(np.float64) * gain).astype(np.float32)


def _fan_in_fan_out(adapter: AdapterFiles) -> bool:
    """Return what the adapter's own config says of how its base holds weights (GPT-2's Conv1D: as [in, out])."""
    content = (adapter.folder / CONFIG).read_bytes()
    if hashlib.sha256(content).hexdigest() != adapter.config_digest:
        raise AdapterMismatchError(
            f"{adapter.folder / CONFIG} was changed after it was checked", hint="run the command again"
        )
    return json.loads(content).get("fan_in_fan_out") is True


def _write_passport(adapter: AdapterFiles, stage: Path, *, alpha: float) -> None:
    """Write the passport with the new files' digests; what it says of base, data and behaviour still holds."""
    if adapter.manifest is None:
        return
    lora = adapter.manifest.lora.model_copy(
        update={"variant": "lora", "alpha": float(alpha), "scaling": alpha / adapter.shape.rank}
    )
    digests = {"weights_digest": file_digest(stage / WEIGHTS), "config_digest": file_digest(stage / CONFIG)}
    manifest = adapter.manifest.model_copy(update={"lora": lora, **digests})
    (stage / FILE_NAME).write_text(dump_manifest(manifest), encoding="utf-8")


def _check_same_update(pairs: tuple[LoraPair, ...], scale: float, written: AdapterFiles) -> None:
    """Compare A, and B times the scaling, which is all that the model sees of them."""
    for before, after in zip(pairs, lora_pairs(written), strict=True):
        same_b = np.allclose(before.b * scale, after.b * written.shape.scaling, rtol=1e-6, atol=0)
        assert before.module == after.module and same_b and np.array_equal(before.a, after.a), before.module
