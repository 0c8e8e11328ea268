"""Any conversation × many templates: what is trained is the answer and its end, after the prompt of its use."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tune.data.messages import Conversation, Message, ToolCall
from lora_tune.data.rendering import LossMaskError, answer_spans, render
from lora_tune.data.tokens import RowTokenizer, end_of_turn_ids, prompt_ids, tokenize, trained_text
from tests.integration.test_real_templates import (
    ACCEPTED,
    CASES,
    LAST_TURN_ONLY,
    REFUSED,
    TOOLS,
    WRITES_REASONING,
    WRITES_TOOLS,
    with_template,
)
from tests.tiny import TEMPLATES, tiny_tokenizer

END = "<|im_end|>"
# Families that take any order of a system message and turns.
FAMILIES = (
    "cohere", "cohere2", "gemma3", "gptoss", "lfm2", "llama3", "llama3_1", "llama3_2", "phi3", "phi3_5", "qwen2_5", "qwen3",
    "qwen3_8", "qwen3_instruct_2507", "nemotron_3_nano", "muse_glimmer", "idefics3", "llava_next", "smolvlm",
)  # fmt: skip
# What the model writes before the words: a thinking block is not in the generation prompt, so it is the model's.
BEFORE = {"thinking block": "<think>\n\n</think>\n\n"}

words = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"), include_characters="\n\t "), min_size=1, max_size=30
).filter(lambda text: text.strip() and "<" not in text)
leaves = st.one_of(words, st.integers(-9999, 9999), st.booleans(), st.lists(words, min_size=1, max_size=2))


@st.composite
def conversations(draw):
    messages = [Message("system", draw(words))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(words)), Message("assistant", draw(words))]
    return Conversation(tuple(messages), len(messages) - 1, "row:1")


@st.composite
def tool_conversations(draw):
    """Tools are called and answer, once or twice in a row; each message's words begin with a sign of its own."""
    messages = [Message("system", f"sys0 {draw(words)}")] if draw(st.booleans()) else []
    messages.append(Message("user", f"usr1 {draw(words)}"))
    for number in range(draw(st.integers(1, 2))):
        arguments = {"town": f"arg{number} {draw(words)}", "days": draw(leaves)}
        call = ToolCall("get_weather", json.dumps(arguments, ensure_ascii=False), f"call{number:05}")
        messages.append(Message("assistant", "", tool_calls=(call,)))
        messages.append(Message("tool", f"got{number} {draw(words)}", name="get_weather", call_id=call.call_id))
    messages.append(Message("assistant", f"ans1 {draw(words)}"))
    return Conversation(tuple(messages), len(messages) - 1, "row:1", tools=TOOLS)


@st.composite
def reasoned(draw):
    """One or two turns, of which the last one was thought about."""
    messages = []
    for number in range(draw(st.integers(1, 2))):
        messages += [Message("user", f"usr{number} {draw(words)}"), Message("assistant", f"ans{number} {draw(words)}")]
    messages[-1] = Message("assistant", messages[-1].content, reasoning=f"why {draw(words)}")
    return Conversation(tuple(messages), len(messages) - 1, "row:1")


def without_blanks(text):
    return "".join(text.split())


def tokenized(conversation, tokenizer):
    """Return the row, or None where a prompt in use does not begin with the one before it and its answer."""
    try:
        return tokenize(conversation, tokenizer, train_on="assistant")
    except LossMaskError as err:
        assert "other tokens than its prompt" in err.message
    text, spans = answer_spans(tokenizer, conversation, conversation.trained_messages("assistant"))
    ids = []
    for span in spans:
        prompt = tokenizer(text[: span.start], add_special_tokens=False)["input_ids"]
        if prompt[: len(ids)] != ids:
            return None
        ids = prompt + tokenizer(text[span.start : span.end], add_special_tokens=False)["input_ids"]
    raise AssertionError("refused without a reason")


@pytest.fixture(scope="module", params=TEMPLATES)
def templated(request):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[request.param]
    return tokenizer, request.param


@pytest.fixture(scope="module", params=[*FAMILIES, "phi3 takes blanks", "phi3_5 takes blanks"])
def family(request):
    name, *takes_blanks = request.param.split(" ", 1)
    return with_template(name, rstrip=bool(takes_blanks))


@pytest.fixture(scope="module", params=sorted(WRITES_TOOLS))
def tool_family(request):
    return with_template(request.param)


@pytest.fixture(scope="module", params=sorted(WRITES_REASONING))
def reasoning_family(request):
    return with_template(request.param)


def test_there_are_enough_families():
    assert len(set(FAMILIES) | WRITES_TOOLS | WRITES_REASONING) >= 36
    assert WRITES_TOOLS >= LAST_TURN_ONLY


