"""Packed rows cannot see each other: losses, gradients and training are those of the rows alone, or packing is refused."""

import json

import numpy as np
import pytest
import torch
import transformers as hf

from lora_tune.data.order import grouped_batches, padding_share, random_order
from lora_tune.errors import TrainingError
from lora_tune.training.batching import N_TOKENS, check_packing, join_packs, short_rows
from lora_tune.training.trainer import fit
from tests.invariant.test_training_invariants import make, parts
from tests.tiny import tiny_model

WIDE = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
WINDOWED = {
    "mistral": lambda: hf.MistralConfig(**WIDE, sliding_window=4),
    "phi3": lambda: hf.Phi3Config(**WIDE, sliding_window=4),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **WIDE, head_dim=16, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
}
"""A window shorter than the rows, in all layers or in some."""


def _rows(*lengths: int) -> list[dict[str, list[int]]]:
    """Return random rows whose first third is not trained."""
    numbers = np.random.default_rng(3)
    rows = []
    for length in lengths:
        ids = numbers.integers(3, 500, length).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return rows


PACKS = [_rows(9, 17, 1, 5), _rows(12), _rows(2, 21)]
"""Of 32, 12 and 23 tokens: two of them are padded."""


def _losses(model, labels, **inputs):
    """Return the loss of each trained token, in order."""
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="none")
    return losses[labels[:, 1:].flatten() != -100]


def _alone(model, packs):
    """Return the same tokens' losses, each row in a forward pass of its own."""
    rows = [{name: torch.tensor([values]) for name, values in row.items()} for rows in packs for row in rows]
    return torch.cat([_losses(model, row["labels"], input_ids=row["input_ids"]) for row in rows])


def _packed(model, packs, *, one_line=False):
    batch = join_packs(packs, pad_id=0, one_line=one_line)
    return _losses(model, batch["labels"], input_ids=batch["input_ids"], position_ids=batch["position_ids"])


