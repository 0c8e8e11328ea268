"""Other engines' forms of an adapter: MLX's and PEFT's matrices, Ollama's template; what cannot be held there is refused."""

import json
import math
import re
import shutil

import gguf
import peft
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lora_tune.adapter import convert
from lora_tune.adapter.apply import apply_lora
from lora_tune.adapter.convert import ENGINES, export_adapter_to, lora_pairs
from lora_tune.adapter.door import CONFIG, WEIGHTS, open_adapter
from lora_tune.adapter.ollama import chat_form, check_template, go_template, modelfile, render_go
from lora_tune.data.messages import Message
from lora_tune.data.rendering import render
from lora_tune.errors import AdapterMismatchError, CannotCreateError, RefusedError, UsageError
from lora_tune.model.dense import quiet
from lora_tune.recipe.schema import LoraSection
from tests.integration.test_real_templates import REFUSED, TEMPLATES, family
from tests.tiny import CHATML, tiny_tokenizer
from tests.tiny import TEMPLATES as TINY_TEMPLATES

IDS = torch.tensor([[3, 17, 5, 400, 1, 256, 77, 9]])


def _ignore(*_):
    """Take no note."""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_bases):
    """Return a function (architecture, variant, rank) → (folder, PEFT's live model); each is made once."""
    root, made = tmp_path_factory.mktemp("adapters"), {}

    def adapter(architecture="llama", variant="lora", rank=4):
        key = (architecture, variant, rank)
        if key not in made:
            torch.manual_seed(7)
            with quiet():
                base = hf.AutoModelForCausalLM.from_pretrained(tiny_bases(architecture), dtype=torch.float32)
                live = apply_lora(base, LoraSection(rank=rank, alpha=8, variant=variant), adapter_dtype="fp32").eval()
                with torch.no_grad():
                    for name, weight in live.named_parameters():
                        if "lora_B" in name or "magnitude" in name:
                            weight.add_(torch.randn_like(weight) * 0.1)
                folder = root / "-".join(map(str, key))
                live.save_pretrained(folder, save_embedding_layers=False)
            made[key] = (folder, live)
        return made[key]

    return adapter


def _logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(("variant", "rank"), [("lora", 4), ("rslora", 4), ("rslora", 3)])
def test_the_peft_form_is_plain_lora_with_the_same_logits(tmp_path, adapters, tiny_bases, variant, rank):
    folder, live = adapters("llama", variant, rank)
    report = export_adapter_to(open_adapter(folder), tmp_path / "out", _ignore, to="peft")
    assert report.files == (CONFIG, WEIGHTS)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert len(config) == 10
    assert isinstance(config["lora_alpha"], int)
    # √4 is whole and goes into alpha; √3 is not, so alpha stays and B grows
    assert config["lora_alpha"] == (16 if (variant, rank) == ("rslora", 4) else 8)
    with quiet():
        base = hf.AutoModelForCausalLM.from_pretrained(tiny_bases("llama"), dtype=torch.float32)
        again = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert torch.allclose(_logits(again), _logits(live), atol=1e-5)


def test_the_peft_form_of_a_gpt2_adapter_says_how_its_base_holds_weights(tmp_path, adapters, tiny_bases):
    folder, live = adapters("gpt2")
    export_adapter_to(open_adapter(folder), tmp_path / "out", _ignore, to="peft")
    base = hf.AutoModelForCausalLM.from_pretrained(tiny_bases("gpt2"), dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()  # a warning would be an error
    assert torch.allclose(_logits(again), _logits(live), atol=1e-5)


def test_half_precision_weights_are_widened_without_loss(tmp_path, adapters):
    folder, _ = adapters()
    for dtype in (torch.float16, torch.bfloat16):
        copy = tmp_path / str(dtype)
        shutil.copytree(folder, copy)
        held = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
        from safetensors.torch import save_file

        save_file(held, copy / WEIGHTS)
        for pair in lora_pairs(open_adapter(copy)):
            for part, matrix in (("A", pair.a), ("B", pair.b)):
                theirs = held[f"base_model.model.{pair.module}.lora_{part}.weight"].float()
                assert torch.equal(torch.from_numpy(matrix.copy()), theirs)


def _mlx_layer(x, weight, tensors, module, scale):
    """What mlx-lm's LoRALinear and DoRALinear compute (tuner/lora.py, tuner/dora.py)."""
    a, b = tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]
    y = x @ weight.T + scale * ((x @ a) @ b)
    if f"{module}.m" not in tensors:
        return y
    return tensors[f"{module}.m"] / torch.linalg.norm(weight + (scale * b.T) @ a.T, dim=1) * y


