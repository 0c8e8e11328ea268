"""What `doctor` calls, and how its table is printed."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_tune.cli import render
from lora_tune.cli.verbs import section_of
from lora_tune.cli.visible import visible
from lora_tune.recipe.loader import load_recipe
from lora_tune.recipe.schema import BaseSection, DataSection

Progress = render.Progress
_MARKS = {"ok": "ok", "failed": "FAILED", "warning": "warning", "skipped": "skipped", "info": ""}


def examine(what: str | None, progress: Progress) -> dict[str, Any]:
    """Return what is found about the installed stack, and about the base of a recipe, or a base, if one is named."""
    base, data = _named(what)
    # Before any library is loaded: the doctor is offline even where a hub could be asked.
    os.environ["HF_HUB_OFFLINE"] = "1"
    from lora_tune.doctor.run import examine as diagnose

    return {"base": base.name if base else None, **diagnose(base, data, progress).as_dict()}


def _named(what: str | None) -> tuple[BaseSection | None, DataSection | None]:
    if what is None:
        return None, None
    if what.endswith((".yaml", ".yml")):
        recipe = load_recipe(Path(what), ()).recipe
        return recipe.base, recipe.data
    return section_of(what), None


def diagnosis(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the table: what was measured beside its bound, and a hint under what is not well."""
    if as_json:
        render.json_object(found)
        return
    width = max(len(finding["name"]) for finding in found["findings"])
    for finding in found["findings"]:
        print(
            f"{finding['name']:<{width}}  {_MARKS[finding['verdict']]:<7}  {_figure(finding)}{visible(finding['detail'])}"
        )
        if finding["hint"] and finding["verdict"] != "ok":
            print(f"{'':<{width}}  {'':<7}  hint: {visible(finding['hint'])}")
    counts = found["counts"]
    said = [f"{counts[verdict]} {verdict}" for verdict in ("ok", "failed", "warning", "skipped") if counts[verdict]]
    print(f"{'healthy' if found['ok'] else 'not healthy'}: {', '.join(said)}; {found['seconds']:.0f} s")


def _figure(finding: Mapping[str, Any]) -> str:
    measured, bound = finding["measured"], finding["bound"]
    if measured is None or bound is None:
        return ""
    shown = "no number" if math.isnan(measured) else "infinite" if math.isinf(measured) else format(measured, ".2g")
    return f"{shown} (≤ {bound:g})  "
