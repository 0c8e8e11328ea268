"""A run as one HTML file that needs nothing else: no script, no font, no request.

Whatever stands in a run's folder is a stranger's text: acting characters become signs here, jinja escapes the rest. Every
number carries the value it was rounded from and its place in the JSON of `runs report --json`.
"""

import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from lora_tune import __version__
from lora_tune.cli.plots import plot
from lora_tune.cli.visible import visible, visible_lines
from lora_tune.errors import CannotCreateError, MissingInputError
from lora_tune.staging import translated, write_file

WIDE_HEIGHT, SMALL_HEIGHT, BARS_HEIGHT = 240, 130, 120
_MARK = '<meta name="generator" content="lora_tune'
"""Stands near the top of every page: only a file that has it is ever replaced."""


def write_report(path: Path, text: str) -> None:
    """Write a page; an older page gives way, any other file stays.

    Raises:
        CannotCreateError: something that is no page of ours is there, or the folder is not (exit 73).
        CannotWriteError: the disk is full or failing (exit 74).
    """
    try:
        if path.exists() and not (path.is_file() and _is_page(path)):
            raise CannotCreateError(f"{path} exists already and is no page that lora_tune wrote: it is not overwritten",
                                    hint="give another name with --out FILE")  # fmt: skip
    except OSError as err:
        raise translated(err, path) from err
    if not path.parent.is_dir():
        raise CannotCreateError(f"cannot create {path}: its folder is not there", hint=f"make the folder {path.parent} first")  # fmt: skip
    write_file(path, text)


def run_page(told: Mapping[str, Any], *, refresh_seconds: float | None = None) -> str:
    """Return a run as a page.

    Args:
        told: `runs.details` with `curves`.
        refresh_seconds: the browser reads the page again so often; None never.

    Raises:
        MissingInputError: nothing is known of the run (exit 66).
    """
    if told["state"] == "damaged":
        raise MissingInputError(f"{told['folder']} cannot be read as a run", hint="`lora-tune runs list` says why")
    curves = told["curves"]
    return str(
        _template().render(
            run=told, version=__version__, refresh_seconds=refresh_seconds, verdict=_verdict(told),
            num=partial(_number, told), val=partial(_value, told), lines=_lines, pointer=_pointer,
            loss=plot(curves, "loss", dots="held_out_loss", height=WIDE_HEIGHT, from_zero=False),
            small=[{"title": title, "note": note, "plot": drawn} for title, note, drawn in _small(curves) if drawn],
            bars={name: _bars(bins) for name, bins in told["data"]["tokens_by_row"].items() if bins},
            bars_height=BARS_HEIGHT, rows=_rows(curves),
        )
    )  # fmt: skip


def _small(curves: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    return [
        ("Learning rate", "", plot(curves, "learning_rate", height=SMALL_HEIGHT, smoothed=False)),
        ("Gradient norm", "before it is clipped", plot(curves, "grad_norm", height=SMALL_HEIGHT)),
        ("Tokens a second", "of each step, without padding", plot(curves, "tokens_per_second", height=SMALL_HEIGHT)),
        ("Peak memory, GiB", "the most so far", plot(curves, "peak_memory_gib", height=SMALL_HEIGHT, smoothed=False)),
    ]


def _rows(curves: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the curves as rows of a table: each step with the pointers to what is known of it."""
    rows: dict[int, dict[str, str]] = {}
    for name, curve in curves.items():
        for number, point in enumerate(curve["points"]):
            rows.setdefault(point["step"], {})[name] = f"/curves/{name}/points/{number}"
    return [{"step": step, "of": of} for step, of in sorted(rows.items())]


def _bars(bins: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    most, width = max(one["rows"] for one in bins), 100 / len(bins)
    return [
        {
            "x": f"{(number + 0.04) * width:.3f}%",
            "width": f"{0.92 * width:.3f}%",
            "height": max(3, round(BARS_HEIGHT * one["rows"] / most)) if one["rows"] else 0,
            "over": one["too_long"],
            "title": f"{one['tokens_from']:,} to {one['tokens_to']:,} tokens: {one['rows']:,} rows",
        }
        for number, one in enumerate(bins)
    ]


def _verdict(told: Mapping[str, Any]) -> dict[str, str]:
    """Return the first line of the page."""
    said = {
        "running": "Running: this page is of the moment it was written.",
        "done": "Done: the adapter is exported and measured.",
        "resumable": "Stopped before its end; it can go on from its newest checkpoint.",
        "unfinished": "Stopped before its end, with no checkpoint to go on from.",
    }
    return {"look": "" if told["state"] in ("done", "running") else "look", "text": said[told["state"]]}


def _number(told: Mapping[str, Any], place: str, form: str) -> Any:
    """Return a number of the run rounded for reading, with its whole value and its place; a dash where there is none."""
    from markupsafe import Markup

    value = _at(told, place)
    if value is None:
        return "–"
    return Markup('<data value="{}" data-of="{}">{}</data>').format(json.dumps(value), place, FORMS[form](value))


def _value(told: Mapping[str, Any], place: str) -> Any:
    """Return a setting's value as JSON writes it, a text without its quotes; a dash where there is none."""
    from markupsafe import Markup

    value = _at(told, place)
    if value is None:
        return "–"
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return Markup('<span data-of="{}">{}</span>').format(place, visible(shown))


def _at(told: Any, place: str) -> Any:
    """Return what a JSON pointer (RFC 6901) leads to, or None when a part of the way is not there."""
    for step in place.split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(told, Mapping):
            told = told.get(key)
        elif isinstance(told, list) and int(key) < len(told):
            told = told[int(key)]
        else:
            return None
    return told


def _lines(text: str) -> Any:
    """Return a text that keeps its lines."""
    from markupsafe import escape

    return escape(visible_lines(text))


def _pointer(*steps: object) -> str:
    return "".join(f"/{str(step).replace('~', '~0').replace('/', '~1')}" for step in steps)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{seconds:.1f} s"


def in_bytes(n_bytes: float) -> str:
    """Return a size as people read it."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:,.0f} {unit}" if unit == "B" else f"{n_bytes:,.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} TB"


FORMS: dict[str, Callable[[Any], str]] = {
    "count": lambda value: f"{value:,}",
    "loss": lambda value: f"{value:.4f}",
    "change": lambda value: f"{value:+.4f}",
    "points": lambda value: f"{100 * value:+.1f} points",
    "perplexity": lambda value: f"{value:,.2f}",
    "change of perplexity": lambda value: f"{value:+,.2f}",
    "share": lambda value: f"{value:.1%}",
    "rate": lambda value: f"{value:.4g}",
    "speed": lambda value: f"{value:,.0f}",
    "gib": lambda value: f"{value:.2f} GiB",
    "time": _duration,
    "bytes": in_bytes,
}
"""How a number is rounded, by what it is."""


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    strict = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    return strict.from_string(files("lora_tune.cli").joinpath("report.html.jinja").read_text(encoding="utf-8"))


def _shown(value: Any) -> Any:
    """Return what is written into the page: a plain text in one line without acting characters, all else as it is."""
    return visible(value) if type(value) is str else value


def _is_page(path: Path) -> bool:
    with path.open("rb") as stream:
        return _MARK.encode() in stream.read(400)
