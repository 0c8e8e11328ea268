"""A vLLM of our own: found, started with what was asked, and surely ended."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from lora_tune.errors import (
    UnreachableError,
    UnsupportedError,
)
from lora_tune.serving import vllm_child
from lora_tune.serving.vllm import start_vllm
from lora_tune.serving.vllm_child import ChildLimits, VllmInstall, child_environment, find_vllm, serve_command
from tests.unit import test_vllm_engine
from tests.unit.test_vllm_engine import LIMITS, adapter, ask, begin, ignore
from tests.vllm_stand_in import until

base = test_vllm_engine.base

STAND_IN = Path(__file__).parents[1] / "vllm_stand_in.py"


@pytest.fixture
def install(tmp_path):
    """A python that says which vLLM it has, and serves as the stand-in does."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in\n*importlib.metadata*) echo 0.32.0+cpu;;\n'
        f'*) cd {STAND_IN.parents[1]} && exec {sys.executable} -m tests.vllm_stand_in "$@";;\nesac\n'
    )
    python.chmod(0o755)
    return {"LORA_TUNE_VLLM_PYTHON": str(python), "PATH": os.environ["PATH"]}


def processes_of(folder):
    """Ids of processes whose command speaks of the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_a_vllm_of_our_own_is_started_used_and_ended(base, install, tmp_path):
    engine = start_vllm(base, LIMITS, ignore, install)
    folder = engine._child.folder
    try:
        assert folder.stat().st_mode & 0o077 == 0
        engine.load("a--1", adapter(tmp_path / "a"))
        assert ask(engine, key="a--1").finish().reason != "failed"
        assert len(processes_of(folder)) == 2
    finally:
        engine.close()
    assert not folder.exists()
    assert processes_of(folder) == []


def test_a_vllm_that_dies_amid_an_answer_fails_it_and_what_comes_after(base, install):
    engine = start_vllm(base, LIMITS, ignore, install)
    try:
        _, listener = begin(engine, max_tokens=40, ignore_end=True)
        assert until(lambda: len(listener.tokens) >= 2)
        (server,) = [pid for pid in processes_of(engine._child.folder) if pid != engine._child._keeper.pid]
        os.kill(server, signal.SIGKILL)
        assert isinstance(listener.finish().error, UnreachableError)
        assert until(lambda: "has ended" in str(ask(engine).finish().error))
        assert not engine.can_answer()
    finally:
        engine.close()
    assert processes_of(engine._child.folder) == []


def test_a_vllm_that_does_not_start_is_told_with_its_reason(base, install, monkeypatch):
    made = []
    monkeypatch.setattr(
        vllm_child, "_private_folder", lambda make=vllm_child._private_folder: made.append(make()) or made[-1]
    )
    with pytest.raises(UnreachableError, match="Engine core initialization failed") as caught:
        start_vllm(base, LIMITS, ignore, install | {"LORA_TUNE_VLLM_ARGS": "--fail"})
    # The first error, not a warning that speaks of one.
    assert "ValueError: Available memory" in caught.value.message.splitlines()[1]
    assert "OSError" not in caught.value.message
    assert not made[0].exists()


def test_a_vllm_does_not_outlive_us_however_we_end(base, install, tmp_path):
    program = tmp_path / "owner.py"
    program.write_text(
        "import os, sys, time\n"
        "from tests.unit.test_vllm_engine import LIMITS, ignore\n"
        "from lora_tune.serving.vllm_child import VllmChild, find_vllm\n"
        "from types import SimpleNamespace as N\n"
        "from pathlib import Path\n"
        "base = N(section=N(quantization='none', dtype='fp32'), files=N(folder=Path('.')), max_context_tokens=64)\n"
        f"env = {install!r}\n"
        "child = VllmChild(find_vllm(env), base, LIMITS, env)\n"
        "child.wait_until_up(ignore)\n"
        "print(child.folder, flush=True)\n"
        "time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True, cwd=STAND_IN.parents[1],
                             env=os.environ | {"PYTHONPATH": str(STAND_IN.parents[1])})  # fmt: skip
    with owner:
        folder = owner.stdout.readline().strip()
        assert Path(folder, "socket").exists()
        assert len(processes_of(folder)) == 2
        owner.send_signal(signal.SIGKILL)
    assert until(lambda: processes_of(folder) == [] and not Path(folder).exists())


def test_a_missing_vllm_is_said_with_how_to_get_it(tmp_path):
    environment = {"PATH": str(tmp_path)}
    for named in ({}, {"LORA_TUNE_VLLM_PYTHON": str(tmp_path / "nothing")}):
        with pytest.raises(UnreachableError) as caught:
            find_vllm(environment | named)
        assert "pip install vllm" in caught.value.hint
        assert caught.value.exit_code == 69


def test_the_command_serves_the_base_as_it_was_asked(base):
    install = VllmInstall(Path("/v/bin/python"), "0.32.0")
    command = serve_command(
        install, base, ChildLimits(20, 20, 8), socket=Path("/s"), more=["--tensor-parallel-size", "4"]
    )
    flags = dict(pairwise(command))
    assert flags["serve"] == str(base.files.folder)
    assert {"--max-lora-rank": "32", "--max-loras": "8", "--max-cpu-loras": "20", "--max-num-seqs": "8", "--dtype": "float32",
            "--max-model-len": "48", "--generation-config": "vllm", "--tensor-parallel-size": "4"}.items() <= flags.items()  # fmt: skip
    assert not {"--enforce-eager", "--gpu-memory-utilization"} & set(command)
    on_cpu = serve_command(replace(install, version="0.32.0+cpu"), base, LIMITS, socket=Path("/s"))
    assert dict(pairwise(on_cpu))["--gpu-memory-utilization"] == "0.5"
    assert "--enforce-eager" in serve_command(replace(install, version="0.32.0+cpu"), base, LIMITS, socket=Path("/s"))
    for change, limits in (({"quantization": "int8"}, LIMITS), ({}, replace(LIMITS, max_rank=513))):
        asked = replace(base, section=base.section.model_copy(update=change))
        with pytest.raises(UnsupportedError):
            serve_command(install, asked, limits, socket=Path("/s"))


def test_the_child_sees_no_keys_of_ours(base):
    given = {
        "LORA_TUNE_API_KEY": "a",
        "LORA_TUNE_ADMIN_KEY": "b",
        "HF_TOKEN": "c",
        "VLLM_LORA_RESOLVER_CACHE_DIR": "d",
        "PATH": "p",
    }
    seen = child_environment(given, "own")
    assert (seen["PATH"], seen["VLLM_API_KEY"], seen["HF_HUB_OFFLINE"]) == ("p", "own", "1")
    assert not set(seen.values()) & {"a", "b", "c", "d"}
