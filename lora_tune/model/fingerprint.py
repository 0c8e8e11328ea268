"""What a base is, by content: digests over its config, its tensors' names and shapes, and its weights.

Read from safetensors headers and bytes; the model is never built, so this runs where torch is not imported.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import platformdirs

from lora_tune.errors import CannotCreateError, CannotWriteError, MissingInputError
from lora_tune.staging import write_file

_VOLATILE_CONFIG = {
    "_name_or_path",
    "transformers_version",
    "use_cache",
    "dtype",
    "torch_dtype",
    "_attn_implementation",
}
_SPECIAL_TOKENS_FILE = "tokenizer_config.json"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_MAX_HEADER_BYTES = 100 * 1024 * 1024


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a safetensors header describes it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    end: int
    """Byte after the last."""


@dataclass(frozen=True)
class Fingerprint:
    """A base's identity; equal exactly when config, tensors and weights are."""

    config: str
    """sha256 of the config without what does not change the model."""

    tensors: str
    """sha256 of tensor names, dtypes and shapes."""

    weights: str
    """sha256 over every tensor's bytes, in order of names; how they are sharded does not matter."""

    def as_dict(self) -> dict[str, str]:
        """The digests by name."""
        return asdict(self)


def canonical_digest(value: object) -> str:
    """Return the sha256 of a value as canonical JSON: sorted keys, no spaces."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def kept_file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes, hashed once: it is kept in the cache, see `_digest_place`."""
    place = _digest_place("file", path)
    kept = _recall(place)
    if set(kept) == {"sha256"}:
        return kept["sha256"]
    digest = file_digest(path)
    _remember(place, {"sha256": digest})
    return digest


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors that a safetensors file's header names.

    Raises:
        MissingInputError: the file is not a whole safetensors file.
    """
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = path.stat().st_size
            if length > min(_MAX_HEADER_BYTES, size):
                raise ValueError(f"its header claims {length} bytes")
            header = json.loads(stream.read(length))
            tensors = {
                name: TensorInfo(
                    str(info["dtype"]),
                    tuple(map(int, info["shape"])),
                    8 + length + int(info["data_offsets"][0]),
                    8 + length + int(info["data_offsets"][1]),
                )
                for name, info in header.items()
                if name != "__metadata__"
            }
            if any(info.end > size for info in tensors.values()):
                raise ValueError("it ends before its last tensor")
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as err:
        raise MissingInputError(
            f"{path} is damaged: {err}",
            hint="delete it and run the command again: it is fetched or made anew",
            where=str(path),
        ) from err
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """Return the base's safetensors files: those that transformers loads, and no copy or variant beside them.

    Raises:
        MissingInputError: the folder holds none, or not all of them.

    Source: transformers 5.23, modeling_utils: model.safetensors comes before model.safetensors.index.json.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _indexed_files(index)
    files = sorted(folder.glob("*.safetensors"))
    parts = [path.name for path in files if re.search(r"-\d+-of-\d+\.safetensors$", path.name)]
    if parts:
        raise MissingInputError(
            f"{folder} holds {parts[0]}, a part of a base, but no {index.name} that names all parts",
            hint="fetch the base again, or copy the index and every part",
            where=str(folder),
        )
    if not files:
        pickled = [path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"))]
        found = f"only {pickled[0]}, a pickle, which is not opened" if pickled else "none"
        raise MissingInputError(
            f"no safetensors weights in {folder}: found {found}",
            hint="take a base that ships safetensors, or convert it: model.save_pretrained(folder)",
        )
    return files


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it must name files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise MissingInputError(
            f"{index} is damaged: {err}", hint="fetch the base again, or copy the index once more", where=str(index)
        ) from err
    gone = [name for name in names if not (index.parent / name).is_file()]
    if gone:
        raise MissingInputError(
            f"{len(gone)} of the {len(names)} weight files that {index} names are not there; the first is {gone[0]}",
            hint="fetch the base again, or copy the missing files",
            where=str(index),
        )
    return [index.parent / name for name in names]


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return tensor name → shape for a whole base, over all its shards."""
    return {name: info.shape for path in weight_files(folder) for name, info in read_header(path).items()}


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json.

    Raises:
        MissingInputError: it is not there or not JSON.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise MissingInputError(
            f"{path} cannot be read: {err}", hint="a base's folder holds config.json and *.safetensors"
        ) from err
    if not isinstance(values, dict):
        raise MissingInputError(f"{path} holds no object", where=str(path))
    return values


def fingerprint(folder: Path) -> Fingerprint:
    """Return what the base in `folder` is.

    Every weight is hashed, once: digests are kept in the cache, see `_digest_place`.

    Raises:
        MissingInputError: config or weights are missing or damaged.
    """
    config = {key: value for key, value in read_config(folder).items() if key not in _VOLATILE_CONFIG}
    tensors: dict[str, tuple[str, list[int]]] = {}
    digests: dict[str, str] = {}
    for path in weight_files(folder):
        header = read_header(path)
        tensors |= {name: (info.dtype, list(info.shape)) for name, info in header.items()}
        digests |= _tensor_digests(path, header)
    return Fingerprint(canonical_digest(config), canonical_digest(tensors), canonical_digest(digests))


def remember_base(weights: str, name: str) -> None:
    """Keep on this machine where the base with this weights digest stands, if the cache can be written."""
    _remember(cache_root() / "known" / f"{weights}.json", {"name": name})


def recall_base(weights: str) -> str | None:
    """Return where a base with this weights digest was last seen on this machine, if it is still there."""
    name = _recall(cache_root() / "known" / f"{weights}.json").get("name")
    try:
        return name if name and Path(name).exists() else None
    except OSError:
        return None


def tokenizer_digest(files: Iterable[Path], *, chat_template: str) -> dict[str, str]:
    """Return the digests of a tokenizer: of its vocabulary, rules and special tokens, and of the chat template."""
    vocabulary = {path.name: _vocabulary(path) for path in files}
    return {
        "tokenizer": canonical_digest(vocabulary),
        "chat_template": hashlib.sha256(chat_template.encode()).hexdigest(),
    }


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files that decide which ids a text becomes, and which of them begin, end and pad it."""
    slow = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")
    names = ("tokenizer.json",) if (folder / "tokenizer.json").is_file() else slow
    return [folder / name for name in (*names, _SPECIAL_TOKENS_FILE) if (folder / name).is_file()]


def _vocabulary(path: Path) -> str:
    if path.suffix != ".json":
        return file_digest(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise MissingInputError(
            f"{path} cannot be read: {err}", hint="fetch the base again, or copy the file once more", where=str(path)
        ) from err
    if path.name == _SPECIAL_TOKENS_FILE:
        # The rest of this file says how and by whom the tokenizer was saved.
        return canonical_digest({name: _token_text(values, name) for name in _SPECIAL_TOKENS})
    if isinstance(values, Mapping):
        # Truncation and padding are left behind in this file by whoever saved it last; they are no part of the vocabulary.
        values = {key: value for key, value in values.items() if key not in ("truncation", "padding")}
    return canonical_digest(values)


def _token_text(values: object, name: str) -> str | None:
    token = values.get(name) if isinstance(values, Mapping) else None
    content = token.get("content") if isinstance(token, Mapping) else token
    return None if content is None else str(content)


def _tensor_digests(path: Path, header: Mapping[str, TensorInfo]) -> dict[str, str]:
    place = _digest_place("tensors", path)
    kept = _recall(place)
    if set(kept) == set(header):
        return kept
    digests = {}
    with path.open("rb") as stream:
        for name, info in sorted(header.items(), key=lambda item: item[1].start):
            stream.seek(info.start)
            digest, left = hashlib.sha256(), info.end - info.start
            while left > 0:
                chunk = stream.read(min(left, 1 << 24))
                if not chunk:
                    raise MissingInputError(f"{path} ends before {name}", where=str(path))
                digest.update(chunk)
                left -= len(chunk)
            digests[name] = digest.hexdigest()
    _remember(place, digests)
    return digests


def _digest_place(kind: str, path: Path) -> Path:
    """Return where a file's digests are kept: by path, inode, size, and both times of change.

    Size and mtime alone do not tell: `cp -p`, `rsync -t` and tar set the mtime. Nothing sets the ctime.
    """
    stat = path.stat()
    key = canonical_digest([kind, str(path.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    return cache_root() / "digests" / f"{key}.json"


def _recall(place: Path) -> dict[str, str]:
    """Return what the cache keeps there; nothing when it is not there, damaged or closed to us."""
    try:
        kept = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in kept.items()} if isinstance(kept, dict) else {}


def _remember(place: Path, values: Mapping[str, str]) -> None:
    """Keep the values in the cache; one that cannot be written costs time at the next call and nothing else."""
    with suppress(OSError, CannotCreateError, CannotWriteError):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_file(place, json.dumps(dict(values)))


def cache_root() -> Path:
    """Return where converted bases and digests are kept: LORA_TUNE_CACHE, or the platform's cache folder."""
    given = os.environ.get("LORA_TUNE_CACHE")
    return Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("lora_tune"))
