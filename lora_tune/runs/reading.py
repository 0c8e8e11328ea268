"""A run's files → text and checked values, within limits. Nothing is written, and nothing but a regular file is opened."""

import json
import os
import stat
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lora_tune.adapter.manifest import first_problem

MAX_JSON_BYTES = 64 << 20
MAX_METRICS_BYTES = 256 << 20
_Model = TypeVar("_Model", bound=BaseModel)


class UnreadableError(Exception):
    """A file is there and cannot be used; the text says which and why, in one line."""


def read_text(path: Path, *, cap_bytes: int = MAX_JSON_BYTES) -> str | None:
    """Return a file's text, or None when it is not there.

    Raises:
        UnreadableError: it is no regular file, too large, not UTF-8, or cannot be read.
    """
    found = read_end(path, cap_bytes=cap_bytes)
    if found is None:
        return None
    content, is_whole = found
    if not is_whole:
        raise UnreadableError(f"{path.name} is larger than {cap_bytes >> 20} MiB")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as err:
        raise UnreadableError(f"{path.name} is not UTF-8 text (byte {err.start})") from err


def read_end(path: Path, *, cap_bytes: int) -> tuple[bytes, bool] | None:
    """Return the last bytes of a file and whether they are all of it, or None when it is not there.

    Raises:
        UnreadableError: it is no regular file, or cannot be read.
    """
    try:
        # Not blocking, since a FIFO would wait for a writer; a link could lead to anything.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as err:
        reason = "a link, and a run's own files are none" if path.is_symlink() else err.strerror or str(err)
        raise UnreadableError(f"{path.name} cannot be read: {reason}") from err
    try:
        with os.fdopen(descriptor, "rb") as stream:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise UnreadableError(f"{path.name} is no file")
            first = max(0, facts.st_size - cap_bytes)
            stream.seek(first)
            return stream.read(cap_bytes), first == 0
    except OSError as err:
        raise UnreadableError(f"{path.name} cannot be read: {err.strerror or err}") from err


def read_values(path: Path, model: type[_Model]) -> _Model | None:
    """Return what a JSON file says, checked, or None when it is not there.

    Raises:
        UnreadableError: it is not what such a file must be; the first problem is named.
    """
    text = read_text(path)
    if text is None:
        return None
    try:
        return model.model_validate(json_values(text))
    except ValidationError as err:
        raise UnreadableError(f"{path.name}: {first_problem(err)}") from err
    except ValueError as err:
        raise UnreadableError(f"{path.name} is not JSON: {err}"[:200]) from err


def json_values(text: str) -> Any:
    """Return the JSON in a text.

    Raises:
        ValueError: it is none, or nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError as err:
        raise ValueError("nested too deep") from err
