"""What the `runs` verbs print: a table of runs, one run, several beside each other."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_tune.cli import ledger, render
from lora_tune.cli.report_page import FORMS, in_bytes
from lora_tune.cli.visible import visible

_LONGEST_VALUE, _NARROW = 60, 26


def runs(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print every run in a line; a folder that cannot be read says why."""
    if as_json:
        render.json_object(found)
        return
    if not found["runs"]:
        print(f"no runs in {visible(found['folder'])}/")
        return
    header = ("run", "state", "steps", "last loss", "held out", "adapter", "begun", "took")
    rows = [header, *(_row(one) for one in found["runs"] if not one["damage"])]
    if len(rows) > 1:
        for line in _aligned(rows, right=(2, 3, 4, 7)):
            print(line)
    for one in found["runs"]:
        if one["damage"]:
            print(f"{visible(one['run'])}  damaged: {visible(one['damage'])}")


def run(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print everything of one run."""
    if as_json:
        render.json_object(found)
        return
    print(f"{visible(found['run'])}: {found['state']}, {_steps(found)}{_when(found)}")
    for name, lines in (
        ("folder", [visible(found["folder"])]), ("base", _base(found)), ("losses", _losses(found["losses"])),
        ("training", _speed(found["speed"])), ("time", [_parts(found["seconds"])] if found["seconds"] else []),
        ("held out", _evaluation(found["evaluation"])), ("recipe", _recipe(found["recipe"]["differences"])),
        ("data", _data(found["data"])), ("adapter", _adapter(found["adapter"])),
        ("checkpoints", [_checkpoint(one) for one in found["checkpoints"]]),
        ("versions", [", ".join(f"{visible(name)} {visible(version)}" for name, version in found["versions"].items())]),
        ("next", [f"{one['command']}    # {one['for']}" for one in found["next"]]),
    ):  # fmt: skip
        for number, line in enumerate(line for line in lines if line):
            print(f"  {name if not number else '':<11} {line}")
    for warning in found["warnings"]:
        render.note(f"warning: {warning}")


def comparison(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what differs between runs; the first is what the others are compared with."""
    if as_json:
        render.json_object(found)
        return
    print(found["verdict"])
    names = [visible(one["run"]) for one in found["runs"]]
    rows = [("", *names)]
    for one in found["differences"]:
        rows.append((f"{one['group']}: {visible(one['field'])}", *(_value(value, _NARROW) for value in one["values"])))
    rows.append(("", *("" for _ in names)))
    rows += [(one["name"], *_figure(one)) for one in found["figures"]]
    rows += [(f"loss at step {one['step']}", *(_loss(value) for value in one["values"])) for one in found["losses"]["same_steps"]]  # fmt: skip
    for line in _aligned(rows, right=()):
        print(line)
    if found["same"]:
        print(f"\nthe same: {', '.join(found['same'])}")
    for name, first, held_out in zip(names[1:], found["losses"]["first_differences"], found["losses"]["first_held_out_differences"], strict=True):  # fmt: skip
        print(_parting(names[0], name, first, found["losses"]["n_common_steps"]))
        if held_out is not None:
            print(
                f"  held-out losses first differ at step {held_out['step']}: {held_out['values'][0]!r} and {held_out['values'][1]!r}"
            )


def _parting(one: str, other: str, first: Mapping[str, Any] | None, n_common: int) -> str:
    if not n_common:
        return f"{one} and {other}: no step that both did"
    if first is None:
        return f"{one} and {other}: the losses are equal bit for bit at all {n_common:,} common steps"
    return f"{one} and {other}: the losses first differ at step {first['step']:,}: {first['values'][0]!r} and {first['values'][1]!r}"


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    begun = "–" if one["started_at"] is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(one["started_at"]))
    return (
        visible(one["run"]), one["state"], f"{_or_dash(one['step'])}/{_or_dash(one['steps'])}", _loss(one["last_loss"]),
        _loss(one["held_out_loss"]), visible(one["adapter"] or "–"), begun, _said(one["elapsed_seconds"], "time"),
    )  # fmt: skip


def _aligned(rows: Sequence[Sequence[str]], *, right: Sequence[int]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(width) if column in right else cell.ljust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]  # fmt: skip


def _steps(found: Mapping[str, Any]) -> str:
    left = f", {FORMS['time'](found['eta_seconds'])} left" if found["eta_seconds"] is not None else ""
    return f"step {_or_dash(found['step'])} of {_or_dash(found['steps'])}{left}"


def _when(found: Mapping[str, Any]) -> str:
    begun = f", begun {found['started']}" if found["started"] else ""
    return begun + (f", took {FORMS['time'](found['elapsed_seconds'])}" if found["elapsed_seconds"] is not None else "")


