"""From training to an answer of the server, no process looks for a network; seen by strace, not by what a library promises."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request

import pytest

from tests.tiny import write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")]
TRACE = ("strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg")


def environment(folder):
    """Return an environment as a user has it: nothing that tests set to keep libraries quiet."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_", "CI"))}
    return {**kept, "LORA_TUNE_CACHE": str(folder / "cache"), "HOME": str(folder), "OMP_NUM_THREADS": "1"}


def attempts(log):
    """Return the lines of a trace that reach for another machine, or ask for a name."""
    away = re.compile(r"sa_family=AF_INET6?.*(?:inet_addr|inet_pton)")
    lines = [line for line in log.read_text().splitlines() if "connect(" in line or "sin_port=htons(53)" in line]
    return [line for line in lines if away.search(line) and not re.search(r'"(127\.0\.0\.1|::1)"', line)]


def test_an_attempt_would_be_seen(tmp_path):
    reach = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))"
    subprocess.run([*TRACE, "-o", str(tmp_path / "trace"), sys.executable, "-c", reach], check=False)
    assert len(attempts(tmp_path / "trace")) == 1


def test_from_training_to_serving_nothing_is_asked_of_the_network(tmp_path, tiny_bases):
    recipe = write_recipe(tmp_path, tiny_bases(), eval={"generate": 4}, train={"save_every_steps": 1})
    command = [sys.executable, "-m", "lora_tune.cli.app"]
    places = ["--registry", str(tmp_path / "adapters")]
    logs = [tmp_path / "train.trace", tmp_path / "serve.trace"]
    subprocess.run(
        [*TRACE, "-o", str(logs[0]), *command, "train", str(recipe), "--run-dir", str(tmp_path / "run"), *places],
        check=True, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    server = subprocess.Popen(
        [*TRACE, "-o", str(logs[1]), *command, "serve", "tiny", "--port", "0", "--json", *places],
        env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        url = json.loads(server.stdout.readline())["url"]
        body = {"model": "tiny", "messages": [{"role": "user", "content": "turn on the radio"}], "max_tokens": 4}
        request = urllib.request.Request(
            f"{url.rstrip('/')}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["choices"]
    finally:
        # strace passes no signal on: end the server itself, which it follows.
        subprocess.run(["pkill", "-TERM", "-P", str(server.pid)], check=False)
        server.wait(30)
        server.stdout.close()
    assert server.returncode in {0, -signal.SIGTERM, 143}
    for log in logs:
        assert log.stat().st_size > 0 or log == logs[0]
        assert attempts(log) == []
