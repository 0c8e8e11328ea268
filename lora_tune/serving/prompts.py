"""A request's messages → the prompt's token ids, the same as in training: template, settings, system message."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from lora_tune.adapter.fence import fence_template
from lora_tune.adapter.live import own_template
from lora_tune.data.messages import Conversation, Message
from lora_tune.data.rendering import LossMaskError, control_normalizer, refuse_control_tokens, special_tokens
from lora_tune.data.tokens import prompt_ids
from lora_tune.data.turns import MessageKeys, RowError, read_tools, read_turns
from lora_tune.errors import RequestError
from lora_tune.model.dense import BaseFiles
from lora_tune.model.load import load_tokenizer
from lora_tune.serving.deployed import Deployed
from lora_tune.serving.engine import ServedBase

MAX_CHARS_PER_TOKEN = 64
"""A prompt with more characters than this for each token of the context cannot fit, and is not tokenized to find out."""

MAX_TEMPLATES = 16
"""Adapters' own templates whose tokenizers are kept: one for each place that an engine has unless told otherwise."""

_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_NEW_LOCK = Lock()


def render(
    base: ServedBase,
    version: Deployed | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Return the token ids, [T], after which the answer begins.

    Slow for long texts; call it beside the event loop. Any number of threads may.

    Args:
        base: the base that answers.
        version: whose template and system message are used; None for the base's own, and no system message.
        messages: `{role, content, …}` as chat clients and rows of data write them.
        tools: functions as OpenAI's clients write them.

    Raises:
        RequestError: the messages cannot be read, the template refuses them, or they hold control tokens (400).
        AdapterError: the version's own template was stopped at its limits (412).
    """
    tokenizer = tokenizer_of(base, version)
    turns, written_tools = _read(messages, tools)
    system = version.files.manifest.data.system_message if version and version.files.manifest else None
    if system and all(turn.role != "system" for turn in turns):
        turns = (Message("system", system), *turns)
    check_length(base, [part for turn in turns for part in _words(turn)] + [written_tools])
    with _lock_of(tokenizer):
        try:
            asked = Conversation(turns, len(turns), "", written_tools)
            refuse_control_tokens(asked, special_tokens(tokenizer), normalize=control_normalizer(tokenizer))
            return prompt_ids(tokenizer, turns, tools=written_tools)
        except LossMaskError as err:
            raise RequestError(
                f"the messages cannot be put into the chat template: {err.message}",
                hint="change the messages, or send a finished prompt to /v1/completions",
                where="messages",
            ) from err


def encode(base: ServedBase, version: Deployed | None, prompt: str) -> list[int]:
    """Return the token ids of a finished prompt, special tokens in it read as such, with what the tokenizer begins texts with.

    Raises:
        RequestError: it is too long, or empty (400).
    """
    check_length(base, [prompt])
    tokenizer = base.tokenizer  # a version's own is the same but for its chat template
    with _lock_of(tokenizer):
        ids = [int(token) for token in tokenizer(prompt)["input_ids"]]
    if not ids:
        raise RequestError("the prompt is empty", hint="send at least one token", where="prompt")
    return ids


def tokenizer_of(base: ServedBase, version: Deployed | None) -> Any:
    """Return the base's tokenizer; with the template that the version's passport carries, if it carries one.

    Slow the first time for each template: call it beside the event loop.
    """
    template = own_template(version.files) if version is not None else None
    return base.tokenizer if template is None else _fenced(base.files, template)


def check_length(base: ServedBase, texts: Sequence[str]) -> None:
    """Refuse texts that are too long for the context whatever their tokens are.

    Raises:
        RequestError: with the number of characters (400).
    """
    n_chars, most = sum(map(len, texts)), base.max_context_tokens * MAX_CHARS_PER_TOKEN
    if n_chars > most:
        raise RequestError(
            f"the prompt has {n_chars:,} characters; a context of {base.max_context_tokens:,} tokens takes at most {most:,}",
            hint="send less",
            where="messages",
        )


def _read(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> tuple[tuple[Message, ...], str]:
    try:
        turns = tuple(
            turn.message for turn in read_turns([dict(message) for message in messages], "messages", MessageKeys())
        )
        return turns, read_tools([dict(tool) for tool in tools], "tools") if tools else ""
    except RowError as err:
        raise RequestError(str(err), hint="write messages as OpenAI's API takes them", where="messages") from err


def _words(turn: Message) -> list[str]:
    return [turn.content, turn.reasoning, *(json.dumps(call.as_dict()) for call in turn.tool_calls)]


@lru_cache(maxsize=MAX_TEMPLATES)
def _fenced(files: BaseFiles, template: str) -> Any:
    """Return the base's tokenizer with a stranger's template, rendered in a process under limits."""
    return fence_template(load_tokenizer(files, template_text=template))


def _lock_of(tokenizer: Any) -> Any:
    """One thread at a time: a tokenizer's settings, and what is learnt of its template, are not safe from two."""
    with _NEW_LOCK:
        return _LOCKS.setdefault(tokenizer, Lock())
