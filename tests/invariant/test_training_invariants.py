"""Runs that must agree: accumulation, checkpointing, padding."""

import pytest
import torch

from tests.integration.test_trl_keeps_labels import _trainer


def _weights(tmp_path, **train):
    trainer, _, model = _trainer(tmp_path, max_steps=3, **train)
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_accumulating_4_times_1_row_equals_1_time_4_rows(tmp_path):
    whole = _weights(tmp_path / "a", micro_batch_sequences=4)
    parts = _weights(tmp_path / "b", micro_batch_sequences=1, gradient_accumulation_steps=4)
    assert _largest_difference(whole, parts) <= 1e-5


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = _weights(tmp_path / "a")
    recomputed = _weights(tmp_path / "b", gradient_checkpointing=True)
    assert _largest_difference(plain, recomputed) <= 1e-6


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_padding_changes_no_loss(tmp_path, architecture):
    trainer, _, model = _trainer(tmp_path, architecture)
    collate = trainer.data_collator
    model.eval()
    examples = [trainer.train_dataset[i] for i in range(4)]
    examples[0] = {key: value[:20] for key, value in examples[0].items()} | {
        "labels": [-100] * 10 + examples[0]["input_ids"][10:20]
    }
    with torch.no_grad():
        together = trainer.compute_loss(model, collate(examples), num_items_in_batch=torch.tensor(1.0)).item()
        alone = sum(
            trainer.compute_loss(model, collate([example]), num_items_in_batch=torch.tensor(1.0)).item()
            for example in examples
        )
    assert together == pytest.approx(alone, rel=1e-5)
