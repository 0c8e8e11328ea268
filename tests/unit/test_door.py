"""Hostile and broken adapter folders: each is refused with a reason, and the reason names what is wrong."""

import json
import os
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_tune.adapter import registry
from lora_tune.adapter.door import CONFIG, WEIGHTS, check_fits, open_adapter
from lora_tune.errors import (
    AdapterError,
    AdapterMismatchError,
    CannotCreateError,
    LoraTuneError,
    MissingInputError,
    UsageError,
)

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
GOOD = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none",
        "task_type": "CAUSAL_LM", "base_model_name_or_path": "x/y", "loftq_config": {}, "modules_to_save": None}  # fmt: skip


def tensors() -> dict[str, tuple[str, list[int], bytes]]:
    found = {}
    for module in MODULES:
        found[f"base_model.model.{module}.lora_A.weight"] = ("F32", [2, 8], struct.pack("<16f", *range(16)))
        found[f"base_model.model.{module}.lora_B.weight"] = ("F32", [8, 2], struct.pack("<16f", *range(16)))
    return found


def write(folder, config=None, content=None):
    folder.mkdir(exist_ok=True)
    header, body = {}, b""
    for name, (dtype, shape, data) in (content if content is not None else tensors()).items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + body)
    (folder / CONFIG).write_text(json.dumps(GOOD | (config or {})))
    return folder


def test_an_adapter_made_elsewhere_is_let_in_unverified(tmp_path):
    files = open_adapter(write(tmp_path / "a"))
    assert files.manifest is None
    assert files.shape.modules == tuple(MODULES)
    assert (files.shape.rank, files.shape.alpha, files.shape.variant) == (2, 4.0, "lora")


CONFIGS = {
    "a huge rank": {"r": 4_194_304}, "rank zero": {"r": 0}, "a negative rank": {"r": -2}, "rank as text": {"r": "2"},
    "rank as a boolean": {"r": True}, "another rank than the tensors'": {"r": 4}, "infinite alpha": {"lora_alpha": 1e300},
    "alpha not a number": {"lora_alpha": float("nan")}, "negative alpha": {"lora_alpha": -1},
    "a pattern as targets": {"target_modules": "(a+)+$"}, "a pattern in the list": {"target_modules": ["(a+)+$"]},
    "no targets": {"target_modules": []}, "targets that name other layers": {"target_modules": ["o_proj"]},
    "a rank pattern": {"rank_pattern": {"(a+)+$": 4}}, "an alpha pattern": {"alpha_pattern": {"q_proj": 4}},
    "excluded modules": {"exclude_modules": "(a+)+$"}, "a trained bias": {"bias": "all"},
    "modules to save": {"modules_to_save": ["lm_head"]}, "another method": {"peft_type": "IA3"},
    "an initialization that changes the base": {"init_lora_weights": "pissa"}, "code to import": {"auto_mapping": {"base_model_class": "os"}},
    "layer replication": {"layer_replication": [[0, 2]]}, "a loftq file": {"loftq_config": {"file": "x"}},
    "a corda cache file": {"corda_config": {"cache_file": "/etc/passwd"}}, "dora without magnitudes": {"use_dora": True},
    "a flag that is no flag": {"use_rslora": "yes"}, "tokens of its own": {"trainable_token_indices": [1]},
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_hostile_config_is_refused(tmp_path, config):
    if config == {"auto_mapping": {"base_model_class": "os"}}:
        files = open_adapter(write(tmp_path / "a", config))  # never read: the PEFT config is built by us
        assert not hasattr(files.shape, "auto_mapping")
        return
    with pytest.raises(AdapterError) as caught:
        open_adapter(write(tmp_path / "a", config))
    assert caught.value.exit_code == 77


def _changed(**change):
    content = tensors()
    first = next(iter(content))
    dtype, shape, data = content[first]
    content[change.get("name", first)] = (
        change.get("dtype", dtype),
        change.get("shape", shape),
        change.get("data", data),
    )
    if change.get("name"):
        content.pop(first, None) if change.get("replace") else None
    return content


CONTENTS = {
    "a weight of the base": _changed(name="base_model.model.model.layers.0.self_attn.q_proj.weight"),
    "a weight of another adapter": _changed(name="base_model.model.model.layers.0.self_attn.q_proj.lora_A.other.weight"),
    "a path as a name": _changed(name="../../etc/passwd"), "another prefix": _changed(name="model.q_proj.lora_A.weight"),
    "a layer that is no target": _changed(name="base_model.model.model.layers.0.mlp.lora_A.weight"),
    "a missing half": _changed(name="base_model.model.model.layers.0.self_attn.o.lora_A.weight", replace=True),
    "a wrong rank": _changed(shape=[4, 4]), "one dimension": _changed(shape=[16]), "three dimensions": _changed(shape=[2, 4, 2]),
    "an unknown dtype": _changed(dtype="I64", shape=[1, 8]), "a shape that lies": _changed(shape=[2, 9]),
    "an overflowing shape": _changed(shape=[0, 2**40]), "a negative size": _changed(shape=[-2, -8]),
    "NaN": _changed(data=struct.pack("<16f", float("nan"), *range(15))),
    "infinity": _changed(data=struct.pack("<16f", *range(15), float("inf"))), "nothing": {},
}  # fmt: skip


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_hostile_tensors_are_refused(tmp_path, content):
    with pytest.raises(AdapterError) as caught:
        open_adapter(write(tmp_path / "a", content=content))
    assert caught.value.exit_code == 77


def test_nan_is_found_in_every_tensor(tmp_path):
    for name in tensors():
        content = tensors()
        content[name] = ("F32", content[name][1], struct.pack("<16f", *range(15), float("nan")))
        with pytest.raises(AdapterError, match="NaN"):
            open_adapter(write(tmp_path / "a", content=content))


@pytest.mark.parametrize(
    "what",
    [
        "pickle",
        "symlink",
        "fifo",
        "folder",
        "no config",
        "big config",
        "deep config",
        "duplicate key",
        "trailing",
        "cut",
    ],
)
def test_hostile_files_are_refused(tmp_path, what):
    folder = write(tmp_path / "a")
    weights, config = folder / WEIGHTS, folder / CONFIG
    if what == "pickle":
        weights.rename(folder / "adapter_model.bin")
    elif what in ("symlink", "fifo", "folder"):
        weights.unlink()
        {
            "symlink": lambda: weights.symlink_to("/etc/passwd"),
            "fifo": lambda: os.mkfifo(weights),
            "folder": weights.mkdir,
        }[what]()
    elif what == "no config":
        config.unlink()
    elif what == "big config":
        config.write_text(json.dumps(GOOD | {"x": "y" * 100_000}))
    elif what == "deep config":
        config.write_text("[" * 30_000 + "]" * 30_000)
    elif what == "duplicate key":
        config.write_text('{"r": 2, ' + json.dumps(GOOD)[1:])
    elif what == "trailing":
        weights.write_bytes(weights.read_bytes() + b"x")
    else:
        weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(LoraTuneError) as caught:
        open_adapter(folder)
    assert caught.value.exit_code in (66, 77)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 400), value=st.integers(0, 255), cut=st.booleans())
