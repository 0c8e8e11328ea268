"""From files to what the trainer is fed: mixtures, folders, kinds of rows, and a ledger that adds up."""

import pytest

from lora_tune.data.dataset import as_examples, prepare_dataset
from lora_tune.data.verdict import check_rows
from lora_tune.errors import DataError
from lora_tune.recipe.schema import DataSection
from tests.tiny import home_rows, write_jsonl


def prepared(tokenizer, **settings):
    return prepare_dataset(DataSection(**settings), tokenizer, seed=0)


@pytest.fixture
def folder(tmp_path):
    rows = home_rows(40)
    write_jsonl(tmp_path / "set" / "train.jsonl", rows[:30])
    write_jsonl(tmp_path / "set" / "valid.jsonl", rows[30:])
    return tmp_path / "set"


def test_a_folder_brings_its_own_held_out_rows(folder, tokenizer):
    splits = prepared(tokenizer, path=str(folder))
    assert (splits.train.counts.rows, splits.held_out.counts.rows) == (30, 10)
    checked = check_rows(DataSection(path=str(folder)), seed=0)
    assert (checked.n_train, checked.n_held_out) == (30, 10)
    with pytest.raises(DataError, match="held-out files of its own"):
        prepared(tokenizer, path=str(folder), eval_split=0.1)


def test_a_mixture_trains_each_set_as_often_as_asked(tmp_path, tokenizer):
    a = write_jsonl(tmp_path / "a.jsonl", home_rows(10))
    b = write_jsonl(tmp_path / "b.jsonl", [{"instruction": f"say {n}", "output": str(n)} for n in range(4)])
    mix = ({"path": str(a), "repeat": 0.5}, {"path": str(b), "repeat": 3.0})
    splits = prepared(tokenizer, mix=mix)
    assert splits.checked.row_format == "chat + alpaca"
    assert [share.used for share in splits.shares] == [5, 12]
    assert splits.train.counts.rows == 17
    by_file = [row.where.rpartition("/")[2].partition(":")[0] for row in splits.train.rows]
    assert (by_file.count("a.jsonl"), by_file.count("b.jsonl")) == (5, 12)


def test_tokens_of_roles_and_template_add_up_to_all_tokens(tokenizer, folder):
    splits = prepared(tokenizer, path=str(folder))
    sets = (splits.train.counts, splits.held_out.counts)
    assert sum(tokens for tokens, _ in splits.roles.values()) == sum(counts.tokens for counts in sets)
    assert sum(trained for _, trained in splits.roles.values()) == sum(counts.trained_tokens for counts in sets)
    assert splits.roles["user"][1] == splits.roles["system"][1] == 0
    assert splits.roles["assistant"][0] == splits.roles["assistant"][1] > 0
    assert splits.roles["template"][1] == 40  # one end-of-turn a row


def test_what_the_trainer_gets_is_read_when_it_is_asked_for(tokenizer, folder):
    splits = prepared(tokenizer, path=str(folder))
    examples = as_examples(splits.train.rows)
    row = splits.train.rows[7]
    assert examples[7]["input_ids"] == list(row.input_ids)
    assert [label != -100 for label in examples[7]["labels"]] == list(row.trained)


@pytest.mark.parametrize(("rows", "warning"), [
    ([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3, "the rejected one is not used"),
    ([{"prompt": f"a{n}", "completion": "b", "label": n > 0} for n in range(3)], "1 row is rated unwanted"),
    ([{"text": f"t{n}", "label": "x" if n else "y"} for n in range(12)], "labels are imbalanced: 'x' has 11 rows, 'y' has 1"),
    ([{"text": f"t{n}", "label": "x"} for n in range(3)], "there is nothing to tell apart"),
    ([{"prompt": "my key is AKIAIOSFODNN7ABCDEFG", "completion": "b"}], "looks like a secret"),
])  # fmt: skip
def test_what_works_and_may_surprise_is_warned_of(tmp_path, rows, warning):
    checked = check_rows(DataSection(path=str(write_jsonl(tmp_path / "rows.jsonl", rows))), seed=0)
    assert any(warning in text for text in checked.warnings), checked.warnings
    assert not any("IOSFODNN" in text for text in checked.warnings)


def test_a_labelled_text_is_answered_with_its_label(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "where is my card", "label": "card_arrival"}] * 2)
    splits = prepared(tokenizer, path=str(path))
    (first, _) = splits.train.rows.conversations()
    assert (first.final_answer, first.label) == ("card_arrival", "card_arrival")
    assert splits.checked.labels == {"card_arrival": 2}


