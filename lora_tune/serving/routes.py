"""What OpenAI's clients ask: chat, completions, models; streams as server-sent events."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from lora_tune.errors import LoraTuneError, MissingInputError, RequestError
from lora_tune.serving.answers import Piece, Running, Serving, take_lease
from lora_tune.serving.bodies import BodyKind, ChatBody, CompletionBody, dump, error_body, parse
from lora_tune.serving.deployed import Deployed
from lora_tune.serving.engine import Token
from lora_tune.serving.guard import Receive, Scope, Send, needs_api_key
from lora_tune.serving.prompts import encode, render
from lora_tune.serving.text import token_bytes

LOWEST_LOGPROB = -9999.0
"""What OpenAI's API says for a token that cannot come; JSON has no infinity."""

_LONG_BODY_BYTES = 64 * 1024
"""From here on a body is read beside the event loop."""

Asked = ChatBody | CompletionBody
Prompt = Callable[[Deployed | None], list[int]]
router = APIRouter(dependencies=[Depends(needs_api_key)], tags=["answers"])


class UnknownModelError(MissingInputError):
    """No such model is served."""

    code = "model_not_found"


def serving_of(request: Request) -> Serving:
    """Return what the routes of this app work with."""
    found: Serving = request.app.state.serving
    return found


def takes(kind: type[BodyKind]) -> dict[str, Any]:
    """Return how the OpenAPI page describes a body: it is read by `body_of`, after the key was looked at."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def body_of(request: Request, kind: type[BodyKind]) -> BodyKind:
    """Return the request's body.

    Raises:
        RequestError: it is not of this kind (400).
    """
    content = await request.body()
    if len(content) < _LONG_BODY_BYTES:
        return parse(kind, content)
    return await serving_of(request).beside(partial(parse, kind, content))


@router.post("/v1/chat/completions", openapi_extra=takes(ChatBody))
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    asked = await body_of(request, ChatBody)
    base = serving_of(request).fleet.base
    prompt = partial(render, base, messages=asked.plain_messages, tools=asked.plain_tools)
    return await _answer(request, asked, prompt)


@router.post("/v1/completions", openapi_extra=takes(CompletionBody))
async def completions(request: Request) -> Response:
    """Go on with a prompt that is finished: a text, or token ids."""
    asked = await body_of(request, CompletionBody)
    base = serving_of(request).fleet.base
    given = asked.one_prompt
    if isinstance(given, str):
        return await _answer(request, asked, partial(encode, base, prompt=given))
    if max(given) >= len(base.tokenizer):
        raise RequestError(
            f"prompt holds token {max(given)}; the base knows {len(base.tokenizer)} tokens", where="prompt"
        )
    return await _answer(request, asked, lambda _version: list(given))


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """List the base, the adapters' names and aliases, and every version that is loaded."""
    return Response(dump({"object": "list", "data": _models(serving_of(request))}), media_type="application/json")


@router.get("/v1/models/{model:path}")
async def one_model(request: Request, model: str) -> Response:
    """Describe one model; a base's name may have slashes."""
    found = next((entry for entry in _models(serving_of(request)) if entry["id"] == model), None)
    if found is None:
        raise UnknownModelError(f"no model is called {model[:100]!a}", hint="GET /v1/models lists all", where="model")
    return Response(dump(found), media_type="application/json")


def _models(serving: Serving) -> list[dict[str, Any]]:
    fleet = serving.fleet
    pointers = fleet.pointers()
    loaded = {version.id: version for version in fleet.versions()}
    listed = []
    for name in fleet.names():
        entry: dict[str, Any] = {"id": name, "object": "model", "created": 0, "owned_by": "lora_tune"}
        entry |= {"kind": "base", "parent": None, "target": None}
        if name in pointers:
            entry |= {"kind": "alias", "parent": fleet.base.name, "target": dict(pointers[name].target)}
        elif name in loaded:
            version = loaded[name]
            entry |= {"kind": "adapter", "parent": fleet.base.name, "created": int(version.loaded_at)}
        listed.append(entry)
    return listed


async def _answer(request: Request, asked: Asked, prompt: Prompt) -> Response:
    running = await _begun(request, asked, prompt)
    reply = _ChatReply(running, asked) if isinstance(asked, ChatBody) else _TextReply(running, asked)
    if asked.stream:
        return _EventStream(running, _chunks(running, reply, wants_usage=asked.wants_usage))
    watching = asyncio.ensure_future(running.watch(request.receive))
    try:
        async for _ in running.changes():
            if running.error is not None:
                raise running.error
        if running.cancelled:
            return Response(status_code=499)  # nobody is there to read it
        pieces = [answer.take() for answer in running.answers]
        choices = [reply.whole(index, piece) for index, piece in enumerate(pieces) if piece]
        return Response(dump(reply.head(choices, whole=True) | {"usage": running.usage}), media_type="application/json")
    finally:
        watching.cancel()
        if any(answer.finish is None for answer in running.answers):
            running.cancel()


