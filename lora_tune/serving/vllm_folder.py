"""An adapter's folder as vLLM reads it: the bytes that the door checked, and a config written here."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lora_tune.adapter.door import CONFIG, WEIGHTS, AdapterFiles, read_weights
from lora_tune.staging import translated


@dataclass(frozen=True)
class HeldAdapter:
    """An adapter that every replica has."""

    name: str
    """What vLLM calls it; it never had the name before and never gets it again."""
    folder: Path
    """vLLM reads it again when it has swapped the adapter out, so it stays as long as the adapter."""
    weights_bytes: int


def write_adapter(folder: Path, files: AdapterFiles) -> None:
    """Write what the door checked, and nothing else, as PEFT's format has it.

    Raises:
        AdapterMismatchError: the weights were changed since they were checked.
        MissingInputError: they are gone.
        CannotCreateError, CannotWriteError: the folder cannot be written.
    """
    shape = files.shape
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": shape.rank,
        "lora_alpha": int(shape.alpha) if shape.alpha.is_integer() else shape.alpha,
        "target_modules": list(shape.targets), "use_rslora": shape.variant == "rslora", "bias": "none",
        "lora_dropout": 0.0, "inference_mode": True, "base_model_name_or_path": "",
    }  # fmt: skip
    content = read_weights(files)
    with os_translated(folder):
        folder.mkdir(parents=True)
        (folder / WEIGHTS).write_bytes(content)
        (folder / CONFIG).write_text(json.dumps(config, sort_keys=True, indent=1), encoding="utf-8")


@contextmanager
def os_translated(place: Path) -> Iterator[None]:
    """Raise an operating system's error in the block in our words."""
    try:
        yield
    except OSError as err:
        raise translated(err, place) from err
