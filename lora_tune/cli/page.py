"""What `check` and `preview` found, as one HTML file that needs nothing else: no script, no font, no request.

Everything that comes from rows is a stranger's text: acting characters become signs here, jinja escapes the rest.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from lora_tune import __version__
from lora_tune.cli.ledger import KEPT, is_mixed, set_name, share
from lora_tune.cli.visible import pieces, visible
from lora_tune.errors import CannotCreateError
from lora_tune.staging import translated, write_file

SHOWN_LABELS = 30
OPEN_ROWS = 3
"""Sample rows that are unfolded when the page opens."""
FIRST_TOKENS, LAST_TOKENS = 2000, 1000
"""A longer row shows so many of its first and last tokens, and says how many are between."""
PLOT_HEIGHT = 160
TICKS = 5
_MARK = '<meta name="generator" content="lora_tune'
"""Stands near the top of every page: only a file that has it is ever replaced."""

_COUNTS = (
    ("rows_read", "Rows read", "", "plain"),
    ("rows_refused", "Refused", "not certain which tokens are trained", "loss"),
    ("rows_dropped", "Dropped", "too long, or nothing trained is left", "loss"),
    ("rows_cut", "Cut", "lost their beginning or end", "loss"),
    ("rows_split", "Split", "became several sequences", "plain"),
    ("rows", "Sequences used", "", "sum"),
    ("tokens", "Tokens", "", "plain"),
    ("trained_tokens", "Trained tokens", "", "sum"),
    ("trained_tokens_lost", "Trained tokens lost", "cut or dropped with their row", "loss"),
    ("answers", "Answers", "", "plain"),
    ("answers_without_end", "Answers without their end", "teach nothing about stopping", "loss"),
    ("longest_tokens", "Longest row, tokens", "before the limit", "plain"),
)  # fmt: skip
"""Count, its name, what it means, and whether it is a loss when it is not 0."""


def write_page(path: Path, text: str) -> None:
    """Write a page; an older page gives way, any other file stays.

    Raises:
        CannotCreateError: as `check_place`.
        CannotWriteError: the disk is full or failing (exit 74).
    """
    check_place(path)
    write_file(path, text)


def check_place(path: Path) -> None:
    """Check that a page can stand at `path`; worth knowing before rows are tokenized for it.

    Raises:
        CannotCreateError: something that is no page of ours is there, or the folder is not (exit 73).
    """
    try:
        if path.exists() and not (path.is_file() and _is_page(path)):
            raise CannotCreateError(
                f"{path} exists already and is no page that lora_tune wrote: it is not overwritten",
                hint="give another name to --html",
            )
    except OSError as err:
        raise translated(err, path) from err
    if not path.parent.is_dir():
        raise CannotCreateError(
            f"cannot create {path}: its folder is not there", hint=f"make the folder {path.parent} first"
        )


def lint_page(found: Mapping[str, Any]) -> str:
    """Return everything that `check` found as a page.

    Args:
        found: what `check --tokens` gives, and `samples`: `{where, tokens: [{id, text, trained}]}` a row. If
            `max_seq_tokens`, `too_long` and `train_on` are there, the page says them too.
    """
    ledger, data = found["ledger"], found["data"]
    limit = found.get("max_seq_tokens")
    counts = ledger["counts"]
    return _page(
        kind="check",
        heading=visible(found["recipe"]),
        verdict=_verdict(found["warnings"], counts),
        facts=_facts(found, limit),
        warnings=[visible(warning) for warning in found["warnings"]],
        ledger=_ledger(counts),
        roles=_roles(ledger["roles"]),
        histograms=[_histogram(name, bins, limit) for name, bins in ledger["tokens_by_row"].items()],
        sources=_sources(ledger),
        labels=_labels(data["labels"]),
        samples=_samples(found["samples"]),
        train_on=found.get("train_on"),
        digest=ledger["digest"],
    )


def preview_page(found: Mapping[str, Any]) -> str:
    """Return the rows that `preview` shows as a page: `rows` as the samples of `lint_page`, `counts`, `train_on`."""
    rows = found["rows"]
    return _page(
        kind="preview",
        heading=f"{len(rows)} row{'s' if len(rows) != 1 else ''}, token by token",
        verdict=None,
        facts=[],
        warnings=None,
        ledger=_ledger(found["counts"]),
        roles=[],
        histograms=[],
        sources=[],
        labels=None,
        samples=_samples(rows),
        train_on=found["train_on"],
        digest=None,
    )


def _page(**view: Any) -> str:
    return str(_template().render(version=__version__, plot_height=PLOT_HEIGHT, **view))


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    strict = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return strict.from_string(files("lora_tune.cli").joinpath("page.html.jinja").read_text(encoding="utf-8"))


def _is_page(path: Path) -> bool:
    with path.open("rb") as stream:
        return _MARK.encode() in stream.read(400)


def _verdict(warnings: Sequence[str], counts: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Return the first line of the page: whether it can be trained on, and what was left out of the training set."""
    train = counts["train"]
    lost = [f"{train[f'rows_{deed}']:,} rows {deed}" for deed in ("refused", "dropped", "cut") if train[f"rows_{deed}"]]
    if tokens := train["trained_tokens_lost"]:
        lost.append(f"{share(tokens, tokens + train['trained_tokens'])} of the trained tokens lost")
    said = [", ".join(lost) if lost else "nothing is left out"]
    said.append(f"{len(warnings)} warning{'s' if len(warnings) != 1 else ''}" if warnings else "no warnings")
    return {"clean": not lost and not warnings, "text": f"Ready to train: {'; '.join(said)}."}


