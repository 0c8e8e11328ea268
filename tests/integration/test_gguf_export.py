"""GGUF files read back: an adapter's update is PEFT's, a whole model's logits are transformers', and so are its tokens."""

import json

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers as hf
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS

from lora_tune.adapter import gguf_files
from lora_tune.adapter.apply import apply_lora
from lora_tune.adapter.convert import ENGINES, export_adapter_to
from lora_tune.adapter.door import open_adapter
from lora_tune.adapter.gguf_files import held_dtype, model_to_gguf, window_note
from lora_tune.adapter.live import open_live
from lora_tune.adapter.probes import replay_probes
from lora_tune.cli import recipe_verbs
from lora_tune.errors import CannotCreateError, CannotWriteError, DataError, MissingInputError, RefusedError, UsageError
from lora_tune.model.dense import quiet
from lora_tune.recipe.schema import LoraSection
from tests.integration.test_gguf import LAYER
from tests.tiny import tiny_model, tiny_tokenizer, write_recipe

WIDE = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
# The other heads' size is what transformers takes when it reads a GGUF of the family, which it does not look up there.
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**WIDE, tie_word_embeddings=True),
    "llama untied": lambda: hf.LlamaConfig(**WIDE, head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "mistral": lambda: hf.MistralConfig(**WIDE, sliding_window=None),
    "qwen2": lambda: hf.Qwen2Config(**WIDE),
    "qwen3": lambda: hf.Qwen3Config(**WIDE, head_dim=128),
    "gemma": lambda: hf.GemmaConfig(**WIDE, head_dim=16),
    "gemma2": lambda: hf.Gemma2Config(**WIDE, head_dim=256, query_pre_attn_scalar=256, sliding_window=8),
    "gemma3_text": lambda: hf.Gemma3TextConfig(**WIDE, head_dim=16, sliding_window=8),
}  # fmt: skip
WHOLE = [name for name in CONFIGS if name not in ("gemma", "gemma3_text")]
IDS = torch.tensor([[3, 17, 5, 400, 1, 256, 77, 9, 30, 31, 32, 33, 8, 100, 200, 300]])


def _ignore(*_):
    """Take no note."""


