"""A folder or file that appears whole or not at all: written beside its final place, synced, then renamed."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_tune.errors import CannotCreateError, CannotWriteError, LoraTuneError


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `final` when the block ends, and vanishes when the block fails.

    Raises:
        CannotCreateError: `final` exists already, or its parent cannot be written (exit 73).
        CannotWriteError: the disk is full or failing (exit 74).
    """
    try:
        if not final.parent.is_dir():
            final.parent.mkdir(parents=True, exist_ok=True)
            _sync_folder(final.parent.parent)
        stage = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    except OSError as err:
        raise translated(err, final) from err
    try:
        try:
            yield stage
            stage.chmod(0o755)
            _sync(stage)
            # rename() replaces an empty folder without a word, so look first: nothing is ever overwritten.
            if final.exists():
                raise FileExistsError(errno.EEXIST, "exists already")
            stage.rename(final)
            _sync_folder(final.parent)
        except OSError as err:
            raise translated(err, final) from err
        except Exception as err:
            if (found := _os_error(err)) is not None:
                raise translated(found, final) from err
            raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Write `text` to `path` in one step; a reader sees the old file or the new one, never a part.

    Raises:
        CannotCreateError: its folder is not there or cannot be written (exit 73).
        CannotWriteError: the disk is full or failing (exit 74).
    """
    stage = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with stage.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        stage.replace(path)
        _sync_folder(path.parent)
    except OSError as err:
        with suppress(OSError):
            stage.unlink(missing_ok=True)
        raise translated(err, path) from err


def _os_error(err: Exception) -> OSError | None:
    """Return the operating system's error that a library in Rust, safetensors say, tells only in its words."""
    match = re.search(r"\(os error (\d+)\)", str(err))
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else None


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def translated(err: OSError, final: Path) -> LoraTuneError:
    """Return what an operating system's error at `final` is in our words: not to be created (73), or not written (74)."""
    if err.errno in (errno.EEXIST, errno.ENOTEMPTY):
        if final.parent.exists() and not final.parent.is_dir():
            return CannotCreateError(f"{final.parent} is a file, not a folder", hint="give another place")
        return CannotCreateError(
            f"{final} exists already and is never overwritten", hint="give another name, or move it away"
        )
    if err.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT):
        return CannotCreateError(
            f"cannot create {final}: {err.strerror or err}",
            hint="check the folder's permissions, or give another place",
        )
    return CannotWriteError(
        f"writing {final} failed: {err.strerror or err}; nothing of it is left",
        hint="free some space, then run it again",
    )
