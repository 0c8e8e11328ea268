"""Merging: the written model against PEFT's own merge, against the live quantized model, and in plain transformers."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config
from transformers.pytorch_utils import Conv1D

from lora_tune.adapter import merge
from lora_tune.adapter.door import open_adapter
from lora_tune.adapter.live import open_live
from lora_tune.adapter.merge import merge_adapter, merge_adapters, plan_merge, write_merged
from lora_tune.cli import recipe_verbs
from lora_tune.model.fingerprint import read_header
from tests.tiny import ARCHITECTURES, tiny_tokenizer, write_recipe

IDS = torch.tensor([[5, 9, 300, 41, 41, 7, 120, 33, 260, 11, 4, 380]])
AT_ONCE = [("llama", "rslora"), ("qwen3", "lora"), ("gpt2", "dora"), ("llama", "nf4"), ("gpt2", "int8")]
"""The default run takes these; test_architectures.py merges the others too, and here they are slow."""


def _cases(architectures, kinds):
    return [
        pytest.param(
            architecture, kind, id=f"{architecture}-{kind}",
            marks=[] if (architecture, kind) in AT_ONCE else [pytest.mark.slow],
        )
        for architecture in architectures for kind in kinds
    ]  # fmt: skip


IN_TRANSFORMERS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ids = sys.argv[1], json.loads(sys.argv[2])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = model(torch.tensor(ids)).logits[0, -1]
turn = [{"role": "user", "content": "open the door"}]
print(json.dumps({
    "logits": logits.tolist(), "dtype": str(model.dtype),
    "prompt": tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True),
    "other libraries": sorted({name.split(".")[0] for name in sys.modules} & {"lora_tune", "peft", "bitsandbytes"}),
}))
"""


def _ignore(*_):
    """Take no note."""


def _logits(model):
    with torch.no_grad():
        return model(IDS).logits


def _load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _merged_by_peft(model, folder):
    config = peft.LoraConfig.from_pretrained(folder)
    # An adapter of a quantized GPT-2 was on plain linear layers; the same on a Conv1D is the transpose.
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    return peft.PeftModel.from_pretrained(model, folder, config=config).merge_and_unload()


