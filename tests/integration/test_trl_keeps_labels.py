"""What reaches the model equals what we made: the pin for trl's `skip_prepare_dataset`."""

from pathlib import Path

import pytest

from lora_tune.adapter.apply import apply_lora
from lora_tune.data.dataset import prepare_dataset
from lora_tune.data.tokens import IGNORE_INDEX, loss_labels
from lora_tune.model.load import Device, place
from lora_tune.recipe.schema import BaseSection, DataSection, EvalSection, LoraSection, TrainSection
from lora_tune.training.trainer import make_trainer
from tests.tiny import ARCHITECTURES, home_rows, tiny_model, tiny_tokenizer, write_jsonl

CPU = Device("cpu", computes_bf16=False)


def _trainer(tmp_path: Path, architecture: str = "llama", **train):
    tokenizer = tiny_tokenizer()
    rows = write_jsonl(tmp_path / "rows.jsonl", home_rows(12))
    splits = prepare_dataset(DataSection(path=str(rows)), tokenizer, seed=0)
    model = apply_lora(tiny_model(architecture), LoraSection(rank=4), adapter_dtype="fp32")
    section = TrainSection(**{"micro_batch_sequences": 4, "epochs": 1.0, **train})
    placement = place(CPU, BaseSection(name="x/y"))
    trainer = make_trainer(
        model, tokenizer, splits, section, EvalSection(), placement=placement, device=CPU, folder=tmp_path / "out"
    )
    return trainer, splits, model


def test_what_reaches_the_model_equals_ours(tmp_path):
    trainer, splits, _ = _trainer(tmp_path)
    seen = []
    compute_loss = trainer.compute_loss

    def record(model, inputs, **kwargs):
        for ids, labels, attended in zip(
            *(inputs[key].tolist() for key in ("input_ids", "labels", "attention_mask")), strict=True
        ):
            real = sum(attended)
            assert attended == [1] * real + [0] * (len(ids) - real)
            assert labels[real:] == [IGNORE_INDEX] * (len(ids) - real)
            seen.append((tuple(ids[:real]), tuple(labels[:real])))
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = record
    trainer.train()
    ours = [(row.input_ids, tuple(loss_labels(row.input_ids, row.trained))) for row in splits.train.rows]
    assert sorted(seen) == sorted(ours)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_our_loss_head_gives_trls_loss_and_gradients(tmp_path, architecture):
    import torch

    trainer, _, model = _trainer(tmp_path, architecture)
    batch = next(iter(trainer.get_train_dataloader()))
    found = {}
    for head in ("supervised", "trl"):
        trainer.head = head
        model.zero_grad()
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(100))
        loss.backward()
        found[head] = (loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    ours, theirs = found["supervised"], found["trl"]
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        assert torch.allclose(gradient, theirs[1][name], atol=1e-5), name


def test_a_loss_that_is_no_number_stops_before_the_weights_change(tmp_path):
    import torch

    from lora_tune.errors import TrainingError

    trainer, _, model = _trainer(tmp_path)
    compute_loss = trainer.compute_loss
    calls = []

    def broken(*args, **kwargs):
        calls.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        loss = compute_loss(*args, **kwargs)
        return loss * float("nan") if len(calls) == 2 else loss

    trainer.compute_loss = broken
    with pytest.raises(TrainingError, match="at step 2"):
        trainer.train()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, calls[1][name])


def test_nothing_is_pickled_and_no_telemetry_is_asked_for(tmp_path):
    import os

    trainer, _, _ = _trainer(tmp_path)
    trainer.train()
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
