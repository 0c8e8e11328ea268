"""Measure how long the verbs that must answer at once take, as whole processes.

Usage: python scripts/bench_start.py [--runs 7]
Prints a line a verb: median, minimum and maximum in milliseconds, and whether torch was imported.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERBS = {"--help": 300, "check recipes/quickstart.yaml": 1000, "recipes ls": 1000, "adapters list": 1000}
"""Verb → the most it may take, in milliseconds."""


def main() -> int:
    """Measure and print."""
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("--runs", type=int, default=7)
    runs = cli.parse_args().runs
    missed = 0
    for verb, bound in VERBS.items():
        command = [str(Path(sys.executable).parent / "lora-tune"), *verb.split()]
        milliseconds = [_once(command) for _ in range(runs + 1)][1:]
        median = statistics.median(milliseconds)
        missed += median > bound
        shown = (
            f"{median:.0f} ms (min {min(milliseconds):.0f}, max {max(milliseconds):.0f}, {runs} runs; bound {bound})"
        )
        print(f"lora-tune {verb}: {shown}, torch {'imported' if _imports_torch(verb) else 'not imported'}")
    return 1 if missed else 0


def _once(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return (time.perf_counter() - start) * 1000


def _imports_torch(verb: str) -> bool:
    code = f"import sys; from lora_tune.cli.app import run; run({verb.split()!r}); sys.exit('torch' in sys.modules)"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True).returncode == 1


if __name__ == "__main__":
    sys.exit(main())
