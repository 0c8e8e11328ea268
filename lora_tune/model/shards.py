"""A model's folder tensor by tensor: safetensors read and written in pieces, so that memory never holds the model.

What stands beside the weights (config, tokenizer, chat template) is carried over here too.
"""

import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from lora_tune.errors import CannotCreateError, CannotWriteError, MissingInputError
from lora_tune.model.fingerprint import TensorInfo, read_config, read_header, weight_files

MAX_SHARD_BYTES = 5_000_000_000
"""Largest weight file, unless one tensor alone is larger."""

_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
           "I8": 1, "U8": 1, "BOOL": 1}  # fmt: skip
"""Bytes of one number, by safetensors' name of its type."""

_PIECE_NUMBERS = 16 * 1024 * 1024
"""Numbers of a tensor that are in memory at once while it is only copied."""

_BESIDE = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
           "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")  # fmt: skip
"""What stands beside weights and config: nothing else of a base's folder is carried over, least of all code."""

_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a model's folder, not read yet."""

    path: Path
    info: TensorInfo

    @property
    def is_float(self) -> bool:
        """True for a tensor of floating-point numbers; others (masks, counters) are copied as they are."""
        return self.info.dtype in _FLOATS

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return self.info.end - self.info.start


@dataclass(frozen=True)
class NewTensor:
    """One tensor to be written."""

    name: str
    dtype: str
    """safetensors' name of the type: F32, BF16, …"""

    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Any]]
    """Gives tensors whose bytes, one after the other, are this tensor's; called once, when its turn comes."""

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * _WIDTHS[self.dtype]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return name → tensor of a whole model, over all its shards, in the order in which they stand in the files.

    Raises:
        MissingInputError: a file is missing or damaged, or holds numbers of a type that is not known (exit 66).
    """
    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        for name, info in sorted(read_header(path).items(), key=lambda item: item[1].start):
            width = _WIDTHS.get(info.dtype)
            if width is None or info.end - info.start != prod(info.shape) * width:
                raise MissingInputError(
                    f"{path}: {name} is {info.dtype} of shape {list(info.shape)} in {info.end - info.start} bytes, "
                    f"which is not readable; known types: {', '.join(_WIDTHS)}",
                    hint="take a base in bf16, fp16 or fp32",
                    where=str(path),
                )
            found[name] = StoredTensor(path, info)
    return found


def check_room(out: Path, n_bytes: int) -> None:
    """Check, before anything is computed, that a model of this size can be written to the new folder `out`.

    Raises:
        CannotCreateError: it exists, or what it would stand in is a file (exit 73).
        CannotWriteError: the disk is too full (exit 74).
    """
    if out.exists():
        raise CannotCreateError(f"{out} exists already and is never overwritten", hint="give another folder")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise CannotCreateError(f"cannot create {out}: {folder} is a file, not a folder", hint="give another folder")
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise CannotWriteError(
            f"the model takes {n_bytes / 1e9:.2f} GB, but {folder} has {free / 1e9:.2f} GB free; nothing was written",
            hint="free some space, or give another folder",
        )


def main_dtype(stored: Mapping[str, StoredTensor]) -> str:
    """Return what most of a model's bytes are stored as, by safetensors' name of the type."""
    n_bytes: dict[str, int] = {}
    for tensor in stored.values():
        n_bytes[tensor.info.dtype] = n_bytes.get(tensor.info.dtype, 0) + tensor.n_bytes
    return max(n_bytes, key=n_bytes.__getitem__)


def read_tensor(stored: StoredTensor) -> Any:
    """Return a floating-point tensor as it is stored.

    Raises:
        MissingInputError: the file ends within it (exit 66).
    """
    return next(_pieces(stored, prod(stored.info.shape) or 1)).reshape(stored.info.shape)


def copy_pieces(stored: StoredTensor, dtype: str) -> Iterator[Any]:
    """Yield the tensor's numbers, flat, a piece at a time, as `dtype` (safetensors' name of the type)."""
    import torch

    for piece in _pieces(stored, _PIECE_NUMBERS):
        yield piece.to(getattr(torch, _FLOATS[dtype])) if stored.is_float else piece


def _pieces(stored: StoredTensor, n_numbers: int) -> Iterator[Any]:
    """Yield the tensor flat, as it is stored, at most `n_numbers` at a time; one that is no float as bytes."""
    import torch

    dtype = getattr(torch, _FLOATS.get(stored.info.dtype, "uint8"))
    width = dtype.itemsize
    left = stored.n_bytes // width
    # Read, not mapped: mapped pages would count as memory until the last one is let go.
    with stored.path.open("rb") as stream:
        stream.seek(stored.info.start)
        if not left:
            yield torch.empty(0, dtype=dtype)
        while left:
            piece = torch.empty(min(left, n_numbers), dtype=dtype)
            _fill(stream, piece, stored.path)
            left -= len(piece)
            yield piece


def _fill(stream: BufferedReader, piece: Any, path: Path) -> None:
    import torch

    wanted = memoryview(piece.view(torch.uint8).numpy())
    if stream.readinto(wanted) != len(wanted):
        raise MissingInputError(f"{path} ends within a tensor", hint="fetch the base again", where=str(path))


def plan_shards(tensors: Iterable[NewTensor], *, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[list[NewTensor]]:
    """Return the tensors in their order, cut into files of at most `max_shard_bytes` of weights, or of one tensor."""
    shards: list[list[NewTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.n_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.n_bytes
    return shards


def write_shards(
    folder: Path, shards: list[list[NewTensor]], progress: Callable[[float], None] = lambda _: None
) -> list[Path]:
    """Write the shards to `folder`, with an index when there are several, and return the weight files.

    Raises:
        OSError: the disk is full or failing.

    Source: the names, the index and the `format` entry are those of transformers 5.23, `save_pretrained`.
    """
    total = sum(tensor.n_bytes for shard in shards for tensor in shard)
    done, paths, weight_map = 0, [], {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        paths.append(folder / name)
        with paths[-1].open("xb") as stream:
            for tensor in _write_header(stream, shard):
                _write_tensor(stream, tensor)
                done += tensor.n_bytes
                weight_map[tensor.name] = name
                progress(done / max(1, total))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return paths


def _write_header(stream: BinaryIO, shard: list[NewTensor]) -> list[NewTensor]:
    """Write the header and return the tensors in the order in which they follow it."""
    # Wide types first, so that every tensor starts at a multiple of its own width.
    ordered = sorted(shard, key=lambda tensor: -_WIDTHS[tensor.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.n_bytes],
        }
        end += tensor.n_bytes
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    stream.write(struct.pack("<Q", len(content)) + content)
    return ordered


def _write_tensor(stream: BinaryIO, tensor: NewTensor) -> None:
    import torch

    written = 0
    for piece in tensor.pieces():
        written += stream.write(memoryview(piece.contiguous().view(-1).view(torch.uint8).numpy()))
    assert written == tensor.n_bytes, f"{tensor.name}: {written} bytes written, {tensor.n_bytes} planned"


def copy_beside(base: Path, folder: Path, *, dtype: str, template_text: str | None) -> None:
    """Carry config, generation settings and tokenizer over to `folder`.

    Args:
        base: the folder of the base.
        folder: the new model's folder.
        dtype: torch's name of the type that the weights are written in; the config says so.
        template_text: the chat template, when it is not the base's own.

    Raises:
        MissingInputError: the base's config cannot be read (exit 66).
        OSError: the disk is full or failing.
    """
    config = _in_dtype(read_config(base), dtype)
    _write_json(folder / "config.json", config if "torch_dtype" in config else config | {"dtype": dtype})
    for name in (*_BESIDE, *([_TEMPLATE] if template_text is None else [])):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    if template_text is not None:
        (folder / _TEMPLATE).write_text(template_text, encoding="utf-8", newline="")
        _drop_old_template(folder / "tokenizer_config.json")


def _in_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the config, and the configs inside it, with the type of the weights; the path they came from left out."""
    changed = dict(config)
    changed.pop("_name_or_path", None)
    for key in ("dtype", "torch_dtype"):
        if key in changed:
            changed[key] = dtype
    return {key: _in_dtype(value, dtype) if isinstance(value, dict) else value for key, value in changed.items()}


def _drop_old_template(path: Path) -> None:
    """Take the base's own template out of the tokenizer's settings: of two, another tool could take the wrong one."""
    if not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.pop("chat_template", None) is not None:
        _write_json(path, settings)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
