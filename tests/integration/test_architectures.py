"""Every architecture × variant × quantization: trained, exported, loaded back equal, merged equal, in plain PEFT too."""

import json
import shutil

import pytest
import torch

from lora_tune.adapter.apply import apply_lora, resolve_targets
from lora_tune.adapter.door import CONFIG, WEIGHTS, open_adapter
from lora_tune.adapter.live import open_live
from lora_tune.adapter.merge import merge_adapter
from lora_tune.adapter.probes import probe_logits, replay_probes
from lora_tune.cli import recipe_verbs
from lora_tune.errors import AdapterMismatchError, CannotCreateError, RecipeError
from lora_tune.model.dense import BaseFiles
from lora_tune.model.load import load_base
from lora_tune.model.quantization import is_quantized
from lora_tune.recipe.schema import BaseSection, LoraSection
from tests.tiny import ARCHITECTURES, tiny_model, write_recipe

CASES = [
    *[(architecture, variant, "none") for architecture in ARCHITECTURES for variant in ("lora", "rslora", "dora")],
    *[(architecture, "lora", quantization) for architecture in ARCHITECTURES for quantization in ("nf4", "int8")],
    ("llama", "dora", "nf4"),
]
AT_ONCE = {
    *[(architecture, "lora", "none") for architecture in ARCHITECTURES],
    ("gpt2", "rslora", "none"), ("qwen3", "rslora", "none"), ("gpt2", "dora", "none"), ("phi3", "dora", "none"),
    ("gpt2", "lora", "nf4"), ("gemma", "lora", "nf4"), ("phi3", "lora", "nf4"), ("llama", "dora", "nf4"),
    ("mistral", "lora", "int8"), ("gpt2", "lora", "int8"),
}  # fmt: skip
"""Every architecture, every variant and every quantization, each of these on plain layers and on GPT-2's; the rest is slow."""
IN_BF16 = [("llama", "none"), ("llama", "nf4"), ("gpt2", "none"), ("gpt2", "nf4"), ("gemma", "int8")]


def _ignore(*_):
    """Take no note."""


def _train(folder, base, /, **sections):
    folder.mkdir(parents=True)
    report = recipe_verbs.train(
        write_recipe(folder, base, **sections),
        (),
        run_dir=folder / "run",
        dry_run=False,
        registry=folder / "adapters",
        notify=_ignore,
    )
    return folder / "run" / "adapter", report


def _marked(case):
    return pytest.param(*case, id="-".join(case), marks=[] if case in AT_ONCE else [pytest.mark.slow])


@pytest.mark.parametrize(("architecture", "variant", "quantization"), map(_marked, CASES))
def test_trained_exported_loaded_back_and_merged(tmp_path, tiny_bases, architecture, variant, quantization):
    base = tiny_bases(architecture)
    folder, report = _train(
        tmp_path / "a", base, lora={"variant": variant}, base={"quantization": quantization}, train={"max_steps": 8}
    )
    files = open_adapter(folder)
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, "README.md", "lora_tune.json"}
    # The bound is for adapters of real size; a tiny one's header weighs more than its weights.
    parameters = sum(info.end - info.start for info in files.tensors.values())
    assert parameters == report["adapter"]["parameter_bytes"]
    live = open_live(files, _ignore)
    result = replay_probes(live.model, files.manifest.probes)
    assert result.verdict == "equal"
    assert result.max_abs_delta <= 1e-5
    assert result.kl_of_base > 0
    if quantization == "none":
        receipt = merge_adapter(files, tmp_path / "merged", _ignore, onto="trained")
        assert receipt.max_abs_delta <= 1e-4
        assert receipt.top1_agreement == 1.0
        merged = load_base(
            BaseFiles("m", None, tmp_path / "merged"), BaseSection(name=str(tmp_path / "merged"), dtype="fp32")
        )
        probe = files.manifest.probes[0]
        delta = probe_logits(merged, probe.input_ids, 1) - probe_logits(live.model, probe.input_ids, 1)
        assert float(delta.abs().max()) <= 1e-4


@pytest.mark.parametrize(("architecture", "quantization"), IN_BF16, ids=["-".join(case) for case in IN_BF16])
def test_what_a_bf16_device_does(tmp_path, tiny_bases, architecture, quantization):
    base = {"quantization": quantization, "dtype": "bf16"}
    folder, report = _train(tmp_path / "a", tiny_bases(architecture), base=base, train={"max_steps": 8})
    files = open_adapter(folder)
    assert files.manifest.base.dtype == "bf16"
    assert {info.dtype for info in files.tensors.values()} == {"F32" if quantization == "none" else "BF16"}
    assert report["training"]["last_loss"] < report["training"]["first_loss"]
    assert replay_probes(open_live(files, _ignore).model, files.manifest.probes).verdict == "equal"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_plain_peft_loads_the_export_to_the_same_logits(tmp_path, tiny_bases, architecture):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_bases(architecture)
    folder, _ = _train(tmp_path / "a", base, train={"max_steps": 8})
    ours = open_live(open_adapter(folder), _ignore).model
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    ids = list(range(3, 40))
    assert torch.equal(probe_logits(ours, ids, 1), probe_logits(theirs, ids, 1))


