"""Thousands of damaged, forged and random adapters: whatever the door lets in, other readers agree on; nothing escapes.

The default suite draws 1,000 of them, the slow one 10,000.
"""

import json
import math
import struct
import time
from string import printable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from lora_tune.adapter.door import CONFIG, WEIGHTS, open_adapter
from lora_tune.errors import LoraTuneError
from tests.hostile import fitting, raw
from tests.unit.test_door import GOOD, write

BYTES = {"F32": 4, "F16": 2, "BF16": 2}
NAMES = [name for name, _ in zip(fitting(), range(4), strict=False)]
EDGES = [0, 1, 2, 3, 8, 64, 255, 2**31, 2**32, 2**48, 2**63, 2**64, -1, -8, 2**40]
LITERALS = st.one_of(
    st.none(), st.booleans(), st.sampled_from(EDGES), st.integers(-5, 70), st.floats(), st.text(printable, max_size=8),
    st.sampled_from(["LORA", "none", "F32", "q_proj", "v_proj", "(a+)+$", "../x", "\x1b[2J", "\udc80", "all-linear", "gaussian", "eva"]),
)  # fmt: skip
JSON = st.recursive(LITERALS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(printable, max_size=6), inner, max_size=4), max_leaves=8)  # fmt: skip
KEYS = [
    "peft_type", "bias", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "init_lora_weights", "modules_to_save", "rank_pattern",
    "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern", "layer_replication", "base_model_name_or_path", "lora_bias",
    "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_qalora", "qalora_group_size", "corda_config", "eva_config",
    "loftq_config", "arrow_config", "fan_in_fan_out", "lora_dropout", "task_type", "auto_mapping", "revision", "megatron_config", "peft_version",
]  # fmt: skip
INFO = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "BOOL", "f32", ""]) | LITERALS,
     "shape": st.lists(st.sampled_from([*EDGES, 2, 64]), max_size=3) | LITERALS,
     "data_offsets": st.lists(st.sampled_from([*EDGES, 512, 1024]), min_size=1, max_size=3) | LITERALS},
    optional={"extra": LITERALS},
)  # fmt: skip


@st.composite
def weights_files(draw):
    """A true file with some bytes, fields, names or lengths changed, or one that never was true."""
    content = fitting(
        draw(st.sampled_from([1, 2, 2, 2, 4])), draw(st.sampled_from(list(BYTES))), dora=draw(st.booleans())
    )
    header, body = {}, b""
    for name, (dtype, shape, data) in content.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    how = draw(
        st.sampled_from(["bytes", "bytes", "numbers", "info", "name", "swap", "length", "body", "random", "text"])
    )
    if how == "random":
        return draw(st.binary(max_size=300))
    if how == "text":
        return raw(draw(st.text(printable, max_size=200)).encode())
    if how == "numbers":  # any bits as weights
        place = draw(st.integers(0, len(body) - 8))
        body = body[:place] + draw(st.binary(min_size=8, max_size=8)) + body[place + 8 :]
    elif how == "info":
        header[draw(st.sampled_from(NAMES))] = draw(INFO)
    elif how == "name":
        old = draw(st.sampled_from(NAMES))
        new = draw(
            st.sampled_from(
                [
                    f"{old}x",
                    old.replace("q_proj", "o_proj"),
                    old.replace("lora_A", "lora_B"),
                    "__metadata__",
                    old.upper(),
                ]
            )
            | st.text(printable, max_size=40)
        )
        header = {new if name == old else name: info for name, info in header.items()}
    elif how == "swap":  # offsets that are another tensor's
        first, second = draw(st.sampled_from(NAMES)), draw(st.sampled_from(NAMES))
        header[first] = header[first] | {"data_offsets": header[second]["data_offsets"]}
    elif how == "body":
        body = body[: draw(st.integers(0, len(body)))] + draw(st.binary(max_size=8))
    file = bytearray(raw(header, body, length=draw(st.sampled_from(EDGES[:10])) if how == "length" else None))
    if how == "bytes":
        for _ in range(draw(st.integers(1, 4))):
            file[draw(st.integers(0, len(file) - 1))] = draw(st.integers(0, 255))
    return bytes(file)