def _random_adapter(base, folder, *, variant="lora", rank=4, alpha=8, seed=0):
    """Write an adapter with random weights as PEFT saves it, without a passport."""
    torch.manual_seed(seed)
    leaves = sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in _load(base).named_modules()
            if type(module).__name__ in ("Linear", "Conv1D") and "lm_head" not in name
        }
    )
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=leaves, use_rslora=variant == "rslora", use_dora=variant == "dora",
        fan_in_fan_out="gpt2" in base.name, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(_load(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif "lora_magnitude_vector" in name:
            parameter.data *= torch.rand_like(parameter) + 0.5
    model.save_pretrained(folder, save_embedding_layers=False)
    return open_adapter(folder)


@pytest.mark.parametrize(("architecture", "variant"), _cases(ARCHITECTURES, ("lora", "rslora", "dora")))
def test_the_written_model_is_what_peft_merges(tmp_path, tiny_bases, architecture, variant):
    base = tiny_bases(architecture)
    files = _random_adapter(base, tmp_path / "a", variant=variant)
    receipt = merge_adapter(files, tmp_path / "out", _ignore, onto="trained", base_name=str(base))
    theirs = _merged_by_peft(_load(base), tmp_path / "a")
    delta = (_logits(_load(tmp_path / "out")) - _logits(theirs)).abs().max()
    moved = (_logits(_load(base)) - _logits(theirs)).abs().max()
    assert float(delta) <= 1e-5
    assert float(moved) > 1e-2
    assert receipt.kl <= 1e-9
    assert (receipt.top1_agreement, receipt.diverges_first_at, receipt.closer_base) == (1.0, None, None)
    assert (receipt.quantization, receipt.dtype, receipt.kl_to_trained) == ("none", "fp32", None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_bases):
    """Return a function architecture, quantization → adapter folder; each is trained once."""
    root = tmp_path_factory.mktemp("trained")

    def train(architecture, quantization, **sections):
        folder = root / f"{architecture}-{quantization}-{len(json.dumps(sections))}"
        if not folder.is_dir():
            folder.mkdir()
            base = {"quantization": quantization} | sections.pop("base", {})
            recipe_verbs.train(
                write_recipe(folder, tiny_bases(architecture), base=base, train={"max_steps": 8}, **sections),
                (),
                run_dir=folder / "run",
                dry_run=False,
                registry=folder / "adapters",
                notify=_ignore,
            )
        return folder / "run" / "adapter"

    return train


def _dequantized(base, quantization):
    """Return the base as transformers itself dequantizes it, straight after loading."""
    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if quantization == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.float32)
    return model.dequantize(torch.float32).eval()


@pytest.mark.parametrize(("architecture", "quantization"), _cases(("llama", "gpt2", "gemma"), ("nf4", "int8")))
def test_a_quantized_base_is_merged_onto_what_was_trained_or_onto_the_original(
    tmp_path, tiny_bases, trained, architecture, quantization
):
    base, folder = tiny_bases(architecture), trained(architecture, quantization)
    files = open_adapter(folder)
    receipts = {onto: merge_adapter(files, tmp_path / onto, _ignore, onto=onto) for onto in ("trained", "original")}
    live = _logits(open_live(files, _ignore).model)
    far = {onto: float((_logits(_load(tmp_path / onto)) - live).abs().max()) for onto in receipts}
    references = {"trained": _dequantized(base, quantization), "original": _load(base)}
    for onto, reference in references.items():
        merged = _merged_by_peft(reference, folder)
        # 1e-3 for int8: transformers dequantizes with 127's reciprocal rounded to fp32, the product divides.
        bound = 1e-3 if (onto, quantization) == ("trained", "int8") else 1e-5
        assert float((_logits(_load(tmp_path / onto)) - _logits(merged)).abs().max()) <= bound
    # When it only answers, int8 rounds the inputs of every layer to 8 bit as well.
    assert far["trained"] <= (0.1 if quantization == "int8" else 1e-4)
    assert quantization == "int8" or far["trained"] < far["original"]
    onto_trained, onto_original = receipts["trained"], receipts["original"]
    assert onto_trained.kl <= 1e-9
    assert onto_trained.kl_of_writing == onto_trained.kl == onto_trained.kl_onto_trained
    assert onto_original.kl_of_writing <= 1e-9 < onto_original.kl == onto_original.kl_onto_original
    assert quantization == "int8" or onto_original.kl_to_trained > onto_trained.kl_to_trained
    assert {receipt.closer_base for receipt in receipts.values()} == {"trained"}
    # Each receipt has measured the other merge, in another way.
    assert onto_trained.kl_onto_original == pytest.approx(onto_original.kl, rel=1e-3)
    assert onto_original.kl_onto_trained == pytest.approx(onto_trained.kl, rel=1e-3, abs=1e-9)
    assert not any(path.is_dir() for path in (tmp_path / "original").iterdir())


@pytest.mark.slow
def test_a_bf16_merge_is_within_its_bound(tmp_path, trained):
    files = open_adapter(trained("llama", "nf4", base={"dtype": "bf16"}))
    receipt = merge_adapter(files, tmp_path / "out", _ignore, onto="trained")
    assert receipt.dtype == "bf16"
    assert receipt.kl <= receipt.max_kl == min(1e-2, receipt.kl_of_effect / 10)
    assert {info.dtype for info in read_header(tmp_path / "out" / "model.safetensors").values()} == {"BF16"}


def test_a_bf16_merge_keeps_what_the_author_kept_wider(tmp_path, tiny_bases):
    base = tmp_path / "mixed"
    shutil.copytree(tiny_bases("llama"), base)
    stored = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    stored["model.norm.weight"] = stored["model.norm.weight"].float() + 1e-6
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    adapter = _random_adapter(base, tmp_path / "a")
    plan = plan_merge([(adapter, 1.0)], _ignore, onto="trained", base_name=str(base))
    for dtype, kept in (("bf16", "F32"), ("fp32", "F32")):
        out = tmp_path / dtype
        out.mkdir()
        write_merged(replace(plan, dtype=dtype), out, _ignore)
        written = load_file(out / "model.safetensors")
        assert read_header(out / "model.safetensors")["model.norm.weight"].dtype == kept
        assert torch.equal(written["model.norm.weight"], stored["model.norm.weight"])
        assert written["model.embed_tokens.weight"].dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)


