"""Several runs beside each other: what differs, what is the same, and the first step at which losses part."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_tune.errors import UsageError
from lora_tune.runs.details import details, flat_recipe
from lora_tune.runs.records import RunRecord

SHOWN_STEPS = 8
_FIGURES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("steps", ("step",)),
    ("first loss", ("losses", "first")),
    ("last loss", ("losses", "last")),
    ("loss, last tenth", ("losses", "last_tenth")),
    ("best held-out loss while training", ("losses", "best_held_out")),
    ("held-out loss, base", ("evaluation", "base", "loss")),
    ("held-out loss", ("evaluation", "adapter", "loss")),
    ("perplexity", ("evaluation", "adapter", "perplexity")),
    ("token accuracy", ("evaluation", "adapter", "token_accuracy")),
    ("exact match", ("evaluation", "adapter", "exact_match")),
    ("tokens", ("speed", "tokens")),
    ("padding share", ("speed", "padding_share")),
    ("tokens a second", ("speed", "tokens_per_second")),
    ("peak memory, GiB", ("speed", "peak_memory_gib")),
    ("training, seconds", ("speed", "train_seconds")),
)
"""Name, and where it stands in a run's details."""


def compare(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return what differs between two runs or more; the first is what the others are compared with.

    Raises:
        UsageError: fewer than two runs, or one twice (exit 2).
    """
    if len({record.folder.resolve() for record in records}) < max(2, len(records)):
        raise UsageError("compare takes two runs or more, each once", hint="`lora-tune runs list` shows their names")
    told = [details(record) for record in records]
    groups: list[tuple[str, Callable[[RunRecord], Mapping[str, Any]]]] = [
        ("recipe", lambda record: flat_recipe(record.recipe or {})),
        ("data", _data), ("base", lambda record: record.facts.base),
        ("template", lambda record: {"chat_template": record.facts.chat_template}),
        ("versions", lambda record: record.facts.versions), ("adapter", _adapter),
    ]  # fmt: skip
    found = {name: _differences([values_of(record) for record in records]) for name, values_of in groups}
    unknown = [name for name, values_of in groups if any(not _says(values_of(record)) for record in records)]
    losses = _losses(records)
    return {
        "runs": [{"run": one["run"], "folder": one["folder"], "state": one["state"]} for one in told],
        "differences": [{"group": group, **one} for group, several in found.items() for one in several],
        "same": [group for group, several in found.items() if not several and group not in unknown],
        "unknown": unknown,
        "figures": [figure for figure in (_figure(name, place, told) for name, place in _FIGURES) if figure],
        "losses": losses,
        "verdict": _verdict(found, unknown, losses),
    }


def _differences(values: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    fields = list(dict.fromkeys(field for one in values for field in one))
    return [
        {"field": field, "values": [one.get(field) for one in values]}
        for field in fields
        if any(one.get(field) != values[0].get(field) for one in values)
    ]


def _says(values: Mapping[str, Any]) -> bool:
    return any(value is not None for value in values.values())


def _data(record: RunRecord) -> dict[str, Any]:
    """Return what the rows are, set by set; where they came from is the recipe's."""
    data = record.facts.data
    counted = {f"{name}.{key}": count for name, counts in data.counts.items() for key, count in counts.items()}
    return {
        "digest": data.digest,
        "format": data.format,
        "train_rows": data.train_rows,
        "held_out_rows": data.held_out_rows,
        **counted,
    }


def _adapter(record: RunRecord) -> dict[str, Any]:
    passport, said = record.passport, record.report.adapter if record.report else None
    return {
        "weights_digest": passport.weights_digest if passport else said.weights_digest if said else None,
        "n_parameters": passport.lora.n_parameters if passport else None,
        "tokenizer": passport.tokenizer.tokenizer if passport else None,
    }


def _figure(name: str, place: Sequence[str], told: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return a figure of every run with its difference from the first, or None where no run has it."""
    values = [_at(one, place) for one in told]
    if all(value is None for value in values):
        return None
    first = values[0]
    apart = [None if first is None or value is None else value - first for value in values]
    return {"name": name, "values": values, "differences": apart}


def _at(values: Any, place: Sequence[str]) -> Any:
    for key in place:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _losses(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the losses at steps that all runs have, and where each run's first differ by a bit from the first run's."""
    series = [{step.step: step.loss for step in record.metrics.steps} for record in records]
    common = sorted(set.intersection(*(set(one) for one in series)))
    return {
        "n_common_steps": len(common),
        "first_differences": [_first_difference(series[0], one) for one in series[1:]],
        "first_held_out_differences": [
            _first_difference(*({line.step: line.held_out_loss for line in record.metrics.held_out} for record in (records[0], other)))
            for other in records[1:]
        ],
        "same_steps": [{"step": step, "values": [one[step] for one in series]} for step in _spread(common)],
    }  # fmt: skip


def _first_difference(one: Mapping[int, float | None], other: Mapping[int, float | None]) -> dict[str, Any] | None:
    """Return the first step in both at which the numbers are not the same to the last bit; None when there is none."""
    for step in sorted(one.keys() & other.keys()):
        if _bits(one[step]) != _bits(other[step]):
            return {"step": step, "values": [one[step], other[step]]}
    return None


def _bits(value: float | None) -> str | None:
    return None if value is None else float(value).hex()


def _spread(steps: Sequence[int]) -> list[int]:
    """Return at most SHOWN_STEPS of the steps, the first and the last among them."""
    if len(steps) <= SHOWN_STEPS:
        return list(steps)
    return [steps[round(number * (len(steps) - 1) / (SHOWN_STEPS - 1))] for number in range(SHOWN_STEPS)]


def _verdict(found: Mapping[str, Sequence[Any]], unknown: Sequence[str], losses: Mapping[str, Any]) -> str:
    """Return the comparison in one sentence."""
    differ = [name for name, several in found.items() if several and name != "adapter"]
    n_common, parted = losses["n_common_steps"], [first["step"] for first in losses["first_differences"] if first]
    if not n_common:
        said = "there is no step that all of them did"
    elif parted:
        said = f"the losses first differ at step {min(parted)}"
    else:
        said = f"the losses are equal bit for bit at all {n_common} common steps"
    if "adapter" not in unknown:
        said += "; the adapters differ" if found["adapter"] else "; the adapters' weights are the same bytes"
    if unknown:
        said += f"; not known of all: {_and(unknown)}"
    if differ:
        return f"{_and(differ)} differ{'s' if len(differ) == 1 and differ[0] != 'versions' else ''}; {said}"
    apart = bool(parted) or (found["adapter"] and "adapter" not in unknown)
    return (
        f"nothing differs in what was asked for, and yet: {said}"
        if apart
        else f"nothing differs but when they ran and how fast: {said}"
    )


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
