"""What one weight becomes: against formulas written out in fp64, and against PEFT's own merge of one layer."""

import json
import math

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from lora_tune.adapter.deltas import Change, base_tensors, changed_weight, check_change, check_not_tied, open_factors
from lora_tune.adapter.door import open_adapter
from lora_tune.errors import AdapterMismatchError, RefusedError

WIDTHS = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))


def _write(folder, module="layers.0.q", *, rank=2, alpha=6, wide_in=5, wide_out=4, dtype=torch.float32, **settings_):
    """Write an adapter of one layer as PEFT does, and return its A and B."""
    folder.mkdir()
    torch.manual_seed(1)
    a, b = torch.randn(rank, wide_in), torch.randn(wide_out, rank)
    tensors = {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    if settings_.get("use_dora"):
        tensors[f"base_model.model.{module}.lora_magnitude_vector"] = torch.rand(wide_out) + 1
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": [module.rsplit(".", 1)[-1]]}
    (folder / "adapter_config.json").write_text(json.dumps(config | settings_))
    return a.to(dtype), b.to(dtype)


@settings(max_examples=50, deadline=None)
@given(WIDTHS, st.lists(st.floats(-4, 4), min_size=0, max_size=3), st.booleans())
def test_a_weight_becomes_the_sum_written_out(widths, scalings, conv1d):
    wide_out, wide_in, rank = widths
    numbers = np.random.default_rng(0)
    weight = numbers.normal(size=(wide_out, wide_in))
    factors = [(numbers.normal(size=(rank, wide_in)), numbers.normal(size=(wide_out, rank))) for _ in scalings]
    expected = weight + sum(
        (scaling * (b @ a) for scaling, (a, b) in zip(scalings, factors, strict=True)), np.zeros_like(weight)
    )
    changes = [
        Change(torch.tensor(a).float(), torch.tensor(b).float(), scaling)
        for scaling, (a, b) in zip(scalings, factors, strict=True)
    ]
    stored = torch.tensor(weight.T.copy() if conv1d else weight).float()
    before = stored.clone()
    found = changed_weight(stored, changes, conv1d=conv1d).double().numpy()
    assert np.allclose(found.T if conv1d else found, expected, atol=1e-4)
    assert torch.equal(stored, before)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("layer", ["linear", "conv1d"])
def test_a_weight_becomes_what_peft_merges_it_to(tmp_path, variant, layer):
    flags = {"use_rslora": variant == "rslora", "use_dora": variant == "dora"}
    folder = tmp_path / "a"
    _write(folder, "q", rank=3, alpha=8, wide_in=6, wide_out=4, **flags)
    files = open_adapter(folder)
    torch.manual_seed(5)
    plain = torch.nn.Linear(6, 4, bias=False) if layer == "linear" else Conv1D(4, 6)
    before = plain.weight.detach().clone()
    model = torch.nn.ModuleDict({"q": plain})
    config = peft.LoraConfig(r=3, lora_alpha=8, target_modules=["q"], fan_in_fan_out=layer == "conv1d", **flags)
    tuned = peft.get_peft_model(model, config)
    state = {key.replace("base_model.model.", ""): value for key, value in _load(folder).items()}
    merged = tuned.base_model.model["q"]
    with torch.no_grad():
        merged.lora_A["default"].weight.copy_(state["q.lora_A.weight"])
        merged.lora_B["default"].weight.copy_(state["q.lora_B.weight"])
        if variant == "dora":
            merged.lora_magnitude_vector["default"].weight.copy_(state["q.lora_magnitude_vector"])
    merged.merge()
    found = changed_weight(before, [open_factors(files).of("q")], conv1d=layer == "conv1d")
    assert float((found - merged.get_base_layer().weight).abs().max()) <= 1e-5
    assert float((found - before).abs().max()) > 0.1


def _load(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_the_scaling_follows_the_variant_and_the_weight_in_a_sum(tmp_path):
    _write(tmp_path / "lora", rank=4, alpha=6)
    _write(tmp_path / "rslora", rank=4, alpha=6, use_rslora=True)
    plain, stabilised = (open_factors(open_adapter(tmp_path / name)) for name in ("lora", "rslora"))
    assert plain.of("layers.0.q").scaling == 6 / 4
    assert stabilised.of("layers.0.q").scaling == 6 / math.sqrt(4)
    assert plain.of("layers.0.q", weight=-0.5).scaling == -0.75
    assert plain.of("layers.0.q").magnitude is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_are_the_bytes_of_the_file_in_fp32(tmp_path, dtype):
    a, b = _write(tmp_path / "a", dtype=dtype)
    change = open_factors(open_adapter(tmp_path / "a")).of("layers.0.q")
    assert (change.a.dtype, change.b.dtype) == (torch.float32, torch.float32)
    assert torch.equal(change.a, a.float())
    assert torch.equal(change.b, b.float())


def test_weights_changed_after_the_check_are_refused(tmp_path):
    _write(tmp_path / "a")
    files = open_adapter(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(AdapterMismatchError):
        open_factors(files)


def test_a_layer_finds_its_weight_whatever_stands_before_its_number():
    shapes = {"h.0.attn.c_attn.weight": (4, 12), "h.0.attn.c_attn.bias": (12,), "wte.weight": (9, 4)}
    module = "transformer.h.0.attn.c_attn"
    assert base_tensors([module], shapes) == {module: "h.0.attn.c_attn.weight"}
    towers = {f"{front}.layers.3.q.weight": (4, 4) for front in ("vision_tower.encoder", "language_model.model")}
    module = "model.language_model.layers.3.q"
    assert base_tensors([module], towers) == {module: "language_model.model.layers.3.q.weight"}


@pytest.mark.parametrize(("shapes", "error", "words"), [
    ({"layers.1.q.weight": (4, 4)}, AdapterMismatchError, "fused with others"),
    ({"layers.0.q.bias": (4,)}, AdapterMismatchError, "fused with others"),
    ({"layers.0.q.weight": (8, 4, 4)}, RefusedError, "only matrices"),
    ({"left.layers.0.q.weight": (4, 4), "right.layers.0.q.weight": (4, 4)}, RefusedError, "could be any"),
])  # fmt: skip
def test_what_is_no_matrix_of_its_own_is_refused_with_the_reason(shapes, error, words):
    with pytest.raises(error, match=words) as caught:
        base_tensors(["model.layers.0.q"], shapes)
    assert caught.value.hint


def test_a_change_of_other_widths_is_refused(tmp_path):
    _write(tmp_path / "a", wide_in=5, wide_out=4)
    files = open_adapter(tmp_path / "a")
    check_change(files, "layers.0.q", "layers.0.q.weight", shape=(4, 5))
    with pytest.raises(AdapterMismatchError, match="5 → 4"):
        check_change(files, "layers.0.q", "layers.0.q.weight", shape=(5, 4))


def test_a_head_that_is_the_embeddings_too_is_refused(tiny_bases):
    check_not_tied("model.layers.0.self_attn.q_proj", tiny_bases("llama"))
    check_not_tied("lm_head", tiny_bases("qwen3"))
    with pytest.raises(RefusedError, match="embeddings"):
        check_not_tied("lm_head", tiny_bases("llama"))
