"""A real server on a free port, in a thread of the test: the real app and fleet over the scripted engine."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
from openai import OpenAI

from lora_tune.adapter.shelf import content_digest
from lora_tune.serving.api import ApiSettings, DrainingServer, listen, make_app, make_server
from lora_tune.serving.engine import ServedBase
from lora_tune.serving.prompts import encode, render
from lora_tune.serving.swap import Fleet
from tests.fleets import bare_base, fill_registry, opened
from tests.scripted_engine import ScriptedEngine, script
from tests.tiny import tiny_tokenizer

ADMIN = "admin-key-of-the-test"


@dataclass
class Live:
    """The server, and what its answers should be."""

    url: str
    fleet: Fleet
    engine: ScriptedEngine
    base: ServedBase
    server: DrainingServer
    clients: list[OpenAI | httpx.Client] = field(default_factory=list)
    """Closed when the server ends."""

    def http(self, key: str | None = ADMIN, **settings) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers | settings.pop("headers", {}), timeout=20, **settings)

    def openai(self, key: str = "any") -> OpenAI:
        self.clients.append(OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20))
        return self.clients[-1]

    def content(self, model: str) -> str:
        """The digest that the engine's answers come from; the base has none."""
        found = {version.id: version for version in self.fleet.versions()}
        return content_digest(found[model].files) if model in found else ""

    def ids(self, model: str, prompt: str | list, n_tokens: int, *, salt: str = "") -> list[int]:
        """The tokens that answer, from the script."""
        ids = encode(self.base, None, prompt) if isinstance(prompt, str) else render(self.base, None, prompt)
        return script(self.content(model), ids, n_tokens, salt=salt)

    def text(self, model: str, prompt: str | list, n_tokens: int, *, salt: str = "") -> str:
        return self.base.tokenizer.decode(self.ids(model, prompt, n_tokens, salt=salt), skip_special_tokens=True)

    def idle(self) -> bool:
        """Nothing is held, nothing runs."""
        facts = self.engine.facts()
        return not any(self.fleet.in_flight().values()) and facts.n_running == facts.n_waiting == 0


def until(condition: Callable[[], object], seconds: float = 10.0) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return False


@contextmanager
def live(
    folder: Path, settings: ApiSettings | None = None, *, load: tuple[str, ...] = ("home",), **engine
) -> Iterator[Live]:
    """Serve a tiny base and a registry of `home` 1 to 3 and `office` 1; when it ends, nothing may be held or broken."""
    base = replace(bare_base(folder / "base"), tokenizer=tiny_tokenizer())
    root = folder / "registry"
    if not root.exists():
        fill_registry(root, folder, {"home": 3, "office": 1})
    with opened(base, root, **engine) as fleet:
        for spec in load:
            fleet.load(spec)
        settings = settings or ApiSettings(admin_keys=(ADMIN,))
        server = make_server(make_app(fleet, settings), drain_seconds=5.0)
        with listen("127.0.0.1", 0) as taken:
            thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
            thread.start()
            assert until(lambda: server.started)
            running = Live(f"http://127.0.0.1:{taken.getsockname()[1]}", fleet, fleet.engine, base, server)
            yield running
            for client in running.clients:
                client.close()
            assert until(running.idle), "a lease or an answer is left"
            server.should_exit = True
            thread.join(15)
            assert not thread.is_alive()
