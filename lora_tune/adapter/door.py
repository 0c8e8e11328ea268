"""An untrusted folder → a checked, immutable AdapterFiles. Every verb that reads an adapter comes through here.

Nothing of the folder is executed or believed: its config is read by our own closed schema, its tensors' names, shapes
and values are checked, and the PEFT config is later built from what was checked here.
"""

import errno
import hashlib
import json
import os
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import ValidationError

from lora_tune.adapter.manifest import FILE_NAME, AdapterManifest, first_problem, has_control, read_manifest
from lora_tune.errors import AdapterError, AdapterMismatchError, MissingInputError
from lora_tune.model.fingerprint import TensorInfo
from lora_tune.recipe.schema import Recipe

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MAX_RANK = 1024
MAX_WEIGHTS_BYTES = 8 * 1024**3
_MAX_CONFIG_BYTES = 64 * 1024
_MAX_MANIFEST_BYTES = 8 * 1024 * 1024
_MAX_HEADER_BYTES = 4 * 1024 * 1024
_MAX_TENSORS = 20_000
_MAX_TARGETS = 256
_MAX_NAME_CHARS = 256
_CHUNK_BYTES = 16 * 1024 * 1024
_NAME = re.compile(r"[A-Za-z0-9_.]+")
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
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
    try:
        files = _read_folder(folder)
    except OSError as err:
        raise MissingInputError(f"{folder} cannot be read: {err.strerror}", where=str(folder)) from err
    _check_passport(files)
    return files


def read_weights(files: AdapterFiles) -> bytes:
    """Return the bytes of the weights file, which must be those that the door checked.

    Raises:
        AdapterMismatchError: the file was changed since (exit 77).
    """
    path = files.folder / WEIGHTS
    with _open_regular(path, cap=MAX_WEIGHTS_BYTES) as stream:
        content = stream.read(files.weights_bytes + 1)
    if hashlib.sha256(content).hexdigest() != files.weights_digest:
        raise AdapterMismatchError(
            f"{path} was changed after it was checked", hint="run the command again", where=str(path)
        )
    return content


def _read_folder(folder: Path) -> AdapterFiles:
    path = folder / WEIGHTS
    with _open_regular(path, cap=MAX_WEIGHTS_BYTES) as stream:
        size = os.fstat(stream.fileno()).st_size
        header, tensors = _read_header(stream, size, path)
        config_bytes = _read_capped(folder / CONFIG, cap=_MAX_CONFIG_BYTES)
        config = _read_config(config_bytes, folder / CONFIG)
        shape = _shape(config, tensors, folder / CONFIG)
        # Hashed and checked in one pass over one open file, so that both speak of the same bytes.
        weights_digest = _scan(stream, header, tensors, path)
    manifest = None
    passport = folder / FILE_NAME
    if passport.exists() or passport.is_symlink():
        text = _decoded(_read_capped(passport, cap=_MAX_MANIFEST_BYTES), passport)
        manifest = _with_checked_recipe(read_manifest(text, where=str(passport)), passport)
    return AdapterFiles(
        folder, shape, tensors, manifest, config["base_model_name_or_path"],
        weights_digest, hashlib.sha256(config_bytes).hexdigest(), size,
    )  # fmt: skip


def _open_regular(path: Path, *, cap: int) -> BinaryIO:
    """Return the file opened for reading; never through a link, and never a device or a pipe."""
    try:
        # Without O_NONBLOCK, opening a pipe waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as err:
        if path.name == WEIGHTS and list(path.parent.glob("*.bin")):
            raise AdapterError(
                f"{path.parent} holds a pickle (.bin) and no {WEIGHTS}; pickles can run code and are not opened",
                hint="ask its author for safetensors",
            ) from err
        raise MissingInputError(
            f"{path.parent} is not an adapter: it has no {path.name}",
            hint=f"an adapter's folder holds {CONFIG} and {WEIGHTS}",
        ) from err
    except OSError as err:
        if err.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise _not_regular(path) from err
    stream = os.fdopen(descriptor, "rb") if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    if stream is None:
        os.close(descriptor)
        raise _not_regular(path)
    size = os.fstat(descriptor).st_size
    if size > cap:
        stream.close()
        raise AdapterError(f"{path} has {size} bytes; at most {cap} are read", where=str(path))
    return stream


def _not_regular(path: Path) -> AdapterError:
    return AdapterError(f"{path} is not a regular file", hint="copy the real file into the folder", where=str(path))


def _read_capped(path: Path, *, cap: int) -> bytes:
    with _open_regular(path, cap=cap) as stream:
        return stream.read(cap)


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as err:
        raise AdapterError(f"{path} is not UTF-8 text (byte {err.start})", where=str(path)) from err


