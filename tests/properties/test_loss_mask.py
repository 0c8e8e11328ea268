"""Any conversation × many templates: what is trained is the answer and its end, after the prompt of its use."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tune.data.messages import Conversation, Message
from lora_tune.data.tokens import end_of_turn_ids, prompt_ids, render, tokenize, trained_text
from tests.integration.test_real_templates import with_template
from tests.tiny import TEMPLATES, tiny_tokenizer

END = "<|im_end|>"
# Families that take any order of a system message and turns.
FAMILIES = (
    "cohere", "cohere2", "gemma3", "gptoss", "lfm2", "llama3", "llama3_1", "llama3_2", "phi3", "phi3_5", "qwen2_5", "qwen3",
    "qwen3_8", "qwen3_instruct_2507", "nemotron_3_nano", "muse_glimmer",
)  # fmt: skip
# What the model writes before the words: a thinking block is not in the generation prompt, so it is the model's.
BEFORE = {"thinking block": "<think>\n\n</think>\n\n"}

words = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"), include_characters="\n\t "), min_size=1, max_size=30
).filter(lambda text: text.strip() and not any(token in text for token in ("<|", "x7f3a9", "k2c8d1")))


@st.composite
def conversations(draw):
    messages = [Message("system", draw(words))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(words)), Message("assistant", draw(words))]
    return Conversation(tuple(messages), len(messages) - 1, "row:1")


@pytest.fixture(scope="module", params=TEMPLATES)
def templated(request):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[request.param]
    return tokenizer, request.param


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return with_template(request.param)


@settings(max_examples=40, deadline=None)
@given(conversation=conversations())
def test_exactly_the_assistants_words_and_end_of_turns_are_trained(templated, conversation):
    tokenizer, name = templated
    row = tokenize(conversation, tokenizer, train_on="assistant")
    spoken = [m.content.strip() for m in conversation.messages if m.role == "assistant"]
    expected = "".join(f"{BEFORE.get(name, '')}{text}{END}" for text in spoken)
    found = trained_text(row, tokenizer)
    # Templates that do not trim keep the blanks around the words; they are trained with them.
    assert "".join(found.split()) == "".join(expected.split())
    assert found.count(END) == len(spoken)


@settings(max_examples=25, deadline=None)
@given(conversation=conversations())
def test_what_is_trained_follows_the_prompt_that_is_given_when_the_adapter_is_used(templated, conversation):
    tokenizer, _ = templated
    row = tokenize(conversation, tokenizer, train_on="completion")
    prompt = prompt_ids(tokenizer, conversation.prompt)
    assert list(row.input_ids[: len(prompt)]) == prompt
    assert not any(row.trained[: len(prompt)])
    assert row.trained[len(prompt)]


@settings(max_examples=25, deadline=None)
@given(conversation=conversations())
def test_the_tokens_read_as_the_whole_text(templated, conversation):
    tokenizer, _ = templated
    text = render(tokenizer, conversation.messages)
    for train_on in ("assistant", "completion", "all"):
        row = tokenize(conversation, tokenizer, train_on=train_on)
        assert tokenizer.decode(row.input_ids) == text
    assert all(row.trained)
    assert list(row.input_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=15, deadline=None)
@given(conversation=conversations())
def test_real_families_train_the_last_answer_after_its_prompt_and_nothing_else(family, conversation):
    row = tokenize(conversation, family, train_on="completion")
    prompt = prompt_ids(family, conversation.prompt)
    assert list(row.input_ids[: len(prompt)]) == prompt
    assert not any(row.trained[: len(prompt)])
    found = trained_text(row, family)
    assert "".join(conversation.final_answer.split()) in "".join(found.split())
    assert found.endswith(family.decode(end_of_turn_ids(family)))
