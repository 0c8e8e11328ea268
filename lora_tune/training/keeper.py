"""Keeps a run while it trains: when a checkpoint is written, what it holds of the trainer, and how a trainer goes on from one.

The trainer asks it at the places where transformers would write and read its own checkpoints.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from lora_tune.adapter.apply import trained_weights
from lora_tune.interruption import Interruption
from lora_tune.recipe.schema import TrainSection
from lora_tune.training import snapshot
from lora_tune.training.callbacks import BestWeights, StepLog
from lora_tune.training.checkpoints import (
    Checkpoint,
    check_space,
    folder_name,
    retire,
    steps_on_disk,
    write_checkpoint,
)
from lora_tune.training.numbers import Numbers

TRAINER_STATE = "trainer_state.json"
"""What transformers reads of a checkpoint: epoch and step."""


@dataclass(frozen=True)
class Course:
    """Where a run keeps its checkpoints, and where it begins."""

    root: Path
    """The run's folder of checkpoints."""
    run_id: str
    identity: Mapping[str, Any]
    """What must be the same for the run to go on; identity.py's table."""
    start: Checkpoint | None = None
    """What to go on from; None begins."""
    drifted: bool = False
    """The user allowed a setting of the optimizer to change since: the recipe decides, not the checkpoint."""
    stop: Interruption = field(default_factory=lambda: Interruption(""))


