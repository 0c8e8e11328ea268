"""A GGUF file becomes a dense base once, the same for two processes at once; a broken one says so."""

import os
import subprocess
import sys

import pytest

from lora_tune.errors import CannotWriteError, MissingInputError
from lora_tune.model.dense import ready_base
from lora_tune.model.load import load_base, load_tokenizer
from lora_tune.model.resolve import locate
from lora_tune.recipe.schema import BaseSection
from tests.tiny import CHATML, tiny_model, tiny_tokenizer

# transformers' name → llama.cpp's, for a layer of a Llama.
LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache_of_each_test(tmp_path, monkeypatch):
    """The file is the same in every test, so a shared cache would hold its copy from the first one on."""
    monkeypatch.setenv("LORA_TUNE_CACHE", str(tmp_path / "cache"))


def write_gguf(path):
    """Write a tiny random Llama with its tokenizer as GGUF; return the model."""
    import gguf
    import numpy as np

    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab=len(tokenizer))
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(len(tokenizer))
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types([3 if word.startswith("<|") else 1 for word, _ in words])
    import json

    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHATML)
    state = model.state_dict()

    def put(name, tensor):
        writer.add_tensor(name, tensor.float().numpy().astype(np.float32))

    put("token_embd.weight", state["model.embed_tokens.weight"])
    put("output_norm.weight", state["model.norm.weight"])
    for n in range(config.num_hidden_layers):
        for theirs, ours in LAYER.items():
            tensor = state[f"model.layers.{n}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):  # llama.cpp's order of rotary halves
                heads = config.num_attention_heads if ours == "attn_q" else config.num_key_value_heads
                tensor = (
                    tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, tensor.shape[1])
                    .swapaxes(1, 2)
                    .reshape(tensor.shape)
                )
            put(f"blk.{n}.{ours}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _quiet(label, share):
    """Take no note of progress."""


def test_a_gguf_file_becomes_the_model_it_was_written_from(tmp_path):
    import torch

    written = write_gguf(tmp_path / "tiny.gguf")
    section = BaseSection(name=str(tmp_path / "tiny.gguf"), dtype="fp32")
    assert not locate(section).present
    files = ready_base(section, _quiet)
    assert locate(section).present
    model, tokenizer = load_base(files, section), load_tokenizer(files)
    assert tokenizer.chat_template == CHATML
    ids = tokenizer("turn on the lights", add_special_tokens=False)["input_ids"]
    assert ids == tiny_tokenizer()("turn on the lights", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        ours, theirs = (m(input_ids=torch.tensor([ids])).logits for m in (model, written.to(torch.bfloat16).float()))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_two_processes_at_once_make_one_copy(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    # One process that has everything imported becomes two.
    code = f"""
import os, gguf, torch, transformers
from lora_tune.model.dense import ready_base
from lora_tune.recipe.schema import BaseSection
child = os.fork()
print(ready_base(BaseSection(name={str(tmp_path / "tiny.gguf")!r}), lambda *_: None).folder, flush=True)
assert not child or os.waitpid(child, 0)[1] == 0
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()
    assert first == second
    folder = locate(BaseSection(name=str(tmp_path / "tiny.gguf"))).path
    assert (folder / "complete.json").is_file()
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}")]


def test_an_unfinished_copy_and_old_leftovers_are_replaced(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    section = BaseSection(name=str(tmp_path / "tiny.gguf"))
    folder = locate(section).path
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"half")
    left = [folder.with_name(name) for name in (f".{folder.name}-old12345", ".fetch-old12345")]
    fresh = [folder.with_name(name) for name in (f".{folder.name}-new12345", ".fetch-new12345")]
    for path in (*left, *fresh):
        path.mkdir()
        (path / "x").write_text("x")
    for path in left:
        os.utime(path, (0, 0))
    assert ready_base(section, _quiet).folder == folder
    assert locate(section).present
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in fresh)


def test_a_disk_that_fills_up_while_converting_is_exit_74_and_leaves_nothing(tmp_path, monkeypatch):
    import transformers
    from safetensors import SafetensorError

    write_gguf(tmp_path / "tiny.gguf")
    section = BaseSection(name=str(tmp_path / "tiny.gguf"))

    def fail(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(CannotWriteError) as caught:
        ready_base(section, _quiet)
    assert caught.value.exit_code == 74
    folder = locate(section).path
    assert not [
        path
        for path in folder.parent.iterdir()
        if path.name.startswith((folder.name, f".{folder.name}")) and path.is_dir()
    ]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all" * 100])
def test_a_broken_gguf_file_is_exit_66_and_leaves_nothing(tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(MissingInputError) as caught:
        ready_base(BaseSection(name=str(path)), _quiet)
    assert caught.value.exit_code == 66
    assert not locate(BaseSection(name=str(path))).path.exists()
