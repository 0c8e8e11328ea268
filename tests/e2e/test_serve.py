"""`lora-tune serve` as a process of its own: from its first line to the end of its last answer."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

import httpx
import openai
import pytest

from lora_tune.adapter import registry
from lora_tune.adapter.door import open_adapter
from lora_tune.adapter.live import open_live
from lora_tune.cli.app import run
from lora_tune.data.messages import Message
from lora_tune.data.tokens import prompt_ids
from lora_tune.model.generate import generate_answers, stop_ids
from tests.engines import write_adapter
from tests.live_api import until

ASKED = "turn on the lights in the hall"
N_TOKENS = 12
ADMIN, KEY = "admin-key-of-this-test", "api-key-of-this-test"
LIMIT_SECONDS = 120


class Served:
    """A server in a process of its own."""

    def __init__(self, log, *arguments, **environment):
        command = [sys.executable, "-m", "lora_tune.cli.app", "serve", *map(str, arguments), "--port", "0", "--json"]
        self._log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
            )  # fmt: skip
        line = self.process.stdout.readline()
        assert line, log.read_text()
        self.ready = json.loads(line)
        assert self.ready.get("event") == "ready", self.ready
        self.http = httpx.Client(base_url=self.ready["url"], timeout=LIMIT_SECONDS)
        self.client = openai.OpenAI(
            base_url=f"{self.ready['url']}/v1", api_key=KEY, timeout=LIMIT_SECONDS, max_retries=0
        )

    def admin(self, method, path, body=None):
        """Ask as the operator."""
        return self.http.request(method, path, json=body, headers={"Authorization": f"Bearer {ADMIN}"})

    def say(self, model, **more):
        """Return who answered, and what."""
        found = self.client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": ASKED}], **{"temperature": 0, "max_tokens": N_TOKENS, **more}
        )  # fmt: skip
        return found.model, found.choices[0].message.content

    def stop(self, kind):
        """Send a signal and return the exit code."""
        self.process.send_signal(kind)
        code = self.process.wait(LIMIT_SECONDS)
        self.close()
        return code

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.http.close()
        self.client.close()

    @property
    def said(self):
        """What it has written to stderr."""
        return self._log.read_text()


@pytest.fixture
def serving(tmp_path):
    """Return a function that starts a server; all are gone at the end."""
    with contextlib.ExitStack() as stack:

        def start(*arguments, **environment):
            served = Served(tmp_path / "stderr", *arguments, **environment)
            stack.callback(served.close)
            return served

        yield start


@pytest.fixture
def shelf(trained, tmp_path, tiny_bases):
    """A registry with tiny@1, which was trained, and tiny@2, which has random weights and no passport."""
    root = tmp_path / "adapters"
    shutil.copytree(trained / "adapters", root)
    registry.add(write_adapter(tmp_path / "second", tiny_bases(), seed=5), "tiny", root=root)
    return root


def alone(adapter_folder, base):
    """Return what transformers' generate answers with the adapter on its base."""
    files = open_adapter(adapter_folder)
    live = open_live(files, lambda *_: None, base_name=str(base))
    system = files.manifest.data.system_message if files.manifest else None
    turns = [*([Message("system", system)] if system else []), Message("user", ASKED)]
    ids = prompt_ids(live.tokenizer, turns)
    ends = stop_ids(live.model, live.tokenizer)
    answer = generate_answers(live.model, live.tokenizer, [ids], max_tokens=N_TOKENS, ends=ends)[0]
    return live.tokenizer.decode(answer, skip_special_tokens=True)


