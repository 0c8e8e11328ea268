"""A data file's bytes, unpacked within limits: its suffix, its line lengths, how far it may unpack."""

import bz2
import gzip
import io
import lzma
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_tune.errors import DataError, MissingInputError
from lora_tune.recipe.schema import DATA_PACKINGS, DATA_SUFFIXES

SUFFIXES, PACKINGS = DATA_SUFFIXES, DATA_PACKINGS
MAX_ROW_BYTES = 8 * 1024 * 1024
MAX_RATIO = 100
RATIO_FREE_BYTES = 1024 * 1024
"""The ratio of unpacked to packed bytes is not looked at before so many bytes are unpacked."""

READ_BYTES = 256 * 1024


def data_suffix(path: Path) -> tuple[str, str]:
    """Return how a file is laid out and packed, such as `(".jsonl", ".gz")`; the second is empty when it is not packed.

    Raises:
        DataError: the suffix is none that we read (exit 65).
    """
    suffix, packing = split_suffix(path)
    if suffix not in SUFFIXES:
        found = "".join(path.suffixes[-2:]) if packing else path.suffix
        raise DataError(
            f"{path} ends in {found or 'nothing'}; known: {', '.join(SUFFIXES)}, also followed by {', '.join(PACKINGS)}",
            hint="rename the file by what it holds, or convert it to .jsonl",
            where=str(path),
        )
    if suffix == ".parquet" and packing:
        raise DataError(
            f"{path}: a Parquet file is compressed inside and cannot be read through {packing}",
            hint="unpack it first",
            where=str(path),
        )
    return suffix, packing


def split_suffix(path: Path) -> tuple[str, str]:
    """Return layout and packing as the name has them, known or not."""
    suffix = path.suffix.lower()
    return (path.with_suffix("").suffix.lower(), suffix) if suffix in PACKINGS else (suffix, "")


def open_unpacked(path: Path) -> io.BufferedReader:
    """Return the file's bytes as a buffered stream, unpacked, without a byte order mark.

    Reading from it raises DataError when the packed bytes are damaged or unpack to more than MAX_RATIO times their size.

    Raises:
        MissingInputError: the file is not there or cannot be read (exit 66).
        DataError: it is no regular file, or is written as UTF-16 (exit 65).
    """
    _, packing = data_suffix(path)
    refuse_special(path)
    try:
        raw = io.FileIO(path)
    except OSError as err:
        raise unreadable(path, err) from err
    stream: io.BufferedReader = io.BufferedReader(_Unpacked(path, packing, raw) if packing else raw, READ_BYTES)
    try:
        _skip_mark(stream, path)
    except (DataError, OSError) as err:
        stream.close()
        raise unreadable(path, err) if isinstance(err, OSError) else err from err
    return stream


def _skip_mark(stream: io.BufferedReader, path: Path) -> None:
    start = stream.peek(3)[:3]
    if start == b"\xef\xbb\xbf":
        stream.read(3)
    elif start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}:1: the file is UTF-16", hint="save it as UTF-8", where=f"{path}:1")


def bounded_lines(stream: io.BufferedReader) -> Iterator[tuple[int, bytes, int]]:
    """Give each line as its number, its bytes with the line end, and its size in bytes.

    Of a line of MAX_ROW_BYTES or more the bytes are empty, so that it never stands in memory as a whole.
    """
    number = 0
    while line := stream.readline(MAX_ROW_BYTES):
        number += 1
        n_bytes = len(line)
        if n_bytes < MAX_ROW_BYTES:
            yield number, line, n_bytes
            continue
        while not line.endswith(b"\n") and (line := stream.readline(READ_BYTES)):
            n_bytes += len(line)
        yield number, b"", n_bytes


class _Unpacked(io.RawIOBase):
    """The unpacked bytes of a packed file; refuses to unpack far more than there is."""

    def __init__(self, path: Path, packing: str, packed: io.FileIO) -> None:
        self._path, self._packed, self._packing = path, packed, packing
        self._stream = _unpacking(packing, packed)
        self._n_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            block = self._stream.read(len(buffer))
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as err:
            raise DataError(
                f"{self._path}: damaged or no {self._packing} file: {err}",
                hint="pack it again, or copy it again",
                where=str(self._path),
            ) from err
        self._n_bytes += len(block)
        taken = self._packed.tell()
        if self._n_bytes > RATIO_FREE_BYTES and self._n_bytes > MAX_RATIO * taken:
            raise DataError(
                f"{self._path}: {taken:,} packed bytes unpack to more than {self._n_bytes:,}; "
                f"at most {MAX_RATIO} times as many are read",
                hint="a file like this can fill the memory; if you trust it, unpack it yourself",
                where=str(self._path),
            )
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._packed.close()
        super().close()


def _unpacking(packing: str, packed: io.FileIO) -> Any:
    if packing == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, mode="r"), "zstd")
    if packing == ".gz":
        return gzip.GzipFile(fileobj=packed, mode="rb")
    return bz2.BZ2File(packed) if packing == ".bz2" else lzma.LZMAFile(packed)


def file_mode(path: Path) -> int:
    """Return the mode of what `path` leads to.

    Raises:
        MissingInputError: it is not there (exit 66).
    """
    try:
        return path.stat().st_mode
    except (OSError, ValueError) as err:  # ValueError: a NUL in the path
        raise unreadable(path, err) from err


def refuse_special(path: Path) -> None:
    """Refuse what is no regular file: reading a pipe could wait for ever.

    Raises:
        MissingInputError: it is not there (exit 66).
        DataError: it is a folder, pipe, socket or device (exit 65).
    """
    mode = file_mode(path)
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise DataError(f"{path} is {kind}, not a file", hint="correct data.path", where=str(path))


def unreadable(path: Path, err: OSError | ValueError) -> MissingInputError:
    """Return the error of a file that the operating system does not give."""
    reason = err.strerror if isinstance(err, OSError) else err
    return MissingInputError(f"cannot read {path}: {reason}", hint="correct data.path", where=str(path))