def _facts(found: Mapping[str, Any], limit: int | None) -> list[tuple[str, str, str, bool]]:
    """Return name, value, remark and whether the value is words, of what to know at a glance."""
    data, base, train = found["data"], found["base"], found["ledger"]["counts"]["train"]
    trained = share(train["trained_tokens"], train["tokens"])
    limited = f"; over {limit:,}: {found.get('too_long', 'too long').replace('_', ' ')}" if limit is not None else ""
    left_out = f"{data['rows_left_out']:,} cannot be used" if data["rows_left_out"] else ""
    return [
        ("Rows to train on", f"{data['train_rows']:,}", left_out, False),
        ("Held out", f"{data['held_out_rows']:,}", "" if data["held_out_rows"] else "nothing is measured", False),
        ("Trained tokens", f"{train['trained_tokens']:,}", f"{trained} of all tokens", False),
        (
            "Longest row",
            f"{train['longest_tokens']:,}",
            f"tokens{limited}",
            False,
        ),
        ("Steps", "–" if found["steps"] is None else f"{found['steps']:,}", "", False),
        ("Format", visible(data["format"]), "detected" if data["detected"] else "given in the recipe", True),
        ("Base", visible(base["name"]), "on this machine" if base["on_this_machine"] else "will be fetched", True),
    ]