def test_no_damage_to_the_weights_file_is_an_uncaught_exception(tmp_path, position, value, cut):
    folder = write(tmp_path / "a")
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[position % len(content)] = value
    (folder / WEIGHTS).write_bytes(bytes(content[:position] if cut else content))
    try:
        open_adapter(folder)
    except LoraTuneError as err:
        assert err.message


def test_shapes_are_held_against_the_base(tmp_path):
    files = open_adapter(write(tmp_path / "a"))
    fits = {f"{module}.weight": (8, 8) for module in MODULES}
    check_fits(files, fits)
    with pytest.raises(AdapterMismatchError, match="no such layer"):
        check_fits(files, {"model.layers.0.self_attn.q_proj.weight": (8, 8)})
    with pytest.raises(AdapterMismatchError, match="in the base"):
        check_fits(files, fits | {f"{MODULES[1]}.weight": (16, 8)})


def test_the_registry_numbers_versions_and_finds_them(tmp_path):
    source, root = write(tmp_path / "a"), tmp_path / "adapters"
    first = registry.add(source, "home", root=root)
    second = registry.add(write(tmp_path / "b", {"lora_alpha": 8}), "home", root=root)
    assert (first.spec, second.spec) == ("home@1", "home@2")
    assert registry.find("home", root=root) == second.folder
    assert registry.find("home@1", root=root) == first.folder
    digest = registry.content_digest(open_adapter(first.folder))
    assert registry.find(f"home@sha256:{digest[:12]}", root=root) == first.folder
    assert registry.find(str(source), root=root) == source
    assert [json.loads(line)["version"] for line in (root / "journal.jsonl").read_text().splitlines()] == [1, 2]


def test_what_is_not_in_the_registry_is_named_with_close_names(tmp_path):
    registry.add(write(tmp_path / "a"), "home-assistant", root=tmp_path / "r")
    with pytest.raises(MissingInputError, match="did you mean home-assistant"):
        registry.find("home-asistant", root=tmp_path / "r")
    with pytest.raises(MissingInputError, match="it has 1"):
        registry.find("home-assistant@7", root=tmp_path / "r")


@pytest.mark.parametrize("name", ["../x", "/abs", "a/b", "", "A", "a b", ".", "x" * 64, "-x", "a\x00b"])
def test_hostile_names_write_nothing(tmp_path, name):
    with pytest.raises((UsageError, CannotCreateError)):
        registry.add(write(tmp_path / "a"), name, root=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_folder_that_is_no_adapter_is_not_registered(tmp_path):
    folder = write(tmp_path / "a", {"r": 0})
    with pytest.raises(AdapterError):
        registry.add(folder, "home", root=tmp_path / "r")
    assert not (tmp_path / "r" / "home" / "1").exists()
    assert not (tmp_path / "r" / "journal.jsonl").exists()
