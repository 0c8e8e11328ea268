"""Conversation → what the chat template writes, and where in it each answer stands: no tokens yet.

No template markers are needed: where a message's words stand is found by rendering the conversation with marks in their
place (spans.py) and looking at what stands around them.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError

from lora_tune.data.marks import leaves_of
from lora_tune.data.messages import Conversation, Message
from lora_tune.data.spans import (
    ANOTHER_TEMPLATE,
    Asked,
    LossMaskError,
    Place,
    Span,
    WrittenRow,
    answer_span,
    check_layout,
    control_pattern,
    find_places,
)

__all__ = [
    "LossMaskError",
    "Place",
    "Span",
    "answer_spans",
    "control_normalizer",
    "fixed_template",
    "refuse_control_tokens",
    "render",
    "render_many",
    "special_tokens",
    "template_settings",
    "written_row",
]

TEMPLATE_DATE = "26 Jul 2024"
"""What templates that write today's date are told (Llama 3.x's own default): the same rows give the same tokens."""

_FIXED_CLOCK = (
    "{%- macro strftime_now(format) -%}"
    f"{{%- if format == '%Y-%m-%d' -%}}2024-07-26{{%- else -%}}{TEMPLATE_DATE}{{%- endif -%}}"
    "{%- endmacro -%}"
)

_SETTINGS: tuple[Mapping[str, Any], ...] = ({}, {"enable_thinking": False}, {"thinking": False})
"""Ways to ask a template for an answer; the first one under which prompt and answer agree is taken."""

_COMPILER = "_compile_jinja_template"
"""transformers' own compiler (sandboxed, cached); where it is missing, each row goes through `apply_chat_template`."""

