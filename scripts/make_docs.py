"""Write docs/reference/ from the code: recipe settings, verbs, exit codes.

Usage: python scripts/make_docs.py [--check]    --check writes nothing and exits 1 if a page is not what the code says.
"""

import argparse
import subprocess
import sys
import typing
from pathlib import Path

from lora_tune import errors
from lora_tune.recipe.schema import SECTIONS, MixedSet, Recipe

ROOT = Path(__file__).resolve().parents[1]
VERBS = [[], ["check"], ["preview"], ["train"], ["eval"], ["chat"], ["serve"], ["merge"], ["export"], ["doctor"], ["schema"], ["recipes", "ls"], ["recipes", "show"],
         ["recipes", "cp"], *(["adapters", verb] for verb in ("list", "inspect", "verify", "lint", "promote", "rollback", "remove", "import", "export", "compose", "resize",
                                  "fold", "push")), *(["runs", verb] for verb in ("list", "show", "compare", "report"))]  # fmt: skip


def recipe_page() -> str:
    """Return every setting with type, default, limits and meaning."""
    lines = [
        "# The recipe",
        "",
        "Generated from `lora_tune/recipe/schema.py` by `make docs`. A default of – means: required.",
        "",
    ]
    lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
    lines.append(f"| `version` | `1` | `1` | {Recipe.model_fields['version'].description} |")
    for name, section in SECTIONS.items():
        lines += [
            "",
            f"## {name}",
            "",
            (section.__doc__ or "").strip(),
            "",
            "| setting | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for key, field in section.model_fields.items():
            default = "–" if field.is_required() else f"`{_default(field.get_default(call_default_factory=True))}`"
            lines.append(f"| `{name}.{key}` | {_type(section, key)} | {default} | {_line(field.description)} |")
            if key == "mix":
                inner = [f"`{name}`: {_line(field.description)}" for name, field in MixedSet.model_fields.items()]
                lines.append(f"| `{name}.mix[…]` | | | {'<br>'.join(inner)} |")
    return "\n".join(lines) + "\n"


def _default(value: object) -> str:
    return "null" if value is None else "[]" if value == () else str(value)


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def _type(section: type, key: str) -> str:
    schema = section.model_json_schema()["properties"][key]
    return " or ".join(_one_type(part) for part in schema.get("anyOf", [schema]))


def _one_type(schema: dict[str, typing.Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "$ref" in schema:
        return "settings"
    if "const" in schema:
        return f"`{schema['const']}`"
    names = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
        "array": "list",
        "object": "names to names",
    }
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[word]:g}" for word, sign in signs.items() if word in schema]
    return " ".join([names[schema["type"]], *([f"({', '.join(limits)})"] if limits else [])])


def verbs_page() -> str:
    """Return each verb's --help."""
    lines = ["# Verbs", "", "Generated from `lora-tune … --help` by `make docs`.", ""]
    for verb in VERBS:
        shown = subprocess.run(
            [sys.executable, "-m", "lora_tune.cli.app", *verb, "--help"], capture_output=True, text=True, check=True,
            env={"COLUMNS": "100", "PATH": "/usr/bin:/bin", "NO_COLOR": "1", "TERM": "dumb", "HOME": "/"},
        ).stdout  # fmt: skip
        title = " ".join(["lora-tune", *verb])
        lines += [
            f"## {title}",
            "",
            "```text",
            "\n".join(line.rstrip() for line in shown.strip().splitlines()),
            "```",
            "",
        ]
    return "\n".join(lines)


def exit_codes_page() -> str:
    """Return exit codes by class of error."""
    lines = [
        "# Exit codes",
        "",
        "Generated from `lora_tune/errors.py` by `make docs`.",
        "",
        "| exit | code in `--json` | meaning |",
        "|---|---|---|",
    ]
    lines.append("| 0 | – | ok |")
    classes = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LoraTuneError)
    ]
    for kind in sorted(classes, key=lambda kind: (kind.exit_code, kind.code)):
        meaning = "our bug; please report it" if kind is errors.LoraTuneError else (kind.__doc__ or "").strip()
        lines.append(f"| {kind.exit_code} | `{kind.code}` | {meaning} |")
    lines.append("| 130 | – | interrupted with Ctrl-C; nothing was exported |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write or check the pages."""
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("--check", action="store_true")
    check = cli.parse_args().check
    pages = {"recipe.md": recipe_page(), "verbs.md": verbs_page(), "exit-codes.md": exit_codes_page()}
    stale = []
    for name, text in pages.items():
        path = ROOT / "docs" / "reference" / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"docs/reference is stale: {', '.join(stale)}; run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
