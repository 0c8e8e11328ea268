"""How many tokens each role says: what the model writes is the assistant's, and no word is looked for elsewhere."""

from lora_tune.data.messages import Conversation, Message
from lora_tune.data.tokens import RowTokenizer
from tests.tiny import tiny_tokenizer
from tests.unit.test_rendering import CALLING, TOOL_CHATML


def _encoded(*messages, tools="", train_on="assistant", template=TOOL_CHATML):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    (found,) = RowTokenizer(tokenizer, train_on=train_on)(
        [Conversation(messages, len(messages) - 1, "row:1", tools=tools)]
    )
    return found, tokenizer


def _size(tokenizer, text):
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_calls_and_reasoning_are_the_assistants_and_only_the_end_of_turn_is_the_templates():
    answer = Message("assistant", "It is high.", reasoning="Towers are high.")
    found, tokenizer = _encoded(*CALLING.messages[:-1], answer, tools=CALLING.tools)
    trained = sum(end - start for start, end in found.runs)
    assert [role for role, _, _ in found.roles] == ["user", "assistant", "tool", "assistant"]
    assert sum(on for role, _, on in found.roles if role == "assistant") == trained - 2
    assert all(tokens == on for role, tokens, on in found.roles if role == "assistant")
    assert [on for role, _, on in found.roles if role != "assistant"] == [0, 0]
    (_, user, _), _, (_, tool, _), _ = found.roles
    assert (user, tool) == (_size(tokenizer, "How high is it?"), _size(tokenizer, "12 m"))


def test_words_are_not_found_inside_what_the_template_writes():
    found, tokenizer = _encoded(
        Message("user", "us"),
        Message("assistant", "ass", reasoning="so"),
        Message("user", "i"),
        Message("assistant", "im"),
    )
    for words, role in zip(("us", None, "i", "im"), found.roles, strict=True):
        if words:
            assert role[1] == _size(tokenizer, words)
    whole, _ = _encoded(
        Message("user", "us"), Message("assistant", "ass", reasoning="so"), Message("user", "i"), Message("assistant", "im"),
        train_on="all",
    )  # fmt: skip
    assert [role for role, _, _ in whole.roles] == ["user", "assistant", "user", "assistant"]
    assert all(tokens == on for _, tokens, on in whole.roles)


def test_an_answer_that_is_not_trained_counts_as_such():
    turns = (Message("user", "a"), Message("assistant", "b c", reasoning="d", train=False), *CALLING.messages)
    found, _ = _encoded(*turns, tools=CALLING.tools)
    assert [(role, on > 0) for role, _, on in found.roles][:4] == [
        ("user", False), ("assistant", False), ("user", False), ("assistant", True),
    ]  # fmt: skip