def _base(found: Mapping[str, Any]) -> list[str]:
    base = found["base"]
    if not base.get("name"):
        return []
    revision = f" at {visible(base['revision'][:12])}" if base.get("revision") else ""
    weights = f", weights sha256:{visible(base['weights'][:12])}" if base.get("weights") else ""
    template = f", chat template sha256:{visible(found['chat_template'][:12])}" if found["chat_template"] else ""
    return [f"{visible(base['name'])}{revision}{weights}{template}"]


def _losses(losses: Mapping[str, Any]) -> list[str]:
    said = [f"first {_loss(losses['first'])}, last {_loss(losses['last'])}, mean of the last tenth {_loss(losses['last_tenth'])}"]  # fmt: skip
    if losses["held_out"] is not None:
        said.append(f"held out {_loss(losses['held_out'])}")
    if losses["best_held_out"] is not None:
        said.append(
            f"best held out while training {_loss(losses['best_held_out'])}, at step {losses['best_held_out_step']:,}"
        )
    return said


def _speed(speed: Mapping[str, Any]) -> list[str]:
    if speed["tokens"] is None:
        return []
    batches = f" ({visible(speed['batching'])} batches)" if speed["batching"] else ""
    return [
        f"{speed['tokens']:,} tokens, {_said(speed['trained_tokens'], 'count')} trained, {_said(speed['tokens_per_second'], 'speed')} tokens/s, "
        f"{_said(speed['padding_share'], 'share')} padding{batches}, {_said(speed['peak_memory_gib'], 'gib')}"
    ]


def _parts(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{visible(part)} {FORMS['time'](took)}" for part, took in seconds.items())


def _evaluation(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    rows: list[tuple[str, ...]] = [("", "base", "adapter", "change")]
    for key, form, change in (
        ("loss", "loss", "change"), ("perplexity", "perplexity", "change of perplexity"),
        ("token_accuracy", "share", "points"), ("exact_match", "share", "points"),
    ):  # fmt: skip
        values = [(found[who] or {}).get(key) for who in ("base", "adapter")]
        if any(value is not None for value in values):
            rows.append(
                (key.replace("_", " "), *(_said(value, form) for value in values), _said(found["change"][key], change))
            )
    return _aligned(rows, right=(1, 2, 3))


def _recipe(differences: Sequence[Mapping[str, Any]] | None) -> list[str]:
    if differences is None:
        return ["cannot be read"]
    rows = [
        (
            visible(one["field"]),
            _value(one["value"]),
            "" if one["default"] is None else f"(default {_value(one['default'])})",
        )
        for one in differences
    ]
    return _aligned(rows, right=()) if rows else []


def _data(data: Mapping[str, Any]) -> list[str]:
    lines = (
        [f"format {visible(data['format'])}, sha256:{visible((data['digest'] or '')[:12])}"] if data["format"] else []
    )
    for name, counts in data["counts"].items():
        # Another version may count otherwise: what is not there was not counted.
        whole = dict.fromkeys(("rows", "rows_read", "rows_refused", "rows_cut", "rows_split", "rows_dropped", "trained_tokens",
                               "trained_tokens_lost", "answers", "answers_without_end", "tokens", "longest_tokens"), 0) | counts  # fmt: skip
        lines += ledger.set_lines({visible(name): whole})
    return lines


def _adapter(adapter: Mapping[str, Any] | None) -> list[str]:
    if adapter is None:
        return []
    size = f", {in_bytes(adapter['weights_bytes'])}" if adapter["weights_bytes"] is not None else ""
    lines = [
        f"{visible(adapter['registry'] or 'not in the registry')}{size}, sha256:{visible(adapter['digest'] or 'unknown')}"
    ]
    if passport := adapter["passport"]:
        lora = passport["lora"]
        lines.append(
            f"rank {lora['rank']}, alpha {lora['alpha']:g}, {lora['variant']}, {lora['n_parameters']:,} trained numbers"
        )
    return lines


def _checkpoint(one: Mapping[str, Any]) -> str:
    return f"step {one['step']:,}, {in_bytes(one['bytes'])}" + (
        f", damaged: {visible(one['damage'])}" if one["damage"] else ""
    )


def _figure(one: Mapping[str, Any]) -> list[str]:
    """Return a figure of each run, and behind all but the first how far it is from the first."""
    form: Callable[[float], str] = "{:,.6g}".format
    cells = []
    for number, (value, apart) in enumerate(zip(one["values"], one["differences"], strict=True)):
        shown = "–" if value is None else form(value)
        cells.append(shown if not number or apart is None else f"{shown} ({apart:+,.3g})")
    return cells


def _value(value: object, longest: int = _LONGEST_VALUE) -> str:
    text = "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    flat = visible(text)
    half = longest // 2
    return flat if len(flat) <= longest else f"{flat[:half]}…{flat[half + 1 - longest :]}"


def _loss(value: float | None) -> str:
    return _said(value, "loss")


def _said(value: float | None, form: str) -> str:
    return "–" if value is None else FORMS[form](value)


def _or_dash(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
