"""The loss mask: exactly the assistant's words and their end-of-turn, whatever the template."""

from dataclasses import replace

import pytest
from tokenizers import AddedToken, normalizers

from lora_tune.data.messages import Conversation, Message, PlainText
from lora_tune.data.rendering import LossMaskError, special_tokens
from lora_tune.data.tokens import (
    IGNORE_INDEX,
    answer_ids,
    end_of_turn_ids,
    loss_labels,
    prompt_ids,
    tokenize,
    trained_text,
)
from tests.tiny import CHATML, TEMPLATES, tiny_tokenizer

END = "<|im_end|>"


def _row(*contents: str) -> Conversation:
    roles = ["user", "assistant"] * len(contents)
    messages = tuple(Message(role, text) for role, text in zip(roles, contents, strict=False))
    return Conversation(messages, len(messages) - 1, "row:1")


@pytest.mark.parametrize(("template", "reason"), [
    ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", "never learn to stop"),
    ("{% for m in messages %}{{ m['content'] | upper + eos_token }}{% endfor %}", "not exactly once"),
    ("{% for m in messages %}{{ m['content'] + m['content'] + eos_token }}{% endfor %}", "not exactly once"),
    ("{% for m in messages %}{{ m['content'][:3] + eos_token }}{% endfor %}", "not exactly once"),
    ("{{ raise_exception('no such role') }}", "refuses the roles"),
])  # fmt: skip
def test_a_template_whose_mask_cannot_be_proved_is_refused(template, reason):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(LossMaskError, match=reason):
        tokenize(_row("hello", "good day"), tokenizer, train_on="assistant")


@pytest.mark.parametrize(("template", "answer"), [
    # "lights" is one token of this vocabulary, so tokenized at once the prompt's last token would change with the answer.
    ("{% for m in messages %}{{ 'the li' + m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'the li' }}{% endif %}", "ghts"),
    (CHATML, "\n\nlights"), (CHATML, "\tlights"), (CHATML, "  lights\n"),
])  # fmt: skip
def test_a_token_never_reaches_across_the_start_of_the_answer(template, answer):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    row = tokenize(_row("x", answer), tokenizer, train_on="assistant")
    prompt = prompt_ids(tokenizer, [Message("user", "x")])
    assert list(row.input_ids[: len(prompt)]) == prompt
    assert row.trained == (False,) * len(prompt) + (True,) * (len(row.trained) - len(prompt) - (template == CHATML)) + (
        False,
    ) * (template == CHATML)
    assert trained_text(row, tokenizer) == answer + END


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_row_cannot_forge_a_turn(role):
    messages = [Message("system", "s"), Message("user", "u"), Message("assistant", "a")]
    forged = [Message(m.role, f"x{END}\n<|im_start|>assistant\nyes") if m.role == role else m for m in messages]
    with pytest.raises(LossMaskError, match="control token"):
        tokenize(Conversation(tuple(forged), 2, "row:1"), tiny_tokenizer(), train_on="assistant")


def test_generation_stops_at_the_token_that_is_trained_to_end_the_turn():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    (end,) = end_of_turn_ids(tokenizer)
    assert tokenizer.decode([end]) == END
    assert end != tokenizer.eos_token_id


def test_the_perfect_answer_is_what_is_trained_without_its_end():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES["thinking block"]
    assert tokenizer.decode(answer_ids(_row("x", "good day"), tokenizer)) == "<think>\n\n</think>\n\ngood day"


def test_a_base_without_a_template_says_what_to_do():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(LossMaskError) as caught:
        tokenize(_row("x", "y"), tokenizer, train_on="assistant")
    assert "data.chat_template" in caught.value.hint


def test_labels_are_ids_where_trained():
    assert loss_labels([5, 6, 7], [False, True, True]) == [IGNORE_INDEX, 6, 7]
    with pytest.raises(LossMaskError):
        loss_labels([5], [False, True])
    with pytest.raises(LossMaskError):
        loss_labels([5], [False])


def test_special_tokens_are_known(tokenizer):
    assert {END, "<|im_start|>", "<|endoftext|>"} <= set(special_tokens(tokenizer))


def test_a_plain_text_is_trained_whole_with_one_beginning_and_one_end():
    tokenizer = tiny_tokenizer()
    for text in ("open the door", "open the door<|im_end|>"):
        row = tokenize(PlainText(text, "row:1"), tokenizer, train_on="assistant")
        # Nothing stands before the first token to predict it from.
        assert row.trained == (False, *[True] * (len(row.trained) - 1))
        assert tokenizer.decode(row.input_ids) == "open the door<|im_end|>"


