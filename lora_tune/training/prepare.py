"""What is ready before the base is loaded: its files, its tokenizer and the tokenized rows."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_tune.data.dataset import Splits, prepare_dataset
from lora_tune.errors import RecipeError
from lora_tune.model.dense import BaseFiles, ready_base
from lora_tune.model.fingerprint import read_shapes
from lora_tune.model.load import load_tokenizer, read_template
from lora_tune.recipe.schema import BaseSection, DataSection

Notify = Callable[[Mapping[str, Any]], None]
"""Called with one event: `{"event": "step" | "held_out" | "progress" | …, …}`."""


@dataclass(frozen=True)
class Prepared:
    """All that is known before the base is loaded."""

    files: BaseFiles
    tokenizer: Any
    splits: Splits
    seconds: float
    """What it took."""


def prepare(
    base: BaseSection, data: DataSection, targets: str | Sequence[str], notify: Notify, *, seed: int
) -> Prepared:
    """Return the base's files, its tokenizer and the tokenized rows: a mistake in data or targets costs no model load.

    Raises:
        LoraTuneError: the base is not there, rows cannot be trained on, or a target names no layer.
    """
    start = time.monotonic()
    files = ready_base(base, lambda label, share: notify({"event": "progress", "label": label, "share": share}))
    check_targets(targets, read_shapes(files.folder))
    template = data.chat_template
    tokenizer = load_tokenizer(files, template_text=None if template is None else read_template(template))
    splits = prepare_dataset(data, tokenizer, seed=seed)
    notify(
        {
            "event": "data",
            "format": splits.checked.row_format,
            "detected": splits.checked.detected,
            "counts": splits.counts(),
            "warnings": list(splits.checked.warnings),
        }
    )
    return Prepared(files, tokenizer, splits, time.monotonic() - start)


def check_targets(targets: str | Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that every named target is a matrix of the base, by its safetensors headers.

    Raises:
        RecipeError: a name is none; the base's own names are listed (exit 65).
    """
    matrices = [
        name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2
    ]
    named = [] if isinstance(targets, str) else targets
    unknown = [t for t in named if not any(name == t or name.endswith(f".{t}") for name in matrices)]
    if unknown:
        leaves = sorted({name.rsplit(".", 1)[-1] for name in matrices})
        raise RecipeError(
            f"lora.targets names {', '.join(unknown)}, which this base has not; its matrices are {', '.join(leaves)}",
            hint="take some of those, or all-linear",
            where="lora.targets",
        )
