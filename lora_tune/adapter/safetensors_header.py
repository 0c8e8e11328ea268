"""An untrusted safetensors file → its tensors' names, types and places, and one pass over all of its bytes.

Nothing is believed: the header is measured before it is parsed, read by closed rules, and its tensors must fill the file
exactly, without holes, overlaps or anything behind them. Closed rules for other untrusted JSON stand here too.
"""

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lora_tune.errors import AdapterError
from lora_tune.model.fingerprint import TensorInfo

NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
"""A layer's path: plain words between single dots."""

MAX_HEADER_BYTES = 1024 * 1024
MAX_TENSORS = 20_000
MAX_LEVELS = 32
"""Deepest nesting of untrusted JSON."""

MAX_MARKS = 150_000
"""Most brackets, commas and colons of untrusted JSON together: parsed, one of them costs up to sixty times its byte."""

MAX_WEIGHT = 2.0**17
"""Every weight is below it: larger ones are damage, and would become infinite in a product or in 16 bits."""

_MAX_NAME_CHARS = 256
_CHUNK_BYTES = 1024 * 1024
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_FIELDS = {"dtype", "shape", "data_offsets"}


def strict_json(content: bytes) -> Any:
    """Return untrusted JSON: UTF-8, every name once, plain numbers, at most MAX_LEVELS deep and MAX_MARKS wide.

    Raises:
        ValueError: it is not that; the message says what, and shows nothing of it.
    """
    refuse_bomb(content)
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError as err:
        raise ValueError(f"it is nested deeper than {MAX_LEVELS} levels") from err
    level = [value]
    for _ in range(MAX_LEVELS):
        level = [inner for outer in level for inner in _containers(outer)]
        if not level:
            return value
    raise ValueError(f"it is nested deeper than {MAX_LEVELS} levels")


def refuse_bomb(content: bytes) -> None:
    """Refuse JSON that is small as text and huge as values, before it is parsed.

    Raises:
        ValueError: with the count.
    """
    marks = sum(map(content.count, (b"[", b"{", b",", b":")))
    if marks > MAX_MARKS:
        raise ValueError(f"it holds {marks} brackets, commas and colons; at most {MAX_MARKS} are read")


def read_checked_header(stream: BinaryIO, size: int, path: Path) -> tuple[bytes, dict[str, TensorInfo]]:
    """Return the header's bytes, its length in front, and the tensors that it names, in the order of their bytes.

    Args:
        stream: the open file, at its beginning; afterwards at its first tensor.
        size: the file's bytes.
        path: named in messages.

    Raises:
        AdapterError: it is not a safetensors file of matrices and vectors (exit 77).
    """
    try:
        prefix = stream.read(8)
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"its header claims {length} bytes; at most {MAX_HEADER_BYTES} are read")
        content = stream.read(length)
        if not content.startswith(b"{"):
            raise ValueError("its header is no JSON object")
        header = strict_json(content)
        _check_metadata(header.pop("__metadata__", {}))
        if len(header) > MAX_TENSORS:
            raise ValueError(f"it names {len(header)} tensors; at most {MAX_TENSORS} are read")
        tensors = {name: _tensor(name, info, 8 + length) for name, info in header.items()}
        return prefix + content, _fill_the_file(tensors, 8 + length, size)
    except (struct.error, ValueError, TypeError) as err:
        raise AdapterError(
            f"{path} is not a safetensors file of an adapter: {str(err)[:300]}",
            hint="fetch or export it again",
            where=str(path),
        ) from err


def scan_tensors(stream: BinaryIO, header: bytes, tensors: Mapping[str, TensorInfo], path: Path) -> str:
    """Read the tensors, which follow each other, and return the whole file's sha256.

    Args:
        stream: the open file, at its first tensor.
        header: what stands before it.
        tensors: in the order of their bytes.
        path: named in messages.

    Raises:
        AdapterError: a tensor holds NaN, infinity or a number of MAX_WEIGHT or more (exit 77).

    Source: IEEE 754 orders numbers of one sign by their bits, and NaN and infinity have an exponent of all ones.
    """
    import numpy as np

    # Bits without the sign, and the first of them that is refused: MAX_WEIGHT, or infinity in fp16, which ends below it.
    limits = {"F32": (np.uint32, 0x7FFFFFFF, 0x48000000), "F16": (np.uint16, 0x7FFF, 0x7C00), "BF16": (np.uint16, 0x7FFF, 0x4800)}  # fmt: skip
    digest = hashlib.sha256(header)
    for name, info in tensors.items():
        kind, magnitude, limit = limits[info.dtype]
        for start in range(info.start, info.end, _CHUNK_BYTES):
            wanted = min(_CHUNK_BYTES, info.end - start)
            chunk = stream.read(wanted)
            if len(chunk) != wanted:
                raise AdapterError(f"{path} ends within {name}", hint="fetch or export it again", where=str(path))
            digest.update(chunk)
            if bool(np.any((np.frombuffer(chunk, dtype=kind) & kind(magnitude)) >= limit)):
                raise AdapterError(
                    f"{path}: {name} holds NaN, infinity or a number of {MAX_WEIGHT:.0f} or more",
                    hint="this adapter is broken; train it again",
                    where=str(path),
                )
    return digest.hexdigest()


def _containers(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [each for each in inner if isinstance(each, dict | list)]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name is written twice in it")
    return values


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata is no map of texts")
    # Half a character, written as an escape, is let through by Python's reader and by no other.
    "".join((*metadata, *metadata.values())).encode("utf-8")


def _tensor(name: str, info: Any, offset: int) -> TensorInfo:
    if len(name) > _MAX_NAME_CHARS or not NAME.fullmatch(name):
        raise ValueError(f"tensor name {name[:80]!a} is no layer's")
    if not isinstance(info, dict) or set(info) != _FIELDS:
        raise ValueError(f"{name}: expected exactly {', '.join(sorted(_FIELDS))}")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    # Before anything is multiplied: a LoRA tensor is a matrix or a vector.
    if not isinstance(shape, list) or len(shape) > 2 or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"{name}: expected a shape of at most 2 sizes, and 2 offsets")
    if not all(type(n) is int and 0 <= n < 2**48 for n in (*shape, *offsets)):
        raise ValueError(f"{name}: shape and offsets must be plain sizes")
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise ValueError(f"{name} is {ascii(dtype)[:60]}; known: {', '.join(_BYTES)}")
    count = 1
    for n in shape:
        count *= n
    start, end = offsets
    if end - start != count * _BYTES[dtype] or count == 0:
        raise ValueError(f"{name}: {end - start} bytes do not hold shape {shape}")
    return TensorInfo(dtype, tuple(shape), offset + start, offset + end)


def _fill_the_file(tensors: Mapping[str, TensorInfo], start: int, size: int) -> dict[str, TensorInfo]:
    """Return the tensors in the order of their bytes, which must follow each other from `start` to the file's end."""
    ordered = dict(sorted(tensors.items(), key=lambda item: item[1].start))
    for name, info in ordered.items():
        if info.start != start:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        start = info.end
    if start != size:
        raise ValueError(f"it has {size} bytes, but its header describes {start}")
    return ordered
