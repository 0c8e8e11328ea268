"""Everything that one run says, as plain values: what `runs show` prints and `runs report` draws."""

import shlex
import time
from collections.abc import Mapping
from typing import Any

from lora_tune.model.fingerprint import canonical_digest
from lora_tune.recipe.schema import SECTIONS
from lora_tune.runs.listing import done_steps, elapsed_seconds, held_out_loss, planned_steps
from lora_tune.runs.records import RESOLVED, RunRecord
from lora_tune.runs.written import DataLedger


def details(record: RunRecord) -> dict[str, Any]:
    """Return what a person asks of a run; what its files do not say is None."""
    report, last = record.report, record.metrics.steps[-1] if record.metrics.steps else None
    return {
        "run": record.name,
        "folder": str(record.folder),
        "state": record.state,
        "started_at": record.started_at,
        "started": None if record.started_at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.started_at)),
        "elapsed_seconds": elapsed_seconds(record),
        "step": done_steps(record),
        "steps": planned_steps(record),
        "epoch": last.epoch if last else None,
        "eta_seconds": last.eta_seconds if last and record.state == "running" else None,
        "losses": _losses(record),
        "speed": _speed(record),
        "seconds": dict(report.seconds) if report else {},
        "recipe": {
            "digest": record.facts.recipe_digest,
            "differences": recipe_differences(record.recipe) if record.recipe is not None else None,
        },
        "data": record.facts.data.model_dump(mode="json"),
        "base": dict(record.facts.base),
        "chat_template": record.facts.chat_template,
        "versions": dict(record.facts.versions),
        "checkpoints": [
            {"step": one.step, "folder": str(one.folder), "bytes": one.n_bytes, "damage": one.damage or None}
            for one in record.checkpoints
        ],
        "adapter": _adapter(record),
        "evaluation": _evaluation(record),
        "warnings": warnings(record),
        "next": next_commands(record),
    }  # fmt: skip


def recipe_differences(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the settings that are not as they would be if nobody had said anything; required ones have no default."""
    found = []
    for field, value in flat_recipe(recipe).items():
        section, _, key = field.partition(".")
        known = SECTIONS[section].model_fields.get(key) if section in SECTIONS else None
        default = None
        if known is not None and not known.is_required():
            default = known.get_default(call_default_factory=True)
            default = list(default) if isinstance(default, tuple) else default
            if value == default:
                continue
        found.append({"field": field, "value": value, "default": default})
    return found


def flat_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return `section.key` → value."""
    return {
        f"{section}.{key}": value
        for section, values in recipe.items()
        if isinstance(values, Mapping)
        for key, value in values.items()
    }


def warnings(record: RunRecord) -> list[str]:
    """Return what the run warned of, what its data lost, and what is wrong with its files."""
    metrics, report = record.metrics, record.report
    found = [
        *record.facts.warnings,
        *record.facts.data.warnings,
        *metrics.warnings,
        *(report.warnings if report else []),
    ]
    found += _lost(record.facts.data)
    found += [
        f"it went on from the checkpoint of step {one.step}"
        + (f", with {', '.join(one.changed)} changed" if one.changed else "")
        for one in record.facts.resumed
    ]
    if report and report.training.best_step is not None:
        found.append(f"early stopping kept the weights of step {report.training.best_step}")
    if metrics.n_repeated_steps:
        found.append(f"steps that were done again after a resume, the last time counts: {metrics.n_repeated_steps}")
    if metrics.n_unread_lines:
        found.append(f"lines of metrics.jsonl that cannot be read, and are left out: {metrics.n_unread_lines}")
    without = sum(step.loss is None for step in metrics.steps)
    if without:
        found.append(f"steps whose loss was no number: {without}")
    found += [f"checkpoint of step {one.step}: {one.damage}" for one in record.checkpoints if one.damage]
    return list(dict.fromkeys([*found, *record.warnings]))


def next_commands(record: RunRecord) -> list[dict[str, str]]:
    """Return what to run next and what for, the likeliest first."""
    folder = shlex.quote(str(record.folder))
    adapter = shlex.quote(str(record.folder / "adapter"))
    if record.state == "running":
        return [{"for": "watch it", "command": f"lora-tune runs report {folder} --watch"}]
    commands = []
    if record.report is None and record.recipe is not None:
        recipe = shlex.quote(str(record.folder / RESOLVED))
        resumable = record.state == "resumable"
        again = f" --resume --run-dir {folder}" if resumable else ""
        commands.append(
            {"for": "go on with it" if resumable else "start it again", "command": f"lora-tune train {recipe}{again}"}
        )
    if record.has_adapter:
        commands += [
            {"for": "talk to it", "command": f"lora-tune chat {adapter}"},
            {"for": "serve it", "command": f"lora-tune serve {folder}"},
            {"for": "measure it", "command": f"lora-tune eval {adapter}"},
            {"for": "check that it still answers as it was trained", "command": f"lora-tune adapters verify {adapter}"},
        ]
    return commands


def _lost(data: DataLedger) -> list[str]:
    """Say what the data lost; what did not happen is not mentioned."""
    said = {
        "rows_refused": "rows were refused",
        "rows_dropped": "rows were dropped",
        "rows_cut": "rows were cut",
        "trained_tokens_lost": "trained tokens were lost",
        "answers_without_end": "answers have lost their end",
    }
    return [
        f"{name.replace('_', ' ')}: {counts[key]:,} {words}"
        for name, counts in data.counts.items()
        for key, words in said.items()
        if counts.get(key)
    ]


def _losses(record: RunRecord) -> dict[str, Any]:
    """Return losses in nats a trained token."""
    training = record.report.training if record.report else None
    steps, held_out = record.metrics.steps, [one for one in record.metrics.held_out if one.held_out_loss is not None]
    best = min(held_out, key=lambda one: one.held_out_loss or 0.0, default=None)
    return {
        "first": steps[0].loss if steps and record.metrics.is_whole else training.first_loss if training else None,
        "last": steps[-1].loss if steps else None,
        "last_tenth": training.last_loss if training else _mean_of_last_tenth(record),
        "held_out": held_out_loss(record),
        "best_held_out": best.held_out_loss if best else None,
        "best_held_out_step": best.step if best else None,
        "kept_step": training.best_step if training else None,
    }


def _mean_of_last_tenth(record: RunRecord) -> float | None:
    losses = [step.loss for step in record.metrics.steps if step.loss is not None]
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last) if last else None


