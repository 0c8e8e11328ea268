"""Hostile adapters of every kind that the threat list (T1 to T12) names, as functions that write them into a folder.

They are made for the tiny Llama, so that nothing but the attack speaks against them.
"""

import json
import os
import socket
import struct
import zipfile
from functools import cache
from pathlib import Path

from lora_tune.adapter.door import CONFIG, WEIGHTS
from lora_tune.adapter.manifest import FILE_NAME
from tests.unit.test_door import write

WIDTHS = {"q_proj": (64, 64), "v_proj": (32, 64)}
"""Layer → (out, in) of the tiny Llama."""
LAYERS = {f"model.layers.{n}.self_attn.{name}": width for n in (0, 1) for name, width in WIDTHS.items()}
BASE = {f"{module}.weight": width for module, width in LAYERS.items()}
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
PACK = {"F32": "f", "F16": "e"}


def pack(values, dtype):
    """Numbers as bytes of the type; bf16 is the upper half of fp32."""
    if dtype == "BF16":
        return b"".join(struct.pack("<f", value)[2:] for value in values)
    return struct.pack(f"<{len(values)}{PACK[dtype]}", *values)


@cache
def fitting(rank=2, dtype="F32", *, dora=False):
    """Tensors of an adapter that fits the tiny Llama."""
    found = {}
    for module, (rows, columns) in LAYERS.items():
        for part, shape in {"lora_A.weight": [rank, columns], "lora_B.weight": [rows, rank]}.items():
            numbers = [((7 * n) % 13 - 6) / 64 for n in range(shape[0] * shape[1])]
            found[f"base_model.model.{module}.{part}"] = (dtype, shape, pack(numbers, dtype))
        if dora:
            found[f"base_model.model.{module}.lora_magnitude_vector"] = (dtype, [rows], pack([1.0] * rows, dtype))
    return found


