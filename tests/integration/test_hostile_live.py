"""Hostile adapters at a live model: none changes the base or the adapter beside it; what is let in, PEFT loads the same."""

import copy
import hashlib
import json
import os
import shutil
import socket
import sys
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from lora_tune.adapter.apply import attach_adapter
from lora_tune.adapter.door import CONFIG, WEIGHTS, open_adapter
from lora_tune.adapter.live import check_fits, open_live
from lora_tune.adapter.manifest import FILE_NAME
from lora_tune.adapter.probes import probe_logits
from lora_tune.data.messages import Message
from lora_tune.data.rendering import render
from lora_tune.errors import AdapterError, AdapterMismatchError, LoraTuneError
from lora_tune.model.fingerprint import (
    file_digest,
    fingerprint,
    read_shapes,
    tokenizer_digest,
    tokenizer_files,
)
from tests.hostile import OFFERED, fitting, renamed
from tests.unit.test_door import write
from tests.unit.test_hostile_passport import PASSPORT

PREFIXES = {
    "none": ("base_model.model.", ""),
    "the inner model's": ("base_model.model.model.", "base_model.model."),
    "one word too many": ("base_model.model.model.", "base_model.model.model.model."),
    "a vision model's": ("base_model.model.model.", "base_model.model.language_model.model."),
    "saved inside PEFT twice": ("base_model.model.model.", "base_model.model.base_model.model.model."),
    "of distributed training": ("base_model.", "module.base_model."),
    "of a compiled model": ("base_model.model.model.", "base_model.model._orig_mod.model."),
    "of another family": ("base_model.model.model.layers.", "base_model.model.transformer.h."),
}
"""Ways that an adapter's names miss the model: PEFT loads each, changes nothing and says at most a warning."""


def _ignore(*_):
    """Take no note."""


@pytest.fixture(scope="module")
def base(tiny_bases):
    return tiny_bases("llama")


def _plain(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture
def live(base, tmp_path):
    """The tiny Llama with one good adapter on it."""
    good = open_adapter(write(tmp_path / "good", content=fitting(4), config={"r": 4}))
    return attach_adapter(_plain(base), good, name="good", adapter_dtype="fp32")


def _state(model):
    """Everything that an answer depends on, by content."""
    weights = [*model.named_parameters(), *model.named_buffers()]
    digests = {
        name: hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest() for name, tensor in weights
    }
    scalings = {name: dict(module.scaling) for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return copy.deepcopy((digests, scalings, sorted(model.peft_config), model.active_adapters, model.training))


def _offer(folder, model, shapes):
    files = open_adapter(folder)
    check_fits(files, shapes, conv1d=False)
    attach_adapter(model, files, name="other", adapter_dtype="fp32")


def test_no_hostile_adapter_changes_the_base_or_the_adapter_beside_it(live, base, tmp_path):
    shapes, before = read_shapes(base), _state(live)
    answer = probe_logits(live, list(range(3, 30)), 1)
    attacks = OFFERED | {
        f"prefix {name}": renamed(lambda key, change=change: key.replace(*change, 1))
        for name, change in PREFIXES.items()
    }
    assert len(attacks) >= 140
    for number, (name, make) in enumerate(attacks.items()):
        make(tmp_path / str(number))
        with pytest.raises(LoraTuneError) as caught:
            _offer(tmp_path / str(number), live, shapes)
        assert caught.value.exit_code == 77, name
        assert _state(live) == before, name
    assert torch.equal(probe_logits(live, list(range(3, 30)), 1), answer)
    write(tmp_path / "fits", content=fitting())
    _offer(tmp_path / "fits", live, shapes)
    assert sorted(live.peft_config) == ["good", "other"]
    live.set_adapter("good")
    live.delete_adapter("other")
    assert _state(live)[0] == before[0]


@pytest.mark.parametrize("name", PREFIXES)
def test_an_adapter_that_would_not_be_applied_is_refused(live, base, tmp_path, name):
    folder = tmp_path / "a"
    renamed(lambda key: key.replace(*PREFIXES[name], 1))(folder)
    before = _state(live)
    with pytest.raises(LoraTuneError) as caught:
        attach_adapter(live, open_adapter(folder), name="other", adapter_dtype="fp32")
    assert caught.value.exit_code == 77
    assert _state(live) == before
    with pytest.raises(LoraTuneError):
        open_live(open_adapter(folder), _ignore, base_name=str(base))


def test_weights_swapped_after_the_door_never_reach_the_model(live, tmp_path):
    files = open_adapter(write(tmp_path / "a", content=fitting()))
    before = _state(live)
    write(tmp_path / "a", content=fitting() | {next(iter(fitting())): ("F32", [2, 64], bytes(512))})
    with pytest.raises(AdapterMismatchError):
        attach_adapter(live, files, name="other", adapter_dtype="fp32")
    assert _state(live) == before


BASE_NAMES = ["evil/huge-model", "evil", "/etc", "/dev/zero", "../../etc", "./x", "builtin:nothing", "builtin:../../x", "https://evil.example/x",
              "file:///etc", "x.gguf", "evil/x.gguf", "/x.gguf", "", "hub:evil/x", "\\\\server\\x", "~/x", "evil/x/y", "evil/x@main", "a" * 512]  # fmt: skip


def test_the_base_that_an_adapter_names_is_neither_fetched_nor_opened(tmp_path, monkeypatch):
    connected = []
    monkeypatch.setattr(socket.socket, "connect", lambda *given: connected.append(given))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **_: connected.append(given))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in BASE_NAMES:
        files = open_adapter(write(tmp_path / "a", {"base_model_name_or_path": name}, fitting()))
        with pytest.raises(LoraTuneError) as caught:
            open_live(files, _ignore)
        assert caught.value.exit_code == 66, name
    assert connected == []


def test_tokenizers_and_templates_of_an_adapter_are_never_opened(base, tmp_path):
    folder = write(tmp_path / "a", content=fitting())
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "chat_template.jinja",
        "config.json",
        "adapter_model.bin",
    ):
        os.mkfifo(folder / name)  # who opened one to read it would wait for ever
    (folder / "generation_config.json").write_text("{")
    opened, on = [], [True]
    sys.addaudithook(lambda event, given: opened.append(str(given[0])) if on[0] and event == "open" else None)
    try:
        live = open_live(open_adapter(folder), _ignore, base_name=str(base))
    finally:
        on[0] = False  # a hook cannot be taken away again
    assert live.tokenizer.chat_template == live.tokenizer.get_chat_template()
    assert {path for path in opened if path.startswith(str(folder))} == {str(folder / WEIGHTS), str(folder / CONFIG)}