def test_same_recipe_and_seed_give_the_same_weights_and_another_seed_does_not(tmp_path, tiny_bases):
    runs = {name: _train(tmp_path / name, tiny_bases(), train={"seed": seed, "max_steps": 6}, lora={"dropout": 0.1})[1]
            for name, seed in (("a", 3), ("b", 3), ("c", 4))}  # fmt: skip
    digests = {name: report["adapter"]["weights_digest"] for name, report in runs.items()}
    assert digests["a"] == digests["b"] != digests["c"]


@pytest.mark.parametrize(
    ("quantization", "layer"), [("none", "Linear"), ("nf4", "Linear4bit"), ("int8", "Linear8bitLt")]
)
def test_the_base_is_held_as_asked(tiny_bases, quantization, layer):
    folder = tiny_bases("llama")
    model = load_base(BaseFiles("b", None, folder), BaseSection(name=str(folder), quantization=quantization))
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == layer
    assert is_quantized(model) == (quantization != "none")
    if quantization == "nf4":
        assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())
        state = model.model.layers[0].self_attn.q_proj.weight.quant_state
        assert (state.quant_type, state.nested) == ("nf4", True)


def test_all_linear_is_every_linear_layer_but_the_head():
    assert resolve_targets(tiny_model("gpt2"), "all-linear") == ["c_attn", "c_fc", "c_proj"]
    assert resolve_targets(tiny_model("phi3"), "all-linear") == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    with pytest.raises(RecipeError, match="query_key_value"):
        resolve_targets(tiny_model("llama"), ("query_key_value",))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_trained_numbers_follow_the_formula(architecture):
    base = tiny_model(architecture)
    widths = [
        module.weight.shape
        for name, module in base.named_modules()
        if name.rsplit(".", 1)[-1] in resolve_targets(base, "all-linear")
    ]
    model = apply_lora(base, LoraSection(rank=3), adapter_dtype="fp32")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(3 * (a + b) for a, b in widths)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_bases):
    return _train(tmp_path_factory.mktemp("trained") / "a", tiny_bases(), train={"max_steps": 8})[0]


def test_another_base_is_refused_naming_the_field(trained, tiny_bases):
    with pytest.raises(AdapterMismatchError) as caught:
        open_live(open_adapter(trained), _ignore, base_name=str(tiny_bases("llama", 1)))
    assert caught.value.where == "base.weights"
    assert caught.value.exit_code == 77
    with pytest.raises(AdapterMismatchError):
        open_live(open_adapter(trained), _ignore, base_name=str(tiny_bases("gpt2")))


def test_a_changed_tokenizer_or_template_is_refused(trained, tiny_bases, tmp_path):
    for what, where in (("tokenizer.json", "tokenizer.tokenizer"), ("chat_template.jinja", "tokenizer.chat_template")):
        copy = tmp_path / what
        shutil.copytree(tiny_bases(), copy)
        text = (copy / what).read_text()
        (copy / what).write_text(
            text.replace("<|endoftext|>", "<|endofbook|>") if what.endswith("json") else text + " "
        )
        with pytest.raises(AdapterMismatchError) as caught:
            open_live(open_adapter(trained), _ignore, base_name=str(copy))
        assert caught.value.where == where


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_changed_files_are_refused(trained, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    content = bytearray((copy / name).read_bytes())
    if name.endswith("json"):
        content = bytearray(content.replace(b'"lora_alpha": 8', b'"lora_alpha": 9'))
    else:
        content[-2] ^= 1
    (copy / name).write_bytes(bytes(content))
    with pytest.raises(AdapterMismatchError):
        open_adapter(copy)


def test_an_adapter_that_is_not_applied_is_different(trained):
    files = open_adapter(trained)
    live = open_live(files, _ignore)
    with live.model.disable_adapter():
        assert replay_probes(live.model, files.manifest.probes).verdict == "different"


def test_a_passport_names_no_folder_of_this_machine(trained, tiny_bases):
    for path in trained.iterdir():
        if path.suffix in (".json", ".md"):
            assert str(tiny_bases().parent) not in path.read_text()
            assert str(trained.parent) not in path.read_text()
    config = json.loads((trained / CONFIG).read_text())
    assert config["target_modules"] == sorted(config["target_modules"])


@pytest.mark.slow
def test_a_quantized_adapter_is_merged_onto_what_it_was_trained_on_or_the_original(tmp_path, tiny_bases):
    folder, _ = _train(tmp_path / "a", tiny_bases(), base={"quantization": "nf4"}, train={"max_steps": 8})
    trained = merge_adapter(open_adapter(folder), tmp_path / "t", _ignore, onto="trained")
    original = merge_adapter(open_adapter(folder), tmp_path / "o", _ignore, onto="original")
    assert trained.kl <= 1e-9 < original.kl
    assert original.kl_of_writing <= 1e-6
    assert original.closer_base == "trained"


def test_a_merge_never_overwrites(trained, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(CannotCreateError):
        merge_adapter(open_adapter(trained), tmp_path / "taken", _ignore, onto="trained")
