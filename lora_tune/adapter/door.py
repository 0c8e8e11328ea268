"""An untrusted folder → a checked, immutable AdapterFiles. Every verb that reads an adapter comes through here.

Nothing of the folder is executed or believed: its config is read by our own closed schema, its tensors' names, shapes
and values are checked, and the PEFT config is later built from what was checked here. Only the config, the weights and
the passport are opened; tokenizers, templates and whatever else lies beside them never are.
"""

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import ValidationError

from lora_tune.adapter.manifest import FILE_NAME, AdapterManifest, first_problem, has_control, read_manifest
from lora_tune.adapter.safetensors_header import NAME, read_checked_header, refuse_bomb, scan_tensors, strict_json
from lora_tune.errors import AdapterError, AdapterMismatchError, MissingInputError
from lora_tune.model.fingerprint import TensorInfo, canonical_digest
from lora_tune.recipe.schema import NAME_PATTERN, Recipe

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MAX_RANK = 1024
MAX_ALPHA = 65_536
MAX_WEIGHTS_BYTES = 8 * 1024**3
_MAX_CONFIG_BYTES = 64 * 1024
_MAX_MANIFEST_BYTES = 1024 * 1024
_MAX_TARGETS = 256
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
_RESERVED = re.compile(r"lora_.*|base_layer|modules_to_save|original_module")
"""Words that PEFT puts into names itself; in a layer's own name they could lead to another adapter's weights."""
_OFF: tuple[object, ...] = (None, False, {}, [], "")
_READ = {"peft_type", "bias", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora"}
_HARMLESS = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "task_type", "megatron_core",
             "qalora_group_size", "init_lora_weights", "lora_dropout", "fan_in_fan_out", "auto_mapping", "parent_library",
             "eva_config", "runtime_config"}  # fmt: skip
"""They say how it was trained or where, or are read from the base instead: with any value, the numbers stay the same."""
_INITIALIZED = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Ways to begin that leave the base's weights as they are; PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change them."""
_REASONS = {
    "modules_to_save": "it brings whole layers, which would take the place of the base's",
    "rank_pattern": "its layers differ in rank, and one rank for all is loaded",
    "alpha_pattern": "its layers differ in alpha, and one alpha for all is loaded",
    "exclude_modules": "it leaves out some of the layers that target_modules names",
    "layers_to_transform": "it leaves out some of the layers that target_modules names",
    "layers_pattern": "it leaves out some of the layers that target_modules names",
    "layer_replication": "it repeats layers of the base",
    "target_parameters": "it changes parameters that are no linear layers",
    "trainable_token_indices": "it changes rows of the base's embedding",
    "lora_bias": "it adds biases",
    "alora_invocation_tokens": "it acts only after certain tokens",
    "ensure_weight_tying": "it ties the base's layers in another way",
}
_HINT = (
    "only plain LoRA, rsLoRA and DoRA adapters are loaded; merge this one where it was made "
    "(PEFT's merge_and_unload) and use the result as the base"
)


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

    @property
    def scaling(self) -> float:
        """The factor in front of B·A, the same in every layer."""
        return self.alpha / math.sqrt(self.rank) if self.variant == "rslora" else self.alpha / self.rank


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

    @property
    def label(self) -> str:
        """What a message or a note calls it: `name@number` of a folder as a registry has them, else the folder's name."""
        folder = self.folder.resolve()
        is_version = folder.name.isdecimal() and re.fullmatch(NAME_PATTERN, folder.parent.name)
        name = f"{folder.parent.name}@{folder.name}" if is_version else folder.name
        return "unnamed" if not name or has_control(name) else name


def open_adapter(folder: Path) -> AdapterFiles:
    """Return the checked adapter in `folder`.

    Raises:
        MissingInputError: there is no adapter (exit 66).
        AdapterError: the folder is not what an adapter's folder must be (exit 77).
        AdapterMismatchError: its files are not those that its passport speaks of (exit 77).
    """
    try:
        if not folder.is_dir():
            raise MissingInputError(
                f"no adapter folder at {folder}", hint="`lora-tune adapters list` shows the registry", where=str(folder)
            )
        files = _read_folder(folder)
    except OSError as err:
        raise MissingInputError(f"{folder} cannot be read: {err.strerror or err}", where=str(folder)) from err
    _check_passport(files)
    return files


