"""What a run is, field by field, and whether a run that goes on is still the same one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_tune.errors import RefusedError, UsageError

PLACES = frozenset({
    "base.name", "base.revision", "data.path", "data.revision", "data.eval_path", "data.mix", "data.chat_template",
})  # fmt: skip
"""Where things are: what they are is compared by digest."""

AFTERWARDS = frozenset({
    "train.save_every_steps", "train.keep_checkpoints", "train.on_oom", "eval.generate", "eval.generate_rows",
})  # fmt: skip
"""Settings that change no weight."""

DRIFTABLE = frozenset({
    "train.epochs", "train.max_steps", "train.learning_rate", "train.schedule", "train.warmup_ratio", "train.weight_decay",
    "train.max_grad_norm", "train.gradient_checkpointing", "train.micro_batch_sequences", "train.gradient_accumulation_steps",
    "eval.every_steps", "eval.early_stopping_patience", "lora.dropout", "augment.neftune_alpha", "output.name",
})  # fmt: skip
"""Settings that a run may go on with changed, when the user says so; libraries and the device too."""

_STEP = ("train.micro_batch_sequences", "train.gradient_accumulation_steps")


@dataclass(frozen=True)
class Change:
    """One field that is not what it was."""

    field: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.field} was {_short(self.then)}, is {_short(self.now)}"


def run_identity(
    recipe: Mapping[str, Mapping[str, Any]],
    *,
    digests: Mapping[str, str],
    versions: Mapping[str, str],
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """Return everything that decides a run's weights, as one flat table of plain values.

    Args:
        recipe: resolved and portable, by section.
        digests: of rows, base, tokenizer and template.
        versions: of Python and the libraries.
        device: what computes: `cpu`, or the GPU's name.
        dtype: compute dtype.
    """
    settings = {
        f"{section}.{key}": value
        for section, values in recipe.items()
        if isinstance(values, Mapping)
        for key, value in values.items()
        if f"{section}.{key}" not in PLACES | AFTERWARDS
    }
    return {
        **settings,
        **{f"digest.{name}": value for name, value in digests.items()},
        **{f"versions.{name}": value for name, value in versions.items()},
        "device": device,
        "dtype": dtype,
    }


def check_unchanged(then: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str]) -> list[Change]:
    """Return the changes that the user allowed.

    Raises:
        RefusedError: others changed; each is named (exit 77).
        UsageError: `allowed` names a field that there is not, or that cannot change (exit 2).
    """
    for field in allowed:
        _check_allowed(field, then, now)
    changes = [
        Change(field, then.get(field), now.get(field))
        for field in sorted(then.keys() | now.keys())
        if then.get(field) != now.get(field)
    ]
    refused = [change for change in changes if change.field not in allowed]
    if not refused:
        _check_step_size(then, now)
        return changes
    may = [change.field for change in refused if _can_drift(change.field)]
    cannot = len(refused) - len(may)
    way = " ".join(f"--allow-drift {field}" for field in may)
    raise RefusedError(
        "this is not the run that the checkpoint is of: " + "; ".join(map(str, refused)),
        hint="put it back as it was, or start a new run without --resume"
        if cannot
        else f"put it back as it was, or go on with it changed: {way}",
    )


def _can_drift(field: str) -> bool:
    return field in DRIFTABLE or field == "device" or field.startswith("versions.")


def _check_allowed(field: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if field not in then and field not in now:
        raise UsageError(
            f"--allow-drift {field}: there is no such field",
            hint=f"fields that may drift: {', '.join(sorted(DRIFTABLE))}",
        )
    if not _can_drift(field):
        raise UsageError(
            f"--allow-drift {field}: a run cannot go on with that changed; its weights or its rows would be others",
            hint="put it back as it was, or start a new run without --resume",
        )


def _check_step_size(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Micro-batch and accumulation may be exchanged for each other: then the rows of each step stay the same."""
    rows = [values.get(_STEP[0], 1) * values.get(_STEP[1], 1) for values in (then, now)]
    if rows[0] != rows[1]:
        raise RefusedError(
            f"a step had {rows[0]} rows and would have {rows[1]}: the run could not find its place in the data",
            hint=f"keep {_STEP[0]} x {_STEP[1]} at {rows[0]}",
        )


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:12]}…"
