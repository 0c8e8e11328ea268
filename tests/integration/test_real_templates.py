"""The loss mask on the chat templates of real model families, as trl ships them, against its `{% generation %}` twins."""

import json
import re
import time
from functools import cache, partial
from pathlib import Path

import pytest
import trl
from jinja2 import TemplateError
from transformers import AddedToken

from lora_tune.data.messages import Conversation, Message, ToolCall
from lora_tune.data.rendering import (
    TEMPLATE_DATE,
    LossMaskError,
    answer_spans,
    fixed_template,
    render,
    render_many,
    template_settings,
)
from lora_tune.data.tokens import answer_ids, end_of_turn_ids, prompt_ids, tokenize, trained_text
from tests.tiny import tiny_tokenizer

FOLDER = Path(trl.__file__).parent / "chat_templates"
EVERY = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
TEMPLATES = {name: text for name, text in EVERY.items() if not name.endswith("_training")}
CONTROL = re.compile(r"<\|?[｜a-zA-Z_▁/|]+\|?>|<\|\"\|>|\[/?INST\]")

# Refused, each for a reason that holds for the family and not for us; the reasons are checked below.
OPENS_THINKING_IN_PROMPT = {"deepseek_r1_distill", "deepseekv3"}
NO_END_OF_TURN = {"glm4moe"}
REFUSED = OPENS_THINKING_IN_PROMPT | NO_END_OF_TURN
# Vision models' templates, which take words as a list of parts only.
WANTS_PARTS = {"idefics3", "llava_next", "smolvlm"}
# An earlier turn is written otherwise than it was asked for, so only the last can be trained.
LAST_TURN_ONLY = {"qwen3_5_nothink", "qwen3_5_think", "qwen3_6"}

TOOLS = json.dumps([{"type": "function", "function": {
    "name": "get_weather", "description": "Weather of a town",
    "parameters": {"type": "object", "required": ["town"], "properties": {
        "town": {"type": "string", "description": "The town"}, "days": {"type": "integer", "description": "How many"},
    }},
}}])  # fmt: skip
CALL = ToolCall("get_weather", '{"town": "Rome", "days": 2}', "call00001")


def _row(*messages: Message, tools: str = "") -> Conversation:
    return Conversation(messages, len(messages) - 1, "row:1", tools=tools)


_user, _assistant = partial(Message, "user"), partial(Message, "assistant")
ONE = _row(_user("Capital of France?"), _assistant("Paris is it."))
TWO = _row(_user("Hi there"), _assistant("Hello you."), _user("Capital?"), _assistant("Paris."))
CASES = {
    "one turn": ONE,
    "two turns": TWO,
    "system": _row(Message("system", "Be brief."), *TWO.messages),
    "tools": _row(
        _user("Weather in Rome?"), _assistant("", tool_calls=(CALL,)),
        Message("tool", "Sunny and warm.", name="get_weather", call_id="call00001"), _assistant("It is sunny."), tools=TOOLS,
    ),
    "reasoning": _row(_user("Capital of France?"), _assistant("Paris is it.", reasoning="Easy one, I think.")),
}  # fmt: skip
WRITES_TOOLS = {
    "diffusion_gemma", "gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", "gptoss", "lfm2_2_5", "lfm2_2_5_v2",
    "lfm2_2_5_vl", "lfm2_v2", "llama3_1", "llama3_2", "muse_glimmer", "nemotron_3_5_lightning", "nemotron_3_nano",
    "nemotron_3_super", "nemotron_3_ultra", "qwen2_5", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8",
    "qwen3_instruct_2507", "qwen3_vl",
}  # fmt: skip
WRITES_REASONING = {
    "diffusion_gemma", "gemma4_v5", "gptoss", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl", "muse_glimmer", "qwen3",
    "qwen3_5_think", "qwen3_6", "qwen3_8",
}  # fmt: skip
# They could write it, but are asked for answers without it: their prompt would not be that of such a row.
ASKED_WITHOUT_REASONING = {
    "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "qwen3_5_nothink",
}  # fmt: skip
REFUSES_SYSTEM = {"gemma"}
GEMMA4 = {"diffusion_gemma", "gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5"}


