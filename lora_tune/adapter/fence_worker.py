"""A stranger's chat template, rendered in a process of its own with little memory and time.

Run as a script by fence.py, and never imported: it needs only the standard library and jinja2. One JSON line in (template
and values), one JSON line out (text, or why there is none).
"""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

MAX_MEMORY_BYTES = 256 * 1024 * 1024
MAX_CPU_SECONDS = 1.0
"""For one rendering; the kernel ends the process at it, whatever it is doing."""

MAX_TEXT_CHARS = 4 * 1024 * 1024


def serve() -> None:
    """Answer requests from stdin until it ends."""
    timer = _limit()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        timer(MAX_CPU_SECONDS)
        reply = json.dumps(_reply(json.loads(line)))
        timer(0.0)
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


def _limit() -> Callable[[float], object]:
    """Bound this process's memory, files and processes, and return what sets the time left, where the system can."""
    try:
        import resource
        import signal
    except ImportError:  # Windows; the parent still ends a worker that is silent for too long
        return float
    bounds = {"RLIMIT_AS": MAX_MEMORY_BYTES, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0}
    for name, most in bounds.items():
        with suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (most, most))
    # Without a handler of ours, the signal ends the process even inside one long operation.
    return lambda seconds: signal.setitimer(signal.ITIMER_PROF, seconds)


def _reply(request: dict[str, Any]) -> dict[str, str]:
    from jinja2 import TemplateError

    try:
        text = _compiled(request["template"]).render(request["values"])
    except MemoryError:
        return {"limit": f"it needs more than {MAX_MEMORY_BYTES // 1024**2} MiB"}
    except (TemplateError, TypeError, LookupError, ValueError, AttributeError, ArithmeticError, RecursionError) as err:
        return {"refused": str(err)[:300] or type(err).__name__}
    if len(text) > MAX_TEXT_CHARS:
        return {"limit": f"it writes {len(text)} characters; at most {MAX_TEXT_CHARS} are taken"}
    return {"text": text}


@lru_cache(maxsize=4)
def _compiled(text: str) -> Any:
    """Return the template as transformers compiles chat templates.

    Source: transformers 5.23, utils/chat_template_utils.py; tests/integration/test_fence.py holds both against each other.
    """
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` around what is trained: written as it is, in a scope of its own."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

        def _write(self, caller: Any) -> Any:
            return caller()

    class GuardedNamespace(Namespace):
        def __init__(*given: Any, **attributes: Any) -> None:
            this, *rest = given
            values = dict(*rest, **attributes)
            for name in values:
                _refuse_hidden(name)
            Namespace.__init__(this, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_hidden(name)
            Namespace.__setitem__(self, name, value)

    class PlainDict:
        def __call__(self, *given: Any, **items: Any) -> dict[Any, Any]:
            return dict(*given, **items)

        def fromkeys(self, *given: Any) -> dict[Any, Any]:
            return dict.fromkeys(*given)

    def _refuse_hidden(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a template cannot set the attribute {name!r}")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:  # fmt: skip
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form),
                        "dict": PlainDict(), "namespace": GuardedNamespace}  # fmt: skip
    return sandbox.from_string(text)


if __name__ == "__main__":
    sys.path += sys.argv[1:]  # where jinja2 stands; nothing else of the environment is looked at
    serve()
