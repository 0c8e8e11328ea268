"""Does one step of training do what it says: its loss, its gradients, its update, whatever shares a batch, stopped or not."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from lora_tune.adapter.apply import trained_weights
from lora_tune.data.messages import Message
from lora_tune.data.tokens import prompt_ids
from lora_tune.doctor import plain
from lora_tune.doctor.finding import Finding, bounded
from lora_tune.doctor.sample import LORA, MAX_SEQ_TOKENS, Sample, adapted, rows, tiny_base, trainer_of
from lora_tune.errors import StoppedError
from lora_tune.interruption import Interruption
from lora_tune.model.generate import generate_answers
from lora_tune.recipe.schema import EvalSection, TrainSection
from lora_tune.training.checkpoints import newest_verified
from lora_tune.training.keeper import Course
from lora_tune.training.trainer import fit, prove_packing

MAX_APART = 1e-4
"""Largest relative difference of gradients, or of losses, that fp32 sums in another order are let through with."""

ANSWER_TOKENS = 8
_RUN_ID = "d" * 32


@dataclass(frozen=True)
class Step:
    """What the trainer did in its first step."""

    loss: float
    """As it logs it."""
    gradients: Mapping[str, torch.Tensor]
    before: Mapping[str, torch.Tensor]
    after: Mapping[str, torch.Tensor]
    """The adapter's weights."""
    base_is_untouched: bool
    n_micro_batches: int
    n_layer_calls: int
    """How often the first layer ran: twice a micro-batch where activations are computed again."""


class _Watch(TrainerCallback):
    """Takes the gradients that the optimizer is given."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.n_micro_batches = 1

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.n_micro_batches += 1

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients = plain.gradients_of(kwargs["model"])


def first_step(sample: Sample, architecture: str = "llama", **train: Any) -> Step:
    """Return what the trainer does in its first step with these settings."""
    model, watch, calls = adapted(tiny_base(architecture)), _Watch(), []
    before = plain.adapter_weights(model)
    frozen = {
        name: weight.detach().cpu().clone() for name, weight in model.named_parameters() if not weight.requires_grad
    }
    norm = next(module for name, module in model.named_modules() if name.endswith((".0.input_layernorm", ".0.ln_1")))
    norm.register_forward_hook(lambda *_: calls.append(1))
    trainer = trainer_of(sample, model, callbacks=[watch], **train)
    if train.get("batching") == "packed":  # as `fit` does before its first step
        prove_packing(trainer, sample.placement, sample.device)
        calls.clear()
    trainer.train()
    held = dict(model.named_parameters())
    return Step(
        loss=float(trainer.state.log_history[0]["loss"]),
        gradients=watch.gradients,
        before=before,
        after=plain.adapter_weights(model),
        base_is_untouched=all(torch.equal(held[name].detach().cpu(), weight) for name, weight in frozen.items()),
        n_micro_batches=watch.n_micro_batches,
        n_layer_calls=len(calls),
    )


def gradients(sample: Sample) -> Finding:
    """Loss and gradients of a step are those of the formula."""
    found = []
    for architecture in ("llama", "gpt2"):
        step = first_step(sample, architecture)
        loss, expected = plain.loss_and_gradients(
            tiny_base(architecture), sample.splits.train.rows, step.before, LORA.scaling
        )
        found += [plain.apart(step.gradients, expected), abs(step.loss - loss) / loss]
    detail = "loss and gradients of a step, against a plain forward pass row by row (relative; Llama and GPT-2)"
    return bounded("gradients", max(found), MAX_APART, detail)


def accumulation(sample: Sample) -> Finding:
    """Eight micro-batches of one row are one of eight."""
    whole = first_step(sample)
    cut = first_step(sample, micro_batch_sequences=1, gradient_accumulation_steps=8)
    measured = max(plain.apart(cut.gradients, whole.gradients), abs(cut.loss - whole.loss) / whole.loss)
    detail = f"loss and gradients of {cut.n_micro_batches} × 1 row, against 1 × 8 rows (relative)"
    return bounded("accumulation", measured, MAX_APART, detail)


def packing(sample: Sample) -> Finding:
    """Rows of one pack do not see each other."""
    packed = first_step(sample, batching="packed")
    apart = first_step(sample)
    measured = max(plain.apart(packed.gradients, apart.gradients), abs(packed.loss - apart.loss) / apart.loss)
    return bounded(
        "packing", measured, MAX_APART, "loss and gradients of packed rows, against the rows side by side (relative)",
        hint="set train.batching: grouped in your recipes until this is ok; install the tested versions",
    )  # fmt: skip


def padding(sample: Sample) -> Finding:
    """A row beside a longer one has the loss it has alone."""
    model = adapted(tiny_base("llama")).to(sample.device.kind)
    trainer = trainer_of(sample, model)
    model.eval()
    examples = sorted((trainer.train_dataset[number] for number in range(4)), key=lambda row: len(row["input_ids"]))
    one = torch.tensor(1.0, device=model.device)

    def summed(batch: Any) -> float:
        inputs = trainer._prepare_inputs(trainer.data_collator(batch))
        with torch.no_grad():
            return float(trainer.compute_loss(model, inputs, num_items_in_batch=one))

    together, alone = summed(examples), sum(summed([example]) for example in examples)
    detail = "summed loss of rows of different lengths side by side, against each alone (relative)"
    return bounded("padding", abs(together - alone) / alone, MAX_APART, detail)


def batched_answers(sample: Sample) -> Finding:
    """Prompts that are answered in one batch get the answers they get alone."""
    model = adapted(tiny_base("llama")).to(sample.device.kind)
    weights = plain.with_adapter(tiny_base("llama"), plain.adapter_weights(model), LORA.scaling)
    model.eval()
    asked = [turns[: -1 if len(turns) < 4 else -3] for turns in rows()[:6]]
    prompts = [
        prompt_ids(sample.tokenizer, [Message(turn["role"], turn["content"]) for turn in turns]) for turns in asked
    ]
    end = int(sample.tokenizer.eos_token_id)
    answers = generate_answers(model, sample.tokenizer, prompts, max_tokens=ANSWER_TOKENS, ends=[end])
    base = tiny_base("llama")
    expected = [plain.greedy(base, prompt, weights, max_tokens=ANSWER_TOKENS, end=end) for prompt in prompts]
    wrong = sum(a != b for a, b in zip(answers, expected, strict=True))
    detail = f"answers that change when {len(prompts)} prompts of different lengths are answered at once"
    return bounded("batched answers", float(wrong), 0.0, detail)


def checkpointing(sample: Sample) -> Finding:
    """Gradient checkpointing computes activations again, and changes nothing else."""
    kept, again = first_step(sample), first_step(sample, gradient_checkpointing=True)
    measured = plain.apart(again.gradients, kept.gradients)
    detail = "gradients with gradient checkpointing, against those without (relative)"
    found = bounded(
        "checkpointing", measured, MAX_APART, detail, hint="set train.gradient_checkpointing: false until this is ok"
    )
    if found.verdict == "ok" and again.n_layer_calls <= kept.n_layer_calls:
        told = "gradient checkpointing computes nothing again, so it saves no memory"
        return Finding("checkpointing", "failed", told, measured, MAX_APART, found.hint)
    return found


def optimizer_step(sample: Sample) -> Finding:
    """AdamW's first step moves each weight against its gradient by the learning rate, and the base stays as it is."""
    step, rate = first_step(sample), 1e-2
    moved = {name: step.after[name] - weight for name, weight in step.before.items()}
    expected = {name: -rate * gradient / (gradient.abs() + 1e-8) for name, gradient in step.gradients.items()}
    measured = plain.apart(moved, expected)
    if not step.base_is_untouched:
        return Finding(
            "optimizer step", "failed", "a step changed weights of the base, which must stay frozen", measured, 1e-3
        )
    detail = "what one step changes of the adapter, against AdamW's formula (relative); the base stays as it was"
    return bounded("optimizer step", measured, 1e-3, detail)