def with_template(name, **takes_blanks):
    """Return the tiny tokenizer with a family's template and its control tokens (`rstrip=True`: which take blanks)."""
    (tokenizer := tiny_tokenizer()).chat_template = EVERY[name]
    control = sorted({*CONTROL.findall(EVERY[name])} - {"<think>", "</think>"})
    special = [AddedToken(token, special=True, normalized=False, **takes_blanks) for token in control]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return tokenizer


@cache
def family(name):
    """The same, built once; for tests that leave it as it is."""
    return with_template(name)


def accepted(name, case):
    """Whether the family takes the case, by the tables above."""
    return name not in REFUSED and {
        "tools": name in WRITES_TOOLS, "reasoning": name in WRITES_REASONING, "system": name not in REFUSES_SYSTEM,
    }.get(case, True)  # fmt: skip


def as_turns(name, conversation):
    turns = [message.as_dict() for message in conversation.messages]
    if name in WANTS_PARTS:
        turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    return turns


ACCEPTED = [(name, case) for name in TEMPLATES for case in CASES if accepted(name, case)]
NOT_ACCEPTED = [(name, case) for name in TEMPLATES for case in CASES if not accepted(name, case)]


def test_the_families_are_seen():
    assert len(TEMPLATES) >= 40
    assert len(ACCEPTED) >= 150
    assert set(TEMPLATES) >= REFUSED | WANTS_PARTS | LAST_TURN_ONLY | WRITES_TOOLS | WRITES_REASONING


@pytest.mark.parametrize(("name", "case"), ACCEPTED)
def test_the_answer_is_trained_after_the_very_prompt_of_its_use_and_ends_where_generation_stops(name, case):
    tokenizer, conversation = family(name), CASES[case]
    row = tokenize(conversation, tokenizer, train_on="completion")
    prompt = prompt_ids(tokenizer, conversation.prompt, tools=conversation.tools)
    trained = [token for token, on in zip(row.input_ids, row.trained, strict=True) if on]
    assert list(row.input_ids[: len(prompt)]) == prompt
    assert row.trained.index(True) == len(prompt)
    answer = answer_ids(conversation, tokenizer)
    assert trained[: len(answer)] == answer
    text = tokenizer.decode(answer, skip_special_tokens=True)
    assert text.strip().endswith(conversation.final_answer)
    assert text.count(conversation.messages[-1].reasoning or conversation.final_answer) == 1
    assert trained[-1:] == end_of_turn_ids(tokenizer)


@pytest.mark.parametrize(("name", "case"), ACCEPTED)
def test_every_assistant_turn_is_trained_once_or_the_row_is_refused(name, case):
    tokenizer, conversation = family(name), CASES[case]
    if name in LAST_TURN_ONLY and case in ("two turns", "system"):
        with pytest.raises(LossMaskError, match="once the conversation goes on") as caught:
            tokenize(conversation, tokenizer, train_on="assistant")
        assert "completion" in caught.value.hint
        return
    text = trained_text(tokenize(conversation, tokenizer, train_on="assistant"), tokenizer)
    for message in conversation.messages:
        for words in filter(None, (message.content, message.reasoning)):
            assert text.count(words) == (message.role == "assistant")
        for call in message.tool_calls:
            assert call.name in text
            assert text.count("Rome") == 1
    assert "The town" not in text


@pytest.mark.parametrize(("name", "case"), NOT_ACCEPTED)
def test_what_a_template_cannot_write_is_refused_with_the_reason(name, case):
    with pytest.raises(LossMaskError) as caught:
        tokenize(CASES[case], family(name), train_on="assistant")
    if name in ASKED_WITHOUT_REASONING and case == "reasoning":
        assert "take the reasoning out of the rows" in caught.value.hint
    elif name in REFUSED:
        assert re.search(
            "differently from how it asks|no end-of-turn|does not write|refuses the roles", caught.value.message
        )
    elif case == "reasoning":
        assert "does not write the reasoning of message 2" in caught.value.message
    elif case == "tools":
        assert re.search("does not write the tool calls of message 2|refuses the roles", caught.value.message)
    else:
        assert "System role not supported" in caught.value.message


