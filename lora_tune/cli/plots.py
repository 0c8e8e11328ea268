"""Points → what a page draws of them: lines in a box of fixed height that stretches to any width, ticks, hover columns.

Letters and dots stand outside the stretched box, in per cent of the width, so that they never change their shape.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

BOX_WIDTH = 1000
"""Units of the stretched box."""
X_TICKS, Y_TICKS = 6, 4
_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """From values to a share of the axis."""

    low: float
    high: float

    def share(self, value: float) -> float:
        """Return where a value stands, 0 to 1."""
        return (value - self.low) / (self.high - self.low)

    def ticks(self, wanted: int) -> list[float]:
        """Return round values within the scale, about so many."""
        rough = (self.high - self.low) / wanted
        unit = 10.0 ** math.floor(math.log10(rough))
        step = unit * next(nice for nice in _NICE if nice * unit >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [round(number * step, 12) for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def plot(
    curves: Mapping[str, Mapping[str, Any]],
    line: str,
    *,
    dots: str = "",
    height: int,
    from_zero: bool = True,
    smoothed: bool = True,
) -> dict[str, Any] | None:
    """Return one curve, smoothed and raw, and another one as dots; None where neither has a point.

    Args:
        curves: by name, as `runs.curves` gives them.
        line: the curve that is drawn as a line.
        dots: the curve that is drawn as dots on the same scale.
        height: of the box, in pixels.
        from_zero: whether the scale begins at 0.
        smoothed: whether the smoothed line is drawn too.
    """
    drawn = {name: curves[name]["points"] for name in (line, dots) if name in curves}
    if not drawn:
        return None
    points = [point for several in drawn.values() for point in several]
    x = _steps([point["step"] for point in points])
    y = _values(points, from_zero=from_zero)
    own = drawn.get(line, [])
    return {
        "height": height,
        "raw": _path([(point["step"], point["value"]) for point in own], x, y, height),
        "smooth": _path([(point["step"], point["smoothed"]) for point in own if smoothed], x, y, height),
        "band": _band(own, x, y, height),
        "dots": [
            {"x": _percent(x.share(point["step"])), "y": _pixels(y, point["value"], height), "of": f"/curves/{dots}/points/{number}",
             "title": f"step {point['step']:,}: held out {point['value']:.6g}"}
            for number, point in enumerate(drawn.get(dots, []))
        ],
        "hits": _hits(own, x, line, smoothed=smoothed),
        "x_ticks": [{"x": _percent(x.share(at)), "text": f"{at:,.0f}", "anchor": _anchor(x.share(at))} for at in x.ticks(X_TICKS) if at == int(at)],
        "y_ticks": [{"y": _pixels(y, at, height), "text": f"{at:,.6g}"} for at in y.ticks(Y_TICKS)],
        "n_steps_a_point": curves[line]["n_steps_a_point"] if line in curves else 1,
    }  # fmt: skip


def _steps(steps: Sequence[int]) -> Scale:
    low, high = min(steps), max(steps)
    return Scale(low, high) if high > low else Scale(low - 1, low + 1)


def _values(points: Sequence[Mapping[str, float]], *, from_zero: bool) -> Scale:
    low, high = min(point["lowest"] for point in points), max(point["highest"] for point in points)
    if from_zero:
        low = min(0.0, low)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return Scale(low if from_zero and low == 0.0 else low - room, high + room)


def _path(points: Sequence[tuple[int, float]], x: Scale, y: Scale, height: int) -> str:
    places = [f"{BOX_WIDTH * x.share(step):.2f} {_pixels(y, value, height)}" for step, value in points]
    # One point is no line: it becomes one as wide as a hair.
    return "M" + "L".join(places if len(places) != 1 else [places[0], places[0]]) if places else ""


def _band(points: Sequence[Mapping[str, Any]], x: Scale, y: Scale, height: int) -> str:
    """Return the outline between the lowest and the highest of the steps behind each point; none where a point is one step."""
    if all(point["lowest"] == point["highest"] for point in points):
        return ""
    there = [(point["step"], point["highest"]) for point in points]
    back = [(point["step"], point["lowest"]) for point in reversed(points)]
    return _path([*there, *back], x, y, height) + "Z"


def _hits(points: Sequence[Mapping[str, Any]], x: Scale, name: str, *, smoothed: bool) -> list[dict[str, str]]:
    """Return a column for each point, half-way to its neighbours, with what it says when it is pointed at."""
    shares = [x.share(point["step"]) for point in points]
    edges = [0.0, *((one + other) / 2 for one, other in pairwise(shares)), 1.0]
    return [
        {"x": _percent(edges[number]), "width": _percent(max(0.0, edges[number + 1] - edges[number])), "of": f"/curves/{name}/points/{number}",
         "title": f"step {point['step']:,}: {point['value']:.6g}" + (f", smoothed {point['smoothed']:.6g}" if smoothed else "")}
        for number, point in enumerate(points)
    ]  # fmt: skip


def _pixels(y: Scale, value: float, height: int) -> str:
    return f"{height * (1 - y.share(value)):.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.3f}%"


def _anchor(share: float) -> str:
    return "start" if share < 0.03 else "end" if share > 0.97 else "middle"
