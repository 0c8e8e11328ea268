"""How fast rows are linted and tokenized, in how much memory, beside TRL's own preparation of the same rows.

Usage: python scripts/bench_data.py [--rows 1000000] [--trl-rows 20000] [--base DIR]

Each part runs in a process of its own, one after the other: lint (`check`), lint and tokens (`check --tokens`, an empty
cache), the same again from the cache, then TRL's SFTTrainer preparing the first rows as prompt-completion pairs, as its
documentation has it. The last line ends with `ratio N.NN`: our tokens a second over TRL's.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOMS = ("kitchen", "hall", "garage", "office", "attic", "cellar", "bathroom", "nursery")
DEVICES = ("lights", "radio", "door", "blinds", "heating", "fan", "oven", "camera")
ASKED = (
    "turn {a} the {d} in the {r}",
    "please switch the {d} {a}, I am in the {r}",
    "{r}: {d} {a}",
    "could you get the {d} {a} in the {r}?",
)


def write_rows(path: Path, count: int) -> None:
    """Write short chat rows, no two alike, from one seed."""
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as out:
        for number in range(count):
            room, device, action = chance.choice(ROOMS), chance.choice(DEVICES), chance.choice(("on", "off"))
            asked = chance.choice(ASKED).format(a=action, d=device, r=room)
            answer = json.dumps({"device": device, "room": room, "action": action, "id": number})
            row = [{"role": "user", "content": f"{asked} #{number}"}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"prompt": row[:1], "completion": row[1:]}) + "\n")


def lint(path: Path, _base: Path) -> dict[str, float]:
    """Check the rows without tokens."""
    from lora_tune.data.verdict import check_rows
    from lora_tune.recipe.schema import DataSection

    start = time.perf_counter()
    checked = check_rows(DataSection(path=str(path)), seed=0)
    return {"rows": checked.n_train, "seconds": time.perf_counter() - start}


def tokens(path: Path, base: Path) -> dict[str, float]:
    """Check and tokenize the rows."""
    from transformers import AutoTokenizer

    from lora_tune.data.dataset import prepare_dataset
    from lora_tune.recipe.schema import DataSection

    tokenizer = AutoTokenizer.from_pretrained(base)
    start = time.perf_counter()
    splits = prepare_dataset(DataSection(path=str(path)), tokenizer, seed=0)
    seconds = time.perf_counter() - start
    return {"rows": len(splits.train.rows), "tokens": splits.train.counts.tokens, "seconds": seconds}


def trl(path: Path, base: Path) -> dict[str, float]:
    """Let TRL prepare the rows, with its defaults; the model is tiny, it is only there because TRL wants one."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    rows = load_dataset("json", data_files=str(path), split="train")
    settings = SFTConfig(
        str(path.parent / "trl"), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    start = time.perf_counter()
    trainer = SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
    seconds = time.perf_counter() - start
    return {"rows": len(rows), "tokens": sum(map(len, trainer.train_dataset["input_ids"])), "seconds": seconds}


PARTS = {"lint": lint, "tokens": tokens, "again": tokens, "trl": trl}


def run_part(name: str, path: Path, base: Path, cache: Path) -> dict[str, float]:
    """Run one part in a process of its own and return its figures with its peak memory."""
    environment = os.environ | {
        "LORA_TUNE_CACHE": str(cache), "HF_DATASETS_CACHE": str(cache / "datasets"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, __file__, "--part", name, "--path", str(path), "--base", str(base)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(name: str, found: dict[str, float]) -> None:
    """Print one line of figures."""
    rate = f"{found['rows'] / found['seconds']:>10,.0f} rows/s"
    rate += f"{found['tokens'] / found['seconds']:>14,.0f} tokens/s" if "tokens" in found else " " * 23
    print(
        f"{name:<28}{found['rows']:>10,} rows{found['seconds']:>9.1f} s{rate}{found['peak_memory_gib']:>8.2f} GiB",
        flush=True,
    )


def main() -> None:
    """Run every part in turn."""
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--rows", type=int, default=1_000_000)
    cli.add_argument("--trl-rows", type=int, default=20_000)
    cli.add_argument("--base", type=Path, help="folder with a tokenizer; default the built-in base")
    cli.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    cli.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    asked = cli.parse_args()
    if asked.part:
        found = PARTS[asked.part](asked.path, asked.base)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({**found, "peak_memory_gib": peak}))
        return
    base = asked.base
    if base is None:
        from lora_tune.model.dense import ready_base
        from lora_tune.recipe.schema import BaseSection

        base = ready_base(BaseSection(name="builtin:smollm2-135m"), lambda label, share: None).folder
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder, "rows.jsonl"), Path(folder, "few.jsonl")
        write_rows(large, asked.rows)
        write_rows(small, asked.trl_rows)
        cache = Path(folder, "cache")
        show("lint, a fiftieth of the rows", run_part("lint", small, base, cache))
        show("lint", run_part("lint", large, base, cache))
        show("lint + tokens, the fiftieth", run_part("tokens", small, base, cache))
        ours = run_part("tokens", large, base, cache)
        show("lint + tokens", ours)
        show("from the cache", run_part("again", large, base, cache))
        theirs = run_part("trl", small, base, cache)
        show("TRL's preparation", theirs)
    ratio = (ours["tokens"] / ours["seconds"]) / (theirs["tokens"] / theirs["seconds"])
    print(f"tokens a second, ours over TRL's: ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
