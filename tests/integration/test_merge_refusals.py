"""Merges that are refused, fail or are killed: the reason is told, and nothing is left behind."""

import shutil
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from lora_tune.adapter import live as live_module
from lora_tune.adapter import merge
from lora_tune.adapter.door import open_adapter
from lora_tune.adapter.gguf_files import model_to_gguf
from lora_tune.adapter.live import open_base
from lora_tune.adapter.merge import merge_adapter, merge_adapters
from lora_tune.data.messages import Message
from lora_tune.data.rendering import render
from lora_tune.errors import (
    AdapterError,
    AdapterMismatchError,
    CannotCreateError,
    CannotWriteError,
    RefusedError,
    TrainingError,
    UsageError,
)
from lora_tune.model import shards
from lora_tune.model.dense import BaseFiles
from lora_tune.model.fingerprint import fingerprint
from lora_tune.model.load import load_tokenizer
from lora_tune.recipe.schema import BaseSection
from tests.integration import test_merge
from tests.integration.test_merge import _ignore, _random_adapter, _weak_adapter
from tests.tiny import CHATML

trained = test_merge.trained


def test_what_cannot_be_merged_together_is_refused_and_leaves_nothing(tmp_path, tiny_bases, trained):
    base = tiny_bases("llama")
    lora, dora = (_random_adapter(base, tmp_path / variant, variant=variant) for variant in ("lora", "dora"))
    held = open_adapter(trained("llama", "nf4"))
    plain = open_adapter(trained("llama", "none"))
    own = open_adapter(trained("llama", "none", data={"chat_template": "builtin:plain"}))
    other = _random_adapter(tiny_bases("gpt2"), tmp_path / "other")
    cases = [
        ([(lora, 1.0), (dora, 1.0)], RefusedError, "DoRA"),
        ([(dora, 0.5)], RefusedError, "DoRA"),
        ([(held, 1.0), (plain, 1.0)], RefusedError, "held differently"),
        ([(plain, 1.0), (own, 1.0)], RefusedError, "templates"),
        ([(lora, 1.0), (other, 1.0)], AdapterMismatchError, "no such layer"),
        ([], UsageError, "at least one"),
        ([(lora, 0.0)], UsageError, "other than 0"),
        ([(lora, float("nan"))], UsageError, "other than 0"),
    ]
    for adapters, error, words in cases:
        with pytest.raises(error, match=words) as caught:
            merge_adapters(adapters, tmp_path / "out" / "m", _ignore, onto="trained", base_name=str(base))
        assert caught.value.hint
        assert not (tmp_path / "out").exists()
    receipt = merge_adapters([(held, 1.0), (plain, 1.0)], tmp_path / "m", _ignore, onto="original")
    assert (receipt.quantization, receipt.closer_base) == ("none", None)
    with pytest.raises(CannotCreateError):
        merge_adapter(plain, tmp_path / "m", _ignore, onto="trained")


@pytest.mark.parametrize("failure", ["beyond the bound", "disk full", "no room", "another template", "our bug"])
def test_a_merge_that_fails_leaves_nothing(tmp_path, tiny_bases, monkeypatch, failure):
    base = tiny_bases("llama")
    files = _random_adapter(base, tmp_path / "a")
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}

    def fail(*_, **__):
        raise OSError(28, "No space left on device") if failure == "disk full" else ZeroDivisionError

    def template(base_folder, folder, **settings):
        merge_copy(base_folder, folder, **settings | {"template_text": "{{ messages[0]['content'] }}!"})

    merge_copy, error = merge.copy_beside, TrainingError
    if failure == "beyond the bound":
        # As if a sum were written wrong: nothing may rely on the writer being right.
        monkeypatch.setattr(merge, "changed_weight", lambda weight, _, *, conv1d: weight.float())
    elif failure == "another template":
        monkeypatch.setattr(merge, "copy_beside", template)
    elif failure == "no room":
        monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        error = CannotWriteError
    else:
        monkeypatch.setattr(merge, "copy_beside", fail)
        error = CannotWriteError if failure == "disk full" else ZeroDivisionError
    with pytest.raises(error):
        merge_adapter(files, tmp_path / "out" / "m", _ignore, onto="trained", base_name=str(base))
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_a_place_inside_of_a_file_is_refused_before_any_model_is_loaded(tmp_path, trained, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(merge, "plan_merge", lambda *_, **__: pytest.fail("it began to work"))
    with pytest.raises(CannotCreateError, match="is a file"):
        merge_adapter(open_adapter(trained("llama", "none")), tmp_path / "file" / "out", _ignore, onto="trained")


def test_a_base_on_which_the_adapter_does_not_behave_as_its_passport_says_is_refused(
    tmp_path, tiny_bases, trained, monkeypatch
):
    files = open_adapter(trained("llama", "none"))
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_bases("llama"), damaged)
    weights = {name: tensor * 0.5 for name, tensor in load_file(damaged / "model.safetensors").items()}
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    # As if its digests had been kept from before.
    monkeypatch.setattr(live_module, "fingerprint", lambda _: fingerprint(tiny_bases("llama")))
    for onto in ("trained", "original"):
        with pytest.raises(AdapterMismatchError, match="does not behave") as caught:
            merge_adapter(files, tmp_path / "out", _ignore, onto=onto, base_name=str(damaged))
        assert (caught.value.exit_code, caught.value.where) == (77, "probes")
        assert caught.value.hint
        assert not (tmp_path / "out").exists()