@pytest.fixture
def verified(base, tmp_path):
    """A function change → an adapter with a passport for a copy of the base, one fact of which is changed afterwards."""
    copied = tmp_path / "base"
    shutil.copytree(base, copied)
    folder = write(tmp_path / "a", {"base_model_name_or_path": "base"}, fitting())
    passport = copy.deepcopy(PASSPORT)
    template = (copied / "chat_template.jinja").read_text()
    passport["base"] |= fingerprint(copied).as_dict()
    passport["tokenizer"] |= tokenizer_digest(tokenizer_files(copied), chat_template=template)
    passport["lora"]["n_parameters"] = 2 * (2 * 64 + 64 * 2 + 2 * 64 + 32 * 2)
    passport |= {"weights_digest": file_digest(folder / WEIGHTS), "config_digest": file_digest(folder / CONFIG)}
    (folder / FILE_NAME).write_text(json.dumps(passport))
    return folder, copied


def _flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


CHANGES = {
    "weights_digest": lambda folder, base: _flip(folder / WEIGHTS, -4),
    "config_digest": lambda folder, base: (folder / CONFIG).write_text((folder / CONFIG).read_text().replace('"lora_alpha": 4', '"lora_alpha": 5')),
    "lora.scaling": lambda folder, base: (folder / FILE_NAME).write_text((folder / FILE_NAME).read_text().replace('"scaling": 2.0', '"scaling": 3.0')),
    "lora.n_parameters": lambda folder, base: (folder / FILE_NAME).write_text((folder / FILE_NAME).read_text().replace('"n_parameters": 896', '"n_parameters": 897')),
    "lora.alpha": lambda folder, base: (folder / FILE_NAME).write_text((folder / FILE_NAME).read_text().replace('"alpha": 4.0', '"alpha": 5.0')),
    "base.config": lambda folder, base: (base / "config.json").write_text((base / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')),
    "base.weights": lambda folder, base: _flip(base / "model.safetensors", -4),
    "tokenizer.tokenizer": lambda folder, base: (base / "tokenizer.json").write_text((base / "tokenizer.json").read_text().replace("<|endoftext|>", "<|endofbook|>")),
    "tokenizer.chat_template": lambda folder, base: (base / "chat_template.jinja").write_text((base / "chat_template.jinja").read_text() + " "),
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
def test_what_was_changed_after_training_is_named_and_refused(verified, field):
    folder, base = verified
    open_live(open_adapter(folder), _ignore, base_name=str(base))
    before = {path: path.read_bytes() for path in (*folder.iterdir(), *base.iterdir())}
    CHANGES[field](folder, base)
    assert sum(path.read_bytes() != content for path, content in before.items()) == 1
    with pytest.raises(AdapterMismatchError) as caught:
        open_live(open_adapter(folder), _ignore, base_name=str(base))
    assert caught.value.exit_code == 77
    assert caught.value.where == field


HOSTILE_TEMPLATE = "{% for a in range(50000) %}{{ 'x' * 100 }}{% endfor %}"


def test_a_passport_s_own_template_is_rendered_behind_the_fence(verified):
    folder, base = verified
    passport = json.loads((folder / FILE_NAME).read_text())
    passport["tokenizer"] |= {
        "own_template": HOSTILE_TEMPLATE, "chat_template": hashlib.sha256(HOSTILE_TEMPLATE.encode()).hexdigest()
    }  # fmt: skip
    (folder / FILE_NAME).write_text(json.dumps(passport))
    live = open_live(open_adapter(folder), _ignore, base_name=str(base))
    with pytest.raises(AdapterError) as caught:
        render(live.tokenizer, [Message("user", "Hello")])
    assert caught.value.where == "tokenizer.own_template"


OLDEST = {"base_model_name_or_path": "x/y", "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 4, "lora_dropout": 0.05,
          "modules_to_save": None, "peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}  # fmt: skip
SINCE = {
    "0.2": {"enable_lora": None, "merge_weights": False},
    "0.4": {"auto_mapping": None, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None, "revision": None},
    "0.6": {"alpha_pattern": {}, "rank_pattern": {}},
    "0.7": {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core", "use_rslora": False},
    "0.10": {"layer_replication": None, "use_dora": False},
    "0.14": {"eva_config": None, "exclude_modules": None, "lora_bias": False},
    "0.15": {"corda_config": None, "trainable_token_indices": None},
    "0.17": {"qalora_group_size": 16, "target_parameters": None, "use_qalora": False},
    "0.18": {"alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False, "peft_version": "0.18.0"},
}  # fmt: skip
"""Keys of adapter_config.json by the PEFT release that first wrote them."""


def _written_by(version):
    """The config as that release writes it; the oldest keys of all were dropped again in 0.3."""
    releases = list(SINCE)
    found = dict(OLDEST)
    for release in releases[: releases.index(version) + 1]:
        found |= SINCE[release]
    return found if version == "0.2" else {key: value for key, value in found.items() if key not in SINCE["0.2"]}


def _written_now(**change):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **change)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


ELSEWHERE = {
    **{f"PEFT {version}": _written_by(version) for version in SINCE},
    "PEFT installed": _written_now(), "installed, gaussian": _written_now(init_lora_weights="gaussian"), "installed, rsLoRA": _written_now(use_rslora=True),
    "installed, DoRA": _written_now(use_dora=True), "installed, orthogonal": _written_now(init_lora_weights="orthogonal"),
    "Unsloth": _written_by("0.18") | {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama", "unsloth_fixed": True}, "lora_dropout": 0},
    "full paths": _written_now() | {"target_modules": [f"model.layers.{n}.self_attn.{name}" for n in (0, 1) for name in ("q_proj", "v_proj")]},
    "alpha with a point": _written_now() | {"lora_alpha": 2.5}, "a runtime config": _written_now() | {"runtime_config": {"ephemeral_gpu_offload": False}},
    "no task": _written_now() | {"task_type": None}, "a key of tomorrow that is off": _written_now() | {"something_new": None},
}  # fmt: skip


def _agrees_with_peft(folder, base):
    """Load the folder with ours and with PEFT's own loader; return ours, after everything was compared."""
    files = open_adapter(folder)
    assert files.manifest is None  # unverified
    check_fits(files, read_shapes(base), conv1d=False)
    ours = attach_adapter(_plain(base), files, name="default", adapter_dtype="fp32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT tells of settings that it ignores
        theirs = PeftModel.from_pretrained(_plain(base), folder).eval()
        result = theirs.load_adapter(folder, adapter_name="again")
    assert not result.missing_keys
    assert not result.unexpected_keys
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert tuple(sorted(layers)) == files.shape.modules
    for module in layers.values():
        assert module.scaling["again"] == pytest.approx(files.shape.scaling, rel=1e-12)
        assert module.r["again"] == files.shape.rank
        assert module.use_dora["again"] is (files.shape.variant == "dora")
    ids = list(range(3, 40))
    assert torch.equal(probe_logits(ours, ids, 1), probe_logits(theirs, ids, 1))
    return files


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_adapter_of_any_peft_is_let_in_unverified_and_does_what_it_does_in_peft(base, tmp_path, name):
    config = ELSEWHERE[name]
    dtype = ("F32", "F16", "BF16")[list(ELSEWHERE).index(name) % 3]
    _agrees_with_peft(write(tmp_path / "a", config, fitting(dtype=dtype, dora=bool(config.get("use_dora")))), base)


def test_the_configs_above_hold_every_field_of_the_installed_peft():
    known = {key for config in ELSEWHERE.values() for key in config}
    assert set(LoraConfig().to_dict()) <= known


CHANGED = {
    "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}, "exclude_modules": ["k_proj"],
    "layers_to_transform": [0], "layer_replication": [[0, 2], [1, 2]], "target_parameters": ["mlp.experts"], "trainable_token_indices": [1],
    "lora_bias": True, "alora_invocation_tokens": [1, 2], "use_qalora": True, "arrow_config": {"top_k": 3}, "use_bdlora": {"nblocks": 2},
    "velora_config": {"num_groups": 2}, "kasa_config": {"beta": 1}, "monteclora_config": {"num_samples": 2}, "bias": "lora_only",
    "init_lora_weights": "olora", "peft_type": "ADALORA", "ensure_weight_tying": True, "something_new": 5,
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGED)
def test_a_setting_that_changes_what_is_computed_is_refused_by_name_with_a_way_out(tmp_path, key):
    with pytest.raises(LoraTuneError, match=key) as caught:
        open_adapter(write(tmp_path / "a", _written_now() | {key: CHANGED[key]}, fitting()))
    assert caught.value.exit_code == 77
    assert "merge" in caught.value.hint


def test_a_pattern_of_targets_is_refused_with_the_names_to_write_instead(tmp_path):
    for pattern in ("all-linear", r".*\.(q_proj|v_proj)$"):
        with pytest.raises(LoraTuneError, match="not a pattern") as caught:
            open_adapter(write(tmp_path / "a", {"target_modules": pattern}, fitting()))
        names = json.loads(caught.value.hint.partition(": ")[2])
        open_adapter(write(tmp_path / "a", {"target_modules": names}, fitting()))


HARMLESS = st.fixed_dictionaries({}, optional={
    "lora_alpha": st.floats(0.01, 65536) | st.integers(1, 65536), "use_rslora": st.booleans(), "lora_dropout": st.floats(0, 0.9), "inference_mode": st.booleans(),
    "fan_in_fan_out": st.just(False), "init_lora_weights": st.sampled_from([True, False, "gaussian", "orthogonal"]), "task_type": st.sampled_from(["CAUSAL_LM", None]),
    "base_model_name_or_path": st.sampled_from(["", "x/y", "/a/b"]), "revision": st.sampled_from([None, "main"]), "rank_pattern": st.just({}), "exclude_modules": st.sampled_from([None, []]),
    "target_modules": st.permutations(["q_proj", "v_proj", "self_attn.q_proj"]) | st.just(["self_attn.q_proj", "layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]),
})  # fmt: skip


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    config=HARMLESS, rank=st.sampled_from([2, 4, 8]), dtype=st.sampled_from(["F32", "F16", "BF16"]), dora=st.booleans()
)
def test_whatever_the_door_lets_in_peft_loads_to_the_same_logits(base, tmp_path, config, rank, dtype, dora):
    folder = write(
        tmp_path / "a", _written_now() | config | {"r": rank, "use_dora": dora}, fitting(rank, dtype, dora=dora)
    )
    if dora and config.get("use_rslora"):
        with pytest.raises(LoraTuneError, match="together"):
            open_adapter(folder)
    else:
        _agrees_with_peft(folder, base)
