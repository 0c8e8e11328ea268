"""The map shows every file, and every file has its layer."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    path.relative_to(ROOT / "lora_tune").as_posix() for path in (ROOT / "lora_tune").rglob("*.py") if path.name != "__init__.py"
)  # fmt: skip


def test_every_file_is_on_the_map_and_the_map_has_no_other():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = [line.split("`")[1] for line in page.splitlines() if line.startswith("| ") and "`" in line]
    assert sorted(named) == MODULES


def test_every_file_has_a_layer():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    held = [part.strip() for layer in layers for part in layer.replace("|", ":").split(":")]
    for module in MODULES:
        name = "lora_tune." + module.removesuffix(".py").replace("/", ".")
        assert any(name == part or name.startswith(f"{part}.") for part in held), name


def test_files_and_functions_stay_short():
    import ast

    for module in MODULES:
        text = (ROOT / "lora_tune" / module).read_text(encoding="utf-8")
        assert text.count("\n") <= 400, module
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 60, f"{module}:{node.name}"
