"""One vLLM server, spoken to over HTTP: prompts in and tokens out by their ids, adapters by name and folder.

Everything here runs on one event loop; which replica answers what is vllm.py's business.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from lora_tune.errors import BusyError, LoraTuneError, RequestError, UnreachableError, UnsupportedError
from lora_tune.serving.engine import Sampling, Token

_TOKEN_PREFIX = "token_id:"  # noqa: S105 - how vLLM writes a token's id (format_token_id_placeholder)
_CONNECT_SECONDS = 5.0
_SILENCE_SECONDS = 600.0
"""Longest wait for the next token: many prompts may be waiting before it."""
_LOOK_SECONDS = 10.0
"""Longest wait for a list, and for taking an adapter's name away."""
_LOAD_SECONDS = 60.0
"""Longest wait for an adapter to be read."""
_ENDS = ("stop", "length")
_OUR_REQUEST = (httpx.codes.BAD_REQUEST, httpx.codes.REQUEST_ENTITY_TOO_LARGE, httpx.codes.UNPROCESSABLE_ENTITY)


class ReplicaGoneError(UnreachableError):
    """The connection failed or broke: nothing can be asked there until it answers again."""


class ModelLostError(UnreachableError):
    """It does not know the model: it was started anew, and has to get its adapters again."""


@dataclass(frozen=True)
class Address:
    """Where a vLLM answers."""

    url: str
    api_key: str = ""
    socket: Path | None = None
    """Instead of the URL's host, for our own."""


@dataclass(frozen=True)
class Piece:
    """What one event of a stream tells."""

    tokens: tuple[Token, ...] = ()
    reason: str | None = None
    """Why the answer ends here."""
    n_reused: int = 0


class Replica:
    """A connection to one vLLM; built and used on the event loop only."""

    def __init__(self, address: Address) -> None:
        self.label = "our vLLM" if address.socket else address.url
        self.is_up = True
        self.has_lost_models = False
        """Whether it answers, but does not have everything that it was given."""
        self.n_running = 0
        self.base_model = ""
        self.max_context_tokens = 0
        self._client = httpx.AsyncClient(
            base_url=address.url,
            headers={"Authorization": f"Bearer {address.api_key}"} if address.api_key else {},
            transport=httpx.AsyncHTTPTransport(
                uds=str(address.socket) if address.socket else None,
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            ),
            timeout=httpx.Timeout(_SILENCE_SECONDS, connect=_CONNECT_SECONDS),
        )

    async def learn(self) -> set[str]:
        """Ask for its base and its longest context, and return the adapters that it has.

        Raises:
            UnreachableError: it cannot be reached, refuses our key, or is no vLLM.
        """
        answer = await self._ask("GET", "/v1/models")
        models = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
            raise self._odd("its list of models")
        base: dict[str, Any] = next((model for model in models if model.get("parent") is None), {})
        if not isinstance(base.get("id"), str) or not isinstance(base.get("max_model_len"), int):
            raise self._odd("its list of models")
        self.base_model, self.max_context_tokens = base["id"], base["max_model_len"]
        return {str(model.get("id")) for model in models if model.get("parent") is not None}

    async def is_healthy(self) -> bool:
        """Return whether it says that it can answer."""
        try:
            answer = await self._client.get("/health", timeout=_CONNECT_SECONDS)
        except (httpx.HTTPError, OSError):
            return False
        return answer.status_code == httpx.codes.OK

    async def load(self, name: str, folder: Path) -> None:
        """Register an adapter that lies in a folder which it can read.

        Raises:
            UnreachableError: it cannot be reached, or does not take adapters while it runs.
            UnsupportedError: it refuses this one.
        """
        try:
            body = {"lora_name": name, "lora_path": str(folder)}
            await self._ask("POST", "/v1/load_lora_adapter", body, seconds=_LOAD_SECONDS)
        except _AnswerError as err:
            if err.status == httpx.codes.NOT_FOUND and "adapter" not in err.said:
                raise UnreachableError(
                    f"{self.label} does not load adapters while it runs",
                    hint="start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
                ) from err
            hint = "it must see the folder under the same path: name one that both see in LORA_TUNE_VLLM_SHARED"
            if err.status != httpx.codes.NOT_FOUND:
                hint = "use --engine native or simple, or merge it into the base (lora-tune merge NAME OUT)"
            raise UnsupportedError(f"{self.label} does not load the adapter: {err.said}", hint=hint) from err

    async def unload(self, name: str) -> None:
        """Take an adapter's name away; one that it does not know is away.

        Raises:
            UnreachableError: it cannot be reached.
        """
        try:
            await self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except _AnswerError as err:
            if err.status != httpx.codes.NOT_FOUND:
                raise UnreachableError(f"{self.label} does not unload {name}: {err.said}") from err

    async def answer(self, body: dict[str, Any]) -> AsyncGenerator[Piece, None]:
        """Yield what it makes, piece by piece; leaving the loop early ends it there too.

        Raises:
            ReplicaGoneError: it cannot be reached, or went away.
            ModelLostError: it has lost the adapter.
            UnreachableError: it failed, or answers as no vLLM does.
            RequestError: it refuses the request.
            BusyError: it takes no more.
        """
        async with self._translated(), self._client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                raise self._refused(_AnswerError(response.status_code, _said(await response.aread())))
            async for line in response.aiter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if not data:
                    continue
                if data == "[DONE]":
                    return
                yield self._read(data, body.get("logprobs", 0))
        raise ReplicaGoneError(f"{self.label} broke off an answer")

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    def _read(self, data: str, n_top: int) -> Piece:
        try:
            event = json.loads(data)
            if "error" in event:
                raise self._refused(_AnswerError(event["error"].get("code", 500), _said(data.encode())))
            return read_piece(event, n_top)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as err:
            raise self._odd("an answer") from err

    def _refused(self, err: "_AnswerError") -> LoraTuneError:
        if err.status in _OUR_REQUEST:
            return RequestError(f"vLLM refuses the request: {err.said}")
        if err.status in (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE):
            return BusyError(f"{self.label} takes no more requests", hint="try again later")
        kind = ModelLostError if err.status == httpx.codes.NOT_FOUND else UnreachableError
        return kind(f"{self.label} answered {err.status}: {err.said}")

    def _odd(self, what: str) -> UnreachableError:
        return UnreachableError(
            f"{self.label} sent {what} in a form that is not vLLM's",
            hint="check the address; vLLM 0.32 is known to work",
        )

    async def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, seconds: float = _LOOK_SECONDS
    ) -> Any:
        timeout = httpx.Timeout(seconds, connect=_CONNECT_SECONDS)
        async with self._translated():
            response = await self._client.request(method, path, json=body, timeout=timeout)
            if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
                raise UnreachableError(
                    f"{self.label} refuses our key",
                    hint="put the key that it was started with into LORA_TUNE_VLLM_API_KEY",
                )
            if response.status_code != httpx.codes.OK:
                err = _AnswerError(response.status_code, _said(response.content))
                if method == "GET":
                    raise UnreachableError(f"{self.label} answered {err.status}: {err.said}")
                raise err
            if method == "POST":
                return None
            try:
                return response.json()
            except ValueError as err_json:
                raise self._odd("its list of models") from err_json

    @asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as err:
            raise ReplicaGoneError(
                f"{self.label} cannot be reached: {str(err) or type(err).__name__}", hint="look whether it still runs"
            ) from err


