"""What is said of an adapter before another engine sees it: each rule on an adapter that it is about."""

import json
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.adapter.door import open_adapter
from lora_tune.adapter.portability import ENGINES, GGUF_FAMILIES, VLLM_RANKS, least_vllm_rank, lint_for
from lora_tune.errors import UsageError
from tests.unit.test_card import manifest
from tests.unit.test_door import write

LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
RANKS = st.integers(1, 1024)


def adapter(folder, *, layers=LLAMA, rank=2, parent="model.layers.0", **config):
    tensors, width = {}, 2
    for layer in layers:
        name = f"base_model.model.{parent}.{layer}"
        parts = {"lora_A.weight": [rank, width], "lora_B.weight": [width, rank]}
        if config.get("use_dora"):
            parts["lora_magnitude_vector"] = [width]
        for part, shape in parts.items():
            count = shape[0] * (shape[1] if len(shape) == 2 else 1)
            tensors[f"{name}.{part}"] = ("F32", shape, struct.pack(f"<{count}f", *[0.5] * count))
    targets = sorted({layer.rpartition(".")[2] for layer in layers})
    return open_adapter(write(folder, {"r": rank, "lora_alpha": rank, "target_modules": targets} | config, tensors))


def verdicts(files, **given):
    return {engine: lint_for(files, engine, **given).verdict for engine in ENGINES}


def said(files, engine, **given):
    return " ".join(f"{f.level} {f.what} {f.why} {f.what_to_do}" for f in lint_for(files, engine, **given).reasons)


def test_a_plain_adapter_of_a_llama_loads_everywhere(tmp_path):
    files = adapter(tmp_path / "a")
    assert set(verdicts(files).values()) == {"loads"}
    assert lint_for(files, "vllm").reasons == lint_for(files, "sglang").reasons == ()


def test_every_finding_says_what_why_what_to_do_and_where_it_was_read(tmp_path):
    adapters = [adapter(tmp_path / "d", use_dora=True), adapter(tmp_path / "r", use_rslora=True), adapter(tmp_path / "b", rank=600),
                adapter(tmp_path / "g", layers=("attn.c_attn",), parent="transformer.h.0")]  # fmt: skip
    findings = [finding for files in adapters for engine in ENGINES for finding in lint_for(files, engine).reasons]
    assert len(findings) >= 10
    for finding in findings:
        assert all((finding.what, finding.why, finding.what_to_do))
        assert any(engine in finding.source for engine in ("vLLM 0.32", "SGLang 0.5.23", "llama.cpp", "PEFT 0.21"))


def test_dora_goes_to_peft_only_and_the_way_out_is_a_merge(tmp_path):
    files = adapter(tmp_path / "a", use_dora=True)
    assert verdicts(files) == {"vllm": "refused", "sglang": "refused", "llamacpp": "refused", "peft": "loads"}
    assert all("lora-tune merge" in said(files, engine) for engine in ("vllm", "sglang", "llamacpp"))


def test_rslora_is_right_in_vllm_and_wrong_in_sglang_which_does_not_read_it(tmp_path):
    files = adapter(tmp_path / "a", rank=16, use_rslora=True)
    found = lint_for(files, "sglang")
    assert (found.verdict, found.loads) == ("wrong", True)
    assert "4 times too weak" in found.reasons[0].why  # sqrt(16)
    assert "--to peft" in found.reasons[0].what_to_do
    assert verdicts(files)["vllm"] == "loads"
    assert "folded" in said(files, "llamacpp")


@pytest.mark.parametrize(("rank", "max_rank", "verdict", "words"), [
    (16, None, "loads", ""), (17, None, "loads", "--max-lora-rank 32"), (300, None, "loads", "--max-lora-rank 320"),
    (513, None, "refused", "resize NAME --rank 512"), (17, 16, "refused", "--max-lora-rank 32"), (16, 16, "loads", ""), (64, 512, "loads", ""),
])  # fmt: skip
def test_vllm_is_started_with_a_rank_that_takes_it(tmp_path, rank, max_rank, verdict, words):
    files = adapter(tmp_path / "a", rank=rank)
    found = lint_for(files, "vllm", max_rank=max_rank)
    assert found.verdict == verdict
    assert words in said(files, "vllm", max_rank=max_rank)
    assert bool(found.reasons) == bool(words)


@given(RANKS)
def test_the_least_rank_takes_the_adapter_and_none_smaller_does(rank):
    least = least_vllm_rank(rank)
    assert least == min((allowed for allowed in VLLM_RANKS if allowed >= rank), default=None)


