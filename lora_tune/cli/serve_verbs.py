"""The verb `serve`: what is asked for → a base, its adapters, an engine, a fleet and an app, in the order of their cost."""

import importlib.util
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_tune.adapter import registry as shelf
from lora_tune.cli.adapter_verbs import registry_root
from lora_tune.cli.exposure import Exposure, read_exposure
from lora_tune.cli.options import EngineName, Quantization
from lora_tune.cli.verbs import Progress, is_base, section_of
from lora_tune.errors import LoraTuneError, MissingInputError, UsageError
from lora_tune.recipe.schema import NAME_PATTERN, BaseSection
from lora_tune.staging import write_file

DRAIN_SECONDS = 30.0
"""How long answers may go on after the server was told to stop."""
__all__ = ["ServeWish", "Server", "Wanted", "find_wanted", "load_wanted", "open_server", "registry_root"]

_EXTRA = ("fastapi", "uvicorn", "prometheus_client", "httpx")


@dataclass(frozen=True)
class ServeWish:
    """What the command line asks for."""

    what: str | None
    """A base, a run's folder, an adapter, or None: what the registry says."""
    adapters: tuple[str, ...]
    """`NAME=PATH_OR_SPEC`, or the latter alone."""
    follow: tuple[str, ...]
    """Aliases of the registry."""
    base: str | None
    quantization: Quantization | None
    engine: EngineName
    vllm_urls: tuple[str, ...]
    host: str
    port: int
    api_key_file: Path | None
    admin_key_file: Path | None
    allow_hosts: tuple[str, ...]
    allow_origins: tuple[str, ...]
    max_context: int | None
    max_running: int
    max_adapters: int
    max_rank: int
    name: str | None
    registry: Path
    state: Path | None
    page: bool


@dataclass(frozen=True)
class Wanted:
    """One adapter to be served."""

    given: str
    """As the command line says it."""
    spec: str
    """As the fleet takes it."""
    name: str | None
    """Another name to serve it under."""
    found: Any
    """Its checked files, and what it will be called."""
    alias: str | None
    """The registry's alias that it was named by: clients may use it too."""


class Server:
    """Everything that runs, ready to take requests."""

    def __init__(self, wish: ServeWish, exposure: Exposure, listening: socket.socket) -> None:
        self._wish, self._exposure, self._listening = wish, exposure, listening
        self._closers: list[Callable[[], None]] = []
        self._app: Any = None
        self.facts: dict[str, Any] = {}
        """What is served where, as `--json` prints it."""

    def open(self, section: BaseSection, wanted: Sequence[Wanted], progress: Progress) -> None:
        """Load the base and its adapters."""
        from lora_tune.serving.api import make_app
        from lora_tune.serving.loading import LoadingServer
        from lora_tune.serving.opening import open_engine
        from lora_tune.serving.swap import Fleet
        from lora_tune.serving.watch import Watch

        wish, settings = self._wish, self._exposure.settings(page=self._wish.page)
        loading = LoadingServer(self._listening, settings)
        self._closers.append(loading.stop)
        followed = [shelf.open_found(alias, root=wish.registry) for alias in wish.follow]
        needs = [*(adapter.found.files for adapter in wanted), *followed]
        engine, base, why = open_engine(
            section, engine=wish.engine, progress=progress, needs=needs, served_name=wish.name,
            # What is named at the start always fits.
            max_adapters=max(wish.max_adapters, len(needs)), max_rank=max([wish.max_rank, *(f.shape.rank for f in needs)]),
            max_running=wish.max_running, max_context=wish.max_context, vllm_url=wish.vllm_urls,
        )  # fmt: skip
        self._closers.append(engine.close)
        state = wish.state or wish.registry / "serving" / f"{base.weights_digest[:12]}.jsonl"
        fleet = Fleet(engine, base, registry=wish.registry, state=state)
        self._closers.append(fleet.close)
        progress("loading adapters", 0.5)
        words = [*fleet.restore(), *load_wanted(fleet, wanted, started=state.with_name(f"{state.name}.started"))]
        for alias in wish.follow:
            watch = Watch(fleet, alias, registry=wish.registry)
            watch.look()
            if watch.problem:
                words.append(f"{alias} is not followed yet: {watch.problem}")
            watch.start()
            self._closers.append(watch.stop)
        self._app = make_app(fleet, settings)
        self.facts = {
            "event": "ready",
            "url": self._exposure.url(self._listening.getsockname()[1]),
            "engine": engine.name,
            "engine_why": why,
            "base": base.name,
            "model": _first_model(fleet, wanted, wish.follow),
            "quantization": base.section.quantization,
            "max_context_tokens": engine.max_context_tokens,
            "needs_key": bool(self._exposure.api_keys),
            "page": wish.page,
            "state": str(state),
            **_served(fleet),
            "warnings": [*self._exposure.warnings, *words],
        }
        # From here on who connects waits for `run`, and is answered by it.
        self._closers.remove(loading.stop)
        loading.stop()

    def run(self) -> None:
        """Answer until SIGTERM or Ctrl-C, then let what is being answered come to its end."""
        from lora_tune.serving.api import make_server

        try:
            make_server(self._app, drain_seconds=DRAIN_SECONDS).run(sockets=[self._listening])
        finally:
            self.close()

    def close(self) -> None:
        """Stop everything that was opened, the last first."""
        while self._closers:
            self._closers.pop()()
        self._listening.close()


