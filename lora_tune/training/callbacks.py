"""What happens at each step of training: metrics to JSONL, progress, early stopping with the best weights."""

import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

from lora_tune.adapter.apply import trained_weights
from lora_tune.errors import TrainingError
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
        self._started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        """Write one line: a step, or a measurement of the held-out rows."""
        logs = logs or {}
        self.seconds = time.monotonic() - self._started
        if "eval_loss" in logs:
            self.held_out_loss = float(logs["eval_loss"])
            self._write({"event": "held_out", "step": state.global_step, "held_out_loss": self.held_out_loss})
        elif "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self._write(self._step(state, logs))

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
            "peak_memory_gib": round(peak_memory_gib(), 3),
            "elapsed_seconds": round(self.seconds, 3),
            "eta_seconds": round(self.seconds / state.global_step * (state.max_steps - state.global_step), 1),
        }

    def _write(self, values: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({key: _finite(value) for key, value in values.items()}) + "\n")
        self.notify(values)


class FiniteGradients(TrainerCallback):
    """Stops before an optimizer step whose gradients are not all numbers."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at every trained weight's gradient."""
        for name, weight in trained_weights(kwargs["model"]).items():
            if weight.grad is not None and not bool(torch.isfinite(weight.grad).all()):
                raise TrainingError(
                    f"a gradient is no longer a number at step {state.global_step + 1} ({name}); the weights were not updated with it",
                    hint="lower train.learning_rate, or look for broken rows with `lora-tune preview`",
                )


class BestWeights(TrainerCallback):
    """Early stopping: keeps the adapter's weights with the lowest held-out loss, and stops when patience runs out."""

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.loss: float | None = None
        self.step: int | None = None
        self._weights: dict[str, torch.Tensor] = {}
        self._worse = 0

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Compare the held-out loss with the best so far."""
        loss = (metrics or {}).get("eval_loss")
        if self.patience is None or loss is None:
            return
        if self.loss is None or loss < self.loss:
            self.loss, self.step, self._worse = float(loss), int(state.global_step), 0
            self._weights = {name: weight.detach().clone() for name, weight in trained_weights(kwargs["model"]).items()}
            return
        self._worse += 1
        if self._worse >= self.patience:
            control.should_training_stop = True

    def restore(self, model: Any) -> None:
        """Put the best weights back; without early stopping the last ones stay."""
        for name, weight in trained_weights(model).items():
            if name in self._weights:
                weight.data.copy_(self._weights[name])


def peak_memory_gib() -> float:
    """Return the most memory this process ever held: on CUDA what torch allocated, elsewhere resident memory."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 2**30)
    units = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * units / 2**30


def _finite(value: Any) -> Any:
    """JSON has no NaN: write it as null, so that every reader can read the file."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