def _save(folder, model):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # they begin as all ones, or as zeros
                weight.add_(torch.rand_like(weight) - 0.5)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return a function family → folder of a random base; each is built once."""
    root = tmp_path_factory.mktemp("bases")

    def base(family):
        folder = root / f"tiny-{family.replace(' ', '-')}"
        if not folder.is_dir():
            torch.manual_seed(3)
            _save(folder, hf.AutoModelForCausalLM.from_config(CONFIGS[family]()))
        return folder

    return base


def _adapter(folder, base, *, variant="lora", targets="all-linear", rank=4):
    """Write a random adapter as PEFT does; return its checked files and PEFT's model."""
    torch.manual_seed(5)
    with quiet():
        model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        section = LoraSection(rank=rank, alpha=8, variant=variant, targets=targets)
        live = apply_lora(model, section, adapter_dtype="fp32")
        with torch.no_grad():
            for name, weight in live.named_parameters():
                if "lora_B" in name:
                    weight.copy_(torch.randn_like(weight) * 0.1)
        live.save_pretrained(folder, save_embedding_layers=False)
    return open_adapter(folder), live.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of an rsLoRA adapter with a passport; its √rank is not whole."""
    return _trained(tmp_path_factory.mktemp("trained"), lora={"variant": "rslora", "rank": 3})


@pytest.fixture(scope="module")
def trained_on_nf4(tmp_path_factory):
    return _trained(tmp_path_factory.mktemp("nf4"), base={"quantization": "nf4"})


def _trained(root, **sections):
    base = _save(root / "base", tiny_model("llama"))
    recipe = write_recipe(root, base, train={"max_steps": 2}, **sections)
    recipe_verbs.train(recipe, (), run_dir=root / "run", dry_run=False, registry=root / "adapters", notify=_ignore)
    return root / "run" / "adapter"


def _fields(reader):
    return {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize("variant", ["lora", "rslora"])
@pytest.mark.parametrize("family", CONFIGS)
def test_an_adapters_update_is_pefts_in_llama_cpps_order(tmp_path, bases, family, variant):
    base = bases(family)
    files, live = _adapter(tmp_path / "a", base, variant=variant)
    report = export_adapter_to(files, tmp_path / "out", _ignore, to="gguf", base_name=str(base))
    assert report.files == ("adapter.gguf",)
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = _fields(reader)
    config = CONFIGS[family]()
    architecture = {"mistral": "llama", "gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["general.architecture"] == architecture
    # transformers undoes llama.cpp's order when it reads a model; gemma's offset is of norms, which carry no adapter.
    processor = TENSOR_PROCESSORS.get(architecture, TENSOR_PROCESSORS["gpt2"].__mro__[1])(config=config.to_dict())
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(found) == 2 * len(files.shape.modules) == report.layers * 2
    for module in files.shape.modules:
        _, _, layer, inside = module.split(".", 3)
        name = f"blk.{layer}.{LAYER[inside]}.weight"
        a, b = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
        update = fields["adapter.lora.alpha"] / b.shape[1] * (b @ a)  # llama-adapter.cpp: get_scale
        theirs = live.get_submodule(f"base_model.model.{module}").get_delta_weight("default").detach().numpy()
        assert np.allclose(processor.process(update, name).weights, theirs, atol=1e-6)
        assert np.abs(theirs).max() > 1e-3


@pytest.mark.parametrize("to", ENGINES)
def test_a_trained_adapter_takes_its_passport_along(tmp_path, trained, to):
    files = open_adapter(trained)
    report = export_adapter_to(files, tmp_path / "out", _ignore, to=to)
    assert "lora_tune.json" in report.files
    if to == "peft":
        live = open_live(open_adapter(tmp_path / "out"), _ignore)
        assert replay_probes(live.model, files.manifest.probes).verdict == "equal"
    if to == "ollama":
        # the system message that every row had
        assert 'SYSTEM """Reply with one JSON call."""' in (tmp_path / "out" / "Modelfile").read_text()


@pytest.mark.parametrize("to", [engine for engine in ENGINES if engine != "ollama"])
def test_what_a_quantized_adapter_needs_is_said_wherever_it_goes(tmp_path, trained_on_nf4, trained, to):
    report = export_adapter_to(open_adapter(trained_on_nf4), tmp_path / "out", _ignore, to=to)
    (note,) = [note for note in report.notes if "nf4" in note]
    assert "lora-tune merge NAME OUT --onto trained" in note
    assert ("BitsAndBytesConfig(load_in_4bit=True" in note) == (to == "peft")
    report = export_adapter_to(open_adapter(trained), tmp_path / "plain", _ignore, to=to)
    assert not any("full-precision" in note for note in report.notes)


def test_an_ollama_folder_holds_the_base_as_while_training(tmp_path, trained_on_nf4):
    report = export_adapter_to(open_adapter(trained_on_nf4), tmp_path / "out", _ignore, to="ollama")
    assert any("nf4, dequantized" in note for note in report.notes)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == list(report.files)
    base = trained_on_nf4.parents[1] / "base"
    held = hf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )  # fmt: skip
    with quiet(), torch.no_grad():
        again = hf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", gguf_file="base.gguf", dtype=torch.float32, quantization_config=hf.GgufConfig(dequantize=True)
        ).eval()  # fmt: skip
        theirs = hf.AutoModelForCausalLM.from_pretrained(base, quantization_config=held, dtype=torch.float32)
        theirs = _rounded(theirs.dequantize(torch.float32).eval(), "f16")
        plain = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        ours, wanted, original = (model(input_ids=IDS).logits for model in (again, theirs, plain))
    assert torch.allclose(ours, wanted, atol=1e-4)
    assert float((wanted - original).abs().max()) > 1e-3


def test_what_a_config_leaves_out_is_its_familys_default(tmp_path):
    """Mistral's default is 8 heads of keys, also of a base with 16 heads."""
    torch.manual_seed(0)
    config = hf.MistralConfig(**WIDE | {"num_attention_heads": 16, "num_key_value_heads": 8}, sliding_window=None)
    base = _save(tmp_path / "base", hf.AutoModelForCausalLM.from_config(config))
    files, _ = _adapter(tmp_path / "a", base)
    written = {}
    for left_out in ((), ("num_key_value_heads",), ("num_key_value_heads", "rms_norm_eps")):
        values = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({key: values[key] for key in values if key not in left_out}))
        out = tmp_path / f"out-{len(left_out)}"
        export_adapter_to(files, out, _ignore, to="gguf", base_name=str(base))
        reader = gguf.GGUFReader(out / "adapter.gguf")
        written[left_out] = {tensor.name: tensor.data.copy() for tensor in reader.tensors}
    first, *others = written.values()
    for other in others:
        assert first.keys() == other.keys()
        assert all(np.array_equal(first[name], other[name]) for name in first)