def held_out_loss(sample: Sample) -> Finding:
    """A measurement while training switches dropout off and counts tokens, not batches."""
    model = adapted(tiny_base("llama"), dropout=0.5)
    trainer = trainer_of(sample, model, evaluation=EvalSection(every_steps=1), micro_batch_sequences=3)
    model.train()
    measured = float(trainer.evaluate()["eval_loss"])
    assert sample.splits.held_out is not None
    weights = plain.with_adapter(tiny_base("llama"), plain.adapter_weights(model), LORA.scaling)
    with torch.no_grad():
        expected = float(plain.loss(tiny_base("llama"), sample.splits.held_out.rows, weights))
    detail = "held-out loss that training measures, dropout switched off, against a plain forward pass (relative)"
    return bounded("held-out loss", abs(measured - expected) / expected, MAX_APART, detail)


def resume(sample: Sample) -> Finding:
    """A run that is stopped and goes on ends with the weights of one that was not stopped."""
    straight, folder = sample.scratch(), sample.scratch()
    expected = _sit(sample, straight, stop_after=None)
    assert expected is not None
    stopped = _sit(sample, folder, stop_after=2)
    found = _sit(sample, folder, stop_after=None)
    if stopped is not None or found is None:
        return Finding(
            "resume",
            "failed",
            "a signal between two steps does not stop the run there, with a checkpoint",
            hint="report it",
        )
    detail = "weights of a run that was stopped after 2 of 4 steps and resumed, against one that was not (relative)"
    return bounded(
        "resume", plain.apart(found, expected), 0.0 if sample.device.kind == "cpu" else MAX_APART, detail,
        hint="do not stop and resume runs until this is ok; install the tested versions",
    )  # fmt: skip


def _sit(sample: Sample, folder: Path, *, stop_after: int | None) -> dict[str, torch.Tensor] | None:
    """Train four steps from the newest checkpoint in `folder`; return the weights, or None when it was stopped."""
    start, _ = newest_verified(folder / "checkpoints", _RUN_ID)
    stop = Interruption("")

    def watch(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == stop_after:
            stop.requested = "SIGTERM"

    model = adapted(tiny_base("llama"), dropout=0.2)
    if start is not None:
        torch.manual_seed(98765)  # what was drawn before must not matter
    section = TrainSection(max_steps=4, micro_batch_sequences=2, batching="random", learning_rate=1e-2)
    try:
        fit(
            model, sample.tokenizer, sample.splits, section, EvalSection(), placement=sample.placement,
            device=sample.device, folder=folder, notify=watch, max_seq_tokens=MAX_SEQ_TOKENS,
            course=Course(folder / "checkpoints", _RUN_ID, {}, start, stop=stop),
        )  # fmt: skip
    except StoppedError:
        return None
    return {name: weight.detach().cpu().clone() for name, weight in trained_weights(model).items()}
