"""What requests may say, every field bounded, and the error body; a field that is not here is refused."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_tune.errors import RequestError
from lora_tune.recipe.schema import NAME_PATTERN
from lora_tune.serving.engine import MAX_LOGPROBS, Sampling

MAX_ANSWERS = 4
MAX_STOPS = 4
MAX_STOP_CHARS = 64
MAX_MESSAGES = 1_000
MAX_TOOLS = 128
COMPLETION_TOKENS = 16
"""Longest answer of /v1/completions when the request says none, as in OpenAI's API."""
_MOST_TOKENS = 2**24
_MAX_SEED = 2**63 - 1

_Model = Annotated[str, Field(min_length=1, max_length=256)]
_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_Off = Annotated[float, Field(ge=0, le=0)]
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_TokenIds = Annotated[tuple[_TokenId, ...], Field(min_length=1, max_length=1_000_000)]
_MaxTokens = Annotated[int, Field(ge=1, le=_MOST_TOKENS)]
_Name = Annotated[str, Field(pattern=NAME_PATTERN)]
_Id = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    """A request's JSON: closed, and never read more loosely than it says."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class StreamOptions(Body):
    """How a stream is sent."""

    include_usage: bool | None = None
    """Send the token counts in a last chunk."""


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """A call that the assistant made."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    arguments: str
    """One JSON object, as text."""