@pytest.mark.parametrize("name", sorted(WRITES_TOOLS))
def test_a_call_may_have_words_before_it_and_stand_at_the_end(name):
    calling = _row(_user("Weather?"), _assistant("One moment.", tool_calls=(CALL,)), tools=TOOLS)
    try:
        text, (span,) = answer_spans(family(name), calling, [1])
    except LossMaskError as err:
        # Llama 3.x and Muse write the call alone; Gemma 4 writes the words after the tool's answer.
        assert name in ("llama3_1", "llama3_2", "muse_glimmer", *GEMMA4)
        assert re.search("the words of message 2 not exactly once|no end-of-turn", err.message)
        return
    answer = text[span.start : span.end]
    assert answer.count("One moment.") == answer.count("Rome") == 1
    assert CALL.name in answer


@pytest.mark.parametrize("name", [name for name, text in TEMPLATES.items() if "strftime_now" in text])
def test_a_template_that_writes_the_date_writes_the_same_date_every_day(name):
    text = trained_text(tokenize(ONE, family(name), train_on="all"), family(name))
    assert time.strftime("%d %b %Y") not in text
    assert time.strftime("%Y-%m-%d") not in text
    assert "2024" in text


@pytest.mark.parametrize("name", EVERY)
def test_the_fast_way_writes_what_transformers_writes(name):
    tokenizer = family(name)
    for case, conversation in CASES.items():
        for prompt in (False, True):
            asked = conversation.messages[: -1 if prompt else None]
            turns = [message.as_dict() for message in asked]
            if name.removesuffix("_training") in WANTS_PARTS:
                turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
            try:
                theirs = tokenizer.apply_chat_template(
                    turns, tools=json.loads(conversation.tools or "null"), tokenize=False, add_generation_prompt=prompt,
                    chat_template=fixed_template(tokenizer), date_string=TEMPLATE_DATE, **template_settings(tokenizer),
                )  # fmt: skip
            except (TemplateError, TypeError, KeyError, ValueError) as err:
                with pytest.raises(LossMaskError) as caught:
                    render_many(tokenizer, [(asked, conversation.tools)], add_generation_prompt=prompt)
                assert str(err) in caught.value.message, case
            else:
                ours = render_many(tokenizer, [(asked, conversation.tools)] * 2, add_generation_prompt=prompt)
                assert ours == [theirs, theirs], case


# --- The oracle ------------------------------------------------------------------------------------------------------

TWINS = sorted(name for name in TEMPLATES if f"{name}_training" in EVERY)
# Templates that bring the markers themselves.
OWN_MARKERS = sorted(name for name, text in TEMPLATES.items() if re.search(r"\{%-?\s*generation\b", text))

# In what a twin differs from us, and the exact text by which it does.
TRAINS_HEADER = "it trains the end of the prompt, which the model is given and never has to write"
TRAINS_THINK_PREFIX = "it trains the thinking block, or its opening, that the prompt already holds"
TRAINS_TRAILING_NEWLINE = "it trains what stands after the end-of-turn, at which generation has stopped"
TRAINS_CLOSING_EOS = "it trains the end-of-text after the whole conversation, which never follows an end-of-turn in use"
REWRITES_HISTORY = "it writes a thinking block into earlier turns, which the template of use leaves out there"
LEAVES_OUT_STOP = "after a tool call it does not train the token at which generation must stop for the tool to answer"
LEAVES_OUT_OPENING = (
    "the prompt after a tool's answer does not open the model's turn, so the model writes that, untrained by it"
)

