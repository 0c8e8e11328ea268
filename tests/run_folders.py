"""Runs' folders made in code: as `train` leaves them, but for the model."""

import json
import math
from pathlib import Path

HELD_OUT = {"rows": 4, "rows_read": 4, "tokens": 200, "trained_tokens": 40, "longest_tokens": 61}
BINS = [
    {"tokens_from": 1, "tokens_to": 32, "rows": 3, "too_long": False},
    {"tokens_from": 33, "tokens_to": 64, "rows": 21, "too_long": True},
]
RECIPE = {
    "version": 1,
    "base": {"name": "example-org/tiny", "revision": None, "quantization": "none", "dtype": "auto"},
    "lora": {"rank": 8, "alpha": 32.0, "dropout": 0.0},
    "train": {"learning_rate": 0.01, "seed": 0, "max_steps": 20},
    "output": {"name": "tiny"},
}
FACTS = {
    "run_id": "r1",
    "versions": {"torch": "2.13.0", "lora_tune": "0.1.0"},
    "base": {"name": "example-org/tiny", "revision": None, "weights": "ab" * 32},
    "chat_template": "cd" * 32,
    "recipe_digest": "ef" * 32,
    "data": {
        "digest": "12" * 32, "format": "chat", "train_rows": 24, "held_out_rows": 4, "rows_left_out": 0, "labels": {},
        "counts": {"train": {"rows": 24, "rows_read": 30, "rows_dropped": 6, "tokens": 1200, "trained_tokens": 300}, "held_out": HELD_OUT},
        "roles": {"user": {"tokens": 700, "trained": 0}, "assistant": {"tokens": 300, "trained": 300}},
        "sources": [{"source": "a/rows.jsonl", "rows": 24, "rows_an_epoch": 24}],
        "tokens_by_row": {"train": BINS},
    },
}  # fmt: skip
REPORT = {
    "adapter": {"registry": "tiny@1", "digest": "34" * 32, "weights_digest": "56" * 32, "weights_bytes": 36256},
    "training": {
        "steps": 20, "first_loss": 3.9, "last_loss": 2.1, "tokens": 2000, "trained_tokens": 600, "batching": "random", "padding_share": 0.05,
        "seconds": 9.5, "tokens_per_second": 210.5, "peak_memory_gib": 0.52, "best_step": 15, "held_out_loss": 2.25,
    },
    "evaluation": {
        "base": {"loss": 4.0, "perplexity": 54.6, "token_accuracy": 0.1, "exact_match": 0.0, "n_answers": 4},
        "adapter": {"loss": 2.25, "perplexity": 9.49, "token_accuracy": 0.6, "exact_match": 0.25, "n_answers": 4},
        "answers": [{"where": "held.jsonl:1", "prompt": "turn it on", "expected": "on", "base": "what", "adapter": "on"}],
    },
    "seconds": {"prepare": 0.5, "train": 9.5},
}  # fmt: skip


def loss_at(step: int) -> float:
    """Return the loss that the made runs have at a step."""
    return 2.0 + 2.0 * math.exp(-step / 7)


def step_line(step: int, **values: object) -> dict[str, object]:
    """Return a line of metrics.jsonl."""
    return {
        "event": "step", "step": step, "steps": 20, "epoch": step / 10, "loss": loss_at(step), "learning_rate": 0.01 / step,
        "grad_norm": 0.5, "tokens": 100 * step, "trained_tokens": 30 * step, "padding_share": 0.05, "tokens_per_second": 210.0,
        "peak_memory_gib": 0.5, "elapsed_seconds": step / 2, "eta_seconds": (20 - step) / 2, **values,
    }  # fmt: skip


def write_run(
    folder: Path, *, n_steps: int = 20, done: bool = True, checkpoints: tuple[int, ...] = (), recipe: dict | None = None
) -> Path:
    """Write a run's folder; every fifth step the held-out rows were measured."""
    folder.mkdir(parents=True)
    (folder / "run.lock").touch()
    text = json.dumps(RECIPE if recipe is None else recipe)  # JSON is YAML 1.2
    for name in ("recipe.yaml", "recipe.resolved.yaml"):
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "run.json").write_text(json.dumps(FACTS), encoding="utf-8")
    lines = [step_line(step) for step in range(1, n_steps + 1)]
    measured = [
        {"event": "held_out", "step": step, "held_out_loss": loss_at(step) + 0.1} for step in range(5, n_steps + 1, 5)
    ]
    write_metrics(folder, sorted([*lines, *measured], key=lambda line: line["step"]))
    for step in checkpoints:
        write_checkpoint(folder, step)
    if done:
        (folder / "report.json").write_text(json.dumps(REPORT), encoding="utf-8")
    return folder


def write_metrics(folder: Path, lines: list[dict[str, object]]) -> None:
    """Write metrics.jsonl."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_checkpoint(folder: Path, step: int, *, run_id: str = "r1") -> Path:
    """Write a checkpoint with one file of 100 bytes."""
    place = folder / "checkpoints" / f"step-{step:06d}"
    place.mkdir(parents=True)
    (place / "state.bin").write_bytes(b"x" * 100)
    manifest = {"format": 1, "run_id": run_id, "step": step, "files": {"state.bin": [100, "00" * 32]}}
    (place / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return place
