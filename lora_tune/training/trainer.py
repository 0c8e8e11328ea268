"""The only file that knows TRL: a recipe's section → SFTConfig, our SFTTrainer, and what came out of training."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from lora_tune.data.dataset import Splits, as_examples
from lora_tune.data.tokens import IGNORE_INDEX
from lora_tune.model.load import Device, Placement
from lora_tune.model.quantization import is_quantized
from lora_tune.recipe.schema import EvalSection, TrainSection
from lora_tune.training.batching import (
    N_TOKENS,
    Feed,
    Precision,
    check_packing,
    join_packs,
    needs_one_line,
    short_rows,
    train_feed,
)
from lora_tune.training.callbacks import BestWeights, StepLog
from lora_tune.training.keeper import Course, Keeper
from lora_tune.training.memory import memory_by_part
from lora_tune.training.numbers import Numbers
from lora_tune.training.prepare import Notify
from lora_tune.training.snapshot import random_states

MAX_LOGITS_BYTES = 2 * 1024**3
"""Above this, the logits of a micro-batch are left to TRL's chunked head."""


@dataclass(frozen=True)
class Outcome:
    """What training did."""

    steps: int
    epochs: float
    first_loss: float
    """Loss of the first step, in nats a trained token."""
    last_loss: float
    """Mean loss of the last tenth of the steps."""
    tokens: int
    """Tokens that went through the model, without padding."""
    trained_tokens: int
    batching: str
    """How rows shared a micro-batch: `grouped`, `random` or `packed`."""
    padding_share: float
    """Padding among all tokens that were computed."""
    seconds: float
    tokens_per_second: float
    """Real tokens, without padding."""
    peak_memory_gib: float
    best_step: int | None
    """Step whose weights were kept by early stopping; None keeps the last."""
    held_out_loss: float | None
    """Held-out loss of the weights that were kept, when it was measured while training."""
    checkpoint_seconds: float = 0.0
    """Spent writing checkpoints, in this sitting; `seconds` holds it too."""

    def as_dict(self) -> dict[str, Any]:
        """The outcome as reports print it."""
        return asdict(self)


def sft_settings(
    section: TrainSection, evaluation: EvalSection, placement: Placement, device: Device, *, neftune_alpha: float = 0.0
) -> dict[str, Any]:
    """Return the recipe's part of SFTConfig: recipe field → upstream argument, in one table.

    `train.batching` is not in it: batching.py feeds the trainer.
    """
    return {
        "num_train_epochs": section.epochs,
        "max_steps": -1 if section.max_steps is None else section.max_steps,
        "per_device_train_batch_size": section.micro_batch_sequences,
        "per_device_eval_batch_size": section.micro_batch_sequences,
        "gradient_accumulation_steps": section.gradient_accumulation_steps,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(section.schedule, section.schedule),
        "warmup_steps": section.warmup_ratio,  # below 1 it is a share of the steps
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "gradient_checkpointing": section.gradient_checkpointing,
        "seed": section.seed,
        "neftune_noise_alpha": neftune_alpha or None,  # 0.0 would hook the embeddings for nothing
        "eval_strategy": "no" if evaluation.every_steps is None else "steps",
        "eval_steps": evaluation.every_steps,
        "bf16": placement.autocast_bf16,
        "use_cpu": device.kind == "cpu",
    }


def loss_head(device: Device, model: Any) -> str:
    """Return who computes the loss: `trl` (its Triton kernel on CUDA), or `supervised`, our head on trained positions.

    On the CPU TRL's head projects every position, padding and prompt too, onto the vocabulary.
    """
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    return "supervised" if device.kind != "cuda" and takes else "trl"


