"""Every shipped recipe checks and trains; every command of the README runs."""

import re
import shlex
from pathlib import Path

import pytest

from lora_tune.cli.app import run
from lora_tune.model.resolve import locate, write_complete
from lora_tune.recipe.loader import load_recipe
from lora_tune.recipe.schema import BaseSection
from tests.tiny import save_tiny_base

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """Return every command in a page's sh blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def tiny_builtin(tmp_path_factory):
    """A cache in which the built-in base's place holds a tiny one, so that commands run as printed, in seconds."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LORA_TUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    folder = locate(BaseSection(name="builtin:smollm2-135m")).path
    folder.mkdir(parents=True)
    write_complete(save_tiny_base(folder))
    yield
    patch.undo()


def test_the_recipes_are_seen():
    assert len(RECIPES) >= 7
    names = {path.stem for path in RECIPES}
    assert {"quickstart", "quickstart-qlora"} <= names
    for size in ("8gb", "16gb", "24gb", "48gb"):
        assert any(size in name for name in names), size


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_checks_and_says_what_it_is_for(path):
    assert run(["check", str(path)]) == 0
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert len(header) >= 2
    assert any("emory" in line for line in header)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains_two_steps_on_a_tiny_base(path, tmp_path, tiny_bases):
    base = tiny_bases("gpt2" if "gpt2" in path.stem else "llama")
    sets = [
        f"base.name={base}",
        "train.max_steps=2",
        "eval.generate_rows=2",
        "eval.generate=4",
        "train.gradient_accumulation_steps=1",
    ]
    arguments = ["train", str(path), "--run-dir", str(tmp_path / "run"), "--registry", str(tmp_path / "r")]
    assert run([*arguments, *(part for setting in sets for part in ("--set", setting))]) == 0


def test_the_first_result_stands_by_line_25():
    lines = README.splitlines()
    assert lines.index("make quickstart") < 15
    assert next(i for i, line in enumerate(lines) if "exact match" in line) < 25


def test_every_command_of_the_readme_runs(tiny_builtin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # `make quickstart` itself is tests/e2e/test_quickstart_slow.py; here its first command stands for it.
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    assert run(["train", "recipes/quickstart.yaml", "--set", "train.max_steps=2", "--set", "eval.generate_rows=1"]) == 0
    found = commands(README)
    assert ["make", "quickstart"] in found
    # `serve` goes on until it is ended: tests/e2e/test_serve.py runs it as a process of its own.
    ran = [command for command in found if command[0] == "lora-tune" and command[1] != "serve"]
    assert len(ran) >= 9
    for command in ran:
        assert run(command[1:]) == 0, command


def test_the_recipe_in_the_readme_is_right(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "home.jsonl").write_bytes((ROOT / "recipes" / "data" / "home.jsonl").read_bytes())
    (tmp_path / "r.yaml").write_text(text)
    assert load_recipe(tmp_path / "r.yaml").recipe.base.quantization == "nf4"


def test_every_verb_the_readme_names_exists():
    for verb in ("check", "preview", "train", "eval", "chat", "serve", "merge", "schema", "recipes", "adapters"):
        assert run([verb, "--help"]) == 0


def test_no_training_sentence_is_held_out():
    import json

    def sentences(name: str) -> list[str]:
        rows = [json.loads(line) for line in (ROOT / "recipes" / "data" / name).read_text().splitlines()]
        return [re.sub(r"[^a-z0-9 ]", "", row["messages"][1]["content"].lower()) for row in rows]

    train, held_out = sentences("home.jsonl"), sentences("home.heldout.jsonl")
    assert len(train) >= 300
    assert not set(train) & set(held_out)
    assert len(set(train + held_out)) == len(train) + len(held_out)
