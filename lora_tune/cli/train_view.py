"""A run as `train` shows it: what happens, then the report."""

import json
from collections.abc import Mapping
from typing import Any, Self

from lora_tune.cli import ledger, render


class TrainView:
    """A run as it happens: progress for people, JSON Lines for programs."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._progress = render.Progress()

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.__exit__(*exception)

    def notify(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        if self._as_json:
            render.json_object(event)
            return
        kind = event["event"]
        if kind == "progress":
            self._progress(event["label"], event["share"])
        elif kind == "step":
            self._step(event)
        else:
            for line in _event_lines(event):
                self._progress.note(line)

    def finish(self, report: Mapping[str, Any]) -> None:
        """Show the report."""
        if self._as_json:
            render.json_object({"event": "done", **report})
        elif report.get("dry_run"):
            print(report["recipe"], end="")
            for line in ledger.set_lines(report["data"]):
                print(f"# {line}")
            print(f"# {report['steps']} steps; nothing was written")
        else:
            _print_report(report)

    def _step(self, event: Mapping[str, Any]) -> None:
        line = (
            f"step {event['step']}/{event['steps']}  loss {event['loss']:.4f}  {event['tokens_per_second']:.0f} tokens/s  "
            f"{event['peak_memory_gib']:.2f} GiB  {_duration(event['eta_seconds'])} left"
        )
        if self._progress.drawing:
            self._progress(line, event["step"] / event["steps"])
        elif event["step"] == 1 or event["step"] % max(1, event["steps"] // 20) == 0 or event["step"] == event["steps"]:
            render.note(line)


_IN_WORDS = {
    "warning": "warning: {message}",
    "page": "page: {page}",
    "exported": "exported to {adapter}, loaded back and equal",
    "resumed": "going on from step {step}: {checkpoint}",
    "held_out": "step {step}: held-out loss {held_out_loss:.4f}",
}


def _event_lines(event: Mapping[str, Any]) -> list[str]:
    kind = event["event"]
    if kind == "data":
        return ledger.event_lines(event)
    if kind == "model":
        held = "" if event["quantization"] == "none" else f", base held in {event['quantization']}"
        return [
            f"model: {event['trainable']:,} trained numbers, computed in {event['dtype']} on {event['device']}{held}"
        ]
    return [_IN_WORDS[kind].format(**event)] if kind in _IN_WORDS else [json.dumps(render.plain(event))]


def _print_report(report: Mapping[str, Any]) -> None:
    training, adapter = report["training"], report["adapter"]
    kept = f", weights of step {training['best_step']} kept" if training["best_step"] is not None else ""
    print(
        f"trained {training['steps']} steps in {_duration(training['seconds'])}: loss {training['first_loss']:.3f} → "
        f"{training['last_loss']:.3f}, {training['tokens_per_second']:.0f} tokens/s, {training['padding_share']:.1%} padding ({training['batching']} batches), {training['peak_memory_gib']:.2f} GiB{kept}"
    )
    if report["evaluation"]:
        render.print_evaluation(report["evaluation"])
    print(
        f"adapter  {adapter['registry']}  ({adapter['folder']}, {adapter['weights_bytes'] / 1e6:.1f} MB, loaded back and equal)"
    )
    print(f"report   {report['run']}/report.json")


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{seconds:.0f} s"
