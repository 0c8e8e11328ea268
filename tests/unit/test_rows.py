"""Reading rows: every problem with its file and line."""

import csv
import json

import pytest

from lora_tune.data.dataset import prepare_dataset
from lora_tune.data.rows import read_rows
from lora_tune.data.verdict import check_rows
from lora_tune.errors import DataError, MissingInputError
from lora_tune.recipe.schema import DataSection
from tests.tiny import home_rows, write_jsonl


def test_csv_cells_stay_strings(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n001,NA\n"two\nlines",=1+1\n', encoding="utf-8")
    rows = read_rows(path).rows
    assert [row.values for row in rows] == [
        {"prompt": "001", "completion": "NA"},
        {"prompt": "two\nlines", "completion": "=1+1"},
    ]
    assert [row.where.rpartition(":")[2] for row in rows] == ["2", "3"]


def test_a_short_csv_row_is_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\na,b\nc\nd,e,f\n", encoding="utf-8")
    assert read_rows(path).problems == [
        f"{path}:3: 1 cells, but the header names 2 columns", f"{path}:4: 3 cells, but the header names 2 columns"
    ]  # fmt: skip


@pytest.mark.parametrize("line", range(5))
def test_bad_utf8_is_found_at_its_line_and_column(tmp_path, line):
    lines = [json.dumps(row).encode() for row in home_rows(5)]
    lines[line] = '{"é": "'.encode() + b"\xff" + b'"}'
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    assert read_rows(path).problems == [f"{path}:{line + 1}: not UTF-8 at column 8 (byte 0xff); save the file as UTF-8"]


def test_a_byte_order_mark_and_blank_lines_are_no_problem(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(home_rows(1)[0]).encode() + b"\r\n\n\n")
    found = read_rows(path)
    assert len(found.rows) == 1
    assert not found.problems


BAD_ROWS = [
    ('{"messages": [}', "not valid JSON"),
    ("[1, 2]", "a row is an object"),
    ('{"text": "x"}', "column 'messages' is missing"),
    ('{"messages": "hello"}', "messages is a text"),
    ('{"messages": [{"role": "user"}]}', "lacks content"),
    ('{"messages": [{"role": "user", "content": 5}]}', "content is a number"),
    ('{"messages": [{"role": "user", "content": null}]}', "content is a null"),
    ('{"messages": [{"role": "robot", "content": "x"}]}', "has role 'robot'"),
    ('{"messages": [{"role": "user", "content": "x", "extra": 1}]}', "has extra"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "the last message must be the assistant's"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', "the first turn must be the user's"),
    ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}', "is empty"),
    ('{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}, {"role": "assistant", "content": "z"}]}', "second user turn"),
    ('{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}, {"role": "assistant", "content": "z"}]}', "system message"),
    ('{"messages": []}', "no messages"),
    ('{"n": ' + "1" * 5000 + "}", "a number of 5000 digits"),
    ('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}', "surrogate pair (\\ud800)"),
    ('{"\\udfff": 1}', "surrogate pair"),
    ('{"messages": [], "messages": []}', "key 'messages' is written twice"),
    ('{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}', "key 'role' is written twice"),
    ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "tools": [{}]}', "tools[1] lacks name"),
    ('{"x": ' + "[" * 900 + "]" * 900 + "}", "nested too deep"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS, ids=[reason for _, reason in BAD_ROWS])
def test_one_bad_row_among_good_ones_is_named_with_its_line(tmp_path, bad, reason):
    lines = [json.dumps(row) for row in home_rows(9)]
    lines.insert(6, bad)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        check_rows(DataSection(path=str(path)), seed=0)
    assert f"{path}:7: " in caught.value.message
    assert reason in caught.value.message
    assert caught.value.exit_code == 65


def test_only_the_first_twenty_bad_rows_are_listed(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*home_rows(1), *({"messages": n} for n in range(30))])
    with pytest.raises(DataError) as caught:
        check_rows(DataSection(path=str(path)), seed=0)
    assert caught.value.message.count(f"{path}:") == 20
    assert "and 10 more" in caught.value.message


def _read(section, tokenizer):
    return list(prepare_dataset(section, tokenizer, seed=0).train.rows.conversations())


