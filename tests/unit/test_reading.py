"""Reading every layout and packing: nothing changed, nothing lost, every problem with its place."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from lora_tune.data import json_rows
from lora_tune.data.rows import Row, iter_rows, read_rows
from lora_tune.errors import DataError

ROWS = [{"prompt": f"wörd {n} 😀", "completion": 'line\nbreak, "quoted"\tand tab'} for n in range(5)]


def _plain(suffix: str, rows: list[dict[str, str]]) -> bytes:
    """Return the rows as another library writes them."""
    if suffix == ".parquet":
        packed = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), packed)
        return packed.getvalue()
    if suffix in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), delimiter="," if suffix == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    if suffix == ".json":
        return json.dumps(rows, indent=2).encode()
    return "".join(json.dumps(row, ensure_ascii=n % 2 == 0) + "\n" for n, row in enumerate(rows)).encode()


def _zstd(content: bytes) -> bytes:
    packed: bytes = pyarrow.compress(content, codec="zstd", asbytes=True)
    return packed


PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd}
TEXTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")


@pytest.mark.parametrize("suffix", [*(t + p for t in TEXTS for p in PACK), ".parquet", ".JSON.GZ"])
def test_every_layout_and_packing_gives_the_same_rows(tmp_path, suffix):
    layout, _, packing = suffix.lower().removeprefix(".").partition(".")
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(PACK[f".{packing}" if packing else ""](_plain(f".{layout}", ROWS)))
    found = read_rows(path)
    assert not found.problems
    assert [row.values for row in found.rows] == ROWS


@pytest.mark.parametrize("packing", [p for p in PACK if p])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.95])
def test_a_packed_file_that_is_cut_off_or_not_packed_is_named(tmp_path, packing, kept):
    packed = PACK[packing](_plain(".jsonl", ROWS * 400))
    path = tmp_path / f"rows.jsonl{packing}"
    path.write_bytes(packed[: int(kept * len(packed))] or _plain(".jsonl", ROWS))
    with pytest.raises(DataError, match=f"damaged or no {packing} file") as caught:
        read_rows(path)
    assert caught.value.hint


def _said(path: Path) -> list[str]:
    try:
        return read_rows(path).problems
    except DataError as err:
        return [err.message]


@pytest.mark.parametrize("suffix", TEXTS)
def test_a_bad_byte_is_found_at_each_of_50_positions(tmp_path, suffix):
    content = _plain(suffix, [{"prompt": f"word {n}", "completion": "a, b"} for n in range(20)])
    positions = random.Random(13).sample(range(len(content)), 50)
    for position in [*positions, 0, len(content) - 2]:
        path = tmp_path / f"{position}{suffix}"
        path.write_bytes(content[:position] + b"\xff" + content[position:])
        before = content[:position].split(b"\n")
        said = f"{path}:{len(before)}: not UTF-8 at column {len(before[-1]) + 1} (byte 0xff); save the file as UTF-8"
        assert _said(path) == [said]


@pytest.mark.parametrize("suffix", TEXTS)
def test_reading_goes_on_after_a_row_that_is_not_utf8(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(_plain(suffix, [{"prompt": f"word {n}"} for n in range(9)]).replace(b"word 4", b"w\xc3rd 4"))
    found = read_rows(path)
    assert [row.values["prompt"] for row in found.rows] == [f"word {n}" for n in (0, 1, 2, 3, 5, 6, 7, 8)]
    assert len(found.problems) == 1


BASE_CELLS = [
    "", " ", "001", "1e5", "1.0", "+1", "-0", "NA", "N/A", "nan", "null", "None", "true", "TRUE", "inf", "1_000", "0x1F",
    "2026-01-01", "12:30:45", "=1+1", "+A1", "-A1", "@SUM(A1)", "\t=1", "\r", "\n", "\r\n", "a\rb", "a\n\nb", "a\r\nb", "\0", "a\0b",
    '"', '""', "'", "a,b", "a;b", "a\tb", "\\", "\\n", "\\\"", "{\"a\": 1}", "[1, 2]", "<b>", "&amp;", "#", "//", "--", "%s", "${HOME}",
    "é", "e\u0301", "ß", "漢字", "😀", "👩\u200d👩\u200d👧", "\u202e", "\u200b", "\ufeff", "\u00a0", "\u2028", "\u2029", "\x0b", "\x0c", "\x1c",
    "\x85", "\x7f", "\ufffd", "\uffff", "\U0010ffff", "a" * 70_000,
]  # fmt: skip
CELLS = [*BASE_CELLS, *(f" {cell}\n" for cell in BASE_CELLS[:40])]


@pytest.mark.parametrize("suffix", [*TEXTS, ".parquet", ".csv.gz"])
def test_100_nasty_cells_come_back_as_they_are(tmp_path, suffix):
    assert len(CELLS) > 100
    path = tmp_path / f"rows{suffix}"
    content = _plain(suffix.removesuffix(".gz"), [{"a": cell, "b": "x"} for cell in CELLS])
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    found = read_rows(path)
    assert not found.problems
    assert [row.values["a"].encode() for row in found.rows] == [cell.encode() for cell in CELLS]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@given(
    rows=st.lists(st.dictionaries(TEXT, VALUES, max_size=3), min_size=2, max_size=6),
    indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans(), listed=st.booleans(), block=st.integers(1, 40),
)  # fmt: skip
def test_json_is_read_right_wherever_the_blocks_end(tmp_path_factory, rows, indent, ascii_only, listed, block):
    path = tmp_path_factory.getbasetemp() / "blocks.json"
    texts = [json.dumps(row, indent=indent, ensure_ascii=ascii_only) for row in rows]
    content = "[" + " ,\n ".join(texts) + "\n]" if listed else "\n".join(texts)
    path.write_text(content, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "READ_BYTES", block)
        found = read_rows(path)
    assert not found.problems
    assert [row.values for row in found.rows] == rows
    begins = [1 + sum(text.count("\n") + 1 for text in texts[:n]) for n in range(len(texts))]
    assert [row.where for row in found.rows] == [f"{path}:{line}" for line in begins]


@given(cells=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6), delimiter=st.sampled_from(",\t"))
def test_any_cell_survives_a_table_and_rows_know_their_line(tmp_path_factory, cells, delimiter):
    path = tmp_path_factory.getbasetemp() / ("cells.csv" if delimiter == "," else "cells.tsv")
    written = io.StringIO(newline="")
    writer = csv.writer(written, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(["a", "b"])
    begins = []
    for pair in cells:
        begins.append(written.getvalue().count("\n") + 1)
        writer.writerow(pair)
    path.write_bytes(written.getvalue().encode())
    found = read_rows(path)
    assert [tuple(row.values.values()) for row in found.rows] == cells
    assert [row.where for row in found.rows] == [f"{path}:{line}" for line in begins]


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_numbers_that_json_does_not_have_are_refused_row_by_row(tmp_path, suffix, literal):
    path = tmp_path / f"rows{suffix}"
    lines = ['{"x": 1}', f'{{"x": [{literal}]}}', '{"x": 1.5e300}']
    path.write_text("\n".join(lines) if suffix == ".jsonl" else "[" + ",\n".join(lines) + "]")
    found = read_rows(path)
    assert [row.values["x"] for row in found.rows] == [1, 1.5e300]
    assert len(found.problems) == 1
    assert found.problems[0].startswith(f"{path}:2: ")
    assert literal in found.problems[0]


@pytest.mark.parametrize(("text", "value"), [
    (r"\ud83d\ude00", "😀"), (r"\uD83D\uDE00", "😀"), (r"\\ud83d", r"\ud83d"), (r"\\\ud83d\ude00", "\\😀"), (r"\\ud83d\\ude00", r"\ud83d\ude00"),
    (r"\ud83d", None), (r"\ude00\ud83d", None), (r"\\ud83d\ude00", None), (r"\ud83d\\ude00", None), (r"\ud83d\ud83d\ude00", None),
    (r"\u0000", "\0"),
])  # fmt: skip
def test_halves_of_surrogate_pairs_are_told_from_whole_ones(tmp_path, text, value):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"x": "{text}"}}')
    found = read_rows(path)
    assert [row.values for row in found.rows] == ([] if value is None else [{"x": value}])
    assert all("half of a surrogate pair" in problem for problem in found.problems)


WHOLE_FILES = [
    ("a.json", '{"data": [{"a": 1}]}', "found a dict", "the list under 'data'"),
    ("a.json", '{"a": 1}', "found a dict", ".jsonl"),
    ("a.json", '[{"a": 1},\n{"a": 2},\n]', ":3: not valid JSON at column 1: a comma after the last row", ""),
    ("a.json", '[{"a": 1}\n{"a": 2}]', ":2: not valid JSON at column 1: expected ',' or ']'", ""),
    ("a.json", '[{"a": 1},\n {"a": tru}]', ":2: not valid JSON at column 8", ""),
    ("a.json", '[{"a": 1},\n{"a": "b', ":2: not valid JSON", ""),
    ("a.json", '[{"a": 1},\n{"a": 1}', ":2: the list does not end", ""),
    ("a.json", '[{"a": 1}]\n[{"a": 2}]', ":2: something follows the list", ""),
    ("a.json", '"text"', ":1: neither a list nor an object", ""),
    ("a.jsonl", '[\n{"a": 1},\n{"a": 2}\n]', ":1: this is one JSON list", "rename the file to .json"),
    ("a.csv", "prompt;completion\na;b\n", ":1: the columns are separated by semicolons", "save it with commas"),
    ("a.csv", "prompt\tcompletion\na\tb\n", ":1: the columns are separated by tabs", "rename the file to .tsv"),
    ("a.tsv", "prompt,completion\na,b\n", ":1: the columns are separated by commas", "rename the file to .csv"),
    ("a.csv", "a,b,a\n1,2,3\n", ":1: a column name is written twice: a, b, a", "rename one"),
    ("a.csv", 'a,b\n1,2\n"3,4\n5,6\n', ":4: not valid CSV: a quote does not end (the row begins in line 3)", ""),
    ("a.csv", "a,b\r1,2\r3,4\r", ":1: not valid CSV: a line ends in a carriage return alone", ""),
    ("a.csv", "a,b\n1,2\n".encode("utf-16").decode("latin-1"), "the file is UTF-16", "save it as UTF-8"),
    ("a.parquet", "PAR1 no", "damaged or no Parquet file", "write or copy it again"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "said", "hint"), WHOLE_FILES)
def test_a_file_that_cannot_be_read_on_is_refused_with_the_place(tmp_path, name, content, said, hint):
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert said in caught.value.message
    assert caught.value.message.startswith(str(path))
    assert hint in caught.value.hint
    assert caught.value.hint


def test_a_stray_quote_costs_one_csv_row(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('a,b\n1,2\n"3"x,4\n5,6\n')
    found = read_rows(path)
    assert [row.values["a"] for row in found.rows] == ["1", "5"]
    assert len(found.problems) == 1
    assert found.problems[0].startswith(f"{path}:3: not valid CSV")


@pytest.mark.parametrize(("name", "content"), [("a.json", "[]"), ("a.json", " \n"), ("a.csv", "a,b\n"), ("a.csv", ""), ("a.jsonl", "")])  # fmt: skip
def test_a_file_without_rows_says_so(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_rows(tmp_path / name).problems == [f"{tmp_path / name}: the file has no rows"]


def test_parquet_values_keep_their_types_and_rows_are_numbered(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"{n}"}], "n": n, "x": n / 2, "ok": n % 2 == 0, "gone": None}
        for n in range(600)
    ]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
    found = read_rows(path).rows
    assert [row.values for row in found] == rows
    assert [row.where for row in found] == [f"{path}:row {n}" for n in range(1, 601)]


def test_a_parquet_text_that_is_not_utf8_costs_one_row(tmp_path):
    column = pyarrow.array([b"a", b"b\xff", b"c"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"x": column}), tmp_path / "rows.parquet")
    found = read_rows(tmp_path / "rows.parquet")
    assert [row.values["x"] for row in found.rows] == ["a", "c"]
    assert [problem.partition(": ")[0] for problem in found.problems] == [f"{tmp_path / 'rows.parquet'}:row 2"]


def test_a_parquet_column_named_twice_is_refused(tmp_path):
    table = pyarrow.table([pyarrow.array(["a"])] * 2, names=["x", "x"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="written twice"):
        read_rows(tmp_path / "rows.parquet")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".jsonl.gz"])
def test_memory_does_not_grow_with_the_rows(tmp_path, suffix):
    rows = [{"prompt": f"what is {n} {random.Random(n).random()}?", "completion": "b" * 100} for n in range(20_000)]
    content = _plain(suffix.removesuffix(".gz"), rows)
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(content, 1) if suffix.endswith(".gz") else content)
    del rows
    tracemalloc.start()
    count = sum(isinstance(row, Row) for row in iter_rows(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert len(content) > 3 * MAX_PEAK_BYTES / 2
    assert peak < MAX_PEAK_BYTES


MAX_PEAK_BYTES = 1536 * 1024
"""A few blocks of 256 KiB."""


def test_a_pipe_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="a pipe, socket or device"):
        read_rows(tmp_path / "rows.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path / "folder.jsonl")
