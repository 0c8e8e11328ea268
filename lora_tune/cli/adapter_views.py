"""What the `adapters` verbs print: the registry, an engine's verdict, an adapter made from others, a merge."""

import math
import time
from collections.abc import Mapping
from typing import Any

from lora_tune.cli import render
from lora_tune.cli.visible import visible


def adapters(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the registry, and on stderr what may be wrong with it."""
    if found["journal_damage"]:
        render.note(f"note: {found['journal_damage']}")
    if as_json:
        render.json_object(found)
        return
    if not found["adapters"]:
        print(f"no adapters in {found['registry']}/")
    for row in found["adapters"]:
        name = row["adapter"] + (f" ({', '.join(row['aliases'])})" if row["aliases"] else "")
        if "refused" in row:
            print(f"{name:<28} refused: {visible(row['refused'])}")
            continue
        print(
            f"{name:<28} {row['variant']} rank {row['rank']}, {row['bytes'] / 1e6:.1f} MB, {visible(row['base'])} "
            f"({row['quantization']}), {_figure(row['figures'])}{_date(row['added_at'])}, sha256:{row['digest'][:12]}"
        )
    for alias, spec in found["dangling_aliases"].items():
        print(f"{alias:<28} points to {spec}, which is not there; promote another version, or remove the alias")


def portability(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print whether an engine takes an adapter, and what to do if not."""
    if as_json:
        render.json_object(found)
        return
    verdicts = {
        "loads": f"{found['engine']} loads it and answers as it was trained",
        "wrong": f"{found['engine']} loads it, and answers otherwise than it was trained",
        "refused": f"{found['engine']} does not load it",
    }
    print(f"{found['adapter']}: {verdicts[found['verdict']]}")
    for reason in found["reasons"]:
        print(
            f"  {reason['level']}: {reason['what']}\n    why: {reason['why']} [{reason['source']}]\n    do: {reason['what_to_do']}"
        )


def derived(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print an adapter that was made from others, and how far it is from them."""
    if as_json:
        render.json_object(found)
        return
    parents = ", ".join(f"{parent['weight']:g} × {visible(parent['name'])}" for parent in found["made_from"]["parents"])
    print(f"{found['adapter']}  ({found['folder']}): {found['made_from']['method']} of {parents}, rank {found['rank']}")
    print(
        f"  norm kept {found['norm_kept']:.2%}; against the exact sum on the golden prompts: KL divergence {found['kl']:.3g} "
        f"nats a token, same likeliest token {found['top1_agreement']:.1%}"
    )
    if not found["verified"]:
        print("  unverified: none of its parents has a passport")


def _figure(figures: Mapping[str, float]) -> str:
    exact = figures.get("held_out_exact_match")
    if exact is not None:
        return f"exact match {exact:.1%}"
    loss = figures.get("train_loss", math.nan)
    return "no figures" if math.isnan(loss) else f"loss {loss:.3f}"


def _date(added_at: float | None) -> str:
    return "" if added_at is None else time.strftime(", %Y-%m-%d", time.localtime(added_at))
