"""An adapter decides neither which base is downloaded nor which file is opened, and is put on no base it does not fit."""

import hashlib
import json
import shutil
import struct
from dataclasses import replace

import pytest

from lora_tune.adapter import live
from lora_tune.adapter.apply import apply_lora, attach_adapter
from lora_tune.adapter.door import CONFIG, WEIGHTS, open_adapter
from lora_tune.adapter.live import base_section, check_fits, open_live
from lora_tune.adapter.manifest import FILE_NAME
from lora_tune.errors import AdapterError, AdapterMismatchError, MissingInputError, UnreachableError, UsageError
from lora_tune.model import resolve
from lora_tune.model.fingerprint import (
    file_digest,
    fingerprint,
    read_shapes,
    remember_base,
    tokenizer_digest,
    tokenizer_files,
)
from lora_tune.recipe.schema import LoraSection
from tests.tiny import CHATML, tiny_model
from tests.unit.test_door import write
from tests.unit.test_hostile_passport import PASSPORT, PROBE, with_passport

COMMIT = "a" * 40


def _quiet(*_):
    """Take no note of progress."""


@pytest.fixture(autouse=True)
def _nothing_is_downloaded(monkeypatch):
    """Only a look into the cache is let through."""
    import huggingface_hub

    real = huggingface_hub.snapshot_download

    def local_only(*args, **kwargs):
        assert kwargs["local_files_only"], f"a download was tried: {args}"
        return real(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", local_only)


@pytest.fixture
def hub(tmp_path, monkeypatch, tiny_bases):
    """A hub cache that holds owner/tiny at COMMIT."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(tiny_bases(), repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)


def _foreign(folder, base_name):
    return open_adapter(write(folder, {"base_model_name_or_path": base_name}))


@pytest.mark.parametrize("name", ["/etc", "../base", "./base", "~/base", "base.gguf", "owner/base.gguf", "a/b/c", "a b", "..", "C:\\x"])  # fmt: skip
def test_a_path_that_an_adapter_names_is_not_opened(tmp_path, monkeypatch, name):
    adapter = _foreign(tmp_path / "a", name)

    def touched(*_):
        raise AssertionError("it was looked at")

    monkeypatch.setattr(live, "locate", touched)
    with pytest.raises(MissingInputError) as caught:
        base_section(adapter)
    assert caught.value.exit_code == 66
    assert "--base" in caught.value.hint


@pytest.mark.parametrize("name", ["owner/other", "other"])
def test_a_base_that_an_adapter_names_is_not_downloaded(tmp_path, hub, name):
    with pytest.raises(MissingInputError) as caught:
        base_section(_foreign(tmp_path / "a", name))
    assert f"--base {name} to download" in caught.value.hint
    with pytest.raises(MissingInputError):
        base_section(_foreign(tmp_path / "b", f"{name}--.."))


def test_a_base_that_is_here_or_built_in_is_taken(tmp_path, hub):
    assert base_section(_foreign(tmp_path / "a", "owner/tiny")).name == "owner/tiny"
    assert base_section(_foreign(tmp_path / "b", "builtin:smollm2-135m")).name == "builtin:smollm2-135m"
    with pytest.raises(MissingInputError, match="does not say"):
        base_section(_foreign(tmp_path / "c", None))


def test_a_passports_hub_base_is_taken_only_from_the_cache(tmp_path, hub):
    here = open_adapter(with_passport(tmp_path / "a", {"base.name": "owner/tiny", "base.revision": COMMIT}))
    section = base_section(here)
    assert (section.name, section.revision) == ("owner/tiny", COMMIT)
    for field, value in (("base.revision", "b" * 40), ("base.name", "owner/other")):
        change = {"base.name": "owner/tiny", "base.revision": COMMIT} | {field: value}
        adapter = open_adapter(with_passport(tmp_path / field, change))
        with pytest.raises(MissingInputError) as caught:
            base_section(adapter)
        name = change["base.name"]
        assert f"--base {name} to download" in caught.value.hint
        # Asked for by name, it may be fetched, at the commit it was trained on.
        asked = base_section(adapter, name)
        assert (asked.name, asked.revision) == (name, change["base.revision"])
        assert base_section(adapter, "owner/third").revision is None


@pytest.mark.parametrize("name", ["/etc", "../x", "x.gguf"])
def test_a_passports_path_with_a_commit_is_still_a_path(tmp_path, name):
    adapter = open_adapter(with_passport(tmp_path / "a", {"base.name": name, "base.revision": COMMIT}))
    with pytest.raises(MissingInputError, match="not opened"):
        base_section(adapter)


def test_a_passports_local_base_is_where_this_machine_saw_it(tmp_path):
    adapter = open_adapter(with_passport(tmp_path / "a", {"base.name": "base", "base.weights": "1" * 64}))
    with pytest.raises(MissingInputError, match="not known on this machine"):
        base_section(adapter)
    remember_base("1" * 64, str(tmp_path))
    assert base_section(adapter).name == str(tmp_path)


def test_a_base_that_the_user_names_is_made_absolute(tmp_path, monkeypatch):
    adapter = _foreign(tmp_path / "a", "owner/x")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "base.gguf").write_bytes(b"x")
    for given, name in (
        ("models/base", str(tmp_path / "models" / "base")),
        ("./models/base", str(tmp_path / "models" / "base")),
        ("base.gguf", str(tmp_path / "base.gguf")),
        ("./nowhere", str(tmp_path / "nowhere")),
        ("owner/name", "owner/name"),
        ("builtin:smollm2-135m", "builtin:smollm2-135m"),
    ):
        assert base_section(adapter, given).name == name
    for given in ("", "x" * 600):
        with pytest.raises(UsageError):
            base_section(adapter, given)


def test_a_base_that_the_user_names_may_be_fetched(tmp_path, monkeypatch):
    asked = []

    def fetched(base, **_):
        asked.append(base.name)
        raise UnreachableError("no network")

    monkeypatch.setattr(resolve, "_hub_snapshot", fetched)
    with pytest.raises(UnreachableError):
        open_live(_foreign(tmp_path / "a", "owner/x"), _quiet, base_name="owner/other")
    assert set(asked) == {"owner/other"}


def _adapter(folder, base, **passport):
    """A fresh adapter on a tiny base, with a passport that belongs to it."""
    model = apply_lora(tiny_model("llama"), LoraSection(rank=2, alpha=4.0, targets=("q_proj",)), adapter_dtype="fp32")
    _save(model, folder)
    facts = {**PASSPORT, "weights_digest": file_digest(folder / WEIGHTS), "config_digest": file_digest(folder / CONFIG)}
    template = passport.pop("own_template", None)
    facts |= {
        "base": PASSPORT["base"] | fingerprint(base).as_dict(),
        "tokenizer": tokenizer_digest(tokenizer_files(base), chat_template=template or CHATML)
        | {"own_template": template},
        "lora": PASSPORT["lora"] | {"targets": ["q_proj"], "n_parameters": 2 * 2 * (64 + 64)},
        **passport,
    }
    (folder / FILE_NAME).write_text(json.dumps(facts))
    return open_adapter(folder)


def _save(model, folder):
    model.save_pretrained(folder, save_embedding_layers=False)
    config = json.loads((folder / CONFIG).read_text()) | {"base_model_name_or_path": "x/y"}
    (folder / CONFIG).write_text(json.dumps(config))


def test_a_template_in_a_passport_is_never_a_file(tmp_path, tiny_bases):
    path = tmp_path / "secret.jinja"
    path.write_text("a secret")
    for number, text in enumerate((str(path), "builtin:plain")):
        files = _adapter(tmp_path / str(number), tiny_bases(), own_template=text)
        assert open_live(files, _quiet, base_name=str(tiny_bases())).tokenizer.chat_template == text


@pytest.mark.parametrize("change", [{"input_ids": [1, 2, 3, 4, 512]}, {"top_ids": [[7, 8], [9, 512]]}])
def test_a_probe_of_tokens_that_the_base_does_not_know_is_refused(tmp_path, tiny_bases, change):
    files = _adapter(tmp_path / "a", tiny_bases(), probes=[PROBE, PROBE | change])
    with pytest.raises(AdapterError, match="token 512, but the base knows 512") as caught:
        open_live(files, _quiet, base_name=str(tiny_bases()))
    assert caught.value.where == "probes.1"


def test_weights_of_other_widths_are_refused_when_attached(tmp_path):
    content = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": ("F32", [2, 4], struct.pack("<8f", *range(8))),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": ("F32", [8, 2], struct.pack("<16f", *range(16))),
    }  # fmt: skip
    target = "model.layers.0.self_attn.q_proj"
    files = open_adapter(write(tmp_path / "a", {"target_modules": [target]}, content))
    with pytest.raises(AdapterMismatchError, match="size mismatch") as caught:
        attach_adapter(tiny_model("llama"), files, name="default", adapter_dtype="fp32")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("extra", ["mlp", "no_such_layer"])
def test_targets_that_lora_cannot_be_put_on_are_refused(tmp_path, extra):
    section = LoraSection(rank=2, alpha=4.0, targets=("q_proj",))
    _save(apply_lora(tiny_model("llama"), section, adapter_dtype="fp32"), tmp_path / "a")
    files = open_adapter(tmp_path / "a")
    names = ("q_proj", extra) if extra == "mlp" else (extra,)
    other = replace(files, shape=replace(files.shape, targets=names))
    with pytest.raises(AdapterMismatchError):
        attach_adapter(tiny_model("llama"), other, name="default", adapter_dtype="fp32")
    carrying = attach_adapter(tiny_model("llama"), files, name="default", adapter_dtype="fp32")
    with pytest.raises(AdapterMismatchError):
        attach_adapter(carrying, other, name="second", adapter_dtype="fp32")
    assert list(carrying.peft_config) == ["default"]


def test_what_is_attached_is_what_was_checked(tmp_path):
    section = LoraSection(rank=2, alpha=4.0, targets=("q_proj",))
    _save(apply_lora(tiny_model("llama"), section, adapter_dtype="fp32"), tmp_path / "a")
    files = open_adapter(tmp_path / "a")
    content = bytearray((tmp_path / "a" / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (tmp_path / "a" / WEIGHTS).write_bytes(bytes(content))
    with pytest.raises(AdapterMismatchError, match="changed after it was checked"):
        attach_adapter(tiny_model("llama"), files, name="default", adapter_dtype="fp32")


def test_a_header_that_safetensors_does_not_take_is_our_error(tmp_path):
    folder = write(tmp_path / "a")
    content = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(json.loads(content[8 : 8 + length]) | {"__metadata__": {"a": 1}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    with pytest.raises(AdapterError):
        attach_adapter(tiny_model("llama"), open_adapter(folder), name="default", adapter_dtype="fp32")


def test_a_multimodal_base_names_its_layers_otherwise_in_the_file(tmp_path):
    import torch
    import transformers as hf

    torch.manual_seed(0)
    wide = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = hf.Gemma3Config(
        text_config={"vocab_size": 64, "hidden_size": 32, "num_key_value_heads": 1, "head_dim": 16, **wide},
        vision_config={"hidden_size": 48, "image_size": 28, "patch_size": 14, **wide},
        mm_tokens_per_image=4,
    )
    model = hf.AutoModelForCausalLM.from_config(settings)
    model.save_pretrained(tmp_path / "base")
    shapes = read_shapes(tmp_path / "base")
    _save(apply_lora(model, LoraSection(targets=("q_proj", "o_proj", "fc1")), adapter_dtype="fp32"), tmp_path / "a")
    files = open_adapter(tmp_path / "a")
    assert not {f"{module}.weight" for module in files.shape.modules} <= set(shapes)
    check_fits(files, shapes, conv1d=False)
    without = {name: shape for name, shape in shapes.items() if "language_model" not in name}
    with pytest.raises(AdapterMismatchError):
        check_fits(files, without, conv1d=False)


def test_gpt2_holds_its_weights_transposed(tmp_path, tiny_bases):
    base = tiny_bases("gpt2")
    _save(apply_lora(tiny_model("gpt2"), LoraSection(rank=2), adapter_dtype="fp32"), tmp_path / "a")
    files = open_adapter(tmp_path / "a")
    live.check_belongs(files, live.BaseFiles("b", None, base))
    with pytest.raises(AdapterMismatchError):
        check_fits(files, read_shapes(base), conv1d=False)


def test_the_digest_of_a_template_is_that_of_its_text(tmp_path, tiny_bases):
    files = _adapter(tmp_path / "a", tiny_bases(), own_template="x")
    assert files.manifest.tokenizer.chat_template == hashlib.sha256(b"x").hexdigest()