def _ledger(counts: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    rows = [
        {
            "name": name,
            "note": note,
            "kind": kind,
            "cells": [_cell(own, key, kind) for own in counts.values()],
        }
        for key, name, note, kind in _COUNTS
    ]
    return {"sets": [set_name(name) for name in counts], "rows": rows}


def _cell(own: Mapping[str, int], key: str, kind: str) -> dict[str, Any]:
    note = ""
    if key == "trained_tokens":
        note = share(own[key], own["tokens"])
    elif key == "trained_tokens_lost" and own[key]:
        note = share(own[key], own[key] + own["trained_tokens"])
    return {"text": f"{own[key]:,}", "note": note, "lost": kind == "loss" and own[key] > 0, "zero": own[key] == 0}


def _roles(roles: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """Return the roles; a bar is as long as the role has tokens, and filled as far as they are trained."""
    most = max((n["tokens"] for n in roles.values()), default=0)
    return [
        {
            "name": visible(role),
            "tokens": f"{n['tokens']:,}",
            "trained": f"{n['trained']:,}",
            "share": share(n["trained"], n["tokens"]),
            "whole": _percent(n["tokens"], most),
            "filled": _percent(n["trained"], most),
        }
        for role, n in roles.items()
    ]


def _histogram(name: str, bins: Sequence[Mapping[str, Any]], limit: int | None) -> dict[str, Any]:
    """Return a set's histogram in per cent of the width and pixels of the height, so that its letters never shrink."""
    most, width = max((one["rows"] for one in bins), default=0), 100 / max(1, len(bins))
    bars = [
        {
            "x": f"{(number + 0.04) * width:.3f}%",
            "width": f"{0.92 * width:.3f}%",
            "height": max(3, round(PLOT_HEIGHT * one["rows"] / most)) if one["rows"] else 0,
            "over": one["too_long"],
            "span": f"{one['tokens_from']:,} to {one['tokens_to']:,}",
            "rows": f"{one['rows']:,}",
        }
        for number, one in enumerate(bins)
    ]
    end = bins[-1]["tokens_to"] if bins else 0
    return {
        "set": set_name(name),
        "bars": bars,
        "most": f"{most:,}",
        "ticks": _ticks(bins),
        "limit": _limit_line(bins, limit),
        "beyond": f"{limit:,}" if limit is not None and limit >= end else "",
    }


def _ticks(bins: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    every = -(-len(bins) // TICKS) if bins else 1
    edges = [(0, 0), *((number + 1, one["tokens_to"]) for number, one in enumerate(bins))][::every]
    return [
        {
            "x": f"{100 * number / max(1, len(bins)):.3f}%",
            "text": f"{tokens:,}",
            "anchor": "start" if number == 0 else "end" if number == len(bins) else "middle",
        }
        for number, tokens in edges
    ]


def _limit_line(bins: Sequence[Mapping[str, Any]], limit: int | None) -> dict[str, str] | None:
    """Return where the limit stands, or None when every row is within it."""
    over = [one["tokens_from"] - 1 for one in bins if one["too_long"]]
    at = limit if limit is not None else over[0] if over else None
    if at is None or not bins or at >= bins[-1]["tokens_to"]:
        return None
    ratio = at / bins[-1]["tokens_to"]
    return {
        "x": f"{100 * ratio:.3f}%",
        "text": f"limit {limit:,}" if limit is not None else "limit",
        "anchor": "end" if ratio > 0.5 else "start",
        "shift": "-6" if ratio > 0.5 else "6",
    }


def _sources(ledger: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return each source with why it was tokenized; none when there is one that was used once and kept."""
    tokenized = ledger["tokenized"]
    if not is_mixed(ledger["sources"]) and all(reason == KEPT for reason in tokenized.values()):
        return []
    total = sum(source["rows_an_epoch"] for source in ledger["sources"])
    mixed = [
        {
            "name": visible(one["source"]),
            "rows": f"{one['rows']:,}",
            "used": f"{one['rows_an_epoch']:,}",
            "share": share(one["rows_an_epoch"], total),
            "tokenized": visible(tokenized.get(one["source"], "")),
        }
        for one in ledger["sources"]
    ]
    named = {one["source"] for one in ledger["sources"]}
    measured = [
        {"name": visible(source), "rows": "", "used": "", "share": "", "tokenized": visible(reason)}
        for source, reason in tokenized.items()
        if source not in named
    ]
    return mixed + measured


def _labels(labels: Mapping[str, int]) -> dict[str, Any] | None:
    if not labels:
        return None
    ranked = sorted(labels.items(), key=lambda item: -item[1])
    total, most = sum(labels.values()), ranked[0][1]
    rest = ranked[SHOWN_LABELS:]
    return {
        "shown": [
            {
                "name": visible(label),
                "rows": f"{rows:,}",
                "share": share(rows, total),
                "width": _percent(rows, most),
            }
            for label, rows in ranked[:SHOWN_LABELS]
        ],
        "n_labels": f"{len(ranked):,}",
        "n_more": f"{len(rest):,}" if rest else "",
        "rows_more": f"{sum(rows for _, rows in rest):,}",
    }


def _samples(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "where": visible(row["where"]),
            "n_tokens": f"{len(row['tokens']):,}",
            "n_trained": f"{sum(token['trained'] for token in row['tokens']):,}",
            "open": number < OPEN_ROWS,
            "runs": _runs(row["tokens"]),
        }
        for number, row in enumerate(rows)
    ]


def _runs(tokens: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row's tokens in runs that are trained or not; of a very long row the middle is only counted."""
    numbered = list(enumerate(tokens))
    if len(numbered) <= FIRST_TOKENS + LAST_TOKENS:
        return _marked(numbered)
    between = numbered[FIRST_TOKENS:-LAST_TOKENS]
    n_trained = sum(token["trained"] for _, token in between)
    gap = f"… {len(between):,} tokens, {n_trained:,} of them trained, are not shown …"
    return [
        *_marked(numbered[:FIRST_TOKENS]),
        {"trained": False, "gap": gap, "tokens": []},
        *_marked(numbered[-LAST_TOKENS:]),
    ]


def _marked(numbered: Sequence[tuple[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    return [
        {
            "trained": bool(trained),
            "gap": "",
            "tokens": [
                {"title": f"token {number}, id {token['id']}", "pieces": list(pieces(token["text"]))}
                for number, token in run
            ],
        }
        for trained, run in groupby(numbered, key=lambda entry: entry[1]["trained"])
    ]


def _percent(part: int, whole: int) -> str:
    """Return a width in per cent; what is not nothing is seen."""
    return f"{max(0.6, 100 * part / whole):.2f}" if part else "0"
