"""A run that is stopped and goes on trains what it would have trained: weights, losses, counts and log, to the bit."""

import json

import pytest
from safetensors.torch import load_file

from lora_tune.training.checkpoints import steps_on_disk
from tests.resuming import Recipe, StopAfter, figures, logged, same_bits, sit

RECIPES = {
    "lora": Recipe(),
    "nf4": Recipe(quantization="nf4"),
    "int8": Recipe(quantization="int8"),
    "more steps than an epoch has, and a short last batch": Recipe(
        n_rows=5, gradient_accumulation_steps=2, max_steps=7
    ),
    "packed, accumulated, measured": Recipe(
        batching="packed",
        epochs=2.0,
        n_rows=24,
        gradient_accumulation_steps=2,
        held_out=3,
        evaluation={"every_steps": 2},
    ),
    "accumulated, in the second epoch": Recipe(gradient_accumulation_steps=2, epochs=1.5),
    "grouped by length": Recipe(batching="grouped", epochs=1.2),
    "packed": Recipe(batching="packed", epochs=2.0, n_rows=24),
    "dropout and noise": Recipe(lora={"dropout": 0.3}, neftune=5.0),
    "checkpointed activations, dora": Recipe(lora={"variant": "dora"}, gradient_checkpointing=True, max_steps=5),
    "early stopping": Recipe(
        held_out=4, evaluation={"every_steps": 1, "early_stopping_patience": 2}, learning_rate=0.3, epochs=2.0
    ),
}


def check(recipe, folder, stops):
    """Stop a run after each of `stops` in turn, in runs of their own, and compare with the run that was not stopped."""
    straight, weights = sit(recipe, folder / "straight")
    for step in stops(straight.steps):
        stopped, _ = sit(recipe, folder / str(step), stop=StopAfter(step))
        assert stopped is None
        resumed, again = sit(recipe, folder / str(step))
        assert same_bits(weights, again), step
        assert figures(resumed) == figures(straight), step
        assert logged(folder / str(step)) == logged(folder / "straight"), step
    return straight


@pytest.mark.parametrize(
    "name", ["nf4", "accumulated, in the second epoch", "packed", "dropout and noise", "early stopping"]
)
def test_a_stopped_run_goes_on_to_the_bit(tmp_path, name):
    check(RECIPES[name], tmp_path, lambda steps: [steps // 2 + 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_goes_on_from_every_step_to_the_bit(tmp_path, name):
    straight = check(RECIPES[name], tmp_path, lambda steps: range(1, steps + 1))
    assert straight.steps >= 4
    if name == "early stopping":
        assert straight.best_step < straight.steps, "the run is to end by patience, after its best step"


def test_a_run_that_is_stopped_again_and_again_is_the_same_run(tmp_path):
    recipe = RECIPES["early stopping"]
    straight, weights = sit(recipe, tmp_path / "straight")
    for step in range(1, straight.steps):
        stopped, _ = sit(recipe, tmp_path / "often", stop=StopAfter(step))
        assert stopped is None
    resumed, again = sit(recipe, tmp_path / "often")
    assert same_bits(weights, again)
    assert figures(resumed) == figures(straight)
    assert logged(tmp_path / "often") == logged(tmp_path / "straight")


@pytest.mark.parametrize(("settings", "kept"), [
    ({"save_every_steps": 3, "keep_checkpoints": 2}, [6, 7]),
    ({"save_every_steps": 2, "keep_checkpoints": 9}, [2, 4, 6, 7]),
    ({"save_every_steps": None}, [7]),
    ({}, [7]),
])  # fmt: skip
def test_checkpoints_are_written_when_due_and_so_many_are_kept(tmp_path, settings, kept):
    outcome, _ = sit(Recipe(**settings), tmp_path)
    assert outcome.steps == 7
    assert steps_on_disk(tmp_path / "checkpoints") == kept


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path):
    recipe = Recipe(held_out=4, evaluation={"every_steps": 1}, learning_rate=0.3, epochs=2.0, keep_checkpoints=1)
    sit(recipe, tmp_path, stop=StopAfter(11))
    losses = {line["step"]: line["held_out_loss"] for line in logged(tmp_path) if line["event"] == "held_out"}
    best = min(losses, key=losses.get)
    assert best < 10, "the loss is to rise before the run is stopped"
    assert steps_on_disk(tmp_path / "checkpoints") == [best, 11]
    outcome, _ = sit(recipe, tmp_path)
    assert outcome.best_step is None, "without early stopping the last weights are the result"
    assert outcome.steps in steps_on_disk(tmp_path / "checkpoints")


def test_nothing_in_a_checkpoint_is_pickled_and_no_secret_is_in_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s3cret" * 6)
    sit(Recipe(save_every_steps=1, held_out=3, evaluation={"every_steps": 2, "early_stopping_patience": 1}), tmp_path)
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        content = path.read_bytes()
        assert b"s3cret" not in content
        assert not content.startswith((b"\x80", b"PK"))
        load_file(path) if path.suffix == ".safetensors" else json.loads(content)


def test_checkpoints_change_nothing(tmp_path):
    kept, weights = sit(Recipe(save_every_steps=1), tmp_path / "kept")
    none, plain = sit(Recipe(save_every_steps=None), tmp_path / "none")
    assert same_bits(weights, plain)
    assert figures(kept) == figures(none)
