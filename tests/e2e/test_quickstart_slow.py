"""The figures of the quickstart on the real base, from a fresh clone: slow, and it needs the package index."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def _environment(cache: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("LORA_TUNE")}
    return kept | {"LORA_TUNE_CACHE": str(cache)}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "repo")], check=True)
    return folder / "repo"


def test_make_quickstart_from_nothing(clone, tmp_path_factory):
    done = subprocess.run(
        ["make", "quickstart", f"PYTHON={sys.executable}"], cwd=clone, capture_output=True, text=True, check=False,
        env=_environment(tmp_path_factory.mktemp("cache")),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert '{"device": "lights", "room": "kitchen", "action": "set", "value": 40}' in done.stdout.splitlines()
    (report,) = (clone / "runs").glob("*/report.json")
    found = json.loads(report.read_text())
    assert found["evaluation"]["base"]["exact_match"] <= 0.05
    assert found["evaluation"]["adapter"]["exact_match"] >= 0.95
    assert found["adapter"]["weights_bytes"] <= 1.05 * found["adapter"]["parameter_bytes"]


def test_the_qlora_recipe_on_the_real_base(tmp_path):
    cache = os.environ.get("LORA_TUNE_REAL_CACHE") or str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "scripts/bench_quickstart.py", "--recipe", "quickstart-qlora"], cwd=ROOT, capture_output=True, text=True,
        check=True, env=_environment(Path(cache)),
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["exact_match_adapter"] >= 0.90
    assert found["verify_in_a_new_process"]["verdict"] == "equal"