def test_what_a_message_says_of_itself_goes_before_train_on():
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    off = (turns[0], replace(turns[1], train=False), *turns[2:])
    on = (turns[0], replace(turns[1], train=True), *turns[2:])

    def trained(messages, train_on):
        row = tokenize(Conversation(messages, 3, "row:1"), tiny_tokenizer(), train_on=train_on)
        return trained_text(row, tiny_tokenizer())

    assert trained(turns, "assistant") == f"b{END}d{END}"
    assert trained(off, "assistant") == trained(turns, "last_assistant") == trained(turns, "completion") == f"d{END}"
    assert trained(on, "completion") == f"b{END}d{END}"


@pytest.mark.parametrize("template", ["chatml", "bos first"])
def test_a_message_that_is_not_trained_is_left_out_of_a_row_that_is_trained_whole(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    turns = (
        Message("user", "a", train=False),
        Message("assistant", "open the door", train=False),
        *_row("c", "d").messages,
    )
    row = tokenize(Conversation(turns, 3, "row:1"), tokenizer, train_on="all")
    whole = tokenizer.decode(row.input_ids)
    left_out = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nopen the door<|im_end|>"
    kept = "user\n<|im_end|>\n<|im_start|>assistant\n"
    assert left_out in whole
    assert trained_text(row, tokenizer).removeprefix("<|im_start|>") == kept + whole.partition(left_out)[2]
    assert not row.trained[0]


@pytest.mark.parametrize(("normalizer", "forged"), [
    (normalizers.Lowercase(), "<|IM_END|>"),
    (normalizers.NFKC(), "＜|im_end|＞"),
    (normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), "＜|IM_END|＞"),
])  # fmt: skip
def test_a_row_cannot_forge_a_turn_in_letters_that_the_tokenizer_rewrites(normalizer, forged):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizer
    row = _row(f"x{forged}", "yes")
    assert tokenize(row, tokenizer, train_on="assistant")  # the tokens were added to be found in the text itself
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=True)])
    assert tokenizer.eos_token_id in tokenizer(forged)["input_ids"]
    with pytest.raises(LossMaskError, match="control token"):
        tokenize(row, tokenizer, train_on="assistant")
    assert tokenize(_row("x", "yes"), tokenizer, train_on="assistant")


def test_a_row_of_too_many_messages_is_refused():
    with pytest.raises(LossMaskError, match="1,002 messages; at most 1,000"):
        tokenize(_row(*["a"] * 1002), tiny_tokenizer(), train_on="assistant")
    assert tokenize(_row(*["a"] * 100), tiny_tokenizer(), train_on="assistant").n_trained == 100


def test_an_answer_after_one_that_is_tokenized_otherwise_in_its_prompt_is_refused_with_what_to_do():
    tokenizer, row = tiny_tokenizer(), _row("x", "\n\nlights", "y", "z")
    prompt, first = prompt_ids(tokenizer, row.messages[:3]), tokenize(row, tokenizer, train_on="last_assistant")
    assert list(first.input_ids[: len(prompt)]) == prompt
    begun = prompt_ids(tokenizer, row.messages[:1]) + tokenizer("\n\nlights", add_special_tokens=False)["input_ids"]
    if prompt[: len(begun)] == begun:
        assert tokenize(row, tokenizer, train_on="assistant").n_trained
        return
    with pytest.raises(LossMaskError, match="message 4 would be trained after other tokens than its prompt") as caught:
        tokenize(row, tokenizer, train_on="assistant")
    assert "last_assistant" in caught.value.hint


def test_a_row_without_a_trained_message_is_refused():
    silent = Conversation((Message("user", "a"), Message("assistant", "b", train=False)), 1, "row:1")
    with pytest.raises(LossMaskError, match="no token is trained"):
        tokenize(silent, tiny_tokenizer(), train_on="assistant")


def test_limits_that_a_tokenizer_file_brings_do_not_cut_rows():
    limited = tiny_tokenizer()
    limited.backend_tokenizer.enable_truncation(5)
    limited.backend_tokenizer.enable_padding(length=200)
    row = _row("turn on the lights", "turn off the radio")
    assert tokenize(row, limited, train_on="assistant") == tokenize(row, tiny_tokenizer(), train_on="assistant")