class _AnswerError(Exception):
    """It answered with an error; never leaves this module."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status = status
        self.said = said


def request_body(
    model: str, prompt: Sequence[int], sampling: Sampling, *, max_tokens: int, ends: Sequence[int]
) -> dict[str, Any]:
    """Return what /v1/completions is asked; everything is said, so that no default of that server takes part."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": sampling.ignore_end,
        "stop_token_ids": [] if sampling.ignore_end else list(ends),
        "add_special_tokens": False,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.n_logprobs is not None:
        body |= {"logprobs": sampling.n_logprobs, "return_tokens_as_token_ids": True}
    return body


def read_piece(event: dict[str, Any], n_top: int) -> Piece:
    """Return what an event of a /v1/completions stream tells, without the token that ended the answer.

    vLLM counts that token among the answer's (v1/core/sched/utils.py, check_stop): the last one before "stop".

    Args:
        event: the JSON of one `data:` line.
        n_top: how many of the likeliest tokens were asked for.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, IndexError: it is no such event.
    """
    if not event["choices"]:
        details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
        return Piece(n_reused=int(details.get("cached_tokens") or 0))
    choice = event["choices"][0]
    ids, reason, told = choice.get("token_ids") or [], choice.get("finish_reason"), choice.get("logprobs")
    if reason is not None and reason not in _ENDS:
        raise ValueError(f"finish_reason {reason}")
    tokens = [
        Token(int(token))
        if told is None
        else Token(int(token), told["token_logprobs"][at], _top(told["top_logprobs"][at], n_top))
        for at, token in enumerate(ids)
    ]
    return Piece(tuple(tokens[:-1] if reason == "stop" else tokens), reason)


def _top(found: dict[str, float] | None, n_top: int) -> tuple[tuple[int, float], ...]:
    """The likeliest first; vLLM puts the chosen token before them, also when it is none of them."""
    pairs = [(int(name.removeprefix(_TOKEN_PREFIX)), float(value)) for name, value in (found or {}).items()]
    return tuple(sorted(pairs, key=lambda pair: -pair[1])[:n_top])


def _said(content: bytes) -> str:
    """What an error's body says, short, and nothing that a terminal obeys."""
    text = content.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        error = found.get("error", found)
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        pass
    return "".join(c if c.isprintable() else " " for c in text)[:300]


async def all_or_first_error(jobs: Sequence[Any]) -> None:
    """Run the jobs to their ends, all of them, then raise the first error."""
    for result in await asyncio.gather(*jobs, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