NEWLINE = {TRAINS_TRAILING_NEWLINE: "\n"}
NOTHING_THOUGHT = "<think>\n\n</think>\n\n"
DIFFERENCES = {
    "cohere": {},
    "cohere2": {},
    "diffusion_gemma": {**NEWLINE, LEAVES_OUT_STOP: "<|tool_response>", LEAVES_OUT_OPENING: "<|turn>model\n"},
    "gemma": NEWLINE,
    "gemma3": NEWLINE,
    "gptoss": {TRAINS_HEADER: "<|start|>assistant"},
    "idefics3": NEWLINE,
    "lfm2": NEWLINE,
    "lfm2_2_5": NEWLINE,
    "lfm2_2_5_v2": NEWLINE,
    "lfm2_2_5_vl": NEWLINE,
    "lfm2_v2": NEWLINE,
    "llama3": {},
    "llava_next": {},
    "muse_glimmer": {TRAINS_HEADER: "<|start|>assistant"},
    "nemotron_3_5_lightning": {**NEWLINE, TRAINS_THINK_PREFIX: "<think></think>"},
    "nemotron_3_nano": {**NEWLINE, TRAINS_THINK_PREFIX: "<think></think>"},
    "nemotron_3_super": {**NEWLINE, TRAINS_THINK_PREFIX: "<think></think>"},
    "nemotron_3_ultra": {**NEWLINE, TRAINS_THINK_PREFIX: "<think></think>"},
    "phi3": {**NEWLINE, TRAINS_CLOSING_EOS: "<|im_end|>"},
    "phi3_5": {**NEWLINE, TRAINS_CLOSING_EOS: "<|im_end|>"},
    "qwen2_5": {**NEWLINE, TRAINS_HEADER: "\n"},
    "qwen2_5_vl": NEWLINE,
    "qwen3": {**NEWLINE, REWRITES_HISTORY: NOTHING_THOUGHT},
    "qwen3_5_nothink": {**NEWLINE, TRAINS_THINK_PREFIX: NOTHING_THOUGHT, REWRITES_HISTORY: NOTHING_THOUGHT},
    "qwen3_5_think": {**NEWLINE, TRAINS_THINK_PREFIX: "<think>\n", REWRITES_HISTORY: NOTHING_THOUGHT},
    "qwen3_6": {**NEWLINE, TRAINS_THINK_PREFIX: "<think>\n", REWRITES_HISTORY: NOTHING_THOUGHT},
    "qwen3_8": {**NEWLINE, TRAINS_THINK_PREFIX: "<think>\n"},
    "qwen3_instruct_2507": NEWLINE,
    "qwen3_vl": NEWLINE,
    "smolvlm": NEWLINE,
}  # fmt: skip


def test_every_twin_is_equal_or_its_difference_is_argued():
    """31 twins: 4 equal token for token, 24 differ by exactly what is said, 3 belong to templates that cannot be trained."""
    with_twin = {name: kinds for name, kinds in DIFFERENCES.items() if name in TWINS}
    assert set(with_twin) | REFUSED == set(TWINS)
    assert {name for name, kinds in with_twin.items() if not kinds} == {"cohere", "cohere2", "llama3", "llava_next"}
    assert (len(TWINS), len(with_twin), len(REFUSED)) == (31, 28, 3)
    # Three more bring the markers themselves.
    assert set(DIFFERENCES) - set(TWINS) == set(OWN_MARKERS) == {"lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"}
    # The line break after the end-of-turn is all there is between us and nine of them.
    assert sum(kinds == NEWLINE for kinds in with_twin.values()) == 9


def our_spans(name, conversation):
    """What we train of each assistant message; where a template allows only the last, the earlier ones by hand."""
    indices = [n for n, message in enumerate(conversation.messages) if message.role == "assistant"]
    if name not in LAST_TURN_ONLY or conversation.tools:
        text, spans = answer_spans(family(name), conversation, indices)
        return text, [(span.start, span.end) for span in spans]
    text, (last,) = answer_spans(family(name), conversation, indices[-1:])
    words = [conversation.messages[index].content + "<|im_end|>" for index in indices[:-1]]
    return text, [(text.index(said), text.index(said) + len(said)) for said in words] + [(last.start, last.end)]


def as_the_twin_has_it(text, spans, kinds, calling):
    """Return the text and the trained spans with the argued differences, and nothing else, carried out."""
    changed, result, position, shift = "", [], 0, 0
    for number, (start, end) in enumerate(spans):
        block = kinds.get(REWRITES_HISTORY, "")
        thinks = text.rfind("<think>", position, start + len("<think>")) >= 0
        inserted = block if block and not thinks else ""
        changed += text[position:start] + inserted + text[start:end]
        position, first, after = end, start, end
        for kind in (TRAINS_HEADER, TRAINS_THINK_PREFIX):
            if kind in kinds and not inserted:
                assert text[:start].endswith(kinds[kind]), kind
                first -= len(kinds[kind])
        stop = kinds.get(LEAVES_OUT_STOP, "")
        if stop and calling and number == 0:
            assert text[:end].endswith(stop)
            after -= len(stop)
        elif TRAINS_TRAILING_NEWLINE in kinds:
            assert text[end : end + 1] == "\n"
            after += 1
        opening = kinds.get(LEAVES_OUT_OPENING, "")
        if opening and calling and number == 1:
            assert text.startswith(opening, start)
            first += len(opening)
        result.append((first + shift, after + shift + len(inserted)))
        shift += len(inserted)
    changed += text[position:]
    if TRAINS_CLOSING_EOS in kinds:
        assert changed.endswith(kinds[TRAINS_CLOSING_EOS])
        result.append((len(changed) - len(kinds[TRAINS_CLOSING_EOS]), len(changed)))
    return changed, result