class Call(Body):
    """A call in an assistant's message."""

    id: Annotated[str, Field(max_length=128)] | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | tuple[TextPart, ...] | None = None
    name: Annotated[str, Field(max_length=128)] | None = None
    """Of a tool message: its function. Of any other: taken and ignored."""
    tool_calls: Annotated[tuple[Call, ...], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=128)] | None = None
    reasoning_content: str | None = None
    refusal: None = None
    annotations: Annotated[tuple[Any, ...], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    @property
    def plain(self) -> dict[str, Any]:
        """What is said, as plain values: without what clients send along, as in an answer that they send back."""
        ignored = {"annotations"} if self.role == "tool" else {"annotations", "name"}
        return self.model_dump(exclude_none=True, exclude=ignored, mode="json")


class OfferedFunction(Body):
    """What a tool is."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema, handed to the chat template as it is."""
    strict: bool | None = None


class Tool(Body):
    """A function that the assistant may call; the call comes as the text that the model writes."""

    type: Literal["function"]
    function: OfferedFunction


class ResponseFormat(Body):
    """Only text is answered."""

    type: Literal["text"]


class _Asked(Body):
    """What both kinds of completion take."""

    model: _Model
    """The base, `name`, `name@3`, `name@sha256:…` or an alias; an unknown one is refused."""
    max_tokens: _MaxTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    """0 and -1 take all."""
    seed: Annotated[int, Field(ge=-(2**63), le=_MAX_SEED)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    stop: _Stop | Annotated[tuple[_Stop, ...], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    """Answer to the last token of `max_tokens`, past every end; for measuring."""
    presence_penalty: _Off | None = None
    frequency_penalty: _Off | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    """Refused unless empty."""
    user: Annotated[str, Field(max_length=512)] | None = None
    """Taken and ignored."""
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    """Taken and ignored."""
    store: bool | None = None
    """Taken and ignored."""

    @model_validator(mode="after")
    def _stream_options_belong_to_streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only taken with stream: true")
        return self

    @property
    def n_answers(self) -> int:
        """Answers asked for."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def n_logprobs(self) -> int | None:
        """As in `Sampling`."""
        raise NotImplementedError

    @property
    def wanted_tokens(self) -> int | None:
        """The longest answer that is asked for; None for as much as fits."""
        return self.max_tokens

    def sampling(self, max_tokens: int, index: int) -> Sampling:
        """Return how the answer of that index is sampled: each has a seed of its own."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            seed=None if self.seed is None else (self.seed + index) % (_MAX_SEED + 1),
            n_logprobs=self.n_logprobs,
            ignore_end=bool(self.ignore_eos),
        )


class ChatBody(_Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: _MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[tuple[Tool, ...], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only taken with logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same thing; send one")
        return self

    @property
    def n_logprobs(self) -> int | None:
        """As in `Sampling`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted_tokens(self) -> int | None:
        """The longest answer that is asked for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def plain_messages(self) -> list[dict[str, Any]]:
        """The messages as plain values."""
        return [message.plain for message in self.messages]

    @property
    def plain_tools(self) -> list[dict[str, Any]]:
        """The tools as plain values, as the client wrote them."""
        offered = self.tools if self.tools and self.tool_choice != "none" else ()
        return [tool.model_dump(exclude_unset=True, mode="json") for tool in offered]


class CompletionBody(_Asked):
    """POST /v1/completions."""

    prompt: str | _TokenIds | Annotated[tuple[str | _TokenIds], Field(min_length=1, max_length=1)]
    """A text, or token ids; a list may hold one prompt."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: Literal[""] | None = None

    @property
    def n_logprobs(self) -> int | None:
        """As in `Sampling`."""
        return self.logprobs

    @property
    def one_prompt(self) -> str | tuple[int, ...]:
        """The prompt."""
        if isinstance(self.prompt, str):
            return self.prompt
        first = self.prompt[0]
        return self.prompt if isinstance(first, int) else first  # type: ignore[return-value]


class LoadBody(Body):
    """POST /v1/adapters."""

    source: Annotated[str, Field(min_length=1, max_length=1024)]
    """A version in the registry (`name`, `name@3`, `name@sha256:…`, an alias), or a folder inside its root."""
    name: _Name | None = None
    """What to call it; None for its own name."""
    point: bool = True
    """Let the name mean this version from now on."""


class AliasBody(Body):
    """PUT /v1/aliases/{alias}."""

    target: _Id | None = None
    """A version's id; all requests go there."""
    split: Annotated[dict[_Id, Annotated[float, Field(gt=0, le=1)]], Field(min_length=1, max_length=8)] | None = None
    """Version ids with the share of requests that each answers; they sum to 1."""
    shadow: _Id | None = None
    """A version that runs along; its answers are thrown away."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("say target, split or shadow")
        if self.target is not None and self.split is not None:
            raise ValueError("target and split say the same thing; send one")
        return self


class VllmLoadBody(Body):
    """POST /v1/load_lora_adapter, as vLLM's clients send it."""

    lora_name: _Name
    lora_path: Annotated[str, Field(min_length=1, max_length=1024)]
    base_model_name: Annotated[str, Field(max_length=256)] | None = None
    """Taken and ignored."""
    load_inplace: bool | None = None
    """Taken and ignored: a name that is there already comes to mean the new version, and nothing running is disturbed."""


class VllmUnloadBody(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: _Id
    lora_int_id: int | None = None
    """Taken and ignored."""


BodyKind = TypeVar("BodyKind", bound=Body)
BODIES: tuple[type[Body], ...] = (ChatBody, CompletionBody, LoadBody, AliasBody, VllmLoadBody, VllmUnloadBody)


def parse(kind: type[BodyKind], content: bytes) -> BodyKind:
    """Return the request's body.

    Raises:
        RequestError: it is no such body; the first wrong field is named (400).
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as err:
        problems = err.errors(include_url=False, include_input=False, include_context=False)
        first = problems[0]
        field = ".".join(map(str, first["loc"]))[:120]
        message = first["msg"].removeprefix("Value error, ")[:300]
        if first["type"] == "extra_forbidden":
            message = "no such field is known"
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RequestError(
            (f"{field}: {message}" if field else message) + more, hint="/openapi.json says what is taken", where=field
        ) from err


def error_body(
    status: int, message: str, *, code: str, param: str | None = None, hint: str = ""
) -> dict[str, Mapping[str, Any]]:
    """Return an error as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "code": code, "param": param, "hint": hint}}


def dump(value: Mapping[str, Any] | Sequence[Any]) -> bytes:
    """Return plain values as JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")
