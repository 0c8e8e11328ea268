"""Files made to hurt: each ends soon, in little memory, with an error that says where and what to do."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest

from lora_tune.data.rows import Row, iter_rows, read_rows
from lora_tune.errors import DataError

MIB = 1024 * 1024
MAX_RSS_MIB = 512
MAX_SECONDS = 10
"""Far more than it takes: it tells fast from never on a busy machine."""

READ = """
import json, sys, time
from pathlib import Path
from lora_tune.data.rows import read_rows
from lora_tune.errors import LoraTuneError
for name in sys.argv[1:]:
    start = time.perf_counter()
    try:
        found = read_rows(Path(name))
        said = {"problems": found.problems, "rows": len(found.rows), "exit": 65 if found.problems else 0}
    except LoraTuneError as err:
        said = {"problems": [err.message], "hint": err.hint, "rows": 0, "exit": err.exit_code}
    found = None
    # Not ru_maxrss: that one also remembers the process that started this one.
    rss = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({**said, "rss_mib": int(rss.split()[1]) / 1024, "seconds": time.perf_counter() - start}))
"""


def _read(*paths: Path):
    """Return what reading each file says, from one process of its own whose memory is measured."""
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, paths)], capture_output=True, text=True, timeout=120, check=True
    )
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == len(paths)
    assert max(one["rss_mib"] for one in said) < MAX_RSS_MIB
    assert max(one["seconds"] for one in said) < MAX_SECONDS
    return said


def _written(folder: Path, suffix: str, contents: list[bytes]) -> list[Path]:
    paths = [folder / f"{n}{suffix}" for n in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


GOOD = b'{"prompt": "a", "completion": "b"}\n'
DEEP = b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
DEEP_OBJECTS = b'{"x":' * 100_000 + b"1" + b"}" * 100_000
MANY_KEYS = b"{" + b",".join(b'"k%d":1' % n for n in range(100_000)) + b"}"
LONG = b'{"prompt": "' + b"a" * (60 * MIB) + b'", "completion": "b"}'


LINES = [
    (LONG, "62,914,5"), (DEEP, "nested too deep"), (DEEP_OBJECTS, "nested too deep"), (MANY_KEYS, "100,000 keys"),
    (b'{"x": ' + b"9" * (7 * MIB) + b"}", "a number of 7340032 digits"),
    (b'{"x": 0.' + b"9" * (7 * MIB) + b"}", "digits; at most 4000"),
]  # fmt: skip


def test_a_bomb_in_json_lines_is_one_bad_row_and_reading_goes_on(tmp_path):
    paths = _written(tmp_path, ".jsonl", [GOOD + row + b"\n" + GOOD for row, _ in LINES])
    for path, said, (_, reason) in zip(paths, _read(*paths), LINES, strict=True):
        assert said["rows"] == 2
        (problem,) = said["problems"]
        assert problem.startswith(f"{path}:2: ")
        assert reason in problem


ELEMENTS = [
    (LONG, "more than 8,388,608"), (DEEP, "nested too deep"), (DEEP_OBJECTS, "nested too deep"), (MANY_KEYS, "100,000 keys"),
    (b'{"prompt": "' + b"a" * (20 * MIB), "a text that does not end"),
]  # fmt: skip


def test_a_bomb_in_a_json_list_is_named_with_its_line(tmp_path):
    paths = _written(tmp_path, ".json", [b"[" + GOOD + b",\n" + row + b",\n" + GOOD + b"]" for row, _ in ELEMENTS])
    for path, said, (_, reason) in zip(paths, _read(*paths), ELEMENTS, strict=True):
        assert said["exit"] == 65
        assert said["problems"][0].startswith(f"{path}:3: ")
        assert reason in said["problems"][0]


TABLES = [
    (b"prompt,completion\na,b\n" + b"c" * (60 * MIB) + b",d\n", 3, "the row has more than"),
    (b'prompt,completion\na,b\n"' + b"some words\n" * (2 * MIB), 3, "or a quote does not end"),
    (b"prompt,completion\na,b\n" + b"c," * MIB + b"\n", 3, "1048577 cells"),
    (b",".join(b"k%d" % n for n in range(100_000)) + b"\na\n", 1, "100,000 keys"),
]


def test_a_bomb_in_a_table_is_named_with_its_line(tmp_path):
    paths = _written(tmp_path, ".csv", [content for content, _, _ in TABLES])
    for path, said, (_, line, reason) in zip(paths, _read(*paths), TABLES, strict=True):
        assert said["exit"] == 65
        assert said["problems"][0].startswith(f"{path}:{line}: ")
        assert reason in said["problems"][0]


def _zstd(content: bytes) -> bytes:
    import pyarrow

    packed: bytes = pyarrow.compress(content, codec="zstd", asbytes=True)
    return packed


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd}


START = {".jsonl": b'{"prompt": "', ".json": b'[{"prompt": "', ".csv": b'prompt\n"', ".tsv": b'prompt\n"'}


def test_600_mib_out_of_a_small_file_are_refused(tmp_path):
    paths = []
    for packing, pack in PACK.items():
        block = pack(b" " * (10 * MIB))
        for suffix, start in START.items():
            paths.append(tmp_path / f"rows{suffix}{packing}")
            # Packed files that follow each other are one packed file: 60 times the same 10 MiB.
            paths[-1].write_bytes(pack(start) + block * 60)
            assert paths[-1].stat().st_size < MIB
    for said in _read(*paths):
        assert said["exit"] == 65
        assert "at most 100 times as many are read" in said["problems"][0]
        assert "unpack it yourself" in said["hint"]


def test_a_parquet_file_that_unpacks_to_far_more_is_refused(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    column = pyarrow.array(["a" * 1000] * 50_000)
    parquet.write_table(pyarrow.table({"text": column}), path, use_dictionary=False, compression="zstd")
    with pytest.raises(DataError, match="at most 100 times"):
        list(iter_rows(path))


def test_a_long_text_that_parquet_keeps_once_does_not_stand_in_memory_for_every_row(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    same = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 300, pyarrow.int32()), ["a" * (4 * MIB)])
    parquet.write_table(pyarrow.table({"text": same}), path, store_schema=False, compression="none")
    assert path.stat().st_size < 5 * MIB
    count = "sum(len(row.values['text']) for row in iter_rows(Path(sys.argv[1])))"
    peak = "[line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM')]"
    script = f"import sys\nfrom pathlib import Path\nfrom lora_tune.data.rows import iter_rows\nprint({count})\nprint(*{peak})"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    characters, memory = done.stdout.splitlines()
    assert int(characters) == 300 * 4 * MIB
    assert int(memory.split()[1]) / 1024 < MAX_RSS_MIB


def test_the_largest_row_there_may_be_fits_into_memory(tmp_path):
    rows = [
        b'{"x":[' + b",".join([inner] * ((8 * MIB - 16) // (len(inner) + 1))) + b"]}" for inner in (b'{"a":1}', b'"a"')
    ]
    for said in _read(*_written(tmp_path, ".jsonl", rows)):
        assert (said["rows"], said["problems"]) == (1, [])


@pytest.mark.parametrize("size", [8 * MIB - 1, 8 * MIB])
def test_a_row_just_below_the_limit_is_read_and_one_at_it_is_not(tmp_path, size):
    line = b'{"x": "' + b"a" * (size - 10) + b'"}\n'
    assert len(line) == size
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line + GOOD)
    assert [isinstance(row, Row) for row in iter_rows(path)] == [size < 8 * MIB, True]


@pytest.mark.parametrize(("row", "good"), [
    ('{"x": ' + "[" * 63 + "]" * 63 + "}", True), ('{"x": ' + "[" * 64 + "]" * 64 + "}", False),
    ('{"x": "' + "[{" * 5000 + '"}', True), ('{"x": [' + "[]," * 5000 + "[]]}", True),
    (json.dumps(dict.fromkeys(map(str, range(256)))), True), (json.dumps(dict.fromkeys(map(str, range(257)))), False),
    ('{"x": ' + "9" * 4000 + "}", True), ('{"x": ' + "9" * 4001 + "}", False),
])  # fmt: skip
def test_the_limits_are_where_they_are_said_to_be(tmp_path, row, good):
    for name, content in (("rows.jsonl", row), ("rows.json", f"[{row}]")):
        path = tmp_path / name
        path.write_text(content)
        found = read_rows(path)
        assert (len(found.rows), len(found.problems)) == ((1, 0) if good else (0, 1))