def read_weights(files: AdapterFiles) -> bytes:
    """Return the bytes of the weights file, which must be those that the door checked.

    Raises:
        AdapterMismatchError: the file was changed since (exit 77).
        MissingInputError: it is gone, or cannot be read any more (exit 66).
    """
    path = files.folder / WEIGHTS
    try:
        with _open_regular(path, cap=MAX_WEIGHTS_BYTES) as stream:
            content = stream.read(files.weights_bytes + 1)
    except OSError as err:
        raise MissingInputError(f"{path} cannot be read: {err.strerror or err}", where=str(path)) from err
    if hashlib.sha256(content).hexdigest() != files.weights_digest:
        raise AdapterMismatchError(
            f"{path} was changed after it was checked", hint="run the command again", where=str(path)
        )
    return content


def _read_folder(folder: Path) -> AdapterFiles:
    path = folder / WEIGHTS
    with _open_regular(path, cap=MAX_WEIGHTS_BYTES) as stream:
        size = os.fstat(stream.fileno()).st_size
        header, tensors = read_checked_header(stream, size, path)
        config_bytes = _read_capped(folder / CONFIG, cap=_MAX_CONFIG_BYTES)
        config = _read_config(config_bytes, folder / CONFIG)
        shape = _shape(config, tensors, folder / CONFIG)
        # Hashed and checked in one pass over one open file, so that both speak of the same bytes.
        weights_digest = scan_tensors(stream, header, tensors, path)
    return AdapterFiles(
        folder, shape, tensors, _read_passport(folder / FILE_NAME), config["base_model_name_or_path"],
        weights_digest, hashlib.sha256(config_bytes).hexdigest(), size,
    )  # fmt: skip


