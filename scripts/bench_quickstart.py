"""Measure the quickstart recipes on this machine: time, memory, held-out figures, reload, merge, repeatability.

Usage: python scripts/bench_quickstart.py [--recipe quickstart quickstart-qlora] [--twice]
Each recipe is trained as a whole process into a folder of its own. --twice trains the first one again and compares
digests. Prints one JSON line a recipe.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LORA_TUNE = str(Path(sys.executable).parent / "lora-tune")


def measure(recipe: str, folder: Path) -> dict[str, object]:
    """Train one recipe and return its figures."""
    run, registry = folder / "run", folder / "adapters"
    start = time.monotonic()
    subprocess.run(
        [LORA_TUNE, "train", f"recipes/{recipe}.yaml", "--run-dir", run, "--registry", registry],
        cwd=ROOT,
        check=True,
        stdout=sys.stderr,
    )
    seconds = time.monotonic() - start
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    verified = _json("adapters", "verify", str(run / "adapter"))
    found = {
        "recipe": recipe,
        "seconds": round(seconds, 1),
        "training_seconds": round(report["training"]["seconds"], 1),
        "checkpoint_seconds": report["training"]["checkpoint_seconds"],
        "checkpoint_share": round(report["training"]["checkpoint_seconds"] / report["training"]["seconds"], 4),
        "tokens_per_second": round(report["training"]["tokens_per_second"], 1),
        "peak_memory_gib": round(report["training"]["peak_memory_gib"], 2),
        "exact_match_base": report["evaluation"]["base"]["exact_match"],
        "exact_match_adapter": report["evaluation"]["adapter"]["exact_match"],
        "file_over_weights": round(report["adapter"]["weights_bytes"] / report["adapter"]["parameter_bytes"], 4),
        "weights_digest": report["adapter"]["weights_digest"],
        "verify_in_a_new_process": {key: verified[key] for key in ("verdict", "max_abs_delta")},
    }
    if "qlora" not in recipe:
        found["merge"] = _json("merge", str(run / "adapter"), str(folder / "merged"))
    return found


def _json(*command: str) -> dict[str, object]:
    done = subprocess.run([LORA_TUNE, *command, "--json"], cwd=ROOT, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def main() -> int:
    """Measure and print."""
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("--recipe", nargs="+", default=["quickstart", "quickstart-qlora"])
    cli.add_argument("--twice", action="store_true")
    given = cli.parse_args()
    digests = []
    for recipe in [*given.recipe, *(given.recipe[:1] if given.twice else [])]:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(recipe, Path(folder))
        digests.append(found["weights_digest"])
        print(json.dumps(found), flush=True)
    if given.twice:
        print(json.dumps({"same_weights_digest_twice": digests[0] == digests[-1]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
