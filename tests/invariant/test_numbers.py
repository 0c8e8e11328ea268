"""What is no number stops the run at its step, before it reaches a weight or a file; what teaches nothing is told."""

import pytest
import torch

from lora_tune.adapter.apply import trained_weights
from lora_tune.errors import TrainingError
from lora_tune.training.checkpoints import newest_verified, steps_on_disk
from lora_tune.training.snapshot import load_file
from lora_tune.training.trainer import Trainer
from tests.resuming import RUN_ID, Recipe, same_bits, sit

STEPS = 12
RECIPE = Recipe(n_rows=STEPS * 2, gradient_accumulation_steps=1, micro_batch_sequences=2, save_every_steps=1)
KINDS = ("loss", "gradient", "weight")


def spoil(kind, step, monkeypatch):
    """Make the loss, one gradient or one weight of a step (from 1) not a number, as a broken machine would."""
    forward, train = Trainer.compute_loss, Trainer.training_step

    def broken_loss(self, model, inputs, *args, **kwargs):
        loss = forward(self, model, inputs, *args, **kwargs)
        return loss * float("nan") if self.model.training and self.state.global_step + 1 == step else loss

    def broken_after(self, model, *args, **kwargs):
        loss = train(self, model, *args, **kwargs)
        if self.state.global_step + 1 == step:
            weight = list(trained_weights(model).values())[3]
            if kind == "gradient":
                weight.grad.view(-1)[5] = float("inf")
            else:
                weight.data.view(-1)[5] = float("nan")
        return loss

    if kind == "loss":
        monkeypatch.setattr(Trainer, "compute_loss", broken_loss)
    else:
        monkeypatch.setattr(Trainer, "training_step", broken_after)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 2, pytest.param(3, marks=pytest.mark.slow), 7, STEPS,
                                  *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 5, 6, 8, 9, 10, 11))])  # fmt: skip
def test_it_stops_at_that_step_and_nothing_of_it_is_kept(tmp_path, monkeypatch, kind, step):
    with monkeypatch.context() as patch:
        spoil(kind, step, patch)
        with pytest.raises(
            TrainingError, match=rf"at step {step}; .* Rows of that batch: .*rows\.jsonl:\d+, .*rows\.jsonl:\d+$"
        ):
            sit(RECIPE, tmp_path)
    assert steps_on_disk(tmp_path / "checkpoints")[-1:] == ([step - 1] if step > 1 else [])
    for path in tmp_path.rglob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values() if tensor.is_floating_point())


def test_after_the_cause_is_gone_the_run_goes_on_to_the_bit(tmp_path, monkeypatch):
    _, weights = sit(RECIPE, tmp_path / "straight")
    with monkeypatch.context() as patch:
        spoil("gradient", 7, patch)
        with pytest.raises(TrainingError):
            sit(RECIPE, tmp_path / "stopped")
    assert newest_verified(tmp_path / "stopped" / "checkpoints", RUN_ID)[0].step == 6
    _, again = sit(RECIPE, tmp_path / "stopped")
    assert same_bits(weights, again)


def test_a_held_out_loss_that_is_no_number_stops_it(tmp_path, monkeypatch):
    forward = Trainer.compute_loss

    def broken(self, model, inputs, *args, **kwargs):
        loss = forward(self, model, inputs, *args, **kwargs)
        return loss if self.model.training else loss * float("inf")

    monkeypatch.setattr(Trainer, "compute_loss", broken)
    with pytest.raises(TrainingError, match="the held-out loss became inf after step 2"):
        sit(Recipe(held_out=3, evaluation={"every_steps": 2}), tmp_path)
    assert not steps_on_disk(tmp_path / "checkpoints")


class Told:
    """Stands where a signal's watcher stands, and keeps the warnings."""

    def __init__(self):
        from lora_tune.interruption import Interruption

        self.warnings, self.stop = [], Interruption("")
        self.stop.watch = self.watch

    def watch(self, event):
        if event["event"] == "warning":
            self.warnings.append(event["message"])


def test_a_loss_far_above_those_before_is_told_with_its_rows(tmp_path, monkeypatch):
    forward, told = Trainer.compute_loss, Told()

    def spiking(self, model, inputs, *args, **kwargs):
        loss = forward(self, model, inputs, *args, **kwargs)
        return loss * 50 if self.state.global_step + 1 == 23 else loss

    monkeypatch.setattr(Trainer, "compute_loss", spiking)
    sit(Recipe(n_rows=48, micro_batch_sequences=2, max_steps=24), tmp_path, stop=told.stop)
    assert len(told.warnings) == 1
    assert "the loss of step 23 is" in told.warnings[0]
    assert "rows.jsonl:" in told.warnings[0]


def test_a_run_without_gradients_is_told_once(tmp_path, monkeypatch):
    forward, told = Trainer.compute_loss, Told()
    monkeypatch.setattr(Trainer, "compute_loss", lambda self, *args, **kwargs: forward(self, *args, **kwargs) * 0.0)
    sit(Recipe(), tmp_path, stop=told.stop)
    assert told.warnings == ["all gradients were exactly 0 in 3 steps up to step 3: nothing is learned"]


def test_a_step_without_a_trained_token_is_told_with_its_rows(tmp_path, monkeypatch):
    step_of, told = Trainer.training_step, Told()

    def untrained(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step + 1 == 2:
            inputs = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
            num_items_in_batch = torch.tensor(0)
        return step_of(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(Trainer, "training_step", untrained)
    sit(Recipe(), tmp_path, stop=told.stop)
    assert len(told.warnings) == 1
    assert "no token of step 2 is trained: it teaches nothing; its rows: " in told.warnings[0]


def test_a_sound_run_is_told_nothing(tmp_path):
    told = Told()
    sit(Recipe(), tmp_path, stop=told.stop)
    assert told.warnings == []