def open_server(wish: ServeWish, progress: Progress) -> Server:
    """Return the server with everything loaded: it listens already, and answers as soon as it is run.

    Raises:
        MissingInputError: the packages for serving, the base or an adapter are not there (exit 66).
        UsageError: nothing says what is to be served (exit 2).
        RefusedError: it would be open to other machines without a key (exit 77).
        CannotCreateError: the port is taken (exit 73).
        LoraTuneError: what open_engine and Fleet.load raise.
    """
    check_installed()
    exposure = read_exposure(
        wish.host,
        api_key_file=wish.api_key_file,
        admin_key_file=wish.admin_key_file,
        allow_hosts=wish.allow_hosts,
        allow_origins=wish.allow_origins,
        environment=os.environ,
    )
    section, wanted = find_wanted(wish)
    from lora_tune.serving import threads
    from lora_tune.serving.api import listen

    threads.leave_to_engine()

    # Taken now, so that a port in use costs no load; who connects meanwhile is told that it loads.
    listening = listen(wish.host, wish.port)
    log_to_stderr()
    server = Server(wish, exposure, listening)
    try:
        server.open(section, wanted, progress)
    except BaseException:
        server.close()
        raise
    return server


def check_installed() -> None:
    """Check that the packages of the extra `serve` are there.

    Raises:
        MissingInputError: one is not (exit 66).
    """
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingInputError(
            f"serving needs packages that are not installed: {', '.join(missing)}",
            hint="pip install 'lora-tune[serve]'",
        )


class _OneLine(logging.Formatter):
    """Events of the API are JSON lines already; what the other parts say becomes one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line of JSON."""
        said = record.getMessage()
        if said.startswith("{") and not record.exc_info:
            return said
        line: dict[str, Any] = {"event": "note", "level": record.levelname.lower(), "message": said}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr() -> None:
    """Let every part of the server log one JSON line an event to stderr."""
    log = logging.getLogger("lora_tune.serving")
    if not log.handlers:
        lines = logging.StreamHandler()
        lines.setFormatter(_OneLine())
        log.addHandler(lines)
        log.setLevel(logging.INFO)
        log.propagate = False


def find_wanted(wish: ServeWish) -> tuple[BaseSection, list[Wanted]]:
    """Return the base and the adapters that are asked for, checked as far as it goes without loading anything.

    Raises:
        UsageError: nothing says what is to be served, or two things say it (exit 2).
        MissingInputError: an adapter is not there (exit 66).
    """
    root, what = wish.registry, wish.what
    given = list(wish.adapters)
    base = wish.base
    if what is not None and is_base(what, root):
        if base is not None:
            raise UsageError(f"{what} is a base, and --base names another", hint="leave one of them out")
        base = what
    elif what is not None:
        given.insert(0, what)
    elif not given and not wish.follow and base is None:
        given = [_only_one(root)]
    wanted = [_wanted(text, root) for text in given]
    named = [adapter.found.name for adapter in wanted]
    for name in named:
        if named.count(name) > 1:
            raise UsageError(f"two adapters are called {name}", hint="name them apart: --adapter OTHER-NAME=…")
    files = [adapter.found.files for adapter in wanted]
    files += [shelf.open_found(alias, root=root) for alias in wish.follow]
    section = _section(base, files)
    if wish.quantization is not None:
        section = section.model_copy(update={"quantization": wish.quantization})
    return section, wanted


def _section(base: str | None, files: Sequence[Any]) -> BaseSection:
    if not files:
        assert base is not None  # find_wanted asked for one of them
        return section_of(base)
    from lora_tune.adapter.live import base_section

    # A base is held as its adapters were trained on it, unless --quantization says otherwise.
    return base_section(files[0], base)