def test_served_swapped_followed_drained(serving, shelf, tiny_bases):
    registry.promote("tiny@1", "prod", root=shelf)
    asked = ("tiny@1", "--follow", "prod", "--registry", shelf)
    server = serving(*asked, LORA_TUNE_API_KEY=KEY, LORA_TUNE_ADMIN_KEY=ADMIN)
    assert server.ready["engine"] == "native"
    (adapter,) = server.ready["adapters"]
    assert adapter == {"id": "tiny@1", "name": "tiny", "verdict": "equal", "aliases": ["prod", "tiny"]}
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/ready").status_code == 401
    assert server.admin("GET", "/ready").status_code == 200
    first, second = (alone(shelf / "tiny" / number, tiny_bases()) for number in ("1", "2"))
    assert first != second
    base = server.ready["base"]
    assert {base, "tiny", "tiny@1"} <= {model.id for model in server.client.models.list()}
    assert server.say("tiny") == ("tiny@1", first)
    assert server.say(base)[0] == base
    with pytest.raises(openai.NotFoundError):
        server.say("tinny")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.ready['url']}/v1", api_key="wrong", max_retries=0).models.list()
    # Another version comes in beside the first, then takes its place, then gives it back.
    loaded = server.admin("POST", "/v1/adapters", {"source": "tiny@2", "point": False})
    assert (loaded.status_code, loaded.json()["verdict"]) == (201, "unverified")
    assert server.say("tiny") == ("tiny@1", first)
    assert server.say("tiny@2") == ("tiny@2", second)
    assert server.admin("PUT", "/v1/aliases/tiny", {"target": "tiny@2"}).status_code == 200
    assert server.say("tiny") == ("tiny@2", second)
    assert server.admin("POST", "/v1/aliases/tiny/rollback").status_code == 200
    assert server.say("tiny") == ("tiny@1", first)
    # The registry's alias is followed.
    assert server.say("prod") == ("tiny@1", first)
    registry.promote("tiny@2", "prod", root=shelf)
    assert until(lambda: server.say("prod", max_tokens=1)[0] == "tiny@2", 20)
    # What is being answered when the signal comes is answered to its end.
    stream = server.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": ASKED}], stream=True, max_tokens=200, extra_body={"ignore_eos": True},
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = [next(stream)]
    server.process.send_signal(signal.SIGTERM)
    chunks += stream
    assert chunks[-1].usage.completion_tokens == 200
    assert server.process.wait(LIMIT_SECONDS) == 0
    assert "Traceback" not in server.said
    assert "Warning" not in server.said
    assert ASKED not in server.said
    assert KEY not in server.said


@pytest.mark.slow
def test_what_was_promoted_outlives_a_kill(serving, shelf, trained, tiny_bases):
    """Also when the command line names the version from before: a restart is no rollback."""
    command = (trained / "run", "--registry", shelf, "--engine", "simple")
    server = serving(*command, LORA_TUNE_ADMIN_KEY=ADMIN)
    # The run's adapter is in the registry, and called by its version there.
    assert [adapter["id"] for adapter in server.ready["adapters"]] == ["tiny@1"]
    assert server.ready["warnings"] == []
    assert server.admin("POST", "/v1/adapters", {"source": "tiny@2"}).status_code == 201
    assert server.admin("PUT", "/v1/aliases/blue", {"target": "tiny@1"}).status_code == 200
    threading.Timer(0.2, lambda: server.process.send_signal(signal.SIGKILL)).start()
    with pytest.raises(openai.APIConnectionError):
        server.say("tiny", max_tokens=400, extra_body={"ignore_eos": True})
    assert server.process.wait(LIMIT_SECONDS) == -signal.SIGKILL

    again = serving(*command, LORA_TUNE_ADMIN_KEY=ADMIN)
    assert again.say("tiny") == ("tiny@2", alone(shelf / "tiny" / "2", tiny_bases()))
    assert again.say("blue") == ("tiny@1", alone(shelf / "tiny" / "1", tiny_bases()))
    (warning,) = again.ready["warnings"]
    assert "tiny still means tiny@2" in warning
    assert again.admin("POST", "/v1/aliases/tiny/rollback").status_code == 200
    assert again.stop(signal.SIGINT) == 0

    once_more = serving(*command)
    assert once_more.ready["warnings"] == []
    assert once_more.say("tiny")[0] == "tiny@1"
    assert once_more.admin("GET", "/v1/adapters").status_code == 403


@pytest.mark.slow
def test_a_server_of_one_alias_follows_it(serving, shelf, tmp_path):
    registry.promote("tiny@1", "prod", root=shelf)
    server = serving("--follow", "prod", "--registry", shelf, "--state", tmp_path / "state.jsonl")
    assert server.ready["model"] == "prod"
    assert server.say("prod")[0] == "tiny@1"
    registry.promote("tiny@2", "prod", root=shelf)
    for _ in range(200):
        if server.say("prod", max_tokens=1)[0] == "tiny@2":
            break
        threading.Event().wait(0.1)
    assert server.say("prod")[0] == "tiny@2"


def test_a_taken_port_is_told_before_the_base_is_loaded(shelf, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["serve", "tiny@1", "--registry", str(shelf), "--port", str(port)]) == 73
    said = capsys.readouterr()
    assert str(port) in said.err
    assert "loading" not in said.err
    assert not (shelf / "serving").exists()
