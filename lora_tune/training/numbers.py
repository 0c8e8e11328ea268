"""Numbers that are none, and runs that learn nothing: the first stop training before they reach a weight, the others warn."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from lora_tune.adapter.apply import trained_weights
from lora_tune.errors import TrainingError
from lora_tune.training.prepare import Notify

SPIKE_WINDOW = 20
"""Steps that a loss is compared with."""
SPIKE_FACTOR = 3.0
SPIKE_NATS = 0.5
DEAD_STEPS = 3
"""So many steps without a gradient are a dead run."""
NAMED_ROWS = 8


class Numbers(TrainerCallback):
    """Looks at loss, gradients and weights of each step.

    Args:
        rows_of_step: step, from 0 → where its rows stand (`file:line`), a list for each row or pack.
    """

    def __init__(self, rows_of_step: Callable[[int], Sequence[Sequence[str]]]) -> None:
        self.notify: Notify = lambda event: None
        """Told of spikes and of runs that learn nothing."""
        self._rows_of_step = rows_of_step
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._without_gradient = 0
        self._warned: set[str] = set()
        self.step_trained = 0
        """Trained tokens of this step so far."""

    def check_loss(self, loss: torch.Tensor, step: int, first: int, n_sequences: int) -> None:
        """Refuse to go on from a micro-batch's loss that is not finite.

        Args:
            loss: of the micro-batch.
            step: from 0.
            first: the micro-batch's first row or pack among those of the step.
            n_sequences: rows or packs of a micro-batch.

        Raises:
            TrainingError: it is not (exit 65).
        """
        if not bool(torch.isfinite(loss)):
            raise _stopped(f"the loss became {float(loss)}", step, self._rows(step, first, n_sequences))

    def _rows(self, step: int, first: int = 0, n_sequences: int | None = None) -> list[str]:
        last = None if n_sequences is None else first + n_sequences
        return [place for group in self._rows_of_step(step)[first:last] for place in group]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to count the step's trained tokens."""
        self.step_trained = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at every gradient before it moves a weight."""
        gradients = {name: weight.grad for name, weight in trained_weights(kwargs["model"]).items() if weight.grad is not None}  # fmt: skip
        if (name := _first_not_finite(gradients)) is not None:
            step = int(state.global_step)
            raise _stopped(f"a gradient is no longer a number ({name})", step, self._rows(step))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at every weight after it was moved: nothing that is not finite is ever saved."""
        if (name := _first_not_finite(trained_weights(kwargs["model"]))) is not None:
            step = int(state.global_step)
            raise _stopped(f"the optimizer made a weight no number ({name})", step, self._rows(step), updated=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        """Warn of a loss far above those before, and of steps that cannot teach anything."""
        logs = logs or {}
        if "loss" not in logs:
            return
        step, loss = int(state.global_step), float(logs["loss"])
        usual = statistics.median(self._recent) if len(self._recent) == SPIKE_WINDOW else math.inf
        if loss > SPIKE_FACTOR * usual and loss > usual + SPIKE_NATS:
            rows = ", ".join(self._rows(step - 1)[:NAMED_ROWS])
            self._warn(
                "",
                f"the loss of step {step} is {loss:.3f}, of the {SPIKE_WINDOW} before it {usual:.3f}; its rows: {rows}",
            )
        self._recent.append(loss)
        if not self.step_trained:
            rows = ", ".join(self._rows(step - 1)[:NAMED_ROWS])
            self._warn("tokens", f"no token of step {step} is trained: it teaches nothing; its rows: {rows}")
        self._without_gradient = self._without_gradient + 1 if logs.get("grad_norm") == 0.0 else 0
        if self._without_gradient == DEAD_STEPS:
            self._warn(
                "gradient", f"all gradients were exactly 0 in {DEAD_STEPS} steps up to step {step}: nothing is learned"
            )
        if logs.get("learning_rate") == 0.0 and args.get_warmup_steps(state.max_steps) < step < state.max_steps:
            self._warn(
                "learning rate", f"the learning rate is 0 at step {step} of {state.max_steps}: nothing is learned"
            )

    def state(self) -> dict[str, Any]:
        """Return what later warnings depend on."""
        return {
            "recent": list(self._recent),
            "without_gradient": self._without_gradient,
            "warned": sorted(self._warned),
        }

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._recent.extend(kept["recent"])
        self._without_gradient, self._warned = kept["without_gradient"], set(kept["warned"])

    def _warn(self, once: str, message: str) -> None:
        if once not in self._warned:
            self.notify({"event": "warning", "message": message})
        if once:
            self._warned.add(once)


def check_held_out_loss(loss: float, step: int) -> None:
    """Refuse a held-out loss that is not finite: what is measured with such weights is worth nothing.

    Raises:
        TrainingError: it is not (exit 65).
    """
    if not math.isfinite(loss):
        raise TrainingError(
            f"the held-out loss became {loss} after step {step}; nothing was saved with it",
            hint="lower train.learning_rate, or look for broken held-out rows with `lora-tune preview`",
        )


def _first_not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity; one look at the device where all is well."""
    if not tensors:
        return None
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors.values()))])
    if bool(torch.isfinite(norms).all()):
        return None
    return next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)


def _stopped(what: str, step: int, rows: Sequence[str], *, updated: bool = False) -> TrainingError:
    named = ", ".join(rows[:NAMED_ROWS]) + (f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else "")
    weights = "nothing was saved with it" if updated else "the weights were not updated with it"
    return TrainingError(
        f"{what} at step {step + 1}; {weights}. Rows of that batch: {named}",
        hint="lower train.learning_rate, or look at those rows with `lora-tune preview`; --resume goes on from the last checkpoint",
    )