_REFUSALS = (TemplateError, TypeError, LookupError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What a template can raise over messages that it does not take."""


@dataclass(frozen=True)
class _Manner:
    """How one template wants to be asked."""

    settings: Mapping[str, Any]
    """Arguments besides the messages."""

    as_parts: bool
    """It takes a message's words as a list of parts only (templates of vision models)."""


_MANNERS: WeakKeyDictionary[Any, dict[str, _Manner]] = WeakKeyDictionary()
_SPECIAL: WeakKeyDictionary[Any, tuple[object, list[str]]] = WeakKeyDictionary()


def render(tokenizer: Any, messages: Sequence[Message], *, tools: str = "", add_generation_prompt: bool = False) -> str:
    """Return the messages as the chat template writes them, with the settings that suit the template.

    Raises:
        LossMaskError: the template refuses these messages, or the tokenizer has no template.
    """
    return _writer(tokenizer, _manner(tokenizer), add_generation_prompt=add_generation_prompt)((messages, tools))


def render_many(tokenizer: Any, conversations: Sequence[Asked], *, add_generation_prompt: bool = False) -> list[str]:
    """Return what `render` gives for each, tens of thousands a second.

    Raises:
        LossMaskError: of the first one that the template refuses; its `row` is the position.
    """
    if not conversations:
        return []
    write = _writer(tokenizer, _manner(tokenizer), add_generation_prompt=add_generation_prompt)
    texts: list[str] = []
    try:
        for asked in conversations:
            texts.append(write(asked))
    except LossMaskError as err:
        err.row = len(texts)
        raise
    return texts


def fixed_template(tokenizer: Any) -> str:
    """Return the template's text, with a clock that stands still in front where it asks for the time.

    Raises:
        LossMaskError: there is no template, or several.
    """
    template = tokenizer.chat_template
    if not template:
        raise LossMaskError(
            "the base has no chat template", hint="set data.chat_template to a .jinja file, or to builtin:plain"
        )
    if not isinstance(template, str):
        raise LossMaskError(
            f"the base has several chat templates ({', '.join(map(str, template))})",
            hint="write the one to use into a .jinja file and name it in data.chat_template",
        )
    return (_FIXED_CLOCK if "strftime_now" in template else "") + template


def template_settings(tokenizer: Any) -> Mapping[str, Any]:
    """Return the settings under which the generation prompt is the beginning of what the template writes.

    Templates of reasoning models open a thinking block in the prompt that they leave out of the finished turn; trained
    like that, the model would be asked from a state that it never saw.
    """
    return _manner(tokenizer).settings


def special_tokens(tokenizer: Any) -> list[str]:
    """Return every special token's text: those with a role (eos, bos, …) and those added as special."""
    roles = tuple(map(str, tokenizer.all_special_tokens))
    version = (len(tokenizer), roles)
    known = _SPECIAL.get(tokenizer)
    if known is None or known[0] != version:
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        known = _SPECIAL[tokenizer] = (version, sorted({*added, *roles}))
    return list(known[1])


def control_normalizer(tokenizer: Any) -> Callable[[str], str] | None:
    """Return how the tokenizer rewrites a text before it looks for control tokens; None where it looks at the text itself.

    A token that was added with `normalized=True` is found in the rewritten text: in lower case, say, or where full-width
    letters have become ordinary ones.
    """
    normalizer = tokenizer.backend_tokenizer.normalizer
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    if normalizer is None or not any(token.normalized and token.special for token in added):
        return None
    rewrite: Callable[[str], str] = normalizer.normalize_str
    return rewrite


def refuse_control_tokens(
    conversation: Conversation, control: Sequence[str], *, normalize: Callable[[str], str] | None = None
) -> None:
    """Refuse texts that the tokenizer would read as the end or the beginning of a turn.

    Args:
        conversation: the row.
        control: every special token's text.
        normalize: how the tokenizer rewrites a text before it looks for them (`control_normalizer`).

    Raises:
        LossMaskError: with the message and the token.
    """
    find = _finder(control, normalize)
    for number, message in enumerate(conversation.messages, start=1):
        found = find(message.content)
        if not found and not message.is_plain:
            found = next(filter(None, map(find, _small_print(message))), "")
        if found:
            raise _forged(f"message {number} ({message.role}) holds", found)
    if conversation.tools:
        found = next(filter(None, map(find, leaves_of(_tool_list(conversation.tools)))), "")
        if found:
            raise _forged("the tools hold", found)


def _finder(control: Sequence[str], normalize: Callable[[str], str] | None) -> Callable[[str], str]:
    """Return what finds the first control token of a text, or nothing."""
    pattern = control_pattern(tuple(control))
    rewritten = control_pattern((*control, *map(normalize, control))) if normalize else None

    def find(text: str) -> str:
        found = pattern.search(text)
        if found is None and normalize and rewritten:
            found = rewritten.search(normalize(text))
        return found.group() if found else ""

    return find


def _forged(holder: str, token: str) -> LossMaskError:
    return LossMaskError(
        f"{holder} the control token {token}, which would end or begin a turn",
        hint="take control tokens out of the rows",
    )


def _small_print(message: Message) -> list[str]:
    """Every text of a message besides its words."""
    texts = [message.reasoning, message.name, message.call_id]
    for call in message.tool_calls:
        texts += [call.name, call.call_id, *leaves_of(json.loads(call.arguments))]
    return texts


@lru_cache(maxsize=64)
def _tool_list(tools: str) -> Any:
    """The tools as a template takes them; templates run in a sandbox that cannot change them."""
    try:
        listed = json.loads(tools)
    except ValueError as err:
        raise LossMaskError(f"the tools are no JSON: {err}", hint="give the tools as a JSON list of objects") from err
    if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
        raise LossMaskError("the tools are no list of objects", hint="give the tools as a JSON list of objects")
    return listed


def _manner(tokenizer: Any) -> _Manner:
    """How this tokenizer's template wants to be asked; found out once."""
    template = fixed_template(tokenizer)
    known = _MANNERS.setdefault(tokenizer, {})
    if template not in known:
        known[template] = _find_manner(tokenizer)
    return known[template]


def _find_manner(tokenizer: Any) -> _Manner:
    messages = [Message("user", "a"), Message("assistant", "x7f3a9")]
    writes: list[_Manner] = []
    for manner in (_Manner(settings, as_parts) for as_parts in (False, True) for settings in _SETTINGS):
        if manner.as_parts and any(not written.as_parts for written in writes):
            break
        try:
            text = _writer(tokenizer, manner)((messages, ""))
            prompt = _writer(tokenizer, manner, add_generation_prompt=True)((messages[:1], ""))
        except LossMaskError:
            continue
        # A template that does not know parts may write the list itself, as Python or JSON.
        if "x7f3a9" in text and not (manner.as_parts and re.search("[\"']type[\"']", text)):
            writes.append(manner)
            if text.startswith(prompt):
                return manner
    return writes[0] if writes else _Manner({}, as_parts=False)


def _writer(tokenizer: Any, manner: _Manner, *, add_generation_prompt: bool = False) -> Callable[[Asked], str]:
    """Return what writes messages and tools with the template, raising LossMaskError for what it refuses."""
    settings = {"date_string": TEMPLATE_DATE, **manner.settings}
    draw = _compiled(tokenizer, settings, add_generation_prompt) or _by_tokenizer(
        tokenizer, settings, add_generation_prompt
    )

    def write(asked: Asked) -> str:
        messages, tools = asked
        try:
            turns = [message.as_dict() for message in messages]
            if manner.as_parts:
                turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
            return draw(turns, _tool_list(tools) if tools else None)
        except _REFUSALS as err:
            roles = ", ".join(message.role for message in messages)
            raise LossMaskError(
                f"the chat template refuses the roles {roles}: {str(err)[:300] or type(err).__name__}",
                hint="change the rows, or give a template that takes them in data.chat_template",
            ) from err

    return write


_Draw = Callable[[list[dict[str, Any]], Any], str]


def _by_tokenizer(tokenizer: Any, settings: Mapping[str, Any], add_generation_prompt: bool) -> _Draw:
    template = fixed_template(tokenizer)

    def draw(turns: list[dict[str, Any]], tools: Any) -> str:
        text = tokenizer.apply_chat_template(
            turns,
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=template,
            **settings,
        )
        return str(text)

    return draw


def _compiled(tokenizer: Any, settings: Mapping[str, Any], add_generation_prompt: bool) -> _Draw | None:
    """Return what `apply_chat_template` does with one conversation, without what it does around it each time."""
    import transformers
    from transformers.utils import chat_template_utils

    compiler = getattr(chat_template_utils, _COMPILER, None)
    own_way = type(tokenizer).apply_chat_template is not transformers.PreTrainedTokenizerBase.apply_chat_template
    if compiler is None or own_way:
        return None
    try:
        template = compiler(fixed_template(tokenizer))
    except _REFUSALS as err:
        raise LossMaskError(f"the chat template is no Jinja: {err}", hint=ANOTHER_TEMPLATE) from err
    always = {
        **template.globals,
        **tokenizer.special_tokens_map,
        **settings,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    body, context = template.root_render_func, template.new_context

    def draw(turns: list[dict[str, Any]], tools: Any) -> str:
        if not turns:
            raise ValueError("there are no messages")
        for turn in turns:
            if "reasoning_content" in turn:  # gpt-oss reads it by another name, which transformers adds too
                turn["thinking"] = turn["reasoning_content"]
        return "".join(body(context({**always, "messages": turns, "tools": tools}, shared=True)))

    return draw


def answer_spans(tokenizer: Any, conversation: Conversation, indices: Sequence[int]) -> tuple[str, list[Span]]:
    """Return the row's text and its spans, as `written_row` does."""
    text, spans, _ = written_row(tokenizer, conversation, indices)
    return text, spans


def written_row(
    tokenizer: Any, conversation: Conversation, indices: Sequence[int]
) -> tuple[str, list[Span], dict[int, Place]]:
    """Return the row as the template writes it, what in it the model must write for each of the messages, and where
    every message stands, as far as that is certain.

    Args:
        tokenizer: its template is asked.
        conversation: the row.
        indices: positions of assistant messages, in order.

    Raises:
        LossMaskError: the template refuses the row, leaves something of it out, or writes an answer otherwise than it
            asks for it.
    """
    manner = _manner(tokenizer)
    write = _writer(tokenizer, manner)
    text = write((conversation.messages, conversation.tools))
    row = WrittenRow(
        conversation.messages,
        conversation.tools,
        text,
        write,
        _writer(tokenizer, manner, add_generation_prompt=True),
        special_tokens(tokenizer),
    )
    places = find_places(row)
    spans = [answer_span(row, index, places.get(index)) for index in indices]
    check_layout(row, indices)
    return text, spans, places
