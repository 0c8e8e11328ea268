"""Tokens that are kept: the same as fresh ones, made again exactly when something that decides them has changed."""

import json
import os
import time

import pytest

from lora_tune.data import store
from lora_tune.data.dataset import prepare_dataset
from lora_tune.data.messages import Conversation, Message, PlainText, ToolCall, row_from_json
from lora_tune.data.sources import find_sources
from lora_tune.data.store import tokenized_source
from lora_tune.data.tokens import tokenize
from lora_tune.recipe.schema import AugmentSection, DataSection
from tests.tiny import TEMPLATES, home_rows, tiny_tokenizer, write_jsonl


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_TUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rows(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", home_rows(30))


def reasons(path, tokenizer=None, **settings):
    splits = prepare_dataset(DataSection(path=str(path), **settings), tokenizer or tiny_tokenizer(), seed=0)
    return next(iter(splits.tokenized.values()))


def test_tokens_from_the_store_are_those_of_the_row_alone(rows, monkeypatch):
    monkeypatch.setattr(store, "CHUNK_ROWS", 7)
    tokenizer = tiny_tokenizer()
    section = DataSection(path=str(rows))
    for _ in range(2):
        train = prepare_dataset(section, tokenizer, seed=0).train
        alone = [tokenize(row, tokenizer, train_on="assistant") for row in train.rows.conversations()]
        assert list(train.rows) == alone
        assert train.n_tokens_by_row.tolist() == [len(row.input_ids) for row in alone]
        assert train.counts.trained_tokens == sum(row.n_trained for row in alone)
    assert [row.where for row in train.rows] == [f"{rows}:{line}" for line in range(1, 31)]


def test_the_reason_of_each_miss_is_named(tmp_path, rows):
    assert reasons(rows) == "first time"
    assert reasons(rows) == "kept from before"
    assert reasons(rows, max_seq_tokens=100, eval_split=0.1) == "kept from before"
    assert reasons(rows, train_on="all") == "train_on changed"
    other = tiny_tokenizer()
    other.chat_template = TEMPLATES["thinking block"]
    assert reasons(rows, other) == "chat template changed"
    grown = tiny_tokenizer()
    grown.add_tokens(["kitchen"])
    assert reasons(rows, grown) == "tokenizer changed"
    assert reasons(rows, format="chat") == "format changed"
    moved = rows.rename(tmp_path / "moved.jsonl")
    assert reasons(moved) == "kept from before"
    write_jsonl(moved, home_rows(29))
    assert reasons(moved) == "first time"
    write_jsonl(moved, home_rows(28))
    assert reasons(moved) == "data changed"


def test_the_same_bytes_as_another_kind_of_file_are_other_rows(tmp_path):
    (tmp_path / "rows.tsv").write_text("text\nhello\tworld\nbye\n")
    prepare_dataset(DataSection(path=str(tmp_path / "rows.tsv"), max_bad_rows=5), tiny_tokenizer(), seed=0)
    (tmp_path / "rows.tsv").rename(tmp_path / "rows.csv")
    splits = prepare_dataset(DataSection(path=str(tmp_path / "rows.csv")), tiny_tokenizer(), seed=0)
    assert (splits.checked.n_train, splits.checked.left_out) == (2, 0)


def test_copies_know_where_their_rows_stand_when_files_are_joined(tmp_path):
    rows, told = home_rows(6), AugmentSection(copies=1, prompts=("Well, {prompt}",))
    write_jsonl(tmp_path / "two" / "train-a.jsonl", rows[:3])
    write_jsonl(tmp_path / "two" / "train-b.jsonl", rows[3:])
    write_jsonl(tmp_path / "one" / "train.jsonl", rows)
    for folder, files in (("two", {"train-a.jsonl", "train-b.jsonl"}), ("one", {"train.jsonl"})):
        section = DataSection(path=str(tmp_path / folder))
        train = prepare_dataset(section, tiny_tokenizer(), seed=0, augment=told).train
        assert {row.where.rpartition("/")[2].partition(":")[0] for row in train.rows} == files
        assert len(list(train.rows)) == len(train.rows) == 12


def test_a_changed_masking_code_makes_tokens_again(rows, monkeypatch):
    assert reasons(rows) == "first time"
    monkeypatch.setattr(store, "_code_digest", lambda: "another")
    assert reasons(rows) == "code of lora_tune changed"


def test_kept_tokens_that_are_damaged_are_made_again(rows, tmp_path):
    assert reasons(rows) == "first time"
    (arrow,) = tmp_path.glob("cache/tokens/*/rows.arrow")
    good = arrow.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for damaged in (good[:100], bytes(flipped)):
        arrow.write_bytes(damaged)
        assert reasons(rows) == "what was kept is damaged"
        assert arrow.read_bytes() == good
    facts = arrow.with_name("facts.json")
    facts.write_text(facts.read_text().replace('"rows_read": 30', '"rows_read": 31'))
    assert reasons(rows) == "what was kept is damaged"
    assert reasons(rows) == "kept from before"


def test_what_a_killed_process_left_is_removed_a_day_later(rows, tmp_path):
    left = tmp_path / "cache" / "tokens" / ".abc-123"
    left.mkdir(parents=True)
    reasons(rows)
    assert left.exists()
    os.utime(left, (0, 0))
    reasons(rows, train_on="all")
    assert not left.exists()


def test_long_rows_are_tokenized_few_at_a_time(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(store, "CHUNK_CHARS", 1000)
    drafted = store.RowTokenizer.draft
    monkeypatch.setattr(store.RowTokenizer, "draft", lambda self, rows: sizes.append(len(rows)) or drafted(self, rows))
    long = [{"prompt": "x", "completion": "y " * n} for n in (600, 10, 10, 600, 10)]
    train = prepare_dataset(
        DataSection(path=str(write_jsonl(tmp_path / "l.jsonl", long)), max_seq_tokens=4096), tiny_tokenizer(), seed=0
    ).train
    assert [size for size in sizes if size] == [1, 3, 1]
    assert [row.where.rpartition(":")[2] for row in train.rows] == ["1", "2", "3", "4", "5"]


def test_a_cache_that_cannot_be_written_does_not_stop_a_run(rows, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert reasons(rows) == "first time; the cache cannot be written"


def test_nobody_else_can_read_the_kept_rows(rows, tmp_path):
    reasons(rows)
    assert (tmp_path / "cache" / "tokens").stat().st_mode & 0o077 == 0


def test_tokens_that_nobody_used_for_a_month_are_removed(rows, tmp_path):
    reasons(rows)
    (old,) = tmp_path.glob("cache/tokens/*/facts.json")
    long_ago = time.time() - 40 * 86_400
    os.utime(old, (long_ago, long_ago))
    reasons(rows, train_on="all")
    assert not old.exists()


def test_a_refused_row_is_kept_as_refused_with_its_place(tmp_path):
    forged = {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "x"}]}
    path = write_jsonl(tmp_path / "rows.jsonl", [*home_rows(3), forged])
    (source,) = find_sources(DataSection(path=str(path))).train
    for _ in range(2):
        stored = tokenized_source(source, tiny_tokenizer(), train_on="assistant")
        assert stored.n_tokens.tolist()[3] == 0 < min(stored.n_tokens.tolist()[:3])
        assert stored.tally.n_refused == 1
        assert stored.tally.refused[0].startswith(f"{path}:4: message 1 (user) holds the control token")


@pytest.mark.parametrize("row", [
    PlainText("some text\n", "a:1"),
    Conversation((Message("user", "é<b>"), Message("assistant", "")), 1, "a:1"),
    Conversation(
        (
            Message("user", "x"),
            Message("assistant", "", reasoning="hm", tool_calls=(ToolCall("f", '{"a": 1}', "c1"),), train=False),
            Message("tool", "7", name="f", call_id="c1"),
            Message("assistant", "seven"),
        ),
        3, "a:1", tools='[{"name": "f"}]', label="l",
    ),
])  # fmt: skip
def test_a_row_is_read_back_as_it_was_kept(row):
    line = row.as_json()
    assert row_from_json(line, "a:1") == row
    assert json.loads(line)
    assert "\n" not in line
