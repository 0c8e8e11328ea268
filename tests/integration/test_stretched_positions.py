"""Bases whose positions are stretched by the longest row of a batch: each answer is read alone, or the base is refused."""

import pytest
import torch
import transformers as hf

from lora_tune.errors import UnsupportedError
from lora_tune.serving.batches import stretching
from lora_tune.serving.forward import unsupported
from lora_tune.serving.simple import SimpleEngine
from tests.engines import ask

WIDE = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
N_SHORT = 16
"""Tokens from which longrope reads with its other frequencies."""


def longrope():
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 8, "long_factor": [8.0] * 8,
            "original_max_position_embeddings": N_SHORT}  # fmt: skip
    config = hf.Phi3Config(
        **WIDE, max_position_embeddings=256, original_max_position_embeddings=N_SHORT, rope_parameters=rope
    )
    return hf.AutoModelForCausalLM.from_config(config).eval()


def dynamic():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    return hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**WIDE, max_position_embeddings=32, rope_parameters=rope))


def alone(prompt, n_tokens):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = longrope().generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_tokens,
            do_sample=False,
            eos_token_id=None,
        )
    return out[0, len(prompt) :].tolist()


def test_answers_beside_a_long_one_are_their_own_also_over_the_switch():
    prompts = [list(range(5, 5 + n)) for n in (4, 60, 12, 16, 17, 6)]
    expected = [alone(prompt, 14) for prompt in prompts]
    engine = SimpleEngine(longrope(), [2], max_context_tokens=200)
    begun = [ask(engine, prompt, max_tokens=14) for prompt in prompts]
    assert [answer.wait().ids for answer in begun] == expected
    engine.close()


def test_a_base_whose_answers_would_depend_on_those_before_is_refused():
    assert stretching(dynamic().config) == "dynamic"
    assert unsupported(dynamic())
    with pytest.raises(UnsupportedError, match="would not be its own"):
        SimpleEngine(dynamic(), [2], max_context_tokens=64)


def test_plain_positions_are_not_taken_for_stretched_ones():
    assert stretching(hf.LlamaConfig(**WIDE)) == ""
    by_kind = {"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}}
    assert stretching(type("Config", (), {"rope_parameters": by_kind})) == "longrope"
