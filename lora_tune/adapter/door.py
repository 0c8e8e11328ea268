"""An untrusted folder → a checked, immutable AdapterFiles. Every verb that reads an adapter comes through here.

Nothing of the folder is executed or believed: its config is read by our own closed schema, its tensors' names, shapes
and values are checked, and the PEFT config is later built from what was checked here.
"""

import json
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_tune.adapter.manifest import FILE_NAME, AdapterManifest, read_manifest
from lora_tune.errors import AdapterError, AdapterMismatchError, MissingInputError
from lora_tune.model.fingerprint import TensorInfo, file_digest

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MAX_RANK = 1024
_MAX_CONFIG_BYTES = 64 * 1024
_MAX_MANIFEST_BYTES = 8 * 1024 * 1024
_MAX_HEADER_BYTES = 4 * 1024 * 1024
_MAX_TENSORS = 20_000
_NAME = re.compile(r"^[A-Za-z0-9_.]+$")
_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)$")
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_OFF: tuple[object, ...] = (None, False, {}, [], "")
_HARMLESS = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "task_type", "megatron_core",
             "qalora_group_size", "init_lora_weights", "lora_dropout", "fan_in_fan_out", "auto_mapping", "parent_library"}  # fmt: skip


@dataclass(frozen=True)
class AdapterShape:
    """What the adapter's config says, checked against its tensors."""

    rank: int
    alpha: float
    variant: Literal["lora", "rslora", "dora"]
    targets: tuple[str, ...]
    """Names of the adapted layers, sorted."""
    modules: tuple[str, ...]
    """Full paths of the adapted layers, sorted."""


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's folder after every check that needs no base."""

    folder: Path
    shape: AdapterShape
    tensors: Mapping[str, TensorInfo]
    manifest: AdapterManifest | None
    """None for an adapter made elsewhere: unverified."""
    base_name: str
    """Only compared and shown, never fetched from."""
    weights_digest: str
    config_digest: str
    weights_bytes: int


def open_adapter(folder: Path) -> AdapterFiles:
    """Return the checked adapter in `folder`.

    Raises:
        MissingInputError: there is no adapter (exit 66).
        AdapterError: the folder is not what an adapter's folder must be (exit 77).
    """
    if not folder.is_dir():
        raise MissingInputError(
            f"no adapter folder at {folder}", hint="`lora-tune adapters list` shows the registry", where=str(folder)
        )
    weights = _regular(folder / WEIGHTS, cap=None)
    config_path = _regular(folder / CONFIG, cap=_MAX_CONFIG_BYTES)
    tensors = _read_tensors(weights)
    config = _read_config(config_path)
    shape = _shape(config, tensors, config_path)
    _check_finite(weights, tensors)
    manifest = None
    if (folder / FILE_NAME).exists():
        path = _regular(folder / FILE_NAME, cap=_MAX_MANIFEST_BYTES)
        manifest = read_manifest(path.read_text(encoding="utf-8"), where=str(path))
    files = AdapterFiles(
        folder, shape, tensors, manifest, str(config.get("base_model_name_or_path") or ""),
        file_digest(weights), file_digest(config_path), weights.stat().st_size,
    )  # fmt: skip
    _check_passport(files)
    return files


