"""Safetensors read and written tensor by tensor: safetensors' own reader finds what was meant, in any number of files."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_tune.errors import MissingInputError
from lora_tune.model import shards
from lora_tune.model.fingerprint import read_header
from lora_tune.model.shards import (
    NewTensor,
    copy_beside,
    copy_pieces,
    plan_shards,
    read_tensor,
    stored_tensors,
    write_shards,
)

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "BOOL": torch.bool}
TENSORS = st.lists(
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=8
)


def _new(name, tensor):
    kind = {dtype: kind for kind, dtype in DTYPES.items()}[tensor.dtype]
    return NewTensor(name, kind, tuple(tensor.shape), lambda: iter([tensor]))


def _random(kinds):
    torch.manual_seed(0)
    return {f"layers.{n}.weight": (torch.randn(shape) * 9).to(DTYPES[kind]) for n, (kind, shape) in enumerate(kinds)}


@settings(max_examples=60, deadline=None)
@given(TENSORS, st.integers(1, 400))
def test_what_is_written_is_what_safetensors_reads_however_it_is_cut(tmp_path_factory, kinds, max_shard_bytes):
    folder = tmp_path_factory.mktemp("shards")
    tensors = _random(kinds)
    planned = plan_shards((_new(name, tensor) for name, tensor in tensors.items()), max_shard_bytes=max_shard_bytes)
    paths = write_shards(folder, planned)
    found = {}
    for path, shard in zip(paths, planned, strict=True):
        assert sum(tensor.n_bytes for tensor in shard) <= max_shard_bytes or len(shard) == 1
        part = load_file(path)
        assert not found.keys() & part.keys()
        found |= part
        with safe_open(path, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        for info in read_header(path).values():
            width = (info.end - info.start) // max(1, part_size(info.shape))
            assert info.start % max(1, width) == 0
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (len(paths) > 1)
    if len(paths) > 1:
        said = json.loads(index.read_text())
        assert {name: load_file(folder / file)[name].shape for name, file in said["weight_map"].items()} == {
            name: tensor.shape for name, tensor in tensors.items()
        }
        assert said["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def part_size(shape):
    return int(torch.tensor(shape).prod()) if shape else 1


@pytest.mark.parametrize("piece_numbers", [1, 7, 10_000])
def test_a_model_is_read_back_as_safetensors_stores_it_and_cast_piece_by_piece(tmp_path, monkeypatch, piece_numbers):
    monkeypatch.setattr(shards, "_PIECE_NUMBERS", piece_numbers)
    tensors = _random([("BF16", [5, 3]), ("F32", [4]), ("I64", [3]), ("F16", []), ("F32", [0, 2])])
    save_file(tensors, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        pieces = list(copy_pieces(stored[name], "F32"))
        assert all(len(piece) <= max(piece_numbers, 1) for piece in pieces)
        flat = torch.cat(pieces)
        if stored[name].is_float:
            assert torch.equal(flat.reshape(tensor.shape), tensor.float())
            assert torch.equal(read_tensor(stored[name]), tensor)
        else:
            assert torch.equal(flat.view(tensor.dtype).reshape(tensor.shape), tensor)


def test_a_folder_in_parts_is_one_model(tmp_path):
    tensors = _random([("F32", [4, 4])] * 5)
    write_shards(tmp_path, plan_shards([_new(*item) for item in tensors.items()], max_shard_bytes=128))
    stored = stored_tensors(tmp_path)
    assert {name: read_tensor(tensor).tolist() for name, tensor in stored.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }


def test_a_damaged_or_unknown_file_is_refused(tmp_path):
    save_file({"a.weight": torch.zeros(8, 8)}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)["a.weight"]
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(MissingInputError, match="ends within"):
        read_tensor(stored)
    (tmp_path / "model.safetensors").write_bytes(whole.replace(b'"F32"', b'"F99"'))
    with pytest.raises(MissingInputError, match="F99"):
        stored_tensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole.replace(b"[8,8]", b"[9,8]"))
    with pytest.raises(MissingInputError):
        stored_tensors(tmp_path)


def test_nothing_is_overwritten(tmp_path):
    planned = plan_shards([_new("a", torch.zeros(2))])
    write_shards(tmp_path, planned)
    with pytest.raises(FileExistsError):
        write_shards(tmp_path, planned)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_the_config_says_what_the_weights_are_written_in_and_no_path(tmp_path, key):
    config = {"model_type": "llama", "_name_or_path": "/home/someone/base", "text_config": {"dtype": "float16", "n": 1}}
    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | ({key: "float16"} if key else {})))
    copy_beside(tmp_path / "base", tmp_path / "out", dtype="float32", template_text=None)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {"model_type": "llama", "text_config": {"dtype": "float32", "n": 1}, key or "dtype": "float32"}
    assert written == expected


@pytest.mark.parametrize("own", [None, "{{ messages }}\r\nown"])
def test_tokenizer_and_template_are_carried_over_and_code_is_not(tmp_path, own):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    (base / "config.json").write_text("{}")
    (base / "tokenizer.json").write_text('{"a": 1}')
    (base / "tokenizer_config.json").write_text('{"eos_token": "x", "chat_template": "old"}')
    (base / "chat_template.jinja").write_text("of the base")
    for name in ("modeling.py", "pytorch_model.bin", "README.md", "model.safetensors"):
        (base / name).write_text("no")
    copy_beside(base, out, dtype="float32", template_text=own)
    assert {path.name for path in out.iterdir()} == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
    }  # fmt: skip
    settings_ = json.loads((out / "tokenizer_config.json").read_text())
    template = Path(out / "chat_template.jinja").read_bytes().decode()
    assert (settings_.get("chat_template"), template) == (("old", "of the base") if own is None else (None, own))
    assert settings_["eos_token"] == "x"
