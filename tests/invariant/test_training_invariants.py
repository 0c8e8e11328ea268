"""Runs that must agree: accumulation, checkpointing, padding, order and resume; and noise that stays in training."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches

from lora_tune.adapter.apply import apply_lora
from lora_tune.data.dataset import prepare_dataset
from lora_tune.model.load import Device, place
from lora_tune.recipe.schema import BaseSection, DataSection, EvalSection, LoraSection, TrainSection
from lora_tune.training.trainer import fit, make_trainer, sft_settings
from tests.tiny import home_rows, tiny_model, tiny_tokenizer, write_jsonl

CPU = Device("cpu", computes_bf16=False)
BATCHINGS = ("grouped", "random", "packed")
MAX_SEQ_TOKENS = 256


def parts(tmp_path, architecture="llama", *, n_rows=12, n_held_out=0, evaluation=None, **train):
    """Return what `fit` and `make_trainer` take: positional arguments, then keywords. Rows differ in length."""
    rows = home_rows(n_rows + n_held_out)
    for number, row in enumerate(rows):
        row["messages"][1]["content"] += " please" * (number * 5 % 13)
    paths = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows[:n_rows]))}
    if n_held_out:
        paths["eval_path"] = str(write_jsonl(tmp_path / "held.jsonl", rows[n_rows:]))
    tokenizer = tiny_tokenizer()
    splits = prepare_dataset(DataSection(**paths, max_seq_tokens=MAX_SEQ_TOKENS), tokenizer, seed=0)
    model = apply_lora(tiny_model(architecture), LoraSection(rank=4), adapter_dtype="fp32")
    section = TrainSection(**{"micro_batch_sequences": 4, "epochs": 1.0, **train})
    placement = place(CPU, BaseSection(name="x/y"))
    return (model, tokenizer, splits, section, evaluation or EvalSection()), {
        "placement": placement, "device": CPU, "folder": tmp_path, "max_seq_tokens": MAX_SEQ_TOKENS
    }  # fmt: skip


def make(tmp_path, architecture="llama", *, neftune_alpha=0.0, **settings):
    """Return a trainer, the splits and the model."""
    arguments, keywords = parts(tmp_path, architecture, **settings)
    return make_trainer(*arguments, **keywords, neftune_alpha=neftune_alpha), arguments[2], arguments[0]


def _weights(tmp_path, **train):
    trainer, _, model = make(tmp_path, **{"max_steps": 3, **train})
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_accumulating_8_times_1_equals_1_time_8(tmp_path, batching):
    # 20 rows are two steps and a shorter third one; their packs are fewer, and an epoch is one step.
    whole = _weights(tmp_path / "a", n_rows=20, micro_batch_sequences=8, batching=batching)
    cut = _weights(tmp_path / "b", n_rows=20, micro_batch_sequences=1, gradient_accumulation_steps=8, batching=batching)
    assert _largest_difference(whole, cut) <= 1e-5


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = _weights(tmp_path / "a")
    recomputed = _weights(tmp_path / "b", gradient_checkpointing=True)
    assert _largest_difference(plain, recomputed) <= 1e-6


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_padding_changes_no_loss(tmp_path, architecture):
    trainer, _, model = make(tmp_path, architecture)
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


def rows_in(inputs):
    """Return the rows of a micro-batch as the model is given them: ids by row, without padding."""
    if "attention_mask" in inputs:
        return [tuple(ids[seen == 1].tolist()) for ids, seen in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]  # fmt: skip
    found = []
    for ids, positions in zip(inputs["input_ids"].tolist(), inputs["position_ids"].tolist(), strict=True):
        starts = [number for number, position in enumerate(positions) if position == 0] + [len(ids)]
        found += [tuple(ids[a:b]) for a, b in pairwise(starts)]
    return [row for row in found if set(row) != {0}]  # padding is a row of its own


@pytest.mark.parametrize("batching", BATCHINGS)
def test_the_model_sees_every_row_once_an_epoch_in_another_order_each(tmp_path, batching):
    trainer, splits, model = make(tmp_path, n_rows=24, epochs=2.0, batching=batching, micro_batch_sequences=3)
    seen = []
    forward = model.get_base_model().model.forward

    def record(**inputs):
        seen.append(rows_in({name: value for name, value in inputs.items() if value is not None}))
        return forward(**inputs)

    model.get_base_model().model.forward = record
    trainer.train()
    per_epoch = len(seen) // 2
    epochs = [seen[start : start + per_epoch] for start in range(0, len(seen), per_epoch)]
    ours = sorted(tuple(row.input_ids) for row in splits.train.rows)
    assert len(epochs) == 2
    for epoch in epochs:
        assert sorted(row for batch in epoch for row in batch) == ours
    assert epochs[0] != epochs[1]
    lengths = np.array([len(row.input_ids) for row in splits.train.rows])
    assert trainer.n_tokens == 2 * lengths.sum()
    assert trainer.n_trained == 2 * sum(sum(row.trained[1:]) for row in splits.train.rows)


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_epoch_goes_on_with_exactly_the_rows_that_were_left(tmp_path, batching, epoch):
    def batches(loader):
        loader.set_epoch(epoch)
        return [batch["input_ids"].tolist() for batch in loader]

    straight, _, _ = make(tmp_path / "a", n_rows=40, batching=batching, micro_batch_sequences=2)
    whole = batches(straight.get_train_dataloader())
    resumed, _, _ = make(tmp_path / "b", n_rows=40, batching=batching, micro_batch_sequences=2)
    torch.manual_seed(12345)  # whatever was drawn in between decides nothing
    np.random.seed(12345)
    left = batches(skip_first_batches(resumed.get_train_dataloader(), 2))  # as transformers resumes
    assert len(whole) > 3
    assert left == whole[2:]


@pytest.mark.parametrize("batching", BATCHINGS)
def test_the_held_out_loss_is_per_row_and_weighted_by_tokens(tmp_path, batching):
    trainer, splits, model = make(
        tmp_path, n_held_out=7, evaluation=EvalSection(every_steps=1), batching=batching, micro_batch_sequences=3
    )
    summed, count = 0.0, 0
    with torch.no_grad():
        for row in splits.held_out.rows:
            ids = torch.tensor([list(row.input_ids)])
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            trained = torch.tensor(row.trained[1:])
            summed, count = summed + float(losses[trained].sum()), count + int(trained.sum())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(summed / count, rel=1e-5)
    widths = [batch["input_ids"].shape[1] for batch in trainer.get_eval_dataloader()]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_each_step_says_its_padding_and_the_last_says_that_of_the_run(tmp_path, batching):
    events = []
    arguments, keywords = parts(tmp_path, n_rows=30, batching=batching)
    outcome = fit(*arguments, **keywords, notify=events.append)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shares = [event["padding_share"] for event in events]
    assert shares == [line["padding_share"] for line in written]
    assert all(0.0 <= share < 1.0 for share in shares)
    assert outcome.padding_share == pytest.approx(shares[-1], abs=1e-4)
    assert outcome.tokens == sum(len(row.input_ids) for row in arguments[2].train.rows)


def test_neftune_is_asked_for_only_when_it_is_wanted():
    settings = [
        sft_settings(TrainSection(), EvalSection(), place(CPU, BaseSection(name="x/y")), CPU, **wanted)
        for wanted in ({}, {"neftune_alpha": 0.0}, {"neftune_alpha": 5.0})
    ]
    assert [found["neftune_noise_alpha"] for found in settings] == [None, None, 5.0]


def test_neftune_adds_noise_to_the_training_forward_and_to_nothing_else(tmp_path):
    trainer, splits, model = make(
        tmp_path, neftune_alpha=5.0, n_held_out=4, evaluation=EvalSection(every_steps=1), max_steps=2
    )
    embeddings = model.get_base_model().get_input_embeddings()
    ids = torch.tensor([list(splits.train.rows[0].input_ids)])
    plain = torch.nn.functional.embedding(ids, embeddings.weight)
    found = []
    training_step, evaluate = trainer.training_step, trainer.evaluate

    def step(*arguments, **keywords):
        model.train()
        found.append((embeddings(ids).detach() - plain).abs().max().item())
        return training_step(*arguments, **keywords)

    def measure(*arguments, **keywords):
        model.eval()
        assert torch.equal(embeddings(ids), plain)
        return evaluate(*arguments, **keywords)

    trainer.training_step, trainer.evaluate = step, measure
    weight = embeddings.weight.clone()
    trainer.train()
    bound = 5.0 / (plain.shape[1] * plain.shape[2]) ** 0.5  # arXiv 2310.05914, algorithm 1
    assert len(found) == 2
    assert all(bound / 2 < noise <= bound * 1.001 for noise in found)
    model.train()
    assert torch.equal(embeddings(ids), plain)  # the hook is gone
    assert torch.equal(embeddings.weight, weight)
    assert not embeddings._forward_hooks