def token_mask(tokenizer, text, spans):
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    on = [any(start < b and a < end for a, b in spans) for start, end in encoded["offset_mapping"]]
    return encoded["input_ids"], on


def twin_mask(name, conversation):
    tokenizer = family(name)
    twin = with_template(f"{name}_training" if name in TWINS else name)
    assert set(twin.all_special_tokens) >= set(tokenizer.all_special_tokens)
    found = tokenizer.apply_chat_template(
        as_turns(name, conversation), tools=json.loads(conversation.tools or "null"), tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True, chat_template=fixed_template(twin), date_string=TEMPLATE_DATE,
        **template_settings(tokenizer),
    )  # fmt: skip
    return found["input_ids"], [bool(on) for on in found["assistant_masks"]]


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, case in ACCEPTED if name in DIFFERENCES])
def test_our_mask_is_that_of_trls_generation_markers_but_for_what_is_argued(name, case):
    conversation, kinds, tokenizer = CASES[case], DIFFERENCES[name], family(name)
    text, spans = our_spans(name, conversation)
    theirs = twin_mask(name, conversation)
    calling = bool(conversation.tools)
    assert token_mask(tokenizer, *as_the_twin_has_it(text, spans, kinds, calling)) == theirs
    row = tokenize(conversation, tokenizer, train_on="completion")
    assert (list(row.input_ids), list(row.trained)) == token_mask(tokenizer, text, spans[-1:])
    if not kinds:
        row = tokenize(conversation, tokenizer, train_on="assistant")
        assert (list(row.input_ids), list(row.trained)) == theirs


def test_each_argued_difference_is_needed():
    """Without it the masks differ in some case, so the table says no more than there is."""
    for name, kinds in DIFFERENCES.items():
        for kind in kinds:
            fewer = {other: text for other, text in kinds.items() if other != kind}
            cases = [CASES[case] for case in CASES if accepted(name, case)]
            assert any(differs(name, conversation, fewer) for conversation in cases), (name, kind)


def differs(name, conversation, kinds):
    try:
        expected = as_the_twin_has_it(*our_spans(name, conversation), kinds, bool(conversation.tools))
    except AssertionError:
        return True
    return token_mask(family(name), *expected) != twin_mask(name, conversation)


@pytest.mark.parametrize("name", sorted(OPENS_THINKING_IN_PROMPT))
def test_refused_because_the_prompt_opens_a_thinking_block_that_the_finished_turn_lacks(name):
    tokenizer = family(name)
    prompt = render(tokenizer, ONE.prompt, add_generation_prompt=True)
    text = render(tokenizer, ONE.messages)
    assert prompt.endswith("<think>\n")
    assert text.startswith(prompt.removesuffix("<think>\n") + ONE.final_answer)
    assert template_settings(tokenizer) == {}
    with pytest.raises(LossMaskError, match=r"differently from how it asks for it: the prompt ends in .*<think>"):
        tokenize(ONE, tokenizer, train_on="completion")


@pytest.mark.parametrize("name", sorted(NO_END_OF_TURN))
def test_refused_because_only_the_next_role_ends_a_turn(name):
    tokenizer = family(name)
    assert render(tokenizer, ONE.messages).endswith(ONE.final_answer)
    assert "Hello you.<|user|>" in render(tokenizer, TWO.messages)
    with pytest.raises(LossMaskError, match="no end-of-turn token"):
        tokenize(ONE, tokenizer, train_on="completion")
