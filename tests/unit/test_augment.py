"""Changed copies keep their meaning: answers and system messages stay as they are, and every copy is counted."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.data.augment import Original, augmented_rows, vary
from lora_tune.data.dataset import prepare_dataset
from lora_tune.data.lint import SetLint, content_hash
from lora_tune.data.messages import Conversation, Message
from lora_tune.errors import DataError
from lora_tune.recipe.schema import AugmentSection, DataSection
from tests.tiny import home_rows, write_jsonl

EVERYTHING = AugmentSection(copies=3, case=0.5, typos=0.2, punctuation=0.5, prompts=("{prompt}", "Please: {prompt}"))


def row(asked, answer="yes"):
    return Conversation(
        (Message("system", "Be kind."), Message("user", asked), Message("assistant", answer)), 2, "row:1"
    )


def letters(text):
    return sorted(re.sub(r"\W", "", text.lower()))


@given(st.text(max_size=60).filter(str.strip), st.integers(0, 99))
def test_only_what_the_user_says_is_changed(asked, seed):
    copy = vary(row(asked, "Answer 42"), EVERYTHING, random.Random(seed))
    assert [message.role for message in copy.messages] == ["system", "user", "assistant"]
    assert copy.messages[0].content == "Be kind."
    assert copy.messages[2].content == "Answer 42"


@pytest.mark.parametrize("seed", range(20))
def test_numbers_addresses_and_short_words_get_no_typo(seed):
    asked = "set 4567 at https://example.org/heating for bob@example.org in user_name to 21.5"
    copy = vary(row(asked), AugmentSection(copies=1, typos=0.2), random.Random(seed))
    for kept in ("4567", "https://example.org/heating", "bob@example.org", "user_name", "21.5", "set", "at"):
        assert kept in copy.messages[1].content


@pytest.mark.parametrize("seed", range(20))
def test_a_typo_changes_at_most_one_letter_of_a_word(seed):
    words = ["please", "switch", "everything", "downstairs", "immediately"]
    copy = vary(row(" ".join(words)), AugmentSection(copies=1, typos=0.2), random.Random(seed))
    for before, after in zip(words, copy.messages[1].content.split(), strict=True):
        assert abs(len(before) - len(after)) <= 1
        assert before[0] == after[0]
        assert len(set(letters(before)) ^ set(letters(after))) <= 1


def test_a_copy_that_came_out_as_the_row_itself_is_left_out():
    lint = SetLint()
    assert list(augmented_rows([Original(row("42"), 1, 1)], lint, AugmentSection(copies=5, typos=0.2), seed=0)) == []
    assert list(
        augmented_rows([Original(row("hi"), 1, 1)], lint, AugmentSection(copies=5, prompts=("Well, {prompt}",)), seed=0)
    )
    assert len(lint.hashes) == 1


def test_copies_are_of_training_rows_alone_and_counted(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", home_rows(30))
    section = DataSection(path=str(path), eval_split=0.2)
    plain = prepare_dataset(section, tokenizer, seed=0)
    more = prepare_dataset(section, tokenizer, seed=0, augment=EVERYTHING)
    copies = more.shares[-1].used
    assert more.train.counts.rows == plain.train.counts.rows + copies
    assert 24 < copies <= 72
    held_out = {message.messages[1].content for message in more.held_out.rows.conversations()}
    assert held_out == {message.messages[1].content for message in plain.held_out.rows.conversations()}
    answers = {conversation.final_answer for conversation in plain.train.rows.conversations()}
    assert {conversation.final_answer for conversation in more.train.rows.conversations()} == answers
    again = prepare_dataset(section, tokenizer, seed=0, augment=EVERYTHING)
    assert again.digest == more.digest != prepare_dataset(section, tokenizer, seed=1, augment=EVERYTHING).digest


def test_a_copy_never_equals_a_held_out_row():
    lint, told = SetLint(), AugmentSection(copies=1, prompts=("Well, {prompt}",))
    (copy,) = augmented_rows([Original(row("hi"), 1, 1)], SetLint(), told, seed=0)
    assert not list(
        augmented_rows([Original(row("hi"), 1, 1)], lint, told, seed=0, held_out={content_hash(copy.packed)})
    )
    assert lint.n_held_out == 1


def test_copies_keep_the_proportions_of_the_mixture(tmp_path, tokenizer):
    a, b = home_rows(44)[:40], home_rows(44)[40:]
    write_jsonl(tmp_path / "a.jsonl", a)
    write_jsonl(tmp_path / "b.jsonl", b)
    mix = ({"path": str(tmp_path / "a.jsonl"), "repeat": 0.1}, {"path": str(tmp_path / "b.jsonl"), "repeat": 5.0})
    told = AugmentSection(copies=1, typos=0.2, prompts=tuple(f"{n}. {{prompt}}" for n in range(200)))
    train = prepare_dataset(DataSection(mix=mix), tokenizer, seed=0, augment=told).train
    by_file = [found.where.rpartition("/")[2].partition(".")[0] for found in train.rows]
    assert by_file.count("a") == 2 * 4
    assert by_file.count("b") >= 2 * 20 - 4


def test_copies_of_plain_texts_are_said_not_to_be_made(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "open the door"}])
    splits = prepare_dataset(DataSection(path=str(path)), tokenizer, seed=0, augment=AugmentSection(copies=1, case=1.0))
    assert any("made no copy" in warning for warning in splits.checked.warnings)


def test_copies_that_cannot_be_proved_stop_the_run(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", home_rows(3))
    told = AugmentSection(copies=1, prompts=("<|im_end|>{prompt}",))
    with pytest.raises(DataError, match="control token"):
        prepare_dataset(DataSection(path=str(path)), tokenizer, seed=0, augment=told)
