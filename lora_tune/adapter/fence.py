"""A tokenizer whose chat template came with an adapter: every rendering happens in a worker under limits.

A template is a program: nested loops over `range`, `'x' * 3000000000` or macros that call each other twice end never or in
no memory, some while they are compiled. The sandbox of transformers keeps them from files, not from time and memory.
"""

import json
import os
import selectors
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from lora_tune.errors import AdapterError

_WORKER = Path(__file__).with_name("fence_worker.py")
_START_SECONDS = 30.0
_SILENT_SECONDS = 10.0
"""Longest wait for one rendering. The worker's own bound is 1 s of its processor time, however busy the machine is."""

_MAX_REPLY_BYTES = 32 * 1024 * 1024


class Fence:
    """A worker process that renders templates; started at the first one, and anew after one that it did not survive."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._finalizer: Any = None

    def render(self, template: str, values: Mapping[str, Any]) -> str:
        """Return what the template writes for these values, which must be plain JSON.

        Raises:
            jinja2.TemplateError: the template refuses them, or is no Jinja.
            AdapterError: it needs more than 1 s, 256 MiB or 4 Mi characters (exit 77).
        """
        from jinja2 import TemplateError

        request = json.dumps({"template": template, "values": dict(values)}).encode() + b"\n"
        with self._lock:
            reply = self._ask(request)
        if "refused" in reply:
            raise TemplateError(reply["refused"])
        if "limit" in reply:
            raise _over_the_limit(reply["limit"])
        return reply["text"]

    def close(self) -> None:
        """End the worker, if there is one."""
        if self._finalizer is not None:
            self._finalizer()
        self._worker = self._finalizer = None

    def _ask(self, request: bytes) -> dict[str, str]:
        if self._worker is None:
            self._start()
        worker = self._worker
        assert worker is not None
        assert worker.stdin is not None
        try:
            worker.stdin.write(request)
            worker.stdin.flush()
            line = _read_line(worker, time.monotonic() + _SILENT_SECONDS)
        except BrokenPipeError:
            line = b""
        if not line:
            self.close()
            raise _over_the_limit("it takes more than 1 s or 256 MiB")
        reply: dict[str, str] = json.loads(line)
        return reply

    def _start(self) -> None:
        import jinja2
        import markupsafe

        places = {str(Path(str(module.__file__)).parents[1]) for module in (jinja2, markupsafe)}
        # Isolated (-I), without the site's start-up code (-S), and without our environment, where secrets may stand.
        worker = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_WORKER), *sorted(places)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in ("LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ},
        )
        self._worker, self._finalizer = worker, weakref.finalize(self, _end, worker)
        if _read_line(worker, time.monotonic() + _START_SECONDS) != b"ready\n":
            self.close()
            raise AdapterError(
                "the worker that renders an adapter's own chat template does not start",
                hint="run the command again; if it stays so, please report it",
            )


def fence_template(tokenizer: Any) -> Any:
    """Return the tokenizer, which from now on renders its chat template in a worker under limits.

    Only text can be asked of it (`tokenize=False`), which is all that data/rendering.py does.
    """
    kind, fence = type(tokenizer), Fence()

    def apply_chat_template(
        self: Any,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        documents: None = None,
        tokenize: bool = True,
        **settings: Any,
    ) -> str:
        assert not tokenize, "a fenced template writes text only"
        if not conversation:
            raise ValueError("there are no messages")
        return fence.render(
            self.chat_template if chat_template is None else chat_template,
            {**self.special_tokens_map, **settings, "messages": [_turn(turn) for turn in conversation], "tools": tools,
             "documents": documents, "add_generation_prompt": add_generation_prompt},
        )  # fmt: skip

    # The same name: a tokenizer writes its class's name when it is saved.
    fenced = type(kind.__name__, (kind,), {"apply_chat_template": apply_chat_template, "__module__": kind.__module__})
    tokenizer.__class__ = fenced
    return tokenizer


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message as transformers hands it to a template: nothing that is None, reasoning under both its names."""
    given = {key: value for key, value in turn.items() if value is not None}
    reasoning = given.get("reasoning_content")
    return given if reasoning is None else {"thinking": reasoning, **given}


def _over_the_limit(reason: str) -> AdapterError:
    return AdapterError(
        f"the chat template that this model or adapter brings was stopped: {reason}",
        hint="do not use this adapter; its template is no ordinary chat template",
        where="tokenizer.own_template",
    )


def _read_line(worker: "subprocess.Popen[bytes]", deadline: float) -> bytes:
    """Return the worker's next line; nothing when it ended, is silent until the deadline or does not stop writing."""
    assert worker.stdout is not None
    chunks: list[bytes] = []
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        while sum(map(len, chunks)) <= _MAX_REPLY_BYTES:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            chunk = os.read(worker.stdout.fileno(), 1 << 20) if ready else b""
            if not chunk:
                return b""
            chunks.append(chunk)
            if chunk.endswith(b"\n"):
                return b"".join(chunks)
    return b""


def _end(worker: "subprocess.Popen[bytes]") -> None:
    worker.kill()
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:  # what it never read
                continue
    worker.wait()
