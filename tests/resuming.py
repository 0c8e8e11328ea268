"""Runs that stop and go on, in one process: what they train, and what they leave, to be compared to the bit."""

import json
from contextlib import suppress
from pathlib import Path

import torch

from lora_tune.adapter.apply import apply_lora, trained_weights
from lora_tune.data.dataset import prepare_dataset
from lora_tune.errors import StoppedError
from lora_tune.interruption import Interruption
from lora_tune.model.dense import ready_base
from lora_tune.model.load import Device, load_base, place
from lora_tune.recipe.schema import BaseSection, DataSection, EvalSection, LoraSection, TrainSection
from lora_tune.training.checkpoints import newest_verified
from lora_tune.training.keeper import Course
from lora_tune.training.trainer import fit
from tests.tiny import home_rows, save_tiny_base, tiny_model, tiny_tokenizer, write_jsonl

CPU = Device("cpu", computes_bf16=False)
MAX_SEQ_TOKENS = 256
RUN_ID = "0" * 32


class Recipe:
    """A small training, with everything that a test may want to vary."""

    def __init__(self, *, n_rows=14, held_out=0, lora=None, evaluation=None, quantization="none", neftune=0.0, **train):
        self.n_rows, self.held_out, self.quantization, self.neftune = n_rows, held_out, quantization, neftune
        self.lora = LoraSection(rank=4, **(lora or {}))
        self.evaluation = EvalSection(**(evaluation or {}))
        self.train = TrainSection(**{"micro_batch_sequences": 2, "epochs": 1.0, "learning_rate": 1e-2, **train})

    def splits(self, folder: Path):
        rows = home_rows(self.n_rows + self.held_out)
        for number, row in enumerate(rows):
            row["messages"][1]["content"] += " please" * (number * 5 % 13)
        paths = {"path": str(write_jsonl(folder / "rows.jsonl", rows[: self.n_rows]))}
        if self.held_out:
            paths["eval_path"] = str(write_jsonl(folder / "held.jsonl", rows[self.n_rows :]))
        return prepare_dataset(DataSection(**paths, max_seq_tokens=MAX_SEQ_TOKENS), tiny_tokenizer(), seed=0)

    def base(self, folder: Path):
        """Return a fresh base; a quantized one is read from files, as a run reads it."""
        if self.quantization == "none":
            return tiny_model("llama")
        files = save_tiny_base(folder / "base") if not (folder / "base").exists() else folder / "base"
        section = BaseSection(name=str(files), quantization=self.quantization, dtype="fp32")
        return load_base(ready_base(section, lambda label, share: None), section)


class StopAfter(Interruption):
    """Asks to stop as a signal would, once `when(event)` says so."""

    def __init__(self, step=None):
        super().__init__("go on")
        self._step = step

    def watch(self, event):
        if event["event"] == "step" and event["step"] == self._step:
            self.requested = "SIGTERM"


def sit(recipe: Recipe, folder: Path, *, stop=None, splits=None, section=None, drifted=False):
    """Train in `folder` from its newest checkpoint, or from the beginning; return (outcome or StoppedError, weights)."""
    folder.mkdir(parents=True, exist_ok=True)
    stop = stop or Interruption("")
    splits = splits or recipe.splits(folder)
    torch.manual_seed(recipe.train.seed)
    model = apply_lora(recipe.base(folder), recipe.lora, adapter_dtype="fp32")
    start, _ = newest_verified(folder / "checkpoints", RUN_ID)
    course = Course(folder / "checkpoints", RUN_ID, {}, start, drifted=drifted, stop=stop)
    if start is not None:
        torch.manual_seed(98765)  # whatever was drawn before decides nothing
    outcome = None
    with suppress(StoppedError):
        outcome = fit(
            model, tiny_tokenizer(), splits, section or recipe.train, recipe.evaluation,
            placement=place(CPU, BaseSection(name="x/y")), device=CPU, folder=folder, max_seq_tokens=MAX_SEQ_TOKENS,
            notify=getattr(stop, "watch", lambda event: None), neftune_alpha=recipe.neftune, course=course,
        )  # fmt: skip
    return outcome, {name: weight.detach().clone() for name, weight in trained_weights(model).items()}


TIMES = {"seconds", "tokens_per_second", "peak_memory_gib", "checkpoint_seconds", "elapsed_seconds", "eta_seconds"}


def figures(outcome):
    """Return an outcome without what a clock measured."""
    return {name: value for name, value in outcome.as_dict().items() if name not in TIMES}


def figures_of_report(run: Path):
    """Return a report's figures without places and what a clock measured."""
    report = json.loads((run / "report.json").read_text())
    training = {name: value for name, value in report["training"].items() if name not in TIMES}
    measured = {who: {name: value for name, value in found.items() if "second" not in name}
                for who, found in (report["evaluation"] or {}).items() if isinstance(found, dict)}  # fmt: skip
    return {"training": training, "evaluation": measured, "adapter": report["adapter"] | {"folder": ""}}


def logged(folder: Path):
    """Return the metrics' lines without what a clock measured, and without where the run was stopped."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in lines
        if line["event"] != "resumed"
    ]


def same_bits(a, b):
    """Return whether two tables of weights are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)