def _speed(record: RunRecord) -> dict[str, Any]:
    """Return what training took: of a finished run as it says, else as its last step says."""
    last = record.metrics.steps[-1] if record.metrics.steps else None
    found = record.report.training if record.report else last
    names = ("tokens", "trained_tokens", "tokens_per_second", "padding_share", "peak_memory_gib")
    return {
        **{name: getattr(found, name) if found else None for name in names},
        "batching": record.report.training.batching if record.report else None,
        "train_seconds": record.report.training.seconds if record.report else last.elapsed_seconds if last else None,
    }


def _evaluation(record: RunRecord) -> dict[str, Any] | None:
    """Return base beside adapter with the change from one to the other; None where nothing was measured."""
    measured = record.report.evaluation if record.report else None
    if measured is None:
        return None
    told = measured.model_dump(mode="json")
    base, adapter = told["base"] or {}, told["adapter"] or {}
    names = ("loss", "perplexity", "token_accuracy", "exact_match")
    both = {name: (base.get(name), adapter.get(name)) for name in names}
    change = {name: None if then is None or now is None else now - then for name, (then, now) in both.items()}
    return {**told, "change": change}


def _adapter(record: RunRecord) -> dict[str, Any] | None:
    """Return the adapter with its passport, but for probes, recipe and the training rows' system message."""
    if not record.has_adapter:
        return None
    said = record.report.adapter if record.report else None
    passport = record.passport
    digest = (
        canonical_digest({"config": passport.config_digest, "weights": passport.weights_digest}) if passport else None
    )
    facts = passport.model_dump(mode="json", exclude={"probes", "recipe", "versions"}) if passport else None
    return {
        "folder": str(record.folder / "adapter"),
        "registry": said.registry if said else None,
        "digest": said.digest if said and said.digest else digest,
        "weights_digest": said.weights_digest if said else passport.weights_digest if passport else None,
        "weights_bytes": said.weights_bytes if said else None,
        "parameter_bytes": said.parameter_bytes if said else None,
        "n_probes": len(passport.probes) if passport else None,
        "passport": facts,
    }