@pytest.mark.parametrize("one_line", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_losses_packed_are_those_alone(architecture, attention, one_line):
    model = tiny_model(architecture)
    model.set_attn_implementation(attention)
    difference = _packed(model, PACKS, one_line=one_line) - _alone(model, PACKS)
    assert len(difference) > 30
    assert float(difference.abs().max()) <= 1e-5


@pytest.mark.parametrize("architecture", ["qwen3", "gemma", "phi3"])
def test_losses_packed_are_those_alone_in_other_architectures(architecture):
    model = tiny_model(architecture)
    assert float((_packed(model, PACKS) - _alone(model, PACKS)).abs().max()) <= 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", WINDOWED)
def test_losses_packed_are_those_alone_with_a_sliding_window(architecture, attention):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(WINDOWED[architecture](), attn_implementation=attention).eval()
    assert float((_packed(model, PACKS) - _alone(model, PACKS)).abs().max()) <= 1e-5


def test_a_pack_without_positions_would_leak_which_is_what_these_tests_can_see():
    model = tiny_model("llama")
    batch = join_packs(PACKS, pad_id=0, one_line=False)
    leaking = _losses(model, batch["labels"], input_ids=batch["input_ids"])
    assert float((leaking - _alone(model, PACKS)).abs().max()) > 1e-3


def test_a_micro_batch_of_packs_is_built_as_written():
    first, second = {"input_ids": [11, 12, 13], "labels": [11, -100, 13]}, {"input_ids": [21, 22], "labels": [21, 22]}
    batch = join_packs([[first, second], [second]], pad_id=9, one_line=False)
    assert {name: value if name == N_TOKENS else value.tolist() for name, value in batch.items()} == {
        "input_ids": [[11, 12, 13, 21, 22], [21, 22, 9, 9, 9]],
        "labels": [[-100, -100, 13, -100, 22], [-100, 22, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]],
        N_TOKENS: 7,
    }
    line = join_packs([[first, second], [second]], pad_id=9, one_line=True)
    assert line["input_ids"].tolist() == [[11, 12, 13, 21, 22, 21, 22]]
    assert line["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]


@pytest.mark.parametrize("head", ["supervised", "trl"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradients_of_packed_rows_are_those_of_the_rows_side_by_side(tmp_path, architecture, head):
    trainer, _, model = make(tmp_path, architecture, n_rows=12, batching="packed")
    trainer.head = head
    with torch.no_grad():  # B is 0 at the start, and A would have no gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    rows = [trainer.train_dataset[number] for number in range(12)]
    packs = trainer.feed.collate([trainer.feed.dataset[number] for number in range(len(trainer.feed.dataset))])
    assert packs["input_ids"].shape[0] < 12
    found = []
    for inputs in (packs, trainer.data_collator(rows)):
        model.zero_grad()
        n_trained = (inputs["labels"][:, 1:] != -100).sum()
        trainer.compute_loss(model, inputs, num_items_in_batch=n_trained).backward()
        found.append((n_trained, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert found[0][0] == found[1][0]
    assert len(found[0][1]) > 8
    for name, gradient in found[0][1].items():
        assert gradient.abs().max() > 0
        assert torch.allclose(gradient, found[1][1][name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_training_on_packs_is_training_on_the_rows(tmp_path, architecture):
    weights = []
    for batching in ("packed", "random"):  # all rows in one step, three times
        arguments, keywords = parts(
            tmp_path / batching, architecture, n_rows=12, batching=batching, micro_batch_sequences=12, epochs=3.0
        )
        for module in arguments[0].modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # GPT-2's own: it draws otherwise for another shape
        outcome = fit(*arguments, **keywords, notify=lambda event: None)
        assert outcome.steps == 3
        weights.append({n: p.detach() for n, p in arguments[0].named_parameters() if p.requires_grad})
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], rtol=0, atol=1e-5), name


def test_packs_are_as_wide_as_allowed_and_the_widest_comes_first(tmp_path):
    trainer, splits, _ = make(tmp_path, n_rows=40, batching="packed", micro_batch_sequences=2)
    widths = [batch["input_ids"].shape for batch in trainer.get_train_dataloader()]
    assert all(n_packs <= 2 and width <= 256 for n_packs, width in widths)
    assert widths[0][1] == max(width for _, width in widths) > 2 * max(len(row.input_ids) for row in splits.train.rows)


# A base that lets packed rows see each other


def _rows_for_proof():
    return short_rows(_rows(40, 12, 50, 30))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma", "mistral", "phi3", "gpt2"])
@pytest.mark.parametrize("precision", ["fp32", "rounded"])
def test_a_base_that_keeps_rows_apart_is_proved_in_any_precision(architecture, precision):
    model = tiny_model(architecture).to(torch.float32 if precision == "fp32" else torch.bfloat16).train()
    check_packing(model, _rows_for_proof(), precision=precision)
    assert model.training


def _blind(model):
    """Make the model ignore where rows begin."""
    forward = model.forward

    def without_positions(input_ids, position_ids=None, **inputs):
        return forward(input_ids=input_ids, **inputs)

    model.forward = without_positions
    return model


@pytest.mark.parametrize("precision", ["fp32", "rounded"])
def test_a_base_whose_attention_reaches_over_is_refused_in_any_precision(precision):
    model = _blind(tiny_model("llama")).to(torch.float32 if precision == "fp32" else torch.bfloat16)
    with pytest.raises(TrainingError, match="cannot be packed on this base") as caught:
        check_packing(model, _rows_for_proof(), precision=precision)
    assert "train.batching: grouped" in caught.value.hint
    assert caught.value.exit_code == 65


def test_a_base_that_counts_positions_on_from_row_to_row_is_refused():
    model = tiny_model("gpt2")
    positions = model.transformer.wpe
    embed = positions.forward
    positions.forward = lambda ids: embed(torch.arange(ids.shape[-1])[None].expand_as(ids))
    with pytest.raises(TrainingError, match="from those it has alone"):
        check_packing(model, _rows_for_proof(), precision="fp32")


RECURRENT = {
    "mamba": lambda: hf.MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, state_size=8),
    "recurrent_gemma": lambda: hf.RecurrentGemmaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, lru_width=64,
        attention_window_size=32, pad_token_id=0
    ),
    "opt": lambda: hf.OPTConfig(
        vocab_size=512, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64
    ),
}  # fmt: skip
"""Real architectures: one takes no positions, one carries a state from row to row, one counts positions by itself."""


@pytest.mark.parametrize("architecture", RECURRENT)
def test_architectures_that_let_rows_see_each_other_are_refused(architecture):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(RECURRENT[architecture]()).eval()
    with pytest.raises(TrainingError, match=f"on this base .{architecture}."):
        check_packing(model, _rows_for_proof(), precision="fp32")


def test_a_leaking_base_stops_the_run_before_the_first_step(tmp_path):
    arguments, keywords = parts(tmp_path, batching="packed")
    model = arguments[0]
    _blind(model.get_base_model())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(TrainingError, match="cannot be packed"):
        fit(*arguments, **keywords, notify=lambda event: None)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_rows_for_the_proof_are_of_one_length_whatever_the_set_holds():
    for rows in (_rows(1), _rows(3, 500), _rows(40, 12, 50, 30)):
        first, second = short_rows(rows)
        assert len(first) == len(second) > 16


def test_the_demo_file_is_padded_by_less_than_5_percent(shared_data, tokenizer):
    rows = json.loads((shared_data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    texts = ["\n".join((row["instruction"], row["input"], row["output"])) for row in rows]
    lengths = np.array([len(ids) for ids in tokenizer(texts)["input_ids"]])
    assert len(lengths) == 999
    for epoch in (0, 1):
        assert padding_share(lengths, grouped_batches(lengths, 4, seed=0, epoch=epoch), 4) <= 0.05
        assert padding_share(lengths, random_order(999, seed=0, epoch=epoch), 4) > 0.35
