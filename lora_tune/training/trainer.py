"""The only file that knows TRL: a recipe's section → SFTConfig, our SFTTrainer, and what came out of training."""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from lora_tune.errors import OutOfMemoryError, TrainingError
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
from lora_tune.training.callbacks import BestWeights, FiniteGradients, StepLog, peak_memory_gib
from lora_tune.training.prepare import Notify

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "out of memory",
)

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
    """TRL's trainer, fed with finished tokens and labels; stops at the first loss that is not a number."""

    feed: Feed
    """The training rows in their order."""
    held_out_order: Sequence[int] = ()
    """Held-out rows, longest first: the least padding, and the most memory at once."""
    head = "trl"
    n_tokens = 0
    n_trained = 0
    n_padded = 0

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
        return summed / count

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Return and log the held-out loss: the mean over trained tokens, as evaluation/evaluate.py measures it."""
        self.model.eval()
        summed, count = 0.0, 0
        for batch in self.get_eval_dataloader():
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
        self.n_trained += int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss became {float(loss)} at step {self.state.global_step + 1}; the weights were not updated with it",
                hint="lower train.learning_rate, or look for broken rows with `lora-tune preview`",
            )
        return loss


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
    trainer.head = loss_head(device, model.get_base_model())
    trainer.remove_callback(PrinterCallback)
    return trainer


def fit(  # noqa: PLR0913
    model: Any, tokenizer: Any, splits: Splits, section: TrainSection, evaluation: EvalSection, *,
    placement: Placement, device: Device, folder: Path, notify: Notify,
    max_seq_tokens: int = 1024, neftune_alpha: float = 0.0,
) -> Outcome:  # fmt: skip
    """Train the adapter in place and return what happened.

    Raises:
        TrainingError: the loss is no longer a number, or rows are to be packed on a base that lets them see each other
            (exit 65).
    """
    log = StepLog(folder / "metrics.jsonl", notify)
    best = BestWeights(evaluation.early_stopping_patience)
    trainer = make_trainer(
        model, tokenizer, splits, section, evaluation, placement=placement, device=device, folder=folder,
        callbacks=[log, best, FiniteGradients()], max_seq_tokens=max_seq_tokens, neftune_alpha=neftune_alpha,
    )  # fmt: skip
    log.counts = trainer
    if section.batching == "packed":
        prove_packing(trainer, placement, device)
    trainer.train()
    # accelerate leaves the model inside its autocast; whoever loads the adapter computes without it.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    best.restore(model)
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
        peak_memory_gib=peak_memory_gib(),
        best_step=best.step,
        held_out_loss=best.loss if best.step is not None else log.held_out_loss,
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


@contextmanager
def memory_guard(section: TrainSection, splits: Splits) -> Iterator[None]:
    """Translate what runs out of memory in the block.

    Raises:
        OutOfMemoryError: with the peak and the settings to change (exit 71).
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as err:
        if type(err) is RuntimeError and not any(sign in str(err) for sign in _OUT_OF_MEMORY):
            raise
        what = f"rows of up to {int(splits.train.n_tokens_by_row.max())} tokens"
        raise OutOfMemoryError(
            f"out of memory with {section.micro_batch_sequences} {'packs of rows' if section.batching == 'packed' else what} "
            f"({peak_memory_gib():.2f} GiB at the peak): {(str(err) or type(err).__name__).splitlines()[0]}",
            hint="halve train.micro_batch_sequences and double train.gradient_accumulation_steps (now "
            f"{section.micro_batch_sequences} and {section.gradient_accumulation_steps}); then "
            "train.gradient_checkpointing: true, base.quantization: nf4, a lower data.max_seq_tokens",
        ) from err