@pytest.mark.parametrize(("layers", "verdict"), [
    (("self_attn.q_proj", "self_attn.v_proj"), "loads"), (("self_attn.q_proj",), "refused"), (("self_attn.q_proj", "self_attn.k_proj"), "refused"),
    (("self_attn.v_proj",), "refused"), (("self_attn.k_proj", "self_attn.v_proj"), "refused"), (("mlp.up_proj",), "refused"),
    (("mlp.gate_proj",), "loads"), (("self_attn.o_proj", "mlp.down_proj"), "loads"), (("self_attn.qkv_proj",), "loads"),
])  # fmt: skip
def test_sglang_needs_the_layers_that_it_stacks_together(tmp_path, layers, verdict):
    assert verdicts(adapter(tmp_path / "a", layers=layers))["sglang"] == verdict


def test_gpt_2_is_refused_where_its_class_takes_no_adapters(tmp_path):
    files = adapter(tmp_path / "a", layers=("attn.c_attn", "mlp.c_fc", "mlp.c_proj"), parent="transformer.h.0")
    assert verdicts(files) == {"vllm": "refused", "sglang": "refused", "llamacpp": "refused", "peft": "loads"}
    assert "gpt2" in said(files, "vllm")
    assert "c_attn" in said(files, "llamacpp")
    assert verdicts(files, model_type="gpt_bigcode")["vllm"] == "loads"


def test_layers_of_an_unknown_family_are_said_to_be_unknown(tmp_path):
    files = adapter(tmp_path / "a", layers=("mixer.in_proj",))
    assert lint_for(files, "vllm").verdict == "loads"
    assert "cannot be told" in said(files, "vllm")
    assert verdicts(files)["llamacpp"] == "refused"


def test_the_base_at_hand_decides_where_names_do_not_tell(tmp_path):
    files = adapter(tmp_path / "a")
    assert verdicts(files, model_type="qwen3")["llamacpp"] == "loads"
    assert verdicts(files, model_type="granite")["llamacpp"] == "refused"
    assert verdicts(files, model_type="stablelm")["vllm"] == "refused"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("held", ["nf4", "int8"])
def test_an_adapter_of_a_quantized_base_answers_otherwise_on_the_original_one(tmp_path, engine, held):
    files = replace(adapter(tmp_path / "a"), manifest=manifest(base__quantization=held))
    found = lint_for(files, engine)
    assert (found.verdict, found.loads) == ("wrong", True)
    finding = next(finding for finding in found.reasons if finding.level == "wrong")
    assert held in finding.what
    assert "original weights unless told otherwise" in finding.why
    assert "merge NAME OUT --onto trained" in finding.what_to_do
    ways = {("vllm", "nf4"): "--quantization bitsandbytes", ("peft", "nf4"): "load_in_4bit=True", ("peft", "int8"): "load_in_8bit=True"}  # fmt: skip
    assert all((way in finding.what_to_do) == (case == (engine, held)) for case, way in ways.items())
    assert lint_for(files, engine, held=held).verdict == "loads"
    other = "int8" if held == "nf4" else "nf4"
    assert f"holds the base in {other}" in said(files, engine, held=other)


def test_an_adapter_of_a_full_precision_base_has_no_such_finding(tmp_path):
    files = replace(adapter(tmp_path / "a"), manifest=manifest())
    assert set(verdicts(files).values()) == {"loads"}


def test_a_rank_that_vllm_does_not_take_is_said(tmp_path):
    files = adapter(tmp_path / "a", rank=16)
    found = lint_for(files, "vllm", max_rank=24)
    assert found.verdict == "loads"
    assert "--max-lora-rank 24" in found.reasons[0].what
    assert "--max-lora-rank 32" in found.reasons[0].what_to_do


def test_an_adapter_of_the_head_says_which_classes_take_it(tmp_path):
    files = adapter(tmp_path / "a", layers=("lm_head",), parent="x")
    assert "lm_head" in said(files, "vllm")
    assert verdicts(files)["llamacpp"] == "refused"


def test_the_families_are_those_that_the_conversion_writes():
    from lora_tune.adapter import gguf_files

    assert set(gguf_files.FAMILIES) == GGUF_FAMILIES


@pytest.mark.parametrize(
    "given", [{"engine": "tgi"}, {"engine": "vllm", "max_rank": 0}, {"engine": "vllm", "max_rank": -8}]
)
def test_an_unknown_engine_or_rank_is_a_mistake_of_the_command(tmp_path, given):
    with pytest.raises(UsageError) as caught:
        lint_for(adapter(tmp_path / "a"), given.pop("engine"), **given)
    assert caught.value.hint


def test_the_result_is_plain_json(tmp_path):
    shown = json.loads(json.dumps(lint_for(adapter(tmp_path / "a", use_dora=True), "vllm").as_dict()))
    assert (shown["engine"], shown["verdict"], shown["loads"]) == ("vllm", "refused", False)
    assert set(shown["reasons"][0]) == {"level", "what", "why", "what_to_do", "source"}
