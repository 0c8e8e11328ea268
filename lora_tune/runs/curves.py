"""A run's numbers by step → the points of its curves: at most so many as a page can show, with a smoothed line beside."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lora_tune.runs.metrics import Metrics
from lora_tune.runs.written import StepLine

MAX_POINTS = 200
SMOOTHED_OVER = 40
"""The smoothed line looks back over about a fortieth of the points."""
RECORDED = ("loss", "learning_rate", "grad_norm", "peak_memory_gib")


@dataclass(frozen=True)
class Point:
    """Neighbouring steps of a curve."""

    step: int
    """The last of them."""
    value: float
    """Their mean."""
    lowest: float
    highest: float
    smoothed: float


def curves(metrics: Metrics) -> dict[str, Any]:
    """Return every curve as `{n_steps_a_point, points: [{step, value, lowest, highest, smoothed}]}`; empty ones are left out."""
    series: dict[str, list[tuple[int, float]]] = {
        name: [(step.step, value) for step in metrics.steps if (value := getattr(step, name)) is not None] for name in RECORDED
    }  # fmt: skip
    series["tokens_per_second"] = _speeds(metrics.steps)
    series["held_out_loss"] = [
        (one.step, one.held_out_loss) for one in metrics.held_out if one.held_out_loss is not None
    ]
    steps = [step for points in series.values() for step, _ in points]
    if not steps:
        return {}
    n_steps = math.ceil((max(steps) - min(steps) + 1) / MAX_POINTS)
    return {name: _curve(points, min(steps), n_steps) for name, points in series.items() if points}


def _curve(points: Sequence[tuple[int, float]], first: int, n_steps: int) -> dict[str, Any]:
    """Return a point for every `n_steps` steps counted from `first`: the same ones in every curve, where it has values."""
    held = [list(part) for _, part in groupby(points, key=lambda point: (point[0] - first) // n_steps)]
    means = [math.fsum(value for _, value in part) / len(part) for part in held]
    made = [
        Point(part[-1][0], mean, min(value for _, value in part), max(value for _, value in part), smoothed)
        for part, mean, smoothed in zip(held, means, smooth(means), strict=True)
    ]
    return {"n_steps_a_point": n_steps, "points": [vars(point) for point in made]}


def smooth(values: Sequence[float]) -> list[float]:
    """Return the running mean in which older values count less and less; the first few are not pulled to 0."""
    share = 1 / max(1.0, len(values) / SMOOTHED_OVER)
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = share * value + (1 - share) * total
        weight = share + (1 - share) * weight
        smoothed.append(total / weight)
    return smoothed


def _speeds(steps: Sequence[StepLine]) -> list[tuple[int, float]]:
    """Return each step's own tokens a second; the file has the mean since the beginning."""
    found, tokens, seconds = [], 0, 0.0
    for step in steps:
        if step.tokens is None or step.elapsed_seconds is None:
            continue
        more, took = step.tokens - tokens, step.elapsed_seconds - seconds
        tokens, seconds = step.tokens, step.elapsed_seconds
        if more > 0 and took > 0:
            found.append((step.step, round(more / took, 2)))
    return found
