"""Memory that runs out: told with its parts and what to change, or gone on from with smaller micro-batches."""

import json
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from lora_tune.cli.app import run
from lora_tune.recipe.schema import TrainSection
from lora_tune.training.memory import is_out_of_memory, shrink
from lora_tune.training.trainer import Trainer
from tests.killed_run import Children
from tests.resuming import logged
from tests.tiny import write_recipe

STEPS = 5


@pytest.fixture
def at_most(monkeypatch):
    """Return a function that makes any micro-batch of more rows run out of memory, from a step on."""

    def limit(rows, *, from_step=1):
        forward = Trainer.compute_loss

        def compute(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > rows and self.state.global_step + 1 >= from_step:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return forward(self, model, inputs, *args, **kwargs)

        monkeypatch.setattr(Trainer, "compute_loss", compute)

    return limit


def train(folder, tiny_bases, **settings):
    """Train in `folder`; return the exit code and the folder of the run."""
    recipe = write_recipe(
        folder, tiny_bases(), held_out=0, rows=STEPS * 4,
        train={"max_steps": STEPS, "micro_batch_sequences": 4, "save_every_steps": 2, **settings},
    )  # fmt: skip
    words = ["train", str(recipe), "--run-dir", str(folder / "run"), "--registry", str(folder / "adapters")]
    return run(words), folder / "run"


def losses(run_dir):
    return [line["loss"] for line in logged(run_dir) if line["event"] == "step"]


def test_it_is_told_with_peak_parts_and_settings(tmp_path, tiny_bases, at_most, capsys):
    at_most(3)
    code, run_dir = train(tmp_path, tiny_bases)
    told = capsys.readouterr().err
    assert code == 71
    assert "out of memory with 4 rows of up to" in told
    for part in ("the peak was", "base 0.", "adapter 0.", "gradients 0.", "optimizer 0.", "activations and all else"):
        assert part in told, part
    assert "train.micro_batch_sequences: 2 with train.gradient_accumulation_steps: 2" in told
    assert "on_oom: shrink" in told
    assert not (run_dir / "adapter").exists()


@pytest.mark.parametrize("from_step", [1, 4])
def test_shrinking_trains_the_same_steps(tmp_path, tiny_bases, at_most, capsys, from_step):
    _, plain = train(tmp_path / "plain", tiny_bases)
    at_most(1, from_step=from_step)
    code, shrunk = train(tmp_path / "shrunk", tiny_bases, on_oom="shrink")
    assert code == 0, capsys.readouterr().err
    assert "train.micro_batch_sequences: 1 and train.gradient_accumulation_steps: 4" in capsys.readouterr().err
    assert losses(shrunk) == pytest.approx(losses(plain), rel=1e-5)
    assert [line["step"] for line in logged(shrunk)] == list(range(1, STEPS + 1))
    figures = [
        json.loads((folder / "report.json").read_text())["training"]["trained_tokens"] for folder in (shrunk, plain)
    ]
    assert figures[0] == figures[1]


def test_a_micro_batch_of_one_cannot_shrink(tmp_path, tiny_bases, at_most, capsys):
    at_most(0)
    assert train(tmp_path, tiny_bases, on_oom="shrink")[0] == 71
    told = capsys.readouterr().err
    assert "out of memory with 1 rows" in told
    assert "train.gradient_checkpointing: true" in told


@pytest.mark.parametrize("micro", range(2, 40))
def test_shrinking_keeps_the_rows_of_a_step(micro):
    section = shrink(TrainSection(micro_batch_sequences=micro, gradient_accumulation_steps=3))
    assert section.micro_batch_sequences < micro
    assert section.micro_batch_sequences * section.gradient_accumulation_steps == 3 * micro


@pytest.mark.parametrize(("err", "expected"), [
    (MemoryError(), True), (torch.OutOfMemoryError("CUDA out of memory"), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), True),
    (RuntimeError("shapes differ"), False), (ValueError("out of memory"), False),
])  # fmt: skip
def test_what_counts_as_out_of_memory(err, expected):
    assert is_out_of_memory(err) is expected


@pytest.mark.slow
def test_a_real_limit_on_memory_is_told_the_same_way(tmp_path, tiny_bases):
    recipe = write_recipe(
        tmp_path, tiny_bases(), rows=512, held_out=0, train={"max_steps": 2, "micro_batch_sequences": 512, "learning_rate": 1e-3}
    )  # fmt: skip
    words = ["train", recipe, "--run-dir", tmp_path / "run", "--registry", tmp_path / "adapters"]
    with Children() as children:
        pid = children.begin(words, tmp_path, hold=True)
        while Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
            time.sleep(0.01)
        held = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (held + 250 * 2**20,) * 2)
        children.signal(pid, signal.SIGCONT)
        code = children.end()
    told = (tmp_path / "log").read_text()
    assert code == 71, told
    assert "out of memory with 512 rows" in told
    assert "activations and all else" in told