def _open_regular(path: Path, *, cap: int) -> BinaryIO:
    """Return the file opened for reading; never through a link, and never a device or a pipe."""
    try:
        # Without O_NONBLOCK, opening a pipe waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as err:
        pickled = sorted({other.suffix for other in path.parent.glob("*")} & set(_PICKLES))
        if path.name == WEIGHTS and pickled:
            raise AdapterError(
                f"{path.parent} holds a pickle ({pickled[0]}) and no {WEIGHTS}; pickles can run code and are not opened",
                hint="ask its author for safetensors; PEFT's save_pretrained writes them where the adapter was made",
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
        return stream.read(min(cap, os.fstat(stream.fileno()).st_size))


def _shown(value: object) -> str:
    """A value of the adapter as a message may hold it: short, and nothing that a terminal obeys."""
    return ascii(value)[:60]


def _read_config(content: bytes, path: Path) -> dict[str, Any]:
    try:
        config = strict_json(content)
    except ValueError as err:
        raise AdapterError(f"{path} is no config of an adapter: {err}", where=str(path)) from err
    if not isinstance(config, dict):
        raise AdapterError(f"{path} holds no object", where=str(path))

    def refuse(key: str, reason: str) -> AdapterError:
        shown = f"{ascii(key[:60])[1:-1]} is {_shown(config.get(key))}"
        return AdapterError(f"{path}: {shown}; {reason}", hint=_HINT, where=str(path))

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", "expected 'LORA'")
    if config.get("bias", "none") != "none":
        raise refuse("bias", "it changes the base's biases; expected 'none'")
    if config.get("init_lora_weights", True) not in _INITIALIZED:
        raise refuse("init_lora_weights", "such an adapter changes the base's own weights")
    for key in sorted(set(config) - _READ - _HARMLESS):
        if config[key] not in _OFF:
            raise refuse(key, _REASONS.get(key, "this setting is not supported: it may change what is computed"))
    base_name = config.get("base_model_name_or_path") or ""
    if not isinstance(base_name, str) or len(base_name) > 512 or has_control(base_name):
        raise refuse("base_model_name_or_path", "expected a name of at most 512 characters, without control characters")
    return config | {"base_model_name_or_path": base_name}


def _shape(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], path: Path) -> AdapterShape:
    def refuse(problem: str, *, hint: str = "") -> AdapterError:
        return AdapterError(f"{path}: {problem}", hint=hint, where=str(path))

    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise refuse(f"r is {_shown(rank)}; expected a whole number from 1 to {MAX_RANK}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= MAX_ALPHA:
        raise refuse(f"lora_alpha is {_shown(alpha)}; expected a number above 0, at most {MAX_ALPHA}")
    if not isinstance(targets, list) or not all(isinstance(t, str) and NAME.fullmatch(t) for t in targets):
        raise refuse("target_modules must be a list of plain layer names, not a pattern", hint=_names_hint(tensors))
    if not 1 <= len(targets) <= _MAX_TARGETS:
        raise refuse(f"target_modules has {len(targets)} names; expected 1 to {_MAX_TARGETS}")
    for flag in ("use_rslora", "use_dora"):
        if type(config.get(flag, False)) is not bool:
            raise refuse(f"{flag} must be true or false")
    if config.get("use_dora") and config.get("use_rslora"):
        raise refuse("use_dora and use_rslora together are not supported", hint=_HINT)
    variant: Literal["lora", "rslora", "dora"] = (
        "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    )
    modules = _modules(tensors, rank, variant, targets)
    return AdapterShape(rank, float(alpha), variant, tuple(sorted(set(targets))), modules)


def _names_hint(tensors: Mapping[str, TensorInfo]) -> str:
    """Return how the targets would be written, from the layers that the tensors name."""
    found = [match["module"].rpartition(".")[2] for match in map(_KEY.fullmatch, tensors) if match]
    return f"write the names themselves: {json.dumps(sorted(set(found))[:16])}" if found else _HINT


def _modules(tensors: Mapping[str, TensorInfo], rank: int, variant: str, targets: list[str]) -> tuple[str, ...]:
    """Return the adapted layers; every tensor must belong to one, and every one must have all its tensors."""
    wanted = set(targets)
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None or any(map(_RESERVED.fullmatch, match["module"].split("."))):
            raise AdapterError(
                f"tensor {name!r} belongs to no LoRA layer; it could overwrite weights of the base",
                hint=f"names are {_PREFIX}LAYER.lora_A.weight and .lora_B.weight; export it again with PEFT's save_pretrained",
            )
        parts.setdefault(match["module"], {})[match["part"]] = info
    if not parts:
        raise AdapterError("the weights hold no tensor", hint="fetch or export them again")
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
                f"{module}: A is {a} and B is {b}; expected rank {rank} as A [rank, in] and B [out, rank]", hint=_HINT
            )
        if variant == "dora" and found["lora_magnitude_vector"].shape != (b[0],):
            raise AdapterError(f"{module}: the magnitude is {found['lora_magnitude_vector'].shape}; expected ({b[0]},)")
    return tuple(sorted(parts))


def _read_passport(path: Path) -> AdapterManifest | None:
    """Return the passport with its recipe checked and every default filled in; None where there is none."""
    if not path.exists() and not path.is_symlink():
        return None
    content = _read_capped(path, cap=_MAX_MANIFEST_BYTES)
    try:
        refuse_bomb(content)
        text = content.decode("utf-8")
    except ValueError as err:
        raise AdapterError(f"{path} is no passport: {err}", where=str(path)) from err
    manifest = read_manifest(text, where=str(path))
    try:
        recipe = Recipe.model_validate_json(json.dumps(manifest.recipe))
    except ValidationError as err:
        raise AdapterError(
            f"{path}: recipe.{first_problem(err)}",
            hint="the passport was changed or is of another version",
            where=str(path),
        ) from err
    # The name becomes a folder's name, a file's, a line in other programs' files.
    if not re.fullmatch(NAME_PATTERN, manifest.name):
        raise AdapterError(
            f"{path}: name is {_shown(manifest.name)}; expected lower-case letters, digits and hyphens, at most 63",
            hint="do not use this adapter, or ask its author for another name",
            where=str(path),
        )
    found = canonical_digest(manifest.recipe)
    if found != manifest.recipe_digest:
        raise AdapterMismatchError(
            f"{path}: recipe_digest is {manifest.recipe_digest[:12]}…, but its recipe has {found[:12]}…",
            hint="the passport was changed after the adapter was exported; fetch or export it again",
            where="recipe_digest",
        )
    # A recipe of an older version lacks the settings that came since; whoever writes it anew writes what is here.
    resolved = recipe.model_dump(mode="json")
    return manifest.model_copy(update={"recipe": resolved, "recipe_digest": canonical_digest(resolved)})


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
        ("lora.n_parameters", manifest.lora.n_parameters, sum(math.prod(t.shape) for t in files.tensors.values())),
    ]
    if not math.isclose(manifest.lora.scaling, files.shape.scaling, rel_tol=1e-9):
        facts.append(("lora.scaling", manifest.lora.scaling, files.shape.scaling))
    for field, said, found in facts:
        if said != found:
            raise AdapterMismatchError(
                f"{files.folder}: {field} in the passport is {str(said)[:80]}, but the files say {str(found)[:80]}",
                hint="the files were changed after they were exported; fetch or export them again",
                where=field,
            )