def check_fits(files: AdapterFiles, base_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that every adapted layer exists in the base with fitting widths.

    Args:
        files: the adapter.
        base_shapes: tensor name → shape of the base, from its safetensors headers.

    Raises:
        AdapterMismatchError: a layer is missing or of other widths (exit 77).
    """
    widths = {name.removesuffix(".weight"): shape for name, shape in base_shapes.items() if name.endswith(".weight")}
    for module in files.shape.modules:
        # Files may leave out the model's own prefix (`h.0…` for `transformer.h.0…`).
        names = [module, *(module.split(".", n)[-1] for n in (1, 2))]
        found = next((widths[name] for name in names if name in widths), None)
        rows_in = files.tensors[f"base_model.model.{module}.lora_A.weight"].shape[1]
        rows_out = files.tensors[f"base_model.model.{module}.lora_B.weight"].shape[0]
        if found is None:
            raise AdapterMismatchError(
                f"the adapter changes {module}, but the base has no such layer",
                hint=f"load it on {files.base_name or 'the base it was trained on'}",
            )
        if sorted(found) != sorted((rows_in, rows_out)):
            raise AdapterMismatchError(
                f"{module} is {rows_in} → {rows_out} in the adapter, but {found} in the base",
                hint=f"load it on {files.base_name or 'the base it was trained on'}",
            )


def _regular(path: Path, *, cap: int | None) -> Path:
    try:
        info = path.lstat()
    except OSError as err:
        if path.name == WEIGHTS and list(path.parent.glob("*.bin")):
            raise AdapterError(
                f"{path.parent} holds a pickle (.bin) and no {WEIGHTS}; pickles can run code and are not opened",
                hint="ask its author for safetensors",
            ) from err
        raise MissingInputError(
            f"{path.parent} is not an adapter: it has no {path.name}",
            hint=f"an adapter's folder holds {CONFIG} and {WEIGHTS}",
        ) from err
    if not stat.S_ISREG(info.st_mode):
        raise AdapterError(f"{path} is not a regular file", hint="copy the real file into the folder", where=str(path))
    if cap is not None and info.st_size > cap:
        raise AdapterError(f"{path} has {info.st_size} bytes; at most {cap} are read", where=str(path))
    return path


def _read_tensors(path: Path) -> dict[str, TensorInfo]:
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_MAX_HEADER_BYTES, size - 8):
                raise AdapterError(f"{path}: its header claims {length} bytes", where=str(path))
            header = json.loads(stream.read(length), object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        if len(header) > _MAX_TENSORS:
            raise AdapterError(f"{path}: {len(header)} tensors; at most {_MAX_TENSORS} are read", where=str(path))
        tensors = {name: _tensor(name, info, 8 + length) for name, info in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise AdapterError(
            f"{path} is not a safetensors file: {err}", hint="fetch or export it again", where=str(path)
        ) from err
    end = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        if info.start != end:
            raise AdapterError(f"{path}: {name} does not begin where the tensor before it ends", where=str(path))
        end = info.end
    if end != size:
        raise AdapterError(
            f"{path} has {size} bytes, but its header describes {end}", hint="fetch or export it again", where=str(path)
        )
    return tensors


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name is written twice in its header")
    return values


def _tensor(name: str, info: Mapping[str, Any], offset: int) -> TensorInfo:
    if not _NAME.match(name):
        raise ValueError(f"tensor name {name[:80]!r} has characters that no layer has")
    dtype, shape = info["dtype"], info["shape"]
    start, end = info["data_offsets"]
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48 for n in (*shape, start, end)):
        raise ValueError(f"{name}: shape and offsets must be plain sizes")
    count = 1
    for n in shape:
        count *= n
    if dtype not in _BYTES:
        raise ValueError(f"{name} is {str(dtype)[:20]}; known: {', '.join(_BYTES)}")
    if end - start != count * _BYTES[dtype] or count == 0:
        raise ValueError(f"{name}: {end - start} bytes do not hold shape {shape}")
    return TensorInfo(dtype, tuple(shape), offset + start, offset + end)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as err:
        raise AdapterError(f"{path} is not JSON: {err}", where=str(path)) from err
    if not isinstance(config, dict):
        raise AdapterError(f"{path} holds no object", where=str(path))

    def refuse(key: str, expected: str) -> AdapterError:
        return AdapterError(
            f"{path}: {key} is {str(config.get(key))[:60]!r}; {expected}",
            hint="only plain LoRA, rsLoRA and DoRA adapters are loaded",
            where=str(path),
        )

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", "expected 'LORA'")
    if config.get("bias", "none") != "none":
        raise refuse("bias", "expected 'none'")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise refuse("init_lora_weights", "such an adapter changes the base's own weights")
    known = {"peft_type", "bias", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora", *_HARMLESS}
    for key in sorted(set(config) - known):
        if config[key] not in _OFF:
            raise refuse(key, "this setting is not supported")
    return config


def _shape(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], path: Path) -> AdapterShape:
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise AdapterError(
            f"{path}: r is {str(rank)[:40]}; expected a whole number from 1 to {MAX_RANK}", where=str(path)
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= 65_536:
        raise AdapterError(
            f"{path}: lora_alpha is {str(alpha)[:40]}; expected a number above 0, at most 65536", where=str(path)
        )
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) and _NAME.match(t) for t in targets):
        raise AdapterError(
            f"{path}: target_modules must be a list of plain layer names, not a pattern", where=str(path)
        )
    for flag in ("use_rslora", "use_dora"):
        if type(config.get(flag, False)) is not bool:
            raise AdapterError(f"{path}: {flag} must be true or false", where=str(path))
    if config.get("use_dora") and config.get("use_rslora"):
        raise AdapterError(f"{path}: use_dora and use_rslora together are not supported", where=str(path))
    variant: Literal["lora", "rslora", "dora"] = (
        "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    )
    return AdapterShape(rank, float(alpha), variant, tuple(sorted(targets)), _modules(tensors, rank, variant, targets))


def _modules(tensors: Mapping[str, TensorInfo], rank: int, variant: str, targets: list[str]) -> tuple[str, ...]:
    """Return the adapted layers; every tensor must belong to one, and every one must have all its tensors."""
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        match = _KEY.match(name)
        if match is None:
            raise AdapterError(f"tensor {name!r} belongs to no LoRA layer; it could overwrite weights of the base")
        parts.setdefault(match["module"], {})[match["part"]] = info
    expected = {"lora_A.weight", "lora_B.weight"} | ({"lora_magnitude_vector"} if variant == "dora" else set())
    for module, found in parts.items():
        if set(found) != expected:
            raise AdapterError(f"{module} has {', '.join(sorted(found))}; expected {', '.join(sorted(expected))}")
        if not any(module == target or module.endswith(f".{target}") for target in targets):
            raise AdapterError(f"{module} is in the weights, but not among target_modules")
        a, b = found["lora_A.weight"].shape, found["lora_B.weight"].shape
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise AdapterError(
                f"{module}: A is {a} and B is {b}; expected rank {rank} as A [rank, in] and B [out, rank]"
            )
        if variant == "dora" and found["lora_magnitude_vector"].shape != (b[0],):
            raise AdapterError(f"{module}: the magnitude is {found['lora_magnitude_vector'].shape}; expected ({b[0]},)")
    if not parts:
        raise AdapterError("the weights hold no tensor")
    return tuple(sorted(parts))


def _check_finite(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse NaN and infinity: in IEEE 754 both have an exponent of all ones."""
    import numpy as np

    masks = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}
    with path.open("rb") as stream:
        for name, info in tensors.items():
            kind, exponent = masks[info.dtype]
            stream.seek(info.start)
            bits = np.frombuffer(stream.read(info.end - info.start), dtype=kind)
            if bool(np.any((bits & kind(exponent)) == exponent)):
                raise AdapterError(
                    f"{path}: {name} holds NaN or infinity",
                    hint="this adapter is broken; train it again",
                    where=str(path),
                )


def _check_passport(files: AdapterFiles) -> None:
    manifest = files.manifest
    if manifest is None:
        return
    facts = [
        ("weights_digest", manifest.weights_digest, files.weights_digest),
        ("config_digest", manifest.config_digest, files.config_digest),
        ("lora.rank", manifest.lora.rank, files.shape.rank),
        ("lora.alpha", manifest.lora.alpha, files.shape.alpha),
        ("lora.variant", manifest.lora.variant, files.shape.variant),
        ("lora.targets", tuple(manifest.lora.targets), files.shape.targets),
    ]
    for field, said, found in facts:
        if said != found:
            raise AdapterMismatchError(
                f"{files.folder}: {field} in the passport is {str(said)[:80]}, but the files say {str(found)[:80]}",
                hint="the files were changed after they were exported; fetch or export them again",
                where=field,
            )
