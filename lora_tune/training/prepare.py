"""What is ready before the base is loaded: its files, its tokenizer and the tokenized rows."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lora_tune.data.dataset import Splits, prepare_dataset
from lora_tune.data.rendering import LossMaskError
from lora_tune.data.tokens import end_of_turn_ids
from lora_tune.errors import RecipeError
from lora_tune.model.dense import BaseFiles, ready_base
from lora_tune.model.fingerprint import read_shapes
from lora_tune.model.load import load_tokenizer, read_template
from lora_tune.recipe.schema import AugmentSection, BaseSection, DataSection

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
    base: BaseSection, data: DataSection, targets: str | Sequence[str], notify: Notify,
    *, seed: int, augment: AugmentSection | None = None, held_out_for: str = "",
) -> Prepared:  # fmt: skip
    """Return the base's files, its tokenizer and the tokenized rows: a mistake in data or targets costs no model load.

    Args:
        base: the base to make ready.
        data: the rows.
        targets: layers that get an adapter.
        notify: told what is being done and what was found.
        seed: of the held-out split, the mixture and the copies.
        augment: changes to the training rows.
        held_out_for: the setting that needs held-out rows, if one does.

    Raises:
        LoraTuneError: the base is not there, rows cannot be trained on, or a target names no layer.
    """
    start = time.monotonic()
    files = ready_base(base, lambda label, share: notify({"event": "progress", "label": label, "share": share}))
    check_targets(targets, read_shapes(files.folder))
    template = data.chat_template
    tokenizer = load_tokenizer(files, template_text=None if template is None else read_template(template))
    label = "reading and tokenizing rows"
    notify({"event": "progress", "label": label, "share": 0.0})
    splits = prepare_dataset(
        data, tokenizer, seed=seed, augment=augment,
        on_rows=lambda rows: notify({"event": "progress", "label": f"{label}, {rows:,} so far" if rows else label, "share": 0.0}),
    )  # fmt: skip
    if held_out_for and splits.held_out is None:
        raise RecipeError(
            f"{held_out_for} needs held-out rows, and there are none",
            hint="set data.eval_split or data.eval_path, or put a valid file into the data folder",
            where=held_out_for,
        )
    notify(
        {
            "event": "data",
            **splits.checked.as_dict(),
            **splits.ledger(),
            "warnings": [*splits.checked.warnings, *token_warnings(splits, tokenizer)],
        }
    )
    return Prepared(files, tokenizer, splits, time.monotonic() - start)


def token_warnings(splits: Splits, tokenizer: Any) -> list[str]:
    """Return what works and may still surprise in the tokens."""
    counts = splits.train.counts
    warnings = []
    if counts.answers_without_end:
        warnings.append(
            f"{counts.answers_without_end} of {counts.answers} answers lost their end-of-turn to data.max_seq_tokens: "
            "they teach nothing about stopping"
        )
    with suppress(LossMaskError):  # a template that is never used for these rows may have no end of turn
        if tokenizer.pad_token_id in end_of_turn_ids(tokenizer):
            warnings.append(
                f"the padding token {tokenizer.pad_token} also ends a turn: it is trained here, where it ends an answer, "
                "and ignored as padding; tools that mask it by its id would teach the model never to stop"
            )
    return warnings


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
