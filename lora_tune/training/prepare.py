"""What is ready before the base is loaded: its files, its tokenizer and the tokenized rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_tune.data.dataset import Splits, prepare_dataset
from lora_tune.model.dense import BaseFiles, ready_base
from lora_tune.model.load import load_tokenizer
from lora_tune.recipe.schema import Recipe

Notify = Callable[[Mapping[str, Any]], None]
"""Called with one event: `{"event": "step" | "held_out" | "progress" | …, …}`."""


@dataclass(frozen=True)
class Prepared:
    """All that is known before the base is loaded."""

    files: BaseFiles
    tokenizer: Any
    splits: Splits


def prepare(recipe: Recipe, notify: Notify) -> Prepared:
    """Return the base's files, its tokenizer and the tokenized rows: a data mistake costs no model load."""
    files = ready_base(recipe.base, lambda label, share: notify({"event": "progress", "label": label, "share": share}))
    tokenizer = load_tokenizer(files, recipe.data.chat_template)
    splits = prepare_dataset(recipe.data, tokenizer, seed=recipe.train.seed)
    notify({"event": "data", "format": splits.checked.row_format, "detected": splits.checked.detected, "counts": splits.counts(),
            "warnings": list(splits.checked.warnings)})  # fmt: skip
    return Prepared(files, tokenizer, splits)
