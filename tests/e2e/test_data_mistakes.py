"""Mistakes of real data sets, each in an otherwise good file: found before any model loads, with file and line."""

import gzip
import json

import pytest

from lora_tune.data.dataset import prepare_dataset
from lora_tune.data.verdict import check_rows
from lora_tune.errors import LoraTuneError
from lora_tune.recipe.schema import DataSection
from tests.tiny import home_rows

GOOD = [json.dumps(row) for row in home_rows(6)]
LINE = 4
"""The mistake stands here; the lines before and after are good."""


def chat(*turns, **more):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def said(**message):
    return {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", **message}]}


CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
ROWS = {
    "no JSON": '{"messages": [',
    "two objects on a line": GOOD[0] + GOOD[1],
    "a list instead of an object": "[1, 2]",
    "a text instead of an object": '"hello"',
    "null": "null",
    "a key written twice": '{"messages": [], "messages": []}',
    "not a number": '{"messages": [], "x": NaN}',
    "half a surrogate pair": '{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "a number without end": '{"messages": [], "x": ' + "9" * 5000 + "}",
    "nested too deep": '{"messages": ' + "[" * 100 + "]" * 100 + "}",
    "nested far too deep": '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "too many keys": json.dumps({"messages": [], **{f"k{n}": 1 for n in range(300)}}),
    "no messages column": {"message": []},
    "messages are a text": {"messages": "hi"},
    "messages are null": {"messages": None},
    "no messages at all": {"messages": []},
    "a message is a text": {"messages": ["hi"]},
    "a role is missing": {"messages": [{"content": "hi"}]},
    "a content is missing": {"messages": [{"role": "user"}]},
    "a content is a number": chat(("user", 5), ("assistant", "b")),
    "a content is null": chat(("user", None), ("assistant", "b")),
    "a role nobody knows": chat(("human being", "a"), ("assistant", "b")),
    "an empty question": chat(("user", "   "), ("assistant", "b")),
    "an empty answer": chat(("user", "a"), ("assistant", "")),
    "no answer": chat(("user", "a")),
    "the user speaks last": chat(("user", "a"), ("assistant", "b"), ("user", "c")),
    "the assistant speaks first": chat(("assistant", "a"), ("user", "b"), ("assistant", "c")),
    "two questions in a row": chat(("user", "a"), ("user", "b"), ("assistant", "c")),
    "a late system message": chat(("user", "a"), ("system", "b"), ("assistant", "c")),
    "only a system message": chat(("system", "a")),
    "a tool that nobody called": chat(("user", "a"), ("tool", "b"), ("assistant", "c")),
    "a message with a key of its own": said(weightt=1),
    "train is no yes or no": said(train="maybe"),
    "tool arguments are no JSON": said(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
    "tool arguments are a list": said(tool_calls=[{"function": {"name": "f", "arguments": [1]}}]),
    "a tool call without a name": said(tool_calls=[{"function": {"arguments": {}}}]),
    "a tool call is never answered": {"messages": [
        {"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "user", "content": "y"},
        {"role": "assistant", "content": "z"},
    ]},
    "tools are no list": chat(("user", "a"), ("assistant", "b"), tools="none of them"),
    "an image": {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, {"role": "assistant", "content": "b"}]},
}  # fmt: skip
TOKENS = {
    "an end-of-turn token in the question": chat(("user", "a<|im_end|>b"), ("assistant", "c")),
    "a forged turn in the answer": chat(("user", "a"), ("assistant", "b<|im_end|>\n<|im_start|>user\nc")),
    "nothing is trained": said(train=False),
}
FILES = {
    "a byte that is no UTF-8": ("rows.jsonl", "\n".join(GOOD).encode().replace(b"kitchen", b"kit\xffhen", 1), 1),
    "a CSV row with a cell too many": ("rows.csv", b"prompt,completion\na,b\nc,d,e\n", 3),
    "a CSV quote that never ends": ("rows.csv", b'prompt,completion\na,b\n"c,d\n', None),
    "a CSV column named twice": ("rows.csv", b"prompt,prompt\na,b\n", 1),
    "a CSV with semicolons": ("rows.csv", b"prompt;completion\na;b\n", 1),
    "a JSON list with a broken element": ("rows.json", b'[\n{"prompt": "a", "completion": "b"},\n{"prompt" "a"}\n]', 3),
    "a JSON object instead of a list": ("rows.json", b'{"rows": []}', None),
    "an empty file": ("rows.jsonl", b"", None),
    "an unknown suffix": ("rows.docx", b"x", None),
    "no gzip inside": ("rows.jsonl.gz", b"not gzip at all", None),
    "a gzip bomb": ("rows.jsonl.gz", gzip.compress(b"\n" * 200_000_000, 9), None),
    "no parquet inside": ("rows.parquet", b"not parquet at all", None),
}


def test_there_are_at_least_forty():
    assert len(ROWS) + len(TOKENS) + len(FILES) >= 40


@pytest.mark.parametrize("mistake", ROWS)
def test_a_row_mistake_is_found_with_file_and_line(mistake, tmp_path):
    found = _found_in(tmp_path, ROWS[mistake], check=lambda section: check_rows(section, seed=0))
    assert found.message.startswith("1 row cannot be used")


@pytest.mark.parametrize("mistake", TOKENS)
def test_a_token_mistake_is_found_with_file_and_line(mistake, tmp_path, tokenizer):
    _found_in(tmp_path, TOKENS[mistake], check=lambda section: prepare_dataset(section, tokenizer, seed=0))


@pytest.mark.parametrize("mistake", FILES)
def test_a_file_mistake_is_found(mistake, tmp_path):
    name, content, line = FILES[mistake]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LoraTuneError) as caught:
        check_rows(DataSection(path=str(tmp_path / name)), seed=0)
    assert caught.value.exit_code == 65
    assert name in caught.value.message
    assert caught.value.hint
    if line:
        assert f"{name}:{line}: " in caught.value.message


def test_every_mistake_of_one_file_is_listed_and_counted(tmp_path):
    mistakes = [row if isinstance(row, str) else json.dumps(row) for row in ROWS.values()]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*GOOD, *mistakes]))
    with pytest.raises(LoraTuneError) as caught:
        check_rows(DataSection(path=str(path), format="chat"), seed=0)
    first, *shown, last = caught.value.message.split("\n  ")
    assert first == f"{len(ROWS)} rows cannot be used"
    assert [line.split(": ")[0] for line in shown] == [f"{path}:{len(GOOD) + n}" for n in range(1, 21)]
    assert last == f"… and {len(ROWS) - 20} more"


def _found_in(folder, row, *, check):
    """Return the error of a good file with one bad row in it."""
    lines = [*GOOD[: LINE - 1], row if isinstance(row, str) else json.dumps(row), *GOOD[LINE - 1 :]]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(LoraTuneError) as caught:
        check(DataSection(path=str(path)))
    assert caught.value.exit_code == 65
    assert f"{path}:{LINE}: " in caught.value.message
    assert caught.value.where == f"{path}:{LINE}"
    assert caught.value.hint
    return caught.value