def raw(header, body=b"", *, length=None):
    """A weights file from any header text or value, true to its length or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def one(offsets, shape, **more):
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets, **more}


A, B = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"
TWO = {A: one([0, 512], [2, 64]), B: one([512, 1024], [64, 2])}


def file(content):
    """A folder whose weights file holds exactly these bytes."""

    def make(folder):
        (write(folder, content=fitting()) / WEIGHTS).write_bytes(content)

    return make


def config(**change):
    return lambda folder: write(folder, change, fitting())


def config_bytes(content):
    return lambda folder: (write(folder, content=fitting()) / CONFIG).write_bytes(content)


def extra(name, shape=(64, 64)):
    """One tensor more than belongs there."""
    count = 1
    for n in shape:
        count *= n
    return lambda folder: write(folder, content=fitting() | {name: ("F32", list(shape), bytes(4 * count))})


def reshaped(key, shape):
    """One tensor in another shape."""
    count = 1
    for n in shape:
        count *= n
    return lambda folder: write(folder, content=fitting() | {key: ("F32", list(shape), bytes(4 * count))})


def poisoned(dtype, value, key=A, position=-1):
    """One number replaced by the bytes of another."""

    def make(folder):
        content = fitting(dtype=dtype)
        kind, shape, data = content[key]
        width = len(value)
        start = (len(data) // width + position) % (len(data) // width) * width
        write(folder, content=content | {key: (kind, shape, data[:start] + value + data[start + width :])})

    return make


def renamed(change):
    """All tensors under other names."""
    return lambda folder: write(folder, content={change(name): value for name, value in fitting().items()})


def replaced(name, act):
    """A file of the folder replaced by something that is no file."""

    def make(folder):
        path = write(folder, content=fitting()) / name
        path.unlink(missing_ok=True)
        act(path)

    return make


def bind_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path is at most 108 bytes
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def pickled(name, content):
    def make(folder):
        (write(folder, content=fitting()) / WEIGHTS).unlink()
        (folder / name).write_bytes(content)

    return make


def zipped(folder):
    with zipfile.ZipFile(write(folder, content=fitting()) / WEIGHTS, "w") as archive:
        archive.writestr("archive/data.pkl", PAYLOAD)


def passport(content):
    return lambda folder: (write(folder, content=fitting()) / FILE_NAME).write_bytes(content)


# What `os.system("touch canary")` looks like as a pickle.
PAYLOAD = b"cos\nsystem\n(S'touch lora_tune_canary'\ntR."
NAN, INF, MINUS_INF = struct.pack("<f", float("nan")), struct.pack("<f", float("inf")), struct.pack("<f", float("-inf"))

AT_DOOR = {
    "T1 a pickle named .bin": pickled("adapter_model.bin", PAYLOAD), "T1 a pickle named .pt": pickled("adapter_model.pt", PAYLOAD),
    "T1 a pickle in the weights' name": file(PAYLOAD), "T1 a torch archive in the weights' name": zipped,
    "T1 a pickle as config": config_bytes(PAYLOAD),
    "T2 nothing": file(b""), "T2 seven bytes": file(b"\0" * 7), "T2 a length of 2^63": file(raw({}, length=2**63)),
    "T2 a negative length": file(raw({}, length=2**64 - 8)), "T2 a length past the end": file(raw(TWO, length=10_000)),
    "T2 a length of nothing": file(raw(b"")), "T2 no JSON": file(raw(b"{{{")), "T2 a list": file(raw([1])), "T2 a text": file(raw("x")),
    "T2 half a character": file(raw(b'{"\xed\xa0\x80":1}')), "T2 a byte order mark": file(raw(b"\xef\xbb\xbf" + json.dumps(TWO).encode(), bytes(1024))),
    "T2 a space in front": file(raw(b" " + json.dumps(TWO).encode(), bytes(1024))),
    "T2 a tensor that is a number": file(raw({A: 5})), "T2 a tensor without a type": file(raw({A: {"shape": [1], "data_offsets": [0, 4]}})),
    "T2 overlapping tensors": file(raw(TWO | {B: one([256, 768], [64, 2])}, bytes(768))),
    "T2 a hole": file(raw(TWO | {B: one([516, 1028], [64, 2])}, bytes(1028))), "T2 bytes behind the end": file(raw(TWO, bytes(1025))),
    "T2 a byte short": file(raw(TWO, bytes(1023))), "T2 a tensor that begins late": file(raw({A: one([4, 516], [2, 64])}, bytes(516))),
    "T2 a name twice": file(raw(json.dumps(TWO).encode()[:-1] + b"," + json.dumps({A: one([0, 512], [2, 64])}).encode()[1:], bytes(1024))),
    "T2 a field twice": file(raw(f'{{"{A}":{{"dtype":"F32","dtype":"F32","shape":[2,64],"data_offsets":[0,512]}}}}'.encode(), bytes(512))),
    "T2 an overflowing shape": file(raw({A: one([0, 0], [0, 2**40])})), "T2 a product of 2^64": file(raw({A: one([0, 0], [2**32, 2**32])})),
    "T2 a size of a thousand digits": file(raw(f'{{"{A}":{{"dtype":"F32","shape":[{"9" * 1000}],"data_offsets":[0,4]}}}}'.encode(), bytes(4))),
    "T2 offsets that run backwards": file(raw({A: one([512, 0], [2, 64])}, bytes(512))), "T2 offsets with a point": file(raw({A: one([0, 512.0], [2, 64])}, bytes(512))),
    "T2 true as a size": file(raw({A: one([0, 4], [True])}, bytes(4))), "T2 three offsets": file(raw({A: one([0, 4, 4], [1])}, bytes(4))),
    "T2 a field that nobody knows": file(raw({A: one([0, 512], [2, 64], code="x")}, bytes(512))),
    "T2 metadata that is a list": file(raw(TWO | {"__metadata__": ["x"]}, bytes(1024))), "T2 metadata that is numbers": file(raw(TWO | {"__metadata__": {"x": 5}}, bytes(1024))),
    "T2 metadata of half a character": file(raw(TWO | {"__metadata__": {"x": "\udc80"}}, bytes(1024))),
    "T2 eight-byte floats": file(raw({A: {"dtype": "F64", "shape": [2, 64], "data_offsets": [0, 1024]}}, bytes(1024))),
    "T2 a type that is a list": file(raw({A: one([0, 512], [2, 64]) | {"dtype": ["F32"]}}, bytes(512))),
    "T2 a path as a name": file(raw({"../../etc/x": one([0, 4], [1])}, bytes(4))), "T2 an absolute path as a name": file(raw({"/etc/x": one([0, 4], [1])}, bytes(4))),
    "T2 an empty name": file(raw({"": one([0, 4], [1])}, bytes(4))), "T2 70,000 names": file(raw({f"t{n}": 0 for n in range(70_000)})), "T2 20,001 tensors": file(raw({f"t{n}": 0 for n in range(20_001)})),
    "T2 a header of more than 1 MiB": file(raw(TWO | {"__metadata__": {"x": "y" * 1024**2}}, bytes(1024))),
    "T2 a header of 350,000 lists": file(raw(b'{"a":[' + b"[]," * 340_000 + b"[]]}")), "T2 a header of 300 levels": file(raw(b'{"a":' + b"[" * 300 + b"]" * 300 + b"}")),
    "T2 a header of 100,000 levels": file(raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
    "T3 NaN in fp32": poisoned("F32", NAN), "T3 infinity in fp32": poisoned("F32", INF, B), "T3 minus infinity in fp32": poisoned("F32", MINUS_INF, position=0),
    "T3 NaN in fp16": poisoned("F16", b"\x00\x7e"), "T3 infinity in fp16": poisoned("F16", b"\x00\xfc"), "T3 NaN in bf16": poisoned("BF16", b"\xc0\x7f"),
    "T3 infinity in bf16": poisoned("BF16", b"\x80\xff"), "T3 the largest float": poisoned("F32", struct.pack("<f", -3.4e38)),
    "T3 the largest bf16": poisoned("BF16", b"\x7f\x7f"), "T3 alpha NaN": config(lora_alpha=float("nan")), "T3 alpha 1e300": config(lora_alpha=1e300),
    "T3 alpha infinite": config_bytes(b'{"peft_type":"LORA","r":2,"lora_alpha":1e999,"target_modules":["q_proj","v_proj"]}'),
    "T3 alpha of 400 digits": config(lora_alpha=10**400), "T3 dropout NaN": config(lora_dropout=float("nan")),
    "T4 a weight of the base": extra(f"{FIRST}.weight"), "T4 a weight of the base inside the wrapper": extra(f"{FIRST}.base_layer.weight"),
    "T4 a weight of the base by its own name": extra("model.layers.0.self_attn.q_proj.weight"), "T4 the embedding": extra("base_model.model.model.embed_tokens.weight", (512, 64)),
    "T4 the head": extra("base_model.model.lm_head.weight", (512, 64)), "T4 a saved module": extra("base_model.model.lm_head.modules_to_save.good.weight", (512, 64)),
    "T4 another adapter's weight": extra(f"{FIRST}.lora_A.good.weight", (2, 64)), "T4 the default adapter's weight": extra(f"{FIRST}.lora_A.default.weight", (2, 64)),
    "T4 another adapter's weight as a layer": extra(f"{FIRST}.lora_A.good.q_proj.lora_A.weight", (2, 64)), "T4 the wrapped layer as a layer": extra(f"{FIRST}.base_layer.q_proj.lora_A.weight", (2, 64)),
    "T4 an adapted embedding": extra("base_model.model.model.embed_tokens.lora_embedding_A", (2, 512)), "T4 a bias": extra(f"{FIRST}.lora_B.bias", (64,)),
    "T4 a magnitude of plain LoRA": extra(f"{FIRST}.lora_magnitude_vector", (64,)), "T4 a layer that is no target": extra("base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight", (2, 64)),
    "T4 half a layer": lambda folder: write(folder, content={name: value for name, value in fitting().items() if name != B}),
    "T4 dots without words": renamed(lambda name: name.replace("layers.0", "layers..0")),
    "T5 a rank of four million": config(r=4_194_304), "T5 rank zero": config(r=0), "T5 a negative rank": config(r=-2), "T5 rank true": config(r=True),
    "T5 rank 2.0": config(r=2.0), "T5 rank as text": config(r="2"), "T5 no rank": config(r=None), "T5 another rank than the tensors'": config(r=4),
    "T5 a rank pattern": config(rank_pattern={"q_proj": 4}), "T5 an alpha pattern": config(alpha_pattern={"q_proj": 4}),
    "T5 B padded": reshaped(B, (64, 4)), "T5 B of one dimension": reshaped(B, (128,)), "T5 B of more columns": reshaped(B, (64, 9)), "T5 A transposed": reshaped(A, (64, 2)),
    "T5 A of no dimension": reshaped(A, ()), "T5 alpha zero": config(lora_alpha=0), "T5 alpha true": config(lora_alpha=True),
    "T6 a pattern as targets": config(target_modules="(a+)+$"), "T6 a pattern among the targets": config(target_modules=["q_proj", "v_proj", "(a+)+$"]),
    "T6 a pattern of what is left out": config(exclude_modules="(a+)+$"), "T6 a pattern of ranks": config(rank_pattern={"(a+)+$": 4}),
    "T6 a pattern of layers": config(layers_to_transform=[0], layers_pattern="(a+)+$"), "T6 a config of 30 MB": config(auto_mapping="x" * 30_000_000),
    "T6 a config of 200,000 levels": config_bytes(b"[" * 200_000 + b"]" * 200_000), "T6 a config of 30,000 levels": config_bytes(b"[" * 30_000 + b"]" * 30_000),
    "T6 a config of 33 levels": config(auto_mapping=json.loads("[" * 32 + "]" * 32)), "T6 a config that names r twice": config_bytes(b'{"peft_type":"LORA","r":2,"r":2,"lora_alpha":4,"target_modules":["q_proj","v_proj"]}'),
    "T6 ten thousand targets": config(target_modules=["q_proj", "v_proj", *(f"m{n}" for n in range(5_000))]),
    "T8 weights that are a link": replaced(WEIGHTS, lambda path: path.symlink_to("/etc/passwd")), "T8 a config that is a link": replaced(CONFIG, lambda path: path.symlink_to("/etc/passwd")),
    "T8 a passport that is a link": replaced(FILE_NAME, lambda path: path.symlink_to("/etc/passwd")), "T8 a passport that leads nowhere": replaced(FILE_NAME, lambda path: path.symlink_to("nowhere")),
    "T8 a link to a device": replaced(WEIGHTS, lambda path: path.symlink_to("/dev/zero")), "T8 a link to itself": replaced(WEIGHTS, lambda path: path.symlink_to(path.name)),
    "T8 weights that are a pipe": replaced(WEIGHTS, os.mkfifo), "T8 a config that is a pipe": replaced(CONFIG, os.mkfifo), "T8 a passport that is a pipe": replaced(FILE_NAME, os.mkfifo),
    "T8 weights that are a folder": replaced(WEIGHTS, os.mkdir), "T8 a config that is a folder": replaced(CONFIG, os.mkdir), "T8 weights that are a socket": replaced(WEIGHTS, bind_socket),
    "T9 a base that a terminal obeys": config(base_model_name_or_path="x\x1b[2Jy"), "T9 a base that is a book": config(base_model_name_or_path="x" * 513),
    "T9 a base that is a list": config(base_model_name_or_path=["https://evil.example/x"]),
    "T10 code in the config": config(auto_map={"AutoConfig": "evil.py"}), "T10 trust asked for": config(trust_remote_code=True), "T10 a cache file": config(corda_config={"cache_file": "/etc/passwd"}),
    "T10 a class to make": config(_target_="os.system"), "T10 another method": config(peft_type="PROMPT_TUNING"), "T10 a megatron of its own": config(megatron_config={"x": 1}),
    "T10 an initialization that changes the base": config(init_lora_weights="pissa_niter_16"), "T10 modules of its own": config(modules_to_save=["lm_head"]),
    "T11 a passport of 1 MiB": passport(b'{"x":"' + b"y" * 1024**2 + b'"}'), "T11 a passport of 300,000 lists": passport(b'{"recipe":[' + b"[]," * 300_000 + b"[]]}"),
    "T11 a passport of 100,000 levels": passport(b"[" * 100_000), "T11 a passport that is no text": passport(b"\xff\xfe{}"),
    "T12 tokens of its own": config(trainable_token_indices=[1, 2]), "T12 a tokenizer in the config": config(tokenizer_file="../../.env"),
}  # fmt: skip
"""Refused before a base is looked at."""

AT_BASE = {
    "T4 a layer that the base has not": lambda folder: write(folder, content=fitting() | {name.replace("layers.0", "layers.9"): value for name, value in fitting().items()}),
    "T5 B of more rows": reshaped(B, (70, 2)), "T5 B of fewer rows": reshaped(B, (32, 2)), "T5 A of fewer columns": reshaped(A, (2, 32)),
    "T5 A and B of another width": lambda folder: write(folder, content={name: (kind, [2, 8] if "lora_A" in name else [8, 2], bytes(64)) for name, (kind, _, _) in fitting().items()}),
}  # fmt: skip
"""Whole in themselves; refused at the base."""

OFFERED = AT_DOOR | AT_BASE