def test_formats_are_detected_and_agree(tmp_path, tokenizer):
    chat = [{"messages": [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c"}]}]
    prompts = [{"prompt": "a\nb", "completion": "c"}]
    conversational = [{"prompt": chat[0]["messages"][:1], "completion": chat[0]["messages"][1:]}]
    alpaca = [{"instruction": "a", "input": "b", "output": "c"}]
    found = {}
    for name, rows in {"chat": chat, "prompts": prompts, "conversational": conversational, "alpaca": alpaca}.items():
        section = DataSection(path=str(write_jsonl(tmp_path / f"{name}.jsonl", rows)))
        checked = check_rows(section, seed=0)
        assert checked.detected
        found[name] = (checked.row_format, _read(section, tokenizer)[0].messages)
    assert [row_format for row_format, _ in found.values()] == [
        "chat",
        "prompt-completion",
        "prompt-completion",
        "alpaca",
    ]
    assert len({messages for _, messages in found.values()}) == 1


def test_unknown_columns_list_what_is_known(tmp_path):
    for columns, hint in (
        ("question answer", "data.columns: {prompt: question, completion: answer}"),
        ("a b", "data.columns"),
    ):
        rows = write_jsonl(tmp_path / "rows.jsonl", [dict.fromkeys(columns.split(), "x")])
        with pytest.raises(DataError, match=f"columns {', '.join(columns.split())} are of no known format") as caught:
            check_rows(DataSection(path=str(rows)), seed=0)
        assert hint in caught.value.hint


def test_the_split_is_seeded_disjoint_and_complete(tmp_path, tokenizer):
    path = str(write_jsonl(tmp_path / "rows.jsonl", home_rows(40)))
    section = DataSection(path=path, eval_split=0.25)
    first, again, other = (prepare_dataset(section, tokenizer, seed=seed) for seed in (0, 0, 1))
    sets = [
        ({row.where for row in splits.train.rows}, {row.where for row in splits.held_out.rows})
        for splits in (first, again, other)
    ]
    assert sets[0] == sets[1] != sets[2]
    for train, held_out in sets:
        assert len(held_out) == 10
        assert train | held_out == {f"{path}:{n}" for n in range(1, 41)}
        assert not train & held_out


def test_copies_and_leaks_are_warned_of(tmp_path):
    rows = home_rows(10)
    train = write_jsonl(tmp_path / "train.jsonl", [*rows, rows[0]])
    held = write_jsonl(tmp_path / "held.jsonl", [rows[3]])
    warnings = check_rows(DataSection(path=str(train), eval_path=str(held)), seed=0).warnings
    assert any("exact copies" in warning for warning in warnings)
    assert any("held-out rows are also trained" in warning for warning in warnings)


def _refusal(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        check_rows(DataSection(path=str(path)), seed=0)
    return caught.value.message


@pytest.mark.parametrize("value", ["0", "false", "[]", "{}"])
@pytest.mark.parametrize("column", ["input", "system"])
def test_an_alpaca_cell_that_is_no_text_is_refused(tmp_path, column, value):
    row = f'{{"instruction": "a", "output": "b", "{column}": {value}}}\n'
    assert f"rows.jsonl:1: {column} is a" in _refusal(tmp_path, "rows.jsonl", row)


def test_an_alpaca_cell_may_be_null(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "input": None, "output": "b", "system": None}])
    assert [m.content for m in _read(DataSection(path=str(path)), tokenizer)[0].messages] == ["a", "b"]


@pytest.mark.parametrize("column", ["tools", "functions", "images"])
def test_a_filled_column_that_changes_the_meaning_is_refused(tmp_path, column):
    row = {"instruction": "a", "output": "b", column: [["x", "y"]]}
    assert f"rows.jsonl:1: column '{column}' is filled" in _refusal(tmp_path, "rows.jsonl", json.dumps(row))


def test_unused_columns_are_counted_with_a_suggestion(tmp_path):
    rows = [{"instruction": f"a{n}", "output": "b", "sytem": "s", "source": "web"} for n in range(3)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"instruction": "a", "output": "b", "id": 1}])
    assert list(check_rows(DataSection(path=str(path)), seed=0).warnings) == [
        "column 'sytem' is not used, in 3 of 4 rows; did you mean 'system'?",
        "column 'source' is not used, in 3 of 4 rows",
        "column 'id' is not used, in 1 of 4 rows",
    ]


def test_defects_in_a_json_list_name_the_line_where_their_row_begins(tmp_path):
    good = json.dumps(home_rows(1)[0], indent=1)
    defects = f'{{"a": 1,\n "a": 2}},\n{{"a": {"9" * 5000}}}, {{\n"a": "\\ud800"}}'
    message = _refusal(tmp_path, "rows.json", f"[{good},\n\n{defects}]")
    line = good.count("\n") + 3
    assert f"rows.json:{line}: key 'a' is written twice" in message
    assert f"rows.json:{line + 2}: a number of 5000 digits" in message
    assert f"rows.json:{line + 2}: half of a surrogate pair" in message


def test_csv_lines_are_right_after_blank_lines_and_cells_may_be_long(tmp_path):
    usual = csv.field_size_limit()
    path = tmp_path / "rows.csv"
    path.write_text(f'\nprompt,completion\n\n\na,b\n"c\n\n",d\n\n{"x" * 300_000},e\nbad\n', encoding="utf-8")
    found = read_rows(path)
    assert [row.where.rpartition(":")[2] for row in found.rows] == ["5", "6", "10"]
    assert found.problems == [f"{path}:11: 1 cells, but the header names 2 columns"]
    assert len(found.rows[2].values["prompt"]) == 300_000
    assert csv.field_size_limit() == usual


@pytest.mark.parametrize("name", ["r" * 300 + ".jsonl", "a\0b.jsonl"])
def test_a_path_that_cannot_be_is_missing(tmp_path, name):
    with pytest.raises(MissingInputError):
        read_rows(tmp_path / name)


def test_missing_files_and_unknown_suffixes(tmp_path):
    with pytest.raises(MissingInputError):
        read_rows(tmp_path / "no.jsonl")
    with pytest.raises(DataError, match=r"known: \.jsonl"):
        read_rows(tmp_path / "rows.docx")


def test_an_empty_file_says_so(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match="has no rows"):
        check_rows(DataSection(path=str(path)), seed=0)


def test_real_alpaca_rows_are_read(shared_data):
    checked = check_rows(DataSection(path=str(shared_data / "alpaca_en_demo.json"), eval_split=0.1), seed=0)
    assert checked.row_format == "alpaca"
    assert (checked.n_train, checked.n_held_out) == (899, 100)