@pytest.mark.parametrize("architecture", ["llama", "gemma", "phi3"])
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_mlx_computes_every_layer_as_peft_does(tmp_path, adapters, tiny_bases, architecture, variant):
    folder, live = adapters(architecture, variant)
    files = open_adapter(folder)
    report = export_adapter_to(files, tmp_path / "out", _ignore, to="mlx", base_name=str(tiny_bases(architecture)))
    assert report.files == ("adapter_config.json", "adapters.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == ("dora" if variant == "dora" else "lora")
    scale = config["lora_parameters"]["scale"]
    assert scale == (8 / math.sqrt(4) if variant == "rslora" else 8 / 4)
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    keys = {re.sub(r"^model\.layers\.\d+\.", "", module) for module in files.shape.modules}
    assert set(config["lora_parameters"]["keys"]) == keys
    for module in files.shape.modules:
        layer = live.get_submodule(f"base_model.model.{module}")
        x = torch.randn(5, layer.in_features)
        with torch.no_grad():
            ours = _mlx_layer(x, layer.base_layer.weight, tensors, module, scale)
            assert torch.allclose(ours, layer(x), atol=1e-5)


def test_mlx_refuses_bases_whose_layers_it_names_otherwise(tmp_path, adapters, tiny_bases):
    with pytest.raises(RefusedError, match="gpt2") as caught:
        export_adapter_to(
            open_adapter(adapters("gpt2")[0]), tmp_path / "out", _ignore, to="mlx", base_name=str(tiny_bases("gpt2"))
        )
    assert "merge" in caught.value.hint


@pytest.mark.parametrize("to", ["gguf", "ollama", "peft"])
def test_dora_is_refused_where_its_magnitudes_would_be_lost(tmp_path, adapters, tiny_bases, to):
    with pytest.raises(RefusedError, match="DoRA") as caught:
        export_adapter_to(
            open_adapter(adapters("llama", "dora")[0]), tmp_path / "out", _ignore, to=to, base_name=str(tiny_bases())
        )
    assert caught.value.exit_code == 77
    assert "merge" in caught.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ENGINES)
def test_nothing_is_overwritten(tmp_path, adapters, tiny_bases, to):
    (tmp_path / "out").mkdir()
    with pytest.raises(CannotCreateError):
        export_adapter_to(open_adapter(adapters()[0]), tmp_path / "out", _ignore, to=to, base_name=str(tiny_bases()))
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


@pytest.mark.parametrize("place", ["out", "file/out"])
def test_a_place_that_cannot_be_written_is_said_before_any_work(tmp_path, adapters, monkeypatch, place):
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(convert, "lora_pairs", lambda _: pytest.fail("it began to work"))
    with pytest.raises(CannotCreateError, match="is a file" if place == "file/out" else "exists already"):
        export_adapter_to(open_adapter(adapters()[0]), tmp_path / place, _ignore, to="ollama")


def test_another_base_and_an_unknown_engine_are_refused(tmp_path, adapters, tiny_bases):
    files = open_adapter(adapters()[0])
    with pytest.raises(AdapterMismatchError):
        export_adapter_to(files, tmp_path / "out", _ignore, to="gguf", base_name=str(tiny_bases("gpt2")))
    with pytest.raises(UsageError, match="onnx"):
        export_adapter_to(files, tmp_path / "out", _ignore, to="onnx")
    with pytest.raises(UsageError, match="dtype"):
        export_adapter_to(files, tmp_path / "out", _ignore, to="peft", base_dtype="f16")


def test_an_ollama_folder_holds_all_that_its_modelfile_names(tmp_path, adapters, tiny_bases):
    files = open_adapter(adapters()[0])
    report = export_adapter_to(files, tmp_path / "out", _ignore, to="ollama", base_name=str(tiny_bases()))
    assert report.files == ("Modelfile", "adapter.gguf", "base.gguf")
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert lines[:2] == ["FROM ./base.gguf", "ADAPTER ./adapter.gguf"]
    assert 'PARAMETER stop "<|im_end|>"' in lines
    fields = gguf.GGUFReader(tmp_path / "out" / "base.gguf").fields
    assert fields["general.architecture"].contents() == "llama"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert str(tmp_path / "out") in report.next_command


# --- chat templates -------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).map(str.strip).filter(bool)
CONSTANT = sorted(set(TEMPLATES) - REFUSED)


