"""What a base is, by content: any change of a weight or a special token is seen, and nothing else is."""

import json
import os
import shutil

import pytest

from lora_tune.errors import LoraTuneError, MissingInputError
from lora_tune.model.fingerprint import (
    fingerprint,
    read_header,
    read_shapes,
    recall_base,
    remember_base,
    tokenizer_digest,
    tokenizer_files,
    weight_files,
)
from lora_tune.model.resolve import locate
from lora_tune.recipe.schema import BaseSection
from tests.unit import test_resolve
from tests.unit.test_resolve import _sharded

base = test_resolve.base


def test_one_changed_weight_changes_the_fingerprint(base, tmp_path):
    before = fingerprint(base)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    assert fingerprint(other) == before
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(bytes(content))
    after = fingerprint(other)
    assert (after.config, after.tensors) == (before.config, before.tensors)
    assert after.weights != before.weights


def test_a_weight_that_changes_under_the_same_size_and_mtime_changes_the_fingerprint(base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    before, weights = fingerprint(other), other / "model.safetensors"
    content, was = bytearray(weights.read_bytes()), weights.stat()
    content[-3] ^= 1
    weights.write_bytes(bytes(content))
    os.utime(weights, ns=(was.st_atime_ns, was.st_mtime_ns))  # as `cp -p`, rsync -t and tar do
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (was.st_size, was.st_mtime_ns)
    assert fingerprint(other).weights != before.weights


def test_sharding_does_not_change_the_fingerprint(base, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "many")
    assert read_shapes(tmp_path / "one") == read_shapes(tmp_path / "many")


def test_the_weights_are_those_that_transformers_loads(base, tmp_path):
    many = _sharded(base, tmp_path / "many")
    before = fingerprint(many)
    for copy in ("consolidated.safetensors", "model.fp16.safetensors", "model-old.safetensors"):
        shutil.copy(base / "model.safetensors", many / copy)
        shutil.copy(base / "model.safetensors", base / copy.replace("model.", "model_"))
    assert fingerprint(many) == before
    assert weight_files(base) == [base / "model.safetensors"]


@pytest.mark.parametrize("damage", ["part", "index", "not json", "elsewhere"])
def test_parts_without_the_whole_are_missing(base, tmp_path, damage):
    many = _sharded(base, tmp_path / "many")
    index = many / "model.safetensors.index.json"
    if damage == "part":
        weight_files(many)[1].unlink()
    elif damage == "index":
        index.unlink()
    elif damage == "not json":
        index.write_text("{")
    else:
        index.write_text(json.dumps({"weight_map": {"a": "../base/model.safetensors"}}))
    with pytest.raises(MissingInputError):
        weight_files(many)


@pytest.mark.parametrize("token", ["bos_token", "eos_token", "pad_token", "unk_token"])
def test_a_changed_special_token_changes_the_tokenizer_digest(base, token):
    def digest():
        return tokenizer_digest(tokenizer_files(base), chat_template="")["tokenizer"]

    before = digest()
    path = base / "tokenizer_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "saved_by": "someone else"}))
    assert digest() == before
    path.write_text(json.dumps({**values, token: {"content": values[token], "special": True}}))
    assert digest() == before
    path.write_text(json.dumps({**values, token: "!"}))
    assert digest() != before


def test_a_cache_that_is_closed_breaks_nothing(base, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("LORA_TUNE_CACHE", str(tmp_path / "file" / "cache"))
    print_ = fingerprint(base)
    remember_base(print_.weights, str(base))
    assert recall_base(print_.weights) is None
    monkeypatch.setenv("LORA_TUNE_CACHE", str(tmp_path / "open"))
    assert fingerprint(base) == print_
    remember_base(print_.weights, str(base))
    assert recall_base(print_.weights) == str(base)
    for kept in (tmp_path / "open").rglob("*.json"):
        kept.write_text("[1]")
    assert fingerprint(base) == print_
    assert recall_base(print_.weights) is None


def test_a_gguf_file_is_hashed_once(tmp_path, monkeypatch):
    from lora_tune.model import fingerprint as module

    path = tmp_path / "x.gguf"
    path.write_bytes(b"one")
    first = locate(BaseSection(name=str(path))).path
    hashed = []
    monkeypatch.setattr(module, "file_digest", lambda path: hashed.append(path) or "f" * 64)
    assert locate(BaseSection(name=str(path))).path == first
    assert not hashed
    path.write_bytes(b"three")
    assert locate(BaseSection(name=str(path))).path != first
    assert hashed == [path]


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\x02\x00\x00\x00\x00\x00\x00\x00{]", b"\x02\x00\x00\x00\x00\x00\x00\x00[]"]
)
def test_broken_safetensors_headers_are_our_error(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoraTuneError):
        read_header(path)