def test_sharded_is_the_same_model(tmp_path, tiny_bases):
    base = tiny_bases("llama")
    files = _random_adapter(base, tmp_path / "a")
    whole = merge_adapters([(files, 1.0)], tmp_path / "whole", _ignore, onto="trained", base_name=str(base))
    cut = merge_adapters(
        [(files, 1.0)], tmp_path / "cut", _ignore, onto="trained", base_name=str(base), max_shard_bytes=100_000
    )
    assert (whole.weight_files, cut.weight_files > 2) == (1, True)
    assert not (tmp_path / "whole" / "model.safetensors.index.json").exists()
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())["weight_map"]
    parts = {name: load_file(tmp_path / "cut" / file)[name] for name, file in index.items()}
    one = load_file(tmp_path / "whole" / "model.safetensors")
    assert parts.keys() == one.keys()
    assert all(torch.equal(parts[name], one[name]) for name in one)
    # Tied: the shared matrix is written once, and the config still says so.
    assert "lm_head.weight" not in one
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["tie_word_embeddings"] is True
    expected = _logits(_merged_by_peft(_load(base), tmp_path / "a"))
    assert float((_logits(_load(tmp_path / "cut")) - expected).abs().max()) <= 1e-5


@pytest.mark.slow
def test_a_process_with_nothing_but_transformers_answers_as_peft_does(tmp_path, tiny_bases):
    base = tiny_bases("llama")
    files = _random_adapter(base, tmp_path / "a")
    merge_adapters(
        [(files, 1.0)], tmp_path / "cut", _ignore, onto="trained", base_name=str(base), max_shard_bytes=100_000
    )
    found = _in_plain_transformers(tmp_path / "cut")
    expected = _logits(_merged_by_peft(_load(base), tmp_path / "a"))[0, -1]
    assert float((torch.tensor(found["logits"]) - expected).abs().max()) <= 1e-5
    assert found["dtype"] == "torch.float32"
    assert found["other libraries"] == []