def _tokenizer(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def _turns(system, said):
    turns = [(("user", "assistant")[n % 2], words) for n, words in enumerate(said)]
    return [("system", system), *turns] if system else turns


def test_the_families_are_seen():
    assert len(CONSTANT) >= 30


@pytest.mark.parametrize("name", CONSTANT)
def test_a_real_familys_prompt_is_the_trained_templates_token_for_token(name):
    tokenizer = family(name)
    form = chat_form(tokenizer)
    template = go_template(form)
    assert check_template(tokenizer, form, template, "Reply with one JSON call.") >= 6
    bos = tokenizer.bos_token if form.begins_with_bos else ""
    for system in ("", "Be brief."):
        for said in (["Capital of France?"], ["Hi", "Hello you.", "And 17 * 23?"], ["a", "b", "c", "d", "e"]):
            if system and not form.takes_system:
                continue
            turns = _turns(system, said)
            messages = [Message(role, words) for role, words in turns]
            assert bos + render_go(template, turns) == render(tokenizer, messages, add_generation_prompt=True)


@settings(max_examples=30, deadline=None)
@given(system=st.one_of(st.just(""), WORDS), said=st.lists(WORDS, min_size=1, max_size=7).filter(lambda s: len(s) % 2))
def test_any_words_are_written_as_the_template_writes_them(system, said):
    for name in ("chatml", "plain", "default system", "bos first"):
        tokenizer = _tokenizer(TINY_TEMPLATES[name])
        turns = _turns(system, said)
        wanted = render(tokenizer, [Message(role, words) for role, words in turns], add_generation_prompt=True)
        assert render_go(go_template(chat_form(tokenizer)), turns) == wanted


def test_a_default_system_message_is_written_only_where_there_is_none():
    template = go_template(chat_form(_tokenizer(TINY_TEMPLATES["default system"])))
    assert render_go(template, [("user", "hi")]) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "Be kind." not in render_go(template, [("system", "Be short."), ("user", "hi")])


def test_an_unfinished_answer_is_left_open():
    template = go_template(chat_form(_tokenizer(CHATML)))
    assert render_go(template, [("user", "hi"), ("assistant", "Hel")]).endswith("<|im_start|>assistant\nHel")


NOT_CONSTANT = {
    "numbered turns": CHATML.replace("message['role'] +", "message['role'] + (loop.index | string) +"),
    "shouting": CHATML.replace("message['content']", "message['content'] | upper"),
    "quoting": CHATML.replace("message['content']", "message['content'] | tojson"),
    "the length of words": CHATML.replace("'\n' + message", "(message['content'] | length | string) + '\n' + message"),
    "the last turn marked": CHATML.replace("message['role'] +", "message['role'] + ('!' if loop.last else '') +"),
    "words twice": CHATML.replace("message['content']", "message['content'] + message['content']"),
}  # fmt: skip


@pytest.mark.parametrize("template", NOT_CONSTANT.values(), ids=NOT_CONSTANT)
def test_a_template_that_is_more_than_constant_texts_is_refused_with_a_way_out(template):
    tokenizer = _tokenizer(template)
    with pytest.raises(RefusedError, match="chat template") as caught:
        form = chat_form(tokenizer)
        check_template(tokenizer, form, go_template(form), None)
    assert "lora-tune serve" in caught.value.hint


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_families_whose_answers_have_no_end_or_another_beginning_are_refused(name):
    with pytest.raises(RefusedError, match="chat template"):
        chat_form(family(name))


@pytest.mark.parametrize("system", ['a """\nFROM /etc/passwd\n"""', 'say "yes"', "a\x00b", "a\u00a0b", "a\rb"])
def test_a_system_message_that_a_modelfile_would_not_keep_is_refused(system):
    form = chat_form(_tokenizer(CHATML))
    with pytest.raises(RefusedError, match="system message"):
        modelfile(form, go_template(form), system)


def test_the_modelfile_keeps_its_template_and_system_message_whole():
    odd = '\u00a0é\U0001f642"\\'
    form = chat_form(_tokenizer(CHATML.replace("'<|im_start|>", "'\u00a0é\U0001f642\"\\\\<|im_start|>")))
    template = go_template(form)
    text = modelfile(form, template, 'Two\nlines, "quoted" too.')
    # The parser drops what Go cannot print (parser.go: strconv.IsPrint) and ends a text at the first three quotes.
    assert text.isascii()
    assert re.findall(r'"""(.*?)"""', text, re.DOTALL) == [template, 'Two\nlines, "quoted" too.']
    assert render_go(template, [("user", "hi")]).startswith(f"{odd}<|im_start|>user\nhi")
