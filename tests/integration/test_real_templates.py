"""The loss mask on the chat templates of real model families, as trl ships them."""

import re
from pathlib import Path

import pytest
import trl
from transformers import AddedToken

from lora_tune.data import tokens
from lora_tune.data.messages import Conversation, Message
from lora_tune.data.tokens import LossMaskError, answer_ids, end_of_turn_ids, prompt_ids, tokenize, trained_text
from tests.tiny import tiny_tokenizer

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted(FOLDER.glob("*.jinja"))
    if not path.stem.endswith("_training")
}
# Refused, each for a reason that holds for the family and not for us.
REFUSED = {
    "deepseek_r1_distill": "opens a thinking block in the prompt that a finished turn lacks, and takes no setting against it",
    "deepseekv3": "the same",
    "glm4moe": "ends a turn by the next role's token only",
    "idefics3": "a vision model's: it wants lists of parts, not text",
    "llava_next": "a vision model's: it wants lists of parts, not text",
    "smolvlm": "a vision model's: it wants lists of parts, not text",
}
# An earlier turn is written otherwise than it was asked for, so only the last can be trained.
LAST_TURN_ONLY = {"qwen3_5_nothink", "qwen3_5_think", "qwen3_6"}
CONTROL = re.compile(r"<\|?[｜a-zA-Z_▁/|]+\|?>|\[/?INST\]")

ONE = Conversation((Message("user", "Capital of France?"), Message("assistant", "Paris is it.")), 1, "row:1")
TWO = Conversation(
    (Message("user", "Hi there"), Message("assistant", "Hello you."), Message("user", "Capital?"), Message("assistant", "Paris.")), 3, "row:2"
)  # fmt: skip


def with_template(name):
    """Return the tiny tokenizer with a family's template and its control tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    control = sorted(set(CONTROL.findall(TEMPLATES[name])) - {"<think>", "</think>"})
    tokenizer.add_special_tokens({"additional_special_tokens": control})
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return tokenizer


def test_the_families_are_seen():
    assert len(TEMPLATES) >= 30
    assert len(set(TEMPLATES) - set(REFUSED)) >= 30


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in REFUSED])
def test_the_answer_is_trained_after_the_very_prompt_of_its_use_and_ends_where_generation_stops(name):
    tokenizer = with_template(name)
    for conversation in (ONE, TWO):
        row = tokenize(conversation, tokenizer, train_on="completion")
        prompt = prompt_ids(tokenizer, conversation.prompt)
        assert list(row.input_ids[: len(prompt)]) == prompt
        assert not any(row.trained[: len(prompt)])
        trained = [token for token, on in zip(row.input_ids, row.trained, strict=True) if on]
        answer = answer_ids(conversation, tokenizer)
        assert trained[: len(answer)] == answer
        assert tokenizer.decode(answer, skip_special_tokens=True).strip().endswith(conversation.final_answer)
        assert trained[-1:] == end_of_turn_ids(tokenizer)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in REFUSED])
def test_every_assistant_turn_is_trained_once_or_the_row_is_refused(name):
    tokenizer = with_template(name)
    if name in LAST_TURN_ONLY:
        with pytest.raises(LossMaskError, match="once the conversation goes on") as caught:
            tokenize(TWO, tokenizer, train_on="assistant")
        assert "completion" in caught.value.hint
        return
    text = trained_text(tokenize(TWO, tokenizer, train_on="assistant"), tokenizer)
    assert text.count("Hello you.") == text.count("Paris.") == 1
    assert "Hi there" not in text
    assert "Capital?" not in text


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_for_certain_is_refused_with_a_reason(name):
    with pytest.raises(LossMaskError) as caught:
        tokenize(ONE, with_template(name), train_on="assistant")
    assert caught.value.message


@pytest.mark.parametrize("name", [name for name, text in TEMPLATES.items() if "strftime_now" in text])
def test_a_template_that_writes_the_date_writes_the_same_date_every_day(name):
    import time

    text = trained_text(tokenize(ONE, with_template(name), train_on="all"), with_template(name))
    assert time.strftime("%d %b %Y") not in text
    assert time.strftime("%Y-%m-%d") not in text
    assert "2024" in text


TWINS = [name for name in TEMPLATES if name not in REFUSED and (FOLDER / f"{name}_training.jinja").is_file()]


def test_twins_are_seen():
    assert len(TWINS) >= 20


@pytest.mark.parametrize("conversation", [ONE, TWO], ids=["one turn", "two turns"])
@pytest.mark.parametrize("name", TWINS)
def test_our_mask_is_that_of_trls_generation_markers(name, conversation):
    """Between the end of the prompt and the end of the turn the two masks are equal, token for token.

    Outside of it some twins train more than can ever be generated: the header and the opened thinking block, which the
    prompt already holds, and the line break after the end-of-turn, at which generation has stopped.
    """
    tokenizer = with_template(name)
    row = tokenize(conversation, tokenizer, train_on="completion")
    twin = (FOLDER / f"{name}_training.jinja").read_text(encoding="utf-8")
    theirs = tokenizer.apply_chat_template(
        [message.as_dict() for message in conversation.messages], tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
        chat_template=(tokens._FIXED_CLOCK if "strftime_now" in twin else "") + twin, date_string=tokens.TEMPLATE_DATE,
        **tokens._settings(tokenizer),
    )  # fmt: skip
    trained = [i for i, on in enumerate(row.trained) if on]
    first, last = trained[0], trained[-1]
    assert trained == list(range(first, last + 1))
    # Some twins write earlier turns otherwise; the last turn is compared from its end, where both agree.
    shift = len(theirs["input_ids"]) - len(row.input_ids)
    span = slice(first + shift, last + shift + 1)
    assert theirs["input_ids"][span] == list(row.input_ids[first : last + 1])
    assert all(theirs["assistant_masks"][span])
    between_turns = theirs["assistant_masks"][: first + shift]
    if conversation is ONE:
        header = tokenizer.decode([t for t, on in zip(theirs["input_ids"], between_turns, strict=False) if on])
        assert header in ("", "\n", "<|start|>assistant", "<think></think>", "<think>\n\n</think>\n\n", "<think>\n")
    after = [
        t
        for t, on in zip(
            theirs["input_ids"][last + shift + 1 :], theirs["assistant_masks"][last + shift + 1 :], strict=True
        )
        if on
    ]
    assert tokenizer.decode(after) in ("", "\n", f"\n{tokenizer.eos_token}")