def test_plain_text_is_trained_whole(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "open the door"}])
    counts = prepared(tokenizer, path=str(path)).train.counts
    assert counts.tokens - 1 == counts.trained_tokens > 0  # nothing stands before the first token


def test_rows_that_cannot_be_proved_may_be_left_out_when_that_is_allowed(tmp_path, tokenizer):
    forged = {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "x"}]}
    path = write_jsonl(tmp_path / "rows.jsonl", [*home_rows(3), forged])
    with pytest.raises(DataError, match=r"1 of 4 rows cannot be trained on for certain\n.*rows.jsonl:4: message 1"):
        prepared(tokenizer, path=str(path))
    splits = prepared(tokenizer, path=str(path), max_bad_rows=1)
    assert (splits.train.counts.rows, splits.train.counts.rows_refused) == (3, 1)


def test_the_real_sets_are_read(shared_data, tokenizer):
    formats = {
        "alpaca_en_demo.json": "alpaca",
        "glaive_toolcall_en_demo.json": "sharegpt",
        "dpo_en_demo.json": "preference",
    }
    for name, row_format in formats.items():
        checked = check_rows(DataSection(path=str(shared_data / name)), seed=0)
        assert checked.row_format == row_format
        assert checked.n_train in (300, 999)
    banking = DataSection(path=str(shared_data / "banking77"), columns={"label": "category"})
    checked = check_rows(banking, seed=0)
    assert (checked.row_format, checked.n_train, checked.n_held_out) == ("labelled", 10_003, 3_080)
    assert len(checked.labels) == 77


def test_rows_left_out_are_named_and_taken_off_the_sources(tmp_path, tokenizer):
    forged = {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "x"}]}
    train = write_jsonl(tmp_path / "rows.jsonl", [*home_rows(3), forged, {"messages": 5}])
    held = write_jsonl(tmp_path / "held.jsonl", [*home_rows(5)[3:], forged])
    splits = prepared(tokenizer, path=str(train), eval_path=str(held), max_bad_rows=3)
    assert splits.checked.left_out == 3
    said = " ".join(splits.checked.warnings)
    assert all(place in said for place in (f"{train}:4", f"{train}:5", f"{held}:3"))
    assert [share.as_dict()["rows_an_epoch"] for share in splits.shares] == [3]


def test_secrets_are_looked_for_in_tool_calls_and_reasoning_too(tmp_path):
    call = {"function": {"name": "login", "arguments": {"key": "AKIAIOSFODNN7ABCDEFG"}}}
    for answer in (
        {"content": None, "tool_calls": [call]},
        {"content": "x", "reasoning_content": "AKIAIOSFODNN7ABCDEFG"},
    ):
        row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", **answer}]}
        checked = check_rows(DataSection(path=str(write_jsonl(tmp_path / "rows.jsonl", [row]))), seed=0)
        assert any("looks like a secret" in text for text in checked.warnings)


def test_a_held_out_set_that_is_all_too_long_is_named(tmp_path, tokenizer):
    train = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    held = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b " * 200}])
    with pytest.raises(
        DataError, match=r"no held-out row is left: of 1, 1 are longer .* \(the shortest has \d+ tokens\)"
    ):
        prepared(tokenizer, path=str(train), eval_path=str(held), max_seq_tokens=64)


def test_repeats_are_rows_of_an_epoch(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", home_rows(24))
    assert check_rows(DataSection(mix=({"path": str(path), "repeat": 10.0},)), seed=0).rows_an_epoch == 240