def test_an_adapter_that_bf16_would_round_away_is_refused_and_fp32_keeps_it(tmp_path, tiny_bases):
    base = tiny_bases("llama")
    files = _weak_adapter(base, tmp_path / "a", 0.01)
    with pytest.raises(TrainingError, match="nothing was written") as caught:
        merge_adapter(files, tmp_path / "out", _ignore, onto="trained", base_name=str(base), dtype="bf16")
    assert "--dtype fp32" in caught.value.hint
    assert not (tmp_path / "out").exists()
    receipt = merge_adapter(files, tmp_path / "out", _ignore, onto="trained", base_name=str(base), dtype="fp32")
    assert receipt.kl_of_writing <= receipt.max_kl <= receipt.kl_of_effect / 10
    assert receipt.dtype == "fp32"


BOMB = "{% if messages[-1].content == 'zz' %}{{ messages[-1].content * 2000000000 }}{% endif %}" + CHATML


def test_a_template_that_came_with_an_adapter_stays_fenced_in_the_merged_model(tmp_path, trained):
    (tmp_path / "bomb.jinja").write_text(BOMB)
    files = open_adapter(trained("llama", "none", data={"chat_template": str(tmp_path / "bomb.jinja")}))
    merge_adapter(files, tmp_path / "out", _ignore, onto="trained")
    live = open_base(BaseSection(name=str(tmp_path / "out")), _ignore)
    assert "hello" in render(live.tokenizer, [Message("user", "hello")], add_generation_prompt=True)
    as_a_base = load_tokenizer(BaseFiles("out", None, tmp_path / "out"))
    for tokenizer in (live.tokenizer, as_a_base):
        with pytest.raises(AdapterError, match="stopped"):
            render(tokenizer, [Message("user", "zz")], add_generation_prompt=True)


def test_the_template_of_a_base_that_is_not_built_in_is_fenced_where_it_is_asked_or_converted(tmp_path, tiny_bases):
    base = tmp_path / "base"
    shutil.copytree(tiny_bases("llama"), base)
    (base / "chat_template.jinja").write_text("{{ 'x' * 3000000000 }}")
    live = open_base(BaseSection(name=str(base)), _ignore)
    with pytest.raises(AdapterError, match="stopped"):
        render(live.tokenizer, [Message("user", "hello")])
    with pytest.raises(AdapterError, match="stopped"):
        model_to_gguf(base, tmp_path / "m.gguf", dtype="f16")
    assert not (tmp_path / "m.gguf").exists()


def test_a_merge_that_is_killed_leaves_no_model(tmp_path, tiny_bases):
    base = tiny_bases("llama")
    _random_adapter(base, tmp_path / "a")
    script = f"""
import os, signal
from pathlib import Path
from lora_tune.adapter import merge
from lora_tune.adapter.door import open_adapter
plan = merge.plan_merge([(open_adapter(Path({str(tmp_path / "a")!r})), 1.0)], print, onto="trained", base_name={str(base)!r})
with merge.staged_folder(Path({str(tmp_path / "out")!r})) as stage:
    merge.write_merged(plan, stage, lambda _, share: share > 0.5 and os.kill(os.getpid(), signal.SIGKILL))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