@st.composite
def configs(draw):
    """A true config with some keys changed, taken away or added, or any text."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200) | st.text(printable, max_size=200).map(str.encode))
    change = draw(st.dictionaries(st.sampled_from(KEYS) | st.text(printable, max_size=6), JSON, max_size=3))
    gone = draw(st.none() | st.sampled_from(KEYS[:7]))
    wanted = {key: value for key, value in (GOOD | change).items() if key != gone}
    text = json.dumps(wanted).encode()
    return text.replace(b"{", b'{"r": 2, ', 1) if draw(st.integers(0, 19)) == 0 else text


def check_weights(content):
    """What the door let in, safetensors' own reader reads as the same, and numpy finds finite."""
    theirs = dict(deserialize(content))
    pairs = {}
    for name, info in theirs.items():
        module, _, part = name.partition(".lora_")
        pairs.setdefault(module, set()).add(part)
        kind = {"F32": np.float32, "F16": np.float16}.get(info["dtype"])
        data = bytes(info["data"])
        wide = (
            np.frombuffer(data, kind)
            if kind
            else np.frombuffer(b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2)), np.float32)
        )
        assert info["dtype"] in BYTES
        assert np.isfinite(wide).all()
        assert np.abs(wide.astype(np.float64)).max(initial=0) < 2**17
        assert wide.size == math.prod(info["shape"])
    assert theirs
    assert all(
        parts in ({"A.weight", "B.weight"}, {"A.weight", "B.weight", "magnitude_vector"}) for parts in pairs.values()
    )
    assert all(module.startswith("base_model.model.") and module.endswith(("q_proj", "v_proj")) for module in pairs)
    return theirs


def check_config(content, shape, theirs):
    """What the door let in means plain LoRA, whoever reads it; PEFT would find the same numbers in it."""
    said = json.loads(content)
    assert said["peft_type"] == "LORA"
    assert all(info["shape"][0] == said["r"] for name, info in theirs.items() if "lora_A" in name)
    assert all(info["shape"][1] == said["r"] for name, info in theirs.items() if "lora_B" in name)
    root = math.sqrt(said["r"]) if said.get("use_rslora") else said["r"]
    assert shape.scaling == pytest.approx(said["lora_alpha"] / root, rel=1e-12)
    assert math.isfinite(shape.scaling)
    assert set(said["target_modules"]) == set(shape.targets)
    assert any("magnitude" in name for name in theirs) == bool(said.get("use_dora"))
    for key in KEYS[8:15] + KEYS[16:21]:
        assert not said.get(key), key
    assert said.get("bias", "none") == "none"


def offer(folder, weights=None, config=None):
    """Offer a folder to the door; return whether it was let in."""
    if weights is not None:
        (folder / WEIGHTS).write_bytes(weights)
    if config is not None:
        (folder / CONFIG).write_bytes(config)
    before = time.perf_counter()
    try:
        files = open_adapter(folder)
    except LoraTuneError as err:
        assert err.message.isprintable()
        assert len(err.message) < 1000
        return False
    finally:
        assert time.perf_counter() - before < 1.0
    check_config((folder / CONFIG).read_bytes(), files.shape, check_weights((folder / WEIGHTS).read_bytes()))
    return True


def fuzz(tmp_path, examples):
    """Draw half as many weights files and half as many configs; return how many of each were let in."""
    let_in = {"weights": 0, "config": 0}
    folders = {
        (kind, dora): write(tmp_path / f"{kind}-{dora}", {"use_dora": dora}, fitting(dora=dora))
        for kind in ("weights", "config")
        for dora in (False, True)
    }
    quiet = settings(max_examples=examples // 2, deadline=None, database=None, suppress_health_check=list(HealthCheck))

    @quiet
    @given(content=weights_files(), dora=st.booleans())
    def weights(content, dora):
        let_in["weights"] += offer(folders["weights", dora], weights=content)

    @quiet
    @given(content=configs(), dora=st.booleans())
    def config(content, dora):
        let_in["config"] += offer(folders["config", dora], config=content)

    weights()
    config()
    return let_in


def test_of_400_fuzzed_adapters_none_is_let_in_wrongly_and_none_is_an_uncaught_exception(tmp_path):
    let_in = fuzz(tmp_path, 400)
    assert all(0 < count < 200 for count in let_in.values()), (
        let_in
    )  # harmless changes are let in, so both sides are seen


@pytest.mark.slow
def test_of_10000_fuzzed_adapters_none_is_let_in_wrongly_and_none_is_an_uncaught_exception(tmp_path):
    let_in = fuzz(tmp_path, 10_000)
    assert all(0 < count < 5000 for count in let_in.values()), let_in


def test_the_true_files_are_let_in(tmp_path):
    for dtype in BYTES:
        for dora in (False, True):
            assert offer(write(tmp_path / "a", {"use_dora": dora}, fitting(dtype=dtype, dora=dora)))


def test_padded_and_spaced_headers_are_read_as_safetensors_reads_them(tmp_path):
    folder = write(tmp_path / "a", content=fitting())
    content = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    for more in (b" " * 7, b"\n", b"\t \n"):
        assert offer(
            folder,
            weights=struct.pack("<Q", length + len(more)) + content[8 : 8 + length] + more + content[8 + length :],
        )
    header = json.loads(content[8 : 8 + length])
    assert offer(folder, weights=raw({"__metadata__": {"format": "pt"}} | header, content[8 + length :]))