def _read_header(stream: BinaryIO, size: int, path: Path) -> tuple[bytes, dict[str, TensorInfo]]:
    """Return the header's bytes, its length in front, and the tensors that it names, in order."""
    try:
        prefix = stream.read(8)
        (length,) = struct.unpack("<Q", prefix)
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise AdapterError(f"{path}: its header claims {length} bytes", where=str(path))
        content = stream.read(length)
        header = json.loads(content.decode("utf-8"), object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        if len(header) > _MAX_TENSORS:
            raise AdapterError(f"{path}: {len(header)} tensors; at most {_MAX_TENSORS} are read", where=str(path))
        tensors = {name: _tensor(name, info, 8 + length) for name, info in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise AdapterError(
            f"{path} is not a safetensors file: {str(err)[:200]}", hint="fetch or export it again", where=str(path)
        ) from err
    end = 8 + length
    tensors = dict(sorted(tensors.items(), key=lambda item: item[1].start))
    for name, info in tensors.items():
        if info.start != end:
            raise AdapterError(f"{path}: {name} does not begin where the tensor before it ends", where=str(path))
        end = info.end
    if end != size:
        raise AdapterError(
            f"{path} has {size} bytes, but its header describes {end}", hint="fetch or export it again", where=str(path)
        )
    return prefix + content, tensors


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name is written twice in its header")
    return values


def _tensor(name: str, info: Mapping[str, Any], offset: int) -> TensorInfo:
    if len(name) > _MAX_NAME_CHARS or not _NAME.fullmatch(name):
        raise ValueError(f"tensor name {name[:80]!a} is no layer's")
    dtype, shape = info["dtype"], info["shape"]
    start, end = info["data_offsets"]
    # Before anything is multiplied: a LoRA tensor is a matrix or a vector.
    if not isinstance(shape, list) or len(shape) > 2:
        raise ValueError(f"{name}: its shape is no list of at most 2 sizes")
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48 for n in (*shape, start, end)):
        raise ValueError(f"{name}: shape and offsets must be plain sizes")
    if dtype not in _BYTES:
        raise ValueError(f"{name} is {_shown(dtype)}; known: {', '.join(_BYTES)}")
    count = 1
    for n in shape:
        count *= n
    if end - start != count * _BYTES[dtype] or count == 0:
        raise ValueError(f"{name}: {end - start} bytes do not hold shape {shape}")
    return TensorInfo(dtype, tuple(shape), offset + start, offset + end)


def _shown(value: object) -> str:
    """A value of the adapter as a message may hold it: short, and nothing that a terminal obeys."""
    return ascii(value)[:60]


def _read_config(content: bytes, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(_decoded(content, path), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as err:
        raise AdapterError(f"{path} is not JSON: {err}", where=str(path)) from err
    if not isinstance(config, dict):
        raise AdapterError(f"{path} holds no object", where=str(path))

    def refuse(key: str, expected: str) -> AdapterError:
        return AdapterError(
            f"{path}: {ascii(key[:60])[1:-1]} is {_shown(config.get(key))}; {expected}",
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
    base_name = config.get("base_model_name_or_path") or ""
    if not isinstance(base_name, str) or len(base_name) > 512 or has_control(base_name):
        raise refuse("base_model_name_or_path", "expected a name of at most 512 characters, without control characters")
    return config | {"base_model_name_or_path": base_name}


def _shape(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], path: Path) -> AdapterShape:
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise AdapterError(
            f"{path}: r is {_shown(rank)}; expected a whole number from 1 to {MAX_RANK}", where=str(path)
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= 65_536:
        raise AdapterError(
            f"{path}: lora_alpha is {_shown(alpha)}; expected a number above 0, at most 65536", where=str(path)
        )
    if not isinstance(targets, list) or not all(isinstance(t, str) and _NAME.fullmatch(t) for t in targets):
        raise AdapterError(
            f"{path}: target_modules must be a list of plain layer names, not a pattern", where=str(path)
        )
    if not 1 <= len(targets) <= _MAX_TARGETS:
        raise AdapterError(
            f"{path}: target_modules has {len(targets)} names; expected 1 to {_MAX_TARGETS}", where=str(path)
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
    wanted = set(targets)
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise AdapterError(f"tensor {name!r} belongs to no LoRA layer; it could overwrite weights of the base")
        parts.setdefault(match["module"], {})[match["part"]] = info
    expected = {"lora_A.weight", "lora_B.weight"} | ({"lora_magnitude_vector"} if variant == "dora" else set())
    for module, found in parts.items():
        if set(found) != expected:
            raise AdapterError(f"{module} has {', '.join(sorted(found))}; expected {', '.join(sorted(expected))}")
        words = module.split(".")
        if wanted.isdisjoint(".".join(words[start:]) for start in range(len(words))):
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


def _scan(stream: BinaryIO, header: bytes, tensors: Mapping[str, TensorInfo], path: Path) -> str:
    """Read the tensors, which follow each other, and return the file's sha256.

    NaN and infinity are refused: in IEEE 754 both have an exponent of all ones.
    """
    import numpy as np

    masks = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}
    digest = hashlib.sha256(header)
    for name, info in tensors.items():
        kind, exponent = masks[info.dtype]
        for start in range(info.start, info.end, _CHUNK_BYTES):
            chunk = stream.read(min(_CHUNK_BYTES, info.end - start))
            if len(chunk) != min(_CHUNK_BYTES, info.end - start):
                raise AdapterError(f"{path} ends within {name}", hint="fetch or export it again", where=str(path))
            digest.update(chunk)
            if bool(np.any((np.frombuffer(chunk, dtype=kind) & kind(exponent)) == exponent)):
                raise AdapterError(
                    f"{path}: {name} holds NaN or infinity",
                    hint="this adapter is broken; train it again",
                    where=str(path),
                )
    return digest.hexdigest()


def _with_checked_recipe(manifest: AdapterManifest, path: Path) -> AdapterManifest:
    """Return the passport with its recipe checked and every default filled in."""
    try:
        recipe = Recipe.model_validate_json(json.dumps(manifest.recipe))
    except ValidationError as err:
        raise AdapterError(
            f"{path}: recipe.{first_problem(err)}",
            hint="the passport was changed or is of another version",
            where=str(path),
        ) from err
    return manifest.model_copy(update={"recipe": recipe.model_dump(mode="json")})


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