def test_a_window_that_cuts_the_context_is_said(tmp_path):
    config = hf.MistralConfig(**WIDE, sliding_window=64)
    base = _save(tmp_path / "base", hf.AutoModelForCausalLM.from_config(config))
    assert "64 tokens instead of 512" in window_note(base)
    files, _ = _adapter(tmp_path / "a", base)
    report = export_adapter_to(files, tmp_path / "out", _ignore, to="ollama", base_name=str(base))
    assert window_note(base) in report.notes


def test_a_disk_without_hard_links_gets_its_file_too(tmp_path, bases, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(gguf_files.os, "link", no_links)
    model_to_gguf(bases("llama"), tmp_path / "m.gguf", dtype="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("heads", [1, 2, 3, 8])
@pytest.mark.parametrize("half", [1, 2, 16])
def test_rows_in_pairs_turn_as_halves_do(heads, half):
    """Rotary positions on llama.cpp's order (2i, 2i + 1) equal those on transformers' (i, i + D/2), row for row."""
    from lora_tune.adapter.gguf_files import in_pairs

    size = 2 * half
    x = np.random.default_rng(0).normal(size=(heads * size, 3)).astype(np.float32)
    angles = np.arange(1, half + 1) / 7
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    by_halves = x.reshape(heads, 2, half, 3)
    turned = np.stack(
        [by_halves[:, 0] * cos - by_halves[:, 1] * sin, by_halves[:, 1] * cos + by_halves[:, 0] * sin], axis=1
    )
    by_pairs = in_pairs(x, heads).reshape(heads, half, 2, 3)
    turned_pairs = np.stack(
        [by_pairs[:, :, 0] * cos - by_pairs[:, :, 1] * sin, by_pairs[:, :, 1] * cos + by_pairs[:, :, 0] * sin], axis=2
    )
    assert np.allclose(in_pairs(turned.reshape(x.shape), heads), turned_pairs.reshape(x.shape), atol=1e-6)


def test_an_output_head_finds_its_place(tmp_path, bases):
    with quiet():
        model = hf.AutoModelForCausalLM.from_pretrained(bases("llama untied"), dtype=torch.float32)
        live = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
        live.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    files = open_adapter(tmp_path / "a")
    export_adapter_to(files, tmp_path / "out", _ignore, to="gguf", base_name=str(bases("llama untied")))
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out" / "adapter.gguf").tensors}
    assert {"output.weight.lora_a", "output.weight.lora_b"} <= names


@pytest.mark.parametrize("architecture", ["gpt2", "phi3"])
def test_other_families_are_refused_with_a_way_out(tmp_path, tiny_bases, architecture):
    files, _ = _adapter(tmp_path / "a", tiny_bases(architecture))
    with pytest.raises(RefusedError, match=architecture) as caught:
        export_adapter_to(files, tmp_path / "out", _ignore, to="gguf", base_name=str(tiny_bases(architecture)))
    assert "merge" in caught.value.hint
    assert "llama.cpp" in caught.value.hint
    assert not (tmp_path / "out").exists()
    with pytest.raises(RefusedError, match=architecture):
        model_to_gguf(tiny_bases(architecture), tmp_path / "m.gguf", dtype="f16")
    assert not list(tmp_path.glob("*m.gguf*"))


def _rounded(model, dtype):
    """The model with its matrices held in the dtype, by torch's own rounding or gguf's own q8_0."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2 and dtype == "q8_0":
                kind = gguf.GGMLQuantizationType.Q8_0
                weight.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)))
            elif weight.dim() == 2:
                weight.copy_(weight.to({"f16": torch.float16, "bf16": torch.bfloat16}[dtype]))
    return model


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, "f16") for family in WHOLE), *((f, d) for f in ("llama", "gemma2") for d in ("bf16", "q8_0"))],
)
def test_a_whole_model_read_back_has_the_same_logits(tmp_path, bases, family, dtype):
    path = model_to_gguf(bases(family), tmp_path / "m.gguf", dtype=dtype)
    with quiet(), torch.no_grad():
        again = hf.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=path.name, dtype=torch.float32, quantization_config=hf.GgufConfig(dequantize=True)
        ).eval()
        before = _rounded(hf.AutoModelForCausalLM.from_pretrained(bases(family), dtype=torch.float32).eval(), dtype)
        ours, theirs = again(input_ids=IDS).logits, before(input_ids=IDS).logits
    assert torch.allclose(ours, theirs, atol=2e-5)
    assert float(theirs.std()) > 0.01
    assert path.stat().st_mode & 0o777 == 0o644
    assert [found.name for found in tmp_path.iterdir()] == ["m.gguf"]


def test_what_the_file_says_of_a_gemma_is_what_llama_cpp_reads(tmp_path, bases):
    fields = _fields(gguf.GGUFReader(model_to_gguf(bases("gemma2"), tmp_path / "m.gguf", dtype="f16")))
    said = {key.removeprefix("gemma2."): value for key, value in fields.items() if key.startswith("gemma2.")}
    expected = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 8,
                "attention.key_length": 256, "attention.value_length": 256, "attention.head_count_kv": 2}  # fmt: skip
    assert {key: said[key] for key in expected} == expected


def test_llama_3s_scaling_becomes_the_factors_that_transformers_divides_by(tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    config = hf.LlamaConfig(**WIDE, head_dim=64, rope_parameters=rope)
    folder = _save(tmp_path / "m", hf.AutoModelForCausalLM.from_config(config))
    reader = gguf.GGUFReader(model_to_gguf(folder, tmp_path / "m.gguf", dtype="bf16"))
    factors = next(tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    plain = 1 / 5e5 ** (torch.arange(0, 64, 2) / 64)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert np.allclose(plain.numpy() / factors, scaled.numpy(), rtol=1e-5)
    assert factors.min() == 1.0
    assert factors.max() == 8.0


UNPROVEN = {
    "biased attention": ("llama", {"attention_bias": True}), "another activation": ("llama", {"hidden_act": "gelu"}),
    "another scaling of positions": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "a window in some layers": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "another scale of attention": ("gemma2", {"query_pre_attn_scalar": 99}), "no caps": ("gemma2", {"final_logit_softcapping": None}),
    "gemma 1": ("gemma", {}), "gemma 3": ("gemma3_text", {}),
}  # fmt: skip


@pytest.mark.parametrize(("family", "change"), UNPROVEN.values(), ids=UNPROVEN)
def test_a_model_that_llama_cpp_would_run_otherwise_is_refused(tmp_path, family, change):
    config = CONFIGS[family]()
    for key, value in change.items():
        setattr(config, key, value)
    folder = tmp_path / "m"
    folder.mkdir()
    config.save_pretrained(folder)
    with pytest.raises(RefusedError) as caught:
        model_to_gguf(folder, tmp_path / "m.gguf", dtype="f16")
    assert "llama.cpp" in caught.value.hint


def test_a_file_is_never_overwritten_and_a_failed_one_leaves_nothing(tmp_path, bases, monkeypatch):
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(CannotCreateError):
        model_to_gguf(bases("llama"), tmp_path / "m.gguf", dtype="f16")
    assert (tmp_path / "m.gguf").read_text() == "mine"

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(CannotWriteError):
        model_to_gguf(bases("llama"), tmp_path / "n.gguf", dtype="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_values_beyond_f16_are_an_error_that_names_bf16(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    folder = _save(tmp_path / "m", model)
    with pytest.raises(DataError, match=r"blk\.0\.ffn_up") as caught:
        model_to_gguf(folder, tmp_path / "m.gguf", dtype="f16")
    assert "bf16" in caught.value.hint
    model_to_gguf(folder, tmp_path / "m.gguf", dtype="bf16")


def test_an_unknown_dtype_is_a_usage_error(tmp_path, bases):
    with pytest.raises(UsageError, match="q4_0"):
        model_to_gguf(bases("llama"), tmp_path / "m.gguf", dtype="q4_0")


def test_a_folder_that_is_no_whole_model_is_exit_66(tmp_path, bases):
    with pytest.raises(MissingInputError):
        model_to_gguf(tmp_path / "none", tmp_path / "m.gguf", dtype="f16")
    bases("llama")
    for gone in ("tokenizer.json", "model.safetensors"):
        copy = tmp_path / gone
        copy.mkdir()
        for path in bases("llama").iterdir():
            if path.name != gone:
                (copy / path.name).write_bytes(path.read_bytes())
        with pytest.raises(MissingInputError):
            model_to_gguf(copy, tmp_path / "m.gguf", dtype="f16")


def test_a_bf16_model_is_held_in_bf16_without_loss(tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "b")
    assert held_dtype(tmp_path / "b") == "bf16"
    tiny_model("llama").save_pretrained(tmp_path / "f")
    assert held_dtype(tmp_path / "f") == "f16"