def _only_one(root: Path) -> str:
    """Return what the registry offers when nothing is said: its alias `prod`, or its only adapter."""
    versions = [version for version, _ in shelf.list_versions(root=root)]
    if shelf.DEFAULT_ALIAS in shelf.aliases(root):
        return shelf.DEFAULT_ALIAS
    names = sorted({version.name for version in versions})
    if len(names) == 1:
        return names[0]
    there = f"it has {', '.join(names[:12])}" if names else "it is empty"
    raise UsageError(
        f"nothing says what to serve, and the registry {root}/ does not either: {there}",
        hint=f"lora-tune serve {names[0] if names else 'builtin:smollm2-135m'}"
        + (f", or promote one: lora-tune adapters promote {names[0]}" if names else ""),
    )


def _wanted(given: str, root: Path) -> Wanted:
    """Return what one argument means: `NAME=…` or not, a run's folder or an adapter's, or a spec of the registry."""
    from lora_tune.serving import sources

    name, equals, spec = given.partition("=")
    if not equals or not re.fullmatch(NAME_PATTERN, name):
        name, spec = "", given
    run = Path(spec) / "adapter"
    if (run / "adapter_config.json").is_file():
        spec = f"{run}/"
    found = sources.find(spec, root=root, name=name or None, allow_outside=True)
    if found.number is None and not name:
        # A run's adapter is in the registry too: then its version says more than a folder does.
        try:
            spec = shelf.find_version(f"{found.name}@sha256:{found.digest}", root=root).spec
        except LoraTuneError:
            pass
        else:
            found = sources.find(spec, root=root, name=None, allow_outside=True)
    alias = spec if spec in shelf.aliases(root) else None
    return Wanted(given, spec, name or None, found, alias)


def load_wanted(fleet: Any, wanted: Sequence[Wanted], *, started: Path) -> list[str]:
    """Load the adapters and point their names to them; return in words where a name was left as it is.

    A server that starts again with the same command must not undo what was promoted while it ran. So a name that no
    longer means what the last start gave it stays, and its adapter is loaded beside.

    Args:
        fleet: restored.
        wanted: of the command line.
        started: a file that holds what each name meant when the server started last.
    """
    before = _read_started(started)
    words = []
    for adapter in wanted:
        names = [adapter.found.name, *([adapter.alias] if adapter.alias else [])]
        moved = [name for name in names if _moved(fleet, name, before.get(name))]
        version = fleet.load(adapter.spec, name=adapter.name, point=names[0] not in moved, allow_outside=True)
        for name in names:
            means = _meaning(fleet, name)
            if name in moved and means != version.id:
                words.append(
                    f"{name} still means {means}, as it was changed while the server ran; the command line's {version.id} "
                    f"is loaded beside it, and PUT /v1/aliases/{name} points there"
                )
            elif name == adapter.alias and means != version.id:
                fleet.point(name, target=version.id)
            if name not in moved or means == version.id:
                before[name] = version.id
        write_file(started, json.dumps(before, sort_keys=True))
    return words


def _meaning(fleet: Any, name: str) -> str | None:
    """Return the version that a name means; of a split all of them; None for an unknown name."""
    pointer = fleet.pointers().get(name)
    return None if pointer is None else " and ".join(id for id, _ in pointer.target)


def _moved(fleet: Any, name: str, before: str | None) -> bool:
    """Return whether a name means something else than what the last start gave it."""
    now = _meaning(fleet, name)
    return now is not None and now != before


def _read_started(path: Path) -> dict[str, str]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(id) for name, id in held.items()} if isinstance(held, dict) else {}


def _first_model(fleet: Any, wanted: Sequence[Wanted], follow: Sequence[str]) -> str:
    """Return what a first request would ask: the first adapter of the command line, else the base."""
    served = set(fleet.names())
    asked = [*(adapter.found.name for adapter in wanted), *follow]
    return next((name for name in asked if name in served), str(fleet.base.name))


def _served(fleet: Any) -> dict[str, Any]:
    pointers = fleet.pointers().values()
    adapters = [
        {
            "id": version.id,
            "name": version.name,
            "verdict": version.verdict,
            "aliases": sorted(p.alias for p in pointers if version.id in {id for id, _ in p.target}),
        }
        for version in fleet.versions()
    ]
    return {"adapters": adapters, "models": fleet.names()}