def _in_plain_transformers(folder):
    done = subprocess.run(
        [sys.executable, "-c", IN_TRANSFORMERS, str(folder), json.dumps(IDS.tolist())],
        capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=folder,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_the_adapters_own_template_goes_with_the_model_and_no_path_of_this_machine(tmp_path, tiny_bases, trained):
    folder = trained("llama", "none", data={"chat_template": "builtin:plain"})
    files = open_adapter(folder)
    receipt = merge_adapter(files, tmp_path / "out", _ignore, onto="trained")
    own = files.manifest.tokenizer.own_template
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == own != AutoTokenizer.from_pretrained(tiny_bases("llama")).chat_template
    assert receipt.kl_to_trained <= 1e-9
    assert json.loads((tmp_path / "out" / "merge_receipt.json").read_text())["kl"] == receipt.kl
    card = (tmp_path / "out" / "README.md").read_text()
    assert "none in 16" in card
    for path in (tmp_path / "out").iterdir():
        if path.suffix in (".json", ".md"):
            assert str(tmp_path) not in path.read_text()
            assert str(tiny_bases("llama").parent) not in path.read_text()


def test_several_adapters_add_up_each_with_its_weight(tmp_path, tiny_bases):
    base = tiny_bases("gpt2")
    parts = [
        (_random_adapter(base, tmp_path / "a", rank=4, alpha=8, seed=1), 0.5),
        (_random_adapter(base, tmp_path / "b", rank=9, alpha=3, seed=2, variant="rslora"), -1.25),
    ]
    receipt = merge_adapters(parts, tmp_path / "out", _ignore, onto="trained", base_name=str(base))
    expected = _load(base)
    weights = dict(expected.named_parameters())
    for (files, weight), scaling in zip(parts, (8 / 4, 3 / 9**0.5), strict=True):
        state = load_file(files.folder / "adapter_model.safetensors")
        for module in files.shape.modules:
            a, b = (state[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
            weights[f"{module}.weight"].data += (weight * scaling * (b @ a).T).float()
    assert float((_logits(_load(tmp_path / "out")) - _logits(expected)).abs().max()) <= 1e-4
    assert [(part.name, part.weight) for part in receipt.adapters] == [("a", 0.5), ("b", -1.25)]
    assert receipt.kl <= 1e-9
    assert "2 adapters" in receipt.compared_with
    assert "peft" in receipt.compared_with


def _weak_adapter(base, folder, share):
    """Write an adapter whose change is `share` of a random one's."""
    _random_adapter(base, folder)
    state = load_file(folder / "adapter_model.safetensors")
    weakened = {name: tensor * (share if "lora_B" in name else 1) for name, tensor in state.items()}
    save_file(weakened, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return open_adapter(folder)


def test_an_adapter_of_no_effect_is_merged_all_the_same(tmp_path, tiny_bases):
    base = tiny_bases("llama")
    files = _weak_adapter(base, tmp_path / "a", 0.0)
    receipt = merge_adapter(files, tmp_path / "out", _ignore, onto="trained", base_name=str(base))
    assert (receipt.kl_of_effect, receipt.max_kl) == (0.0, 1e-6)


def test_an_adapter_that_was_trained_in_bf16_is_written_in_fp32_when_asked(tmp_path, trained):
    files = open_adapter(trained("llama", "nf4", base={"dtype": "bf16"}))
    receipt = merge_adapter(files, tmp_path / "out", _ignore, onto="trained", dtype="fp32")
    assert receipt.dtype == "fp32"
    assert receipt.kl_of_writing <= 1e-6
    assert {info.dtype for info in read_header(tmp_path / "out" / "model.safetensors").values()} == {"F32"}


def test_what_has_no_passport_is_called_unverified_in_receipt_and_card(tmp_path, tiny_bases, trained):
    foreign = _random_adapter(tiny_bases("llama"), tmp_path / "nopass" / "1")
    receipt = merge_adapter(foreign, tmp_path / "m", _ignore, onto="trained", base_name=str(tiny_bases("llama")))
    assert [(part.name, part.verified) for part in receipt.adapters] == [("nopass@1", False)]
    assert "unverified" in receipt.compared_with
    card = (tmp_path / "m" / "README.md").read_text()
    assert "**Unverified**" in card
    assert "It was trained on" not in card
    own = merge_adapter(open_adapter(trained("llama", "none")), tmp_path / "n", _ignore, onto="trained")
    assert own.adapters[0].verified
    assert "Unverified" not in (tmp_path / "n" / "README.md").read_text()


def test_a_head_of_its_own_is_no_conv1d_in_a_gpt2_either(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    base = tmp_path / "untied"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    for target in ("c_attn", "lm_head"):
        settings = peft.LoraConfig(
            r=4, target_modules=[target], fan_in_fan_out=target == "c_attn", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(_load(base), settings)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(tmp_path / target, save_embedding_layers=False)
    files = _joined(tmp_path / "c_attn", tmp_path / "lm_head", tmp_path / "both")
    merge_adapter(files, tmp_path / "out", _ignore, onto="trained", base_name=str(base))
    expected = _load(base)
    weights = dict(expected.named_parameters())
    state = load_file(files.folder / "adapter_model.safetensors")
    for module in files.shape.modules:
        a, b = (state[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        change = files.shape.scaling * (b @ a)
        weights[f"{module}.weight"].data += change if module == "lm_head" else change.T
    assert float((_logits(_load(tmp_path / "out")) - _logits(expected)).abs().max()) <= 1e-4


def _joined(first, second, folder):
    """Write the layers of two adapters as one."""
    shutil.copytree(first, folder)
    state = load_file(first / "adapter_model.safetensors") | load_file(second / "adapter_model.safetensors")
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = ["c_attn", "lm_head"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return open_adapter(folder)


def test_merging_reads_weights_one_at_a_time(tmp_path, tiny_bases, monkeypatch):
    base = tiny_bases("llama")
    files = _random_adapter(base, tmp_path / "a")
    plan = plan_merge([(files, 1.0)], _ignore, onto="trained", base_name=str(base))
    alive, most = [], 0
    real = merge.read_tensor

    def counting(stored):
        nonlocal most
        import weakref

        tensor = real(stored)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(merge, "read_tensor", counting)
    (tmp_path / "out").mkdir()
    write_merged(plan, tmp_path / "out", _ignore)
    assert len(alive) == len(files.shape.modules)
    assert most <= 2