class Keeper(TrainerCallback):
    """Writes the checkpoints of one training, and puts a trainer back to where one was written."""

    def __init__(
        self, course: Course, section: TrainSection, *, log: StepLog, best: BestWeights, numbers: Numbers
    ) -> None:
        self.course = course
        self.seconds = 0.0
        """Spent writing checkpoints."""
        self._section = section
        self._log, self._best, self._numbers = log, best, numbers
        self._evaluation_due = False
        self._last_saved: int | None = None
        self._random: dict[str, torch.Tensor] = {}
        self._trainer: Any = None
        self._kept = snapshot.read_state(course.start.folder) if course.start else {}

    def attach(self, trainer: Any) -> None:
        """Meet the trainer, and check that the disk has room for three checkpoints.

        Raises:
            CannotWriteError: it has not (exit 74).
        """
        self._trainer = trainer
        check_space(self.course.root, 3 * self._needs_bytes(), what="three checkpoints")

    # When a checkpoint is written.

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on with what the stopped run had begun: the random generators, and a measurement that was due."""
        state.compute_steps(args, state.max_steps)  # transformers keeps the checkpoint's, even where it may drift
        if not self._kept:
            if self._section.on_oom == "shrink":
                self.save()  # so that there is always something to go back to
            return
        snapshot.restore_random(self._random)
        if self._kept["evaluation_due"] and not self._best.exhausted:
            self._trainer.evaluate()
            self._random = snapshot.random_states()
        if self._best.exhausted:
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for a checkpoint where one is due, and for an end where a signal came."""
        every = self._section.save_every_steps
        if state.global_step >= state.max_steps or (every is not None and state.global_step % every == 0):
            control.should_save = True
        if self.course.stop.requested is not None:
            self._evaluation_due = control.should_evaluate
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for a checkpoint of the best, and of the last where patience ran out."""
        if self._best.step == state.global_step or control.should_training_stop:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End here if a signal came while the checkpoint was written."""
        if self.course.stop.requested is not None:
            control.should_training_stop = True

    def postpones_evaluation(self, drawn: Mapping[str, torch.Tensor], control: Any) -> bool:
        """Return whether a signal ends a measurement in its middle; then it is made again, from its beginning, on resume.

        Args:
            drawn: the random generators before it began.
            control: told to save and to stop.
        """
        if self.course.stop.requested is None:
            return False
        self._evaluation_due = True
        snapshot.restore_random(drawn)
        control.should_evaluate = False
        control.should_save = control.should_training_stop = True
        return True

    def finish(self) -> None:
        """Make sure that the end of training is kept.

        Raises:
            StoppedError: a signal ended it before its time (exit 75).
        """
        state = self._trainer.state
        if self._last_saved != state.global_step:
            self.save()
        if self.course.stop.requested is not None:
            place = self.course.root / folder_name(state.global_step)
            raise self.course.stop.stopped(
                f"after step {state.global_step} of {state.max_steps}; all of it is kept in {place}"
            )

    # What it holds.

    def save(self) -> None:
        """Write a checkpoint of this very moment, and retire the oldest.

        Raises:
            CannotWriteError: the disk is full or failing; earlier checkpoints are untouched (exit 74).
        """
        step = int(self._trainer.state.global_step)
        started = time.monotonic()
        if step not in steps_on_disk(self.course.root):
            write_checkpoint(self.course.root, step, self.course.run_id, self._fill, needs_bytes=self._needs_bytes())
            keep_steps = frozenset({self._best.step}) if self._best.step is not None else frozenset()
            retire(self.course.root, self.course.run_id, keep=self._section.keep_checkpoints, keep_steps=keep_steps)
        self._last_saved = step
        self.seconds += time.monotonic() - started

    def _fill(self, stage: Path) -> None:
        trainer = self._trainer
        weights = trained_weights(trainer.model)
        snapshot.write_weights(stage / snapshot.WEIGHTS, weights)
        if self._best.weights and self._best.step != trainer.state.global_step:
            snapshot.write_weights(stage / snapshot.BEST, self._best.weights)
        snapshot.write_random(stage / snapshot.RANDOM, snapshot.random_states(), self._log.losses)
        optimizer = snapshot.write_optimizer(stage / snapshot.OPTIMIZER, _plain_optimizer(trainer), trainer.model)
        replace(trainer.state, log_history=[]).save_to_json(str(stage / TRAINER_STATE))
        snapshot.write_state(stage / snapshot.STATE, {
            "identity": dict(self.course.identity),
            "micro_batch_sequences": self._section.micro_batch_sequences,
            "gradient_accumulation_steps": self._section.gradient_accumulation_steps,
            "evaluation_due": self._evaluation_due,
            "optimizer": optimizer,
            "schedule": trainer.lr_scheduler.state_dict(),
            "counts": {name: getattr(trainer, name) for name in ("n_tokens", "n_trained", "n_padded")},
            "log": self._log.state(),
            "best": self._best.state(),
            "numbers": self._numbers.state(),
        })  # fmt: skip

    def _needs_bytes(self) -> int:
        """Return about what a checkpoint takes: the weights, twice as much optimizer state, and the best weights."""
        weights = trained_weights(self._trainer.model).values()
        return 4 * sum(int(weight.nbytes) for weight in weights) + 2**20

    # How a trainer goes on from one.

    def load_weights(self) -> None:
        """Put back the weights, the counts, the log and what is known of the best."""
        folder, trainer = self._start.folder, self._trainer
        snapshot.load_weights(folder, trainer.model)
        self._random, losses = snapshot.read_random(folder)
        for name, count in self._kept["counts"].items():
            setattr(trainer, name, int(count))
        best = snapshot.load_best(folder, next(iter(trained_weights(trainer.model).values())).device)
        if self._kept["best"]["step"] == self._start.step:
            best = {name: weight.detach().clone() for name, weight in trained_weights(trainer.model).items()}
        self._best.restore(self._kept["best"], best)
        self._numbers.restore(self._kept["numbers"])
        self._log.restore(self._kept["log"], losses, step=self._start.step)
        self._last_saved = self._start.step

    def load_optimizer(self) -> None:
        """Put back optimizer and schedule; where the user let settings drift, the recipe's hold and only the state is kept."""
        trainer, optimizer = self._trainer, _plain_optimizer(self._trainer)
        fresh = [
            {key: value for key, value in group.items() if key not in {"params", "lr"}}
            for group in optimizer.param_groups
        ]
        snapshot.load_optimizer(self._start.folder, self._kept["optimizer"], optimizer, trainer.model)
        schedule = trainer.lr_scheduler
        base_rates = list(schedule.base_lrs)
        schedule.load_state_dict(dict(self._kept["schedule"]))
        if not self.course.drifted:
            return
        schedule.base_lrs = base_rates
        for group, settings, base_rate, factor in zip(
            optimizer.param_groups, fresh, base_rates, schedule.lr_lambdas, strict=True
        ):
            group.update(settings, lr=base_rate * factor(schedule.last_epoch))
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]

    def restore_random(self) -> None:
        """Put the random generators back."""
        snapshot.restore_random(self._random)

    @property
    def _start(self) -> Checkpoint:
        assert self.course.start is not None, "only a trainer that was given a checkpoint asks"
        return self.course.start


def _plain_optimizer(trainer: Any) -> Any:
    """Return torch's optimizer, out of accelerate's wrapping."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)