class Trainer(SFTTrainer):
    """TRL's trainer, fed with finished tokens and labels; its checkpoints are ours, and it stops at what is no number."""

    feed: Feed
    """The training rows in their order."""
    places: Sequence[Any] = ()
    """The training rows with where each stands, as `feed` counts them."""
    keeper: Keeper | None = None
    numbers: Numbers
    held_out_order: Sequence[int] = ()
    """Held-out rows, longest first: the least padding, and the most memory at once."""
    head = "trl"
    n_tokens = 0
    n_trained = 0
    n_padded = 0
    _micro_batch = 0

    def get_train_dataloader(self) -> Any:
        """Return the training rows as `train.batching` wants them."""
        return self._loader(self.feed.dataset, self.feed.order, self.feed.collate)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the held-out rows, sorted by length; never packed."""
        return self._loader(self.eval_dataset, self.held_out_order, self.data_collator)

    def _loader(self, dataset: Any, order: Any, collate: Any) -> Any:
        return self.accelerator.prepare(
            DataLoader(
                dataset,
                batch_size=self.args.per_device_train_batch_size,
                sampler=order,
                collate_fn=collate,
                pin_memory=self.args.dataloader_pin_memory,
            )
        )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean negative log-likelihood of the trained tokens over the whole accumulated batch."""
        inputs = {name: value for name, value in inputs.items() if name != N_TOKENS}
        labels = inputs["labels"][:, 1:]
        positions = (labels != IGNORE_INDEX).any(dim=0).nonzero().flatten()
        logits_bytes = labels.shape[0] * len(positions) * model.config.get_text_config().vocab_size * 4
        if self.head != "supervised" or self.aux_loss_enabled or return_outputs or logits_bytes > MAX_LOGITS_BYTES:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        seen = {name: value for name, value in inputs.items() if name != "labels"}
        # No cache: with one, transformers would not look for packed rows.
        logits = model(**seen, use_cache=False, logits_to_keep=positions).logits
        targets = labels[:, positions]
        summed = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        count = (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        return summed / max(count, 1)  # a step without a trained token teaches nothing, and is told

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Return and log the held-out loss: the mean over trained tokens, as evaluation/evaluate.py measures it."""
        self.model.eval()
        summed, count = 0.0, 0
        drawn = random_states() if self.keeper else {}
        for batch in self.get_eval_dataloader():
            if self.keeper and self.keeper.postpones_evaluation(drawn, self.control):
                return {}
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                summed += float(self.compute_loss(self.model, inputs, num_items_in_batch=torch.tensor(1.0)))
            count += int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
        metrics = {f"{metric_key_prefix}_loss": summed / count}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """Run one micro-batch, count its tokens, and refuse to go on from a loss that is not a number."""
        self.n_tokens += int(inputs[N_TOKENS] if N_TOKENS in inputs else inputs["attention_mask"].sum())
        self.n_padded += int(inputs["input_ids"].numel())
        n_trained = int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
        self.n_trained += n_trained
        loss = super().training_step(model, inputs, num_items_in_batch)
        first = self._micro_batch * self.args.per_device_train_batch_size
        self.numbers.check_loss(loss, self.state.global_step, first, self.args.per_device_train_batch_size)
        self.numbers.step_trained += n_trained
        self._micro_batch = (self._micro_batch + 1) % self.current_gradient_accumulation_steps
        return loss

    def rows_of_step(self, step: int) -> list[list[str]]:
        """Return where the rows of a step stand, step from 0: a list for each row, or for each pack."""
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        epoch, within = divmod(step, -(-len(self.feed.order) // size))
        sequences = self.feed.order.order(epoch)[within * size : (within + 1) * size]
        packs = getattr(self.feed.dataset, "packs", None)
        members = [[number] if packs is None else packs[number] for number in sequences]
        return [[str(self.places[int(row)].where) for row in rows] for rows in members]

    # transformers' own checkpoints are replaced here by keeper.py's; the rest of its resume is used as it is.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.keeper is not None, "save_strategy is no: only the keeper asks for a checkpoint"
        self.keeper.save()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert self.keeper is not None
        self.keeper.load_weights()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.keeper is not None:
            self.keeper.load_optimizer()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.keeper is not None:
            self.keeper.restore_random()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers would train one step more after the last.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)


def make_trainer(  # noqa: PLR0913
    model: Any, tokenizer: Any, splits: Splits, section: TrainSection, evaluation: EvalSection, *,
    placement: Placement, device: Device, folder: Path, callbacks: Sequence[Any] = (),
    max_seq_tokens: int = 1024, neftune_alpha: float = 0.0,
) -> Trainer:  # fmt: skip
    """Return a trainer that passes our `input_ids` and `labels` to the model untouched.

    Args:
        max_seq_tokens: tokens of a full pack, where `train.batching` is `packed`; no row is longer.
        neftune_alpha: noise on the embeddings while training; 0 adds none.

    The others are those of `fit`.
    """
    held_out = splits.held_out if evaluation.every_steps is not None else None
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer = Trainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            logging_nan_inf_filter=False,  # on, it would log NaN as 0.0
            disable_tqdm=True,
            optim="adamw_torch",
            dataloader_pin_memory=device.kind == "cuda",
            gradient_checkpointing_kwargs={"use_reentrant": False} if section.gradient_checkpointing else None,
            **sft_settings(section, evaluation, placement, device, neftune_alpha=neftune_alpha),
        ),
        train_dataset=as_examples(splits.train.rows),
        eval_dataset=as_examples(held_out.rows) if held_out else None,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    if is_quantized(model):
        # TRL makes the adapter of a quantized base bf16 whatever the base computes in; the table of load.py decides.
        for name, parameter in model.named_parameters():
            if name in dtypes:
                parameter.data = parameter.data.to(dtypes[name])
    trainer.feed = train_feed(
        trainer.train_dataset, splits.train.n_tokens_by_row, section, max_seq_tokens=max_seq_tokens,
        collate_rows=trainer.data_collator,
        collate_packs=partial(join_packs, pad_id=tokenizer.pad_token_id, one_line=needs_one_line(model)),
    )  # fmt: skip
    if held_out:
        trainer.held_out_order = np.argsort(-held_out.n_tokens_by_row, kind="stable").tolist()
    trainer.places = splits.train.rows
    trainer.head = loss_head(device, model.get_base_model())
    trainer.numbers = Numbers(trainer.rows_of_step)
    trainer.add_callback(trainer.numbers)
    trainer.remove_callback(PrinterCallback)
    return trainer


def fit(  # noqa: PLR0913
    model: Any, tokenizer: Any, splits: Splits, section: TrainSection, evaluation: EvalSection, *,
    placement: Placement, device: Device, folder: Path, notify: Notify,
    max_seq_tokens: int = 1024, neftune_alpha: float = 0.0, course: Course | None = None, memory: dict[str, float] | None = None,
) -> Outcome:  # fmt: skip
    """Train the adapter in place and return what happened.

    Args:
        course: where checkpoints are kept and where to begin; None keeps none.
        memory: filled with GiB by part when training fails.

    Raises:
        TrainingError: a loss, gradient or weight is no longer a number, or rows are to be packed on a base that lets them
            see each other (exit 65).
        StoppedError: a signal ended it; a checkpoint holds all of it (exit 75).
        CannotWriteError: the disk is full or failing (exit 74).
    """
    log = StepLog(folder / "metrics.jsonl", notify)
    best = BestWeights(evaluation.early_stopping_patience)
    trainer = make_trainer(
        model, tokenizer, splits, section, evaluation, placement=placement, device=device, folder=folder,
        callbacks=[log, best], max_seq_tokens=max_seq_tokens, neftune_alpha=neftune_alpha,
    )  # fmt: skip
    log.counts = trainer
    trainer.numbers.notify = log.tell
    if course is not None:
        trainer.keeper = Keeper(course, section, log=log, best=best, numbers=trainer.numbers)
        trainer.add_callback(trainer.keeper)
        trainer.keeper.attach(trainer)
    if section.batching == "packed":
        prove_packing(trainer, placement, device)
    try:
        trainer.train(resume_from_checkpoint=str(course.start.folder) if course and course.start else None)
    except BaseException:
        if memory is not None:
            memory.update(memory_by_part(model, trainer.optimizer))
        raise
    if trainer.keeper:
        trainer.keeper.finish()
    # accelerate leaves the model inside its autocast; whoever loads the adapter computes without it.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    best.put_back(model)
    return _outcome(trainer, log, best)


def _outcome(trainer: Trainer, log: StepLog, best: BestWeights) -> Outcome:
    tail = log.losses[-max(1, len(log.losses) // 10) :]
    return Outcome(
        steps=trainer.state.global_step,
        epochs=round(float(trainer.state.epoch or 0.0), 4),
        first_loss=log.losses[0],
        last_loss=math.fsum(tail) / len(tail),
        tokens=trainer.n_tokens,
        trained_tokens=trainer.n_trained,
        batching=trainer.feed.batching,
        padding_share=1 - trainer.n_tokens / trainer.n_padded,
        seconds=log.seconds,
        tokens_per_second=trainer.n_tokens / log.seconds,
        peak_memory_gib=log.peak_memory_gib,
        best_step=best.kept_step,
        held_out_loss=best.loss if best.kept_step is not None else log.held_out_loss,
        checkpoint_seconds=round(trainer.keeper.seconds, 3) if trainer.keeper else 0.0,
    )


def prove_packing(trainer: Trainer, placement: Placement, device: Device) -> None:
    """Check that this base keeps packed rows apart, in the very precision it is trained in.

    Raises:
        TrainingError: it does not (exit 65).
    """
    model = trainer.model
    precision: Precision = "fp32" if placement.dtype == "fp32" else "rounded"
    if is_quantized(model):
        precision = "int8" if getattr(model, "is_loaded_in_8bit", False) else "rounded"
    with torch.autocast(device.kind, torch.bfloat16, enabled=placement.autocast_bf16):
        check_packing(model, short_rows(trainer.train_dataset), precision=precision)