@settings(max_examples=40, deadline=None)
@given(conversation=conversations())
def test_exactly_the_assistants_words_and_end_of_turns_are_trained(templated, conversation):
    tokenizer, name = templated
    row = tokenized(conversation, tokenizer)
    if row is None:
        return
    spoken = [m.content.strip() for m in conversation.messages if m.role == "assistant"]
    expected = "".join(f"{BEFORE.get(name, '')}{text}{END}" for text in spoken)
    found = trained_text(row, tokenizer)
    # Templates that do not trim keep the blanks around the words; they are trained with them.
    assert without_blanks(found) == without_blanks(expected)
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
    for train_on in ("completion", "all"):
        row = tokenize(conversation, tokenizer, train_on=train_on)
        assert tokenizer.decode(row.input_ids) == text
    assert not row.trained[0]
    assert all(row.trained[1:])
    assert list(row.input_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=10, deadline=None)
@given(conversation=conversations())
def test_real_families_train_the_last_answer_after_its_prompt_and_nothing_else(family, conversation):
    row = tokenize(conversation, family, train_on="completion")
    prompt = prompt_ids(family, conversation.prompt)
    assert list(row.input_ids[: len(prompt)]) == prompt
    assert not any(row.trained[: len(prompt)])
    found = trained_text(row, family)
    assert without_blanks(conversation.final_answer) in without_blanks(found)
    assert found.endswith(family.decode(end_of_turn_ids(family)))


@settings(max_examples=6, deadline=None)
@given(conversation=tool_conversations())
def test_calls_and_answers_are_trained_and_tools_and_their_answers_are_not(tool_family, conversation):
    calls = [n for n, message in enumerate(conversation.messages) if message.role == "assistant"]
    text, spans = answer_spans(tool_family, conversation, calls)
    pieces = [text[span.start : span.end] for span in spans]
    for number, piece in enumerate(pieces[:-1]):
        assert piece.count(f"arg{number}") == 1
        assert "get_weather" in piece
        prompt = render(tool_family, conversation.messages[: calls[number]], tools=TOOLS, add_generation_prompt=True)
        assert text[: spans[number].start] == prompt
    assert pieces[-1].count("ans1") == 1
    row = tokenize(conversation, tool_family, train_on="assistant")
    found = trained_text(row, tool_family)
    assert without_blanks(found) == without_blanks("".join(pieces))
    for sign in ("sys0", "usr1", "got0", "got1", "Weather of a town"):
        assert sign not in found


@settings(max_examples=10, deadline=None)
@given(conversation=reasoned())
def test_reasoning_and_words_are_trained_after_the_prompt_of_use(reasoning_family, conversation):
    row = tokenize(conversation, reasoning_family, train_on="completion")
    prompt = prompt_ids(reasoning_family, conversation.prompt)
    assert list(row.input_ids[: len(prompt)]) == prompt
    assert row.trained.index(True) == len(prompt)
    found = without_blanks(trained_text(row, reasoning_family))
    last = conversation.messages[-1]
    thought, said = found.index(without_blanks(last.reasoning)), found.rindex(without_blanks(last.content))
    assert thought + len(without_blanks(last.reasoning)) <= said
    assert "usr" not in found


# Phi-3's control tokens take the blanks after them with them; nothing may change with any template if they do.
TAKES_BLANKS = {"none": {}, "after": {"rstrip": True}}


@pytest.mark.parametrize("takes_blanks", TAKES_BLANKS)
@pytest.mark.parametrize(("name", "case"), [
    (name, case) for name, case in ACCEPTED if name not in LAST_TURN_ONLY and case in ("system", "tools")
])  # fmt: skip
def test_every_answer_is_trained_after_the_very_prompt_of_its_use(name, case, takes_blanks):
    tokenizer, conversation = with_template(name, **TAKES_BLANKS[takes_blanks]), CASES[case]
    (found,) = RowTokenizer(tokenizer, train_on="assistant")([conversation])
    indices = conversation.trained_messages("assistant")
    if (name, takes_blanks) == ("llava_next", "after"):
        # Its answers begin with a blank, which the token before it would take from all answers but the last.
        assert isinstance(found, LossMaskError)
        return
    assert not isinstance(found, LossMaskError), found
    assert len(found.runs) == len(indices)
    for index, (start, _) in zip(indices, found.runs, strict=True):
        assert found.ids[:start] == prompt_ids(tokenizer, conversation.messages[:index], tools=conversation.tools)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_asked_for_the_end_of_turn_of_a_template_that_cannot_be_trained_it_says_why(name):
    with pytest.raises(LossMaskError):
        end_of_turn_ids(with_template(name))
