"""Hostile and broken adapter folders: each is refused with a reason, and the reason names what is wrong."""

import hashlib
import json
import os
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_tune.adapter import door, safetensors_header
from lora_tune.adapter.door import CONFIG, WEIGHTS, open_adapter, read_weights
from lora_tune.adapter.live import check_fits
from lora_tune.adapter.manifest import FILE_NAME
from lora_tune.errors import AdapterError, AdapterMismatchError, LoraTuneError, RefusedError

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
    assert (files.shape.rank, files.shape.alpha, files.shape.variant, files.shape.scaling) == (2, 4.0, "lora", 2.0)


CONFIGS = {
    "a huge rank": {"r": 4_194_304}, "rank zero": {"r": 0}, "a negative rank": {"r": -2}, "rank as text": {"r": "2"},
    "rank as a boolean": {"r": True}, "another rank than the tensors'": {"r": 4}, "infinite alpha": {"lora_alpha": 1e300},
    "alpha not a number": {"lora_alpha": float("nan")}, "negative alpha": {"lora_alpha": -1},
    "a pattern as targets": {"target_modules": "(a+)+$"}, "a pattern in the list": {"target_modules": ["(a+)+$"]},
    "no targets": {"target_modules": []}, "targets that name other layers": {"target_modules": ["o_proj"]},
    "a rank pattern": {"rank_pattern": {"(a+)+$": 4}}, "an alpha pattern": {"alpha_pattern": {"q_proj": 4}},
    "excluded modules": {"exclude_modules": "(a+)+$"}, "a trained bias": {"bias": "all"},
    "modules to save": {"modules_to_save": ["lm_head"]}, "another method": {"peft_type": "IA3"},
    "an initialization that changes the base": {"init_lora_weights": "pissa"},
    "layer replication": {"layer_replication": [[0, 2]]}, "a loftq file": {"loftq_config": {"file": "x"}},
    "a corda cache file": {"corda_config": {"cache_file": "/etc/passwd"}}, "dora without magnitudes": {"use_dora": True},
    "too many targets": {"target_modules": ["q_proj", "v_proj", *(f"m{n}" for n in range(255))]},
    "a target with a line break": {"target_modules": ["q_proj", "v_proj", "x\n"]},
    "a base's name that a terminal obeys": {"base_model_name_or_path": "x\x1b[2Jy"},
    "a base's name of half a character": {"base_model_name_or_path": "x\udc80y"},
    "a base's name that is no text": {"base_model_name_or_path": ["x"]}, "a base's name that is a book": {"base_model_name_or_path": "x" * 513},
    "a setting that a terminal obeys": {"\x1b[2J": 1}, "a rank that a terminal obeys": {"r": "\x1b[2J"},
    "a flag that is no flag": {"use_rslora": "yes"}, "tokens of its own": {"trainable_token_indices": [1]},
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_hostile_config_is_refused(tmp_path, config):
    with pytest.raises(AdapterError) as caught:
        open_adapter(write(tmp_path / "a", config))
    assert caught.value.exit_code == 77
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 1000


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
    "a shape of a thousand dimensions": _changed(shape=[2**40] * 1000), "a shape that is no list": _changed(shape="22"),
    "a name with a line break": _changed(name="base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight\n"),
    "a name as long as a book": _changed(name=f"base_model.model.{'a.' * 5000}q_proj.lora_A.weight"),
    "a dtype that a terminal obeys": _changed(dtype="\x1b[2J"),
    "infinity": _changed(data=struct.pack("<16f", *range(15), float("inf"))), "nothing": {},
}  # fmt: skip


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_hostile_tensors_are_refused(tmp_path, content):
    with pytest.raises(AdapterError) as caught:
        open_adapter(write(tmp_path / "a", content=content))
    assert caught.value.exit_code == 77
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize("chunk_bytes", [4, 16, 64])
def test_nan_is_found_in_every_tensor_and_chunk(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(safetensors_header, "_CHUNK_BYTES", chunk_bytes)
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
        "not UTF-8",
        "big weights",
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
    elif what == "not UTF-8":
        config.write_bytes(b"\xff\xfe{")
    elif what == "big weights":
        with weights.open("ab") as stream:
            stream.truncate(door.MAX_WEIGHTS_BYTES + 1)
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


@pytest.mark.parametrize("link", ["/etc/passwd", "nowhere"])
def test_a_linked_passport_is_refused_and_not_taken_for_none(tmp_path, link):
    folder = write(tmp_path / "a")
    (folder / FILE_NAME).symlink_to(link)
    with pytest.raises(AdapterError, match="not a regular file"):
        open_adapter(folder)


def test_many_targets_and_layers_are_matched_at_once(tmp_path):
    modules = [f"model.layers.{n}.x.m{n % 250}" for n in range(3000)]
    content = {}
    for module in modules:
        content[f"base_model.model.{module}.lora_A.weight"] = ("F16", [1, 1], b"\0\0")
        content[f"base_model.model.{module}.lora_B.weight"] = ("F16", [1, 1], b"\0\0")
    folder = write(tmp_path / "a", {"r": 1, "target_modules": [f"m{n}" for n in range(250)]}, content)
    assert len(open_adapter(folder).shape.modules) == 3000


def test_the_digest_is_that_of_the_file(tmp_path):
    files = open_adapter(write(tmp_path / "a"))
    assert files.weights_digest == hashlib.sha256((files.folder / WEIGHTS).read_bytes()).hexdigest()
    assert files.config_digest == hashlib.sha256((files.folder / CONFIG).read_bytes()).hexdigest()
    assert read_weights(files) == (files.folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("how", ["other bytes", "more bytes", "a link"])
def test_weights_that_change_after_the_door_are_refused(tmp_path, how):
    files = open_adapter(write(tmp_path / "a"))
    path = files.folder / WEIGHTS
    content = path.read_bytes()
    path.unlink()
    if how == "a link":
        (tmp_path / "same").write_bytes(content)
        path.symlink_to(tmp_path / "same")
    else:
        path.write_bytes(content[:-1] + b"x" if how == "other bytes" else content + b"x")
    with pytest.raises(RefusedError) as caught:
        read_weights(files)
    assert caught.value.exit_code == 77


def test_shapes_are_held_against_the_base(tmp_path):
    files = open_adapter(write(tmp_path / "a"))
    fits = {f"{module}.weight": (8, 8) for module in MODULES}
    check_fits(files, fits, conv1d=False)
    with pytest.raises(AdapterMismatchError, match="no such layer"):
        check_fits(files, {"model.layers.0.self_attn.q_proj.weight": (8, 8)}, conv1d=False)
    with pytest.raises(AdapterMismatchError, match="in the base"):
        check_fits(files, fits | {f"{MODULES[1]}.weight": (16, 8)}, conv1d=False)


def _widening(folder, module):
    """An adapter of one layer, 4 → 8."""
    content = {
        f"base_model.model.{module}.lora_A.weight": ("F32", [2, 4], struct.pack("<8f", *range(8))),
        f"base_model.model.{module}.lora_B.weight": ("F32", [8, 2], struct.pack("<16f", *range(16))),
    }
    return open_adapter(write(folder, {"target_modules": [module.rsplit(".", 1)[-1]]}, content))


def test_a_transposed_layer_fits_only_conv1d(tmp_path):
    files = _widening(tmp_path / "a", "transformer.h.0.attn.c_attn")
    check_fits(files, {"transformer.h.0.attn.c_attn.weight": (8, 4)}, conv1d=False)
    check_fits(files, {"h.0.attn.c_attn.weight": (4, 8)}, conv1d=True)
    for shape, conv1d in (((4, 8), False), ((8, 4), True), ((8, 4, 1), False), ((32,), False)):
        with pytest.raises(AdapterMismatchError, match="in the base"):
            check_fits(files, {"transformer.h.0.attn.c_attn.weight": shape}, conv1d=conv1d)


def test_layers_are_found_where_a_file_names_them_otherwise(tmp_path):
    files = _widening(tmp_path / "a", "model.language_model.layers.3.self_attn.q_proj")
    check_fits(files, {"language_model.model.layers.3.self_attn.q_proj.weight": (8, 4)}, conv1d=False)
    # The vision tower has a layer of the same number and name; one of the two must fit.
    vision = {"vision_tower.encoder.layers.3.self_attn.q_proj.weight": (16, 16)}
    check_fits(files, vision | {"language_model.model.layers.3.self_attn.q_proj.weight": (8, 4)}, conv1d=False)
    with pytest.raises(AdapterMismatchError, match="in the base"):
        check_fits(files, vision | {"language_model.model.layers.3.self_attn.q_proj.weight": (4, 8)}, conv1d=False)
    with pytest.raises(AdapterMismatchError, match="no such layer"):
        check_fits(files, {"language_model.model.layers.13.self_attn.q_proj.weight": (8, 4)}, conv1d=False)
    # A name that is the same in both decides alone.
    exact = {"model.language_model.layers.3.self_attn.q_proj.weight": (16, 16)}
    with pytest.raises(AdapterMismatchError, match="in the base"):
        check_fits(files, exact | {"other.layers.3.self_attn.q_proj.weight": (8, 4)}, conv1d=False)