async def _begun(request: Request, asked: Asked, prompt: Prompt) -> Running:
    """Return the request's answers, begun; a failure on the way gives back what was taken."""
    serving = serving_of(request)
    with serving.preparing():
        try:
            lease = take_lease(serving, asked.model)
        except MissingInputError as err:
            raise UnknownModelError(err.message, hint=err.hint, where="model") from err
        running = Running(serving, lease, request.state.request_id)
        try:
            ids = await serving.beside(partial(prompt, lease.version))
            beside: Sequence[int] | None = None
            if lease.shadow is not None:
                try:
                    beside = await serving.beside(partial(prompt, lease.shadow))
                except LoraTuneError as err:
                    running.shadow_failed(err)
            running.begin(ids, beside, asked)
        except BaseException:
            running.give_up()
            raise
    return running


class _Reply:
    """The shape of one kind of completion."""

    kinds = ("", "")
    """`object` of a whole answer, and of a piece of a stream."""
    prefix = ""

    def __init__(self, running: Running, asked: Asked) -> None:
        self._running = running
        self._asked = asked
        self._tokenizer = running.serving.fleet.base.tokenizer
        self._id = f"{self.prefix}-{running.request_id}"
        self._created = int(time.time())

    def head(self, choices: Sequence[dict[str, Any]], *, whole: bool) -> dict[str, Any]:
        """Return the answer around its choices."""
        lease = self._running.lease
        return {
            "id": self._id, "object": self.kinds[0 if whole else 1], "created": self._created, "model": lease.model,
            "system_fingerprint": lease.fingerprint, "choices": list(choices),
        }  # fmt: skip

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return a whole answer as one choice."""
        raise NotImplementedError

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return what a stream begins with, if anything."""
        raise NotImplementedError

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return a piece of a stream as one choice."""
        raise NotImplementedError

    def _text(self, token_id: int) -> str:
        return token_bytes(self._tokenizer, token_id).decode("utf-8", "replace")


class _ChatReply(_Reply):
    kinds = ("chat.completion", "chat.completion.chunk")
    prefix = "chatcmpl"

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self._choice(index, piece) | {"message": message}

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text or piece.tokens else {}
        return self._choice(index, piece) | {"delta": delta}

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self._asked.n_logprobs is not None and (piece.tokens or piece.finish is None):
            logprobs = {"content": [self._facts(token) for token in piece.tokens], "refusal": None}
        return {"index": index, "logprobs": logprobs, "finish_reason": piece.finish}

    def _facts(self, token: Token) -> dict[str, Any]:
        top = token.top[: self._asked.n_logprobs or 0]
        return self._fact(token.id, token.logprob) | {"top_logprobs": [self._fact(*pair) for pair in top]}

    def _fact(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = token_bytes(self._tokenizer, token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}


class _TextReply(_Reply):
    kinds = ("text_completion", "text_completion")
    prefix = "cmpl"

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        return self.part(index, piece)

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self._asked.n_logprobs is not None:
            tops = [{self._text(token_id): _finite(value) for token_id, value in token.top} for token in piece.tokens]
            logprobs = {
                "tokens": [self._text(token.id) for token in piece.tokens],
                "token_logprobs": [_finite(token.logprob) for token in piece.tokens],
                "top_logprobs": tops if self._asked.n_logprobs else None,
                "text_offset": piece.offsets,
            }
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}


def _finite(logprob: float | None) -> float:
    return LOWEST_LOGPROB if logprob is None else max(LOWEST_LOGPROB, logprob)


async def _chunks(running: Running, reply: _Reply, *, wants_usage: bool) -> AsyncIterator[bytes]:
    """Yield the events of a stream: every answer's pieces as they come, at last the counts, then `[DONE]`."""
    no_usage = {"usage": None} if wants_usage else {}
    openings = [reply.opening(index) for index in range(len(running.answers))]
    yield b"".join(_event(reply.head([choice], whole=False) | no_usage) for choice in openings if choice)
    async for _ in running.changes():
        if running.cancelled:
            return
        if running.error is not None:
            yield _event(_spoken(running.error)) + _DONE
            return
        pieces = [(index, answer.take()) for index, answer in enumerate(running.answers)]
        choices = [choice for index, piece in pieces if piece for choice in _parts(reply, index, piece)]
        if choices:
            yield b"".join(_event(reply.head([choice], whole=False) | no_usage) for choice in choices)
    yield (_event(reply.head([], whole=False) | {"usage": running.usage}) if wants_usage else b"") + _DONE


def _parts(reply: _Reply, index: int, piece: Piece) -> list[dict[str, Any]]:
    """Return a piece as choices; why it ended stands in one of its own, as in OpenAI's streams."""
    if piece.finish is None or not (piece.text or piece.tokens):
        return [reply.part(index, piece)]
    text = Piece(piece.text, piece.tokens, piece.offsets)
    return [reply.part(index, text), reply.part(index, Piece("", [], [], piece.finish))]


_DONE = b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + dump(value) + b"\n\n"


def _spoken(err: LoraTuneError) -> dict[str, Any]:
    return error_body(err.http_status, err.message, code=err.code, hint=err.hint)


class _EventStream(Response):
    """A stream that stops the engine as soon as the client is gone, however it goes."""

    def __init__(self, running: Running, chunks: AsyncIterator[bytes]) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._running = running
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watching = asyncio.ensure_future(self._running.watch(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self._chunks:
                if chunk:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watching.cancel()
            if any(answer.finish is None for answer in self._running.answers):
                self._running.cancel()
