"""What happens at each step of training: metrics to JSONL, progress, early stopping with the best weights."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

from lora_tune.adapter.apply import trained_weights
from lora_tune.staging import translated, write_file
from lora_tune.training.memory import peak_memory_gib
from lora_tune.training.numbers import check_held_out_loss
from lora_tune.training.prepare import Notify


class TokenCounts(Protocol):
    """Who counts the tokens that went through the model."""

    n_tokens: int
    """Without padding."""
    n_padded: int
    """With padding."""
    n_trained: int


class StepLog(TrainerCallback):
    """Writes each step to metrics.jsonl and tells it on."""

    def __init__(self, path: Path, notify: Notify) -> None:
        self.path = path
        self.notify = notify
        self.counts: TokenCounts | None = None
        self.losses: list[float] = []
        self.held_out_loss: float | None = None
        self.seconds = 0.0
        """Spent training, over all sittings."""
        self.peak_memory_gib = 0.0
        """The most of all sittings."""
        self._started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock, or go on with it."""
        self._started = time.monotonic() - self.seconds

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        """Write one line: a step, or a measurement of the held-out rows."""
        logs = logs or {}
        self.seconds = time.monotonic() - self._started
        self.peak_memory_gib = max(self.peak_memory_gib, peak_memory_gib())
        if "eval_loss" in logs:
            self.held_out_loss = float(logs["eval_loss"])
            check_held_out_loss(self.held_out_loss, state.global_step)
            self.tell({"event": "held_out", "step": state.global_step, "held_out_loss": self.held_out_loss})
        elif "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.tell(self._step(state, logs))

    def _step(self, state: Any, logs: Mapping[str, float]) -> dict[str, Any]:
        tokens = self.counts.n_tokens if self.counts else 0
        return {
            "event": "step",
            "step": state.global_step,
            "steps": state.max_steps,
            "epoch": round(float(logs.get("epoch", 0.0)), 4),
            "loss": float(logs["loss"]),
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": float(logs["grad_norm"]),
            "tokens": tokens,
            "trained_tokens": self.counts.n_trained if self.counts else 0,
            "padding_share": round(1 - tokens / self.counts.n_padded, 4) if self.counts else 0.0,
            "tokens_per_second": round(tokens / self.seconds, 2),
            "peak_memory_gib": round(self.peak_memory_gib, 3),
            "elapsed_seconds": round(self.seconds, 3),
            "eta_seconds": round(self.seconds / state.global_step * (state.max_steps - state.global_step), 1),
        }

    def state(self) -> dict[str, Any]:
        """Return where the log stands, with every line so far on the disk; the losses are kept apart."""
        return {
            "seconds": self.seconds, "peak_memory_gib": self.peak_memory_gib, "held_out_loss": self.held_out_loss,
            "metrics_bytes": self._synced(),
        }  # fmt: skip

    def restore(self, kept: Mapping[str, Any], losses: list[float], *, step: int) -> None:
        """Go on where `state` was taken: what was logged of later steps is dropped, they come again."""
        self.losses, self.held_out_loss = list(losses), kept["held_out_loss"]
        self.seconds, self.peak_memory_gib = float(kept["seconds"]), float(kept["peak_memory_gib"])
        self._cut_back(int(kept["metrics_bytes"]), step)
        self._append({"event": "resumed", "step": step})

    def _cut_back(self, n_bytes: int, step: int) -> None:
        """Drop what was logged after the first `n_bytes`; where those are not all there, keep the lines that are, and say so."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        lines = content[:n_bytes].splitlines(keepends=True)
        kept = [line for line in lines if _is_line(line)]
        if len(content) < n_bytes or len(kept) < len(lines):
            write_file(self.path, b"".join(kept).decode("utf-8"))
            message = f"{self.path} was damaged or cut short: {len(kept)} of its lines up to step {step} are left"
            self.tell({"event": "warning", "message": message})
        elif len(content) > n_bytes:
            os.truncate(self.path, n_bytes)

    def _synced(self) -> int:
        if not self.path.exists():
            return 0
        with self.path.open("rb") as stream:
            os.fsync(stream.fileno())
            return os.fstat(stream.fileno()).st_size

    def tell(self, values: Mapping[str, Any]) -> None:
        """Write one event down, and tell it on."""
        self._append(values)
        self.notify(values)

    def _append(self, values: Mapping[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({key: _finite(value) for key, value in values.items()}) + "\n")
        except OSError as err:
            raise translated(err, self.path) from err


class BestWeights(TrainerCallback):
    """Knows the lowest held-out loss; with early stopping also keeps its weights, and stops when patience runs out."""

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.loss: float | None = None
        self.step: int | None = None
        """Step with the lowest held-out loss."""
        self.weights: dict[str, torch.Tensor] = {}
        self._worse = 0

    @property
    def kept_step(self) -> int | None:
        """Step whose weights training ends with; None keeps the last."""
        return None if self.patience is None else self.step

    @property
    def exhausted(self) -> bool:
        """Whether patience ran out."""
        return self.patience is not None and self._worse >= self.patience

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Compare the held-out loss with the best so far."""
        loss = (metrics or {}).get("eval_loss")
        if loss is None:
            return
        if self.loss is None or loss < self.loss:
            self.loss, self.step, self._worse = float(loss), int(state.global_step), 0
            if self.patience is not None:
                self.weights = {
                    name: weight.detach().clone() for name, weight in trained_weights(kwargs["model"]).items()
                }
            return
        self._worse += 1
        if self.exhausted:
            control.should_training_stop = True

    def put_back(self, model: Any) -> None:
        """Put the best weights back; without early stopping the last ones stay."""
        for name, weight in trained_weights(model).items():
            if name in self.weights:
                weight.data.copy_(self.weights[name])

    def state(self) -> dict[str, Any]:
        """Return what is known of the best; its weights are kept apart."""
        return {"loss": self.loss, "step": self.step, "worse": self._worse}

    def restore(self, kept: Mapping[str, Any], weights: dict[str, torch.Tensor]) -> None:
        """Go on where `state` was taken."""
        self.loss, self.step, self._worse = kept["loss"], kept["step"], int(kept["worse"])
        self.weights = weights if self.patience is not None else {}


def _finite(value: Any) -> Any:
    """JSON has no NaN: write it as null, so that every reader can read the file."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_line(line: bytes) -> bool:
    """Return whether it is a whole line of metrics.jsonl."""
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False
