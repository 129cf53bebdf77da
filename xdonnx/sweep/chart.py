"""Where everything stands in the chart of a model: cost to the right, quality upwards, a mark for each point.

Places to the right are per cent of the width, which is the reader's; upwards they are pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from xdonnx.plot import axis
from xdonnx.sweep.front import signed
from xdonnx.sweep.options import told
from xdonnx.sweep.results import PointResult, SweepResults, TeacherResult, cost_text, ordered, quality_text, varied

# Of the panel, in pixels.
TOP, TALL = 12, 268
_ARROW = 18
# What the axes span at least: per cent of the teacher's cost, and a share of the best quality.
_WIDTH, _HEIGHT = 5.0, 0.02
# Marks of a series, around the origin; colours are the style sheet's.
SHAPES = (
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0",
    "M-4.5 -4.5h9v9h-9z",
    "M0 -6.2L6.2 0L0 6.2L-6.2 0z",
    "M0 -5.8L5.6 4.4H-5.6z",
    "M0 5.8L5.6 -4.4H-5.6z",
)
SERIES = 8


def chart(results: SweepResults, teacher: TeacherResult) -> dict[str, Any] | None:
    """Return the places of marks, bars and ticks; None where no point of the model has a student."""
    points = ordered(results, teacher.name)
    if not points:
        return None
    by, lower_is_better = _series(results), results.quality == "error"
    names = list(dict.fromkeys(_name(point, by) for point in results.points))
    level = teacher.accuracy if results.quality == "accuracy" else None
    left, right, across = axis([100 * end for point in points for end in _ends(point.cost)], _WIDTH)
    best = max(abs(_mean(point)) for point in points)
    shown = [end for point in points for end in _ends(point.quality) if _is_shown(end, points, results.quality)]
    low, high, upwards = axis([*shown, *([] if level is None else [level])], _HEIGHT * best, down=not lower_is_better)
    worst = TOP + (0 if lower_is_better else TALL)

    def x(share: float) -> float:
        return round(100 * (100 * share - left) / (right - left), 3)

    def y(value: float) -> float:
        return round(TOP + TALL * (1 - (min(max(value, low), high) - low) / (high - low)), 2)

    marks = [_mark(results, point, names.index(_name(point, by)), x, y) for point in points]
    for mark, point in zip(marks, points, strict=True):
        mark["beyond"] = not low <= _mean(point) <= high
        if mark["beyond"]:  # inside by as much as its arrow needs
            mark["y"] = worst + (_ARROW if lower_is_better else -_ARROW)
    return {
        "height": TOP + TALL + 24,
        "bottom": TOP + TALL,
        "top": TOP,
        "across": [{"at": x(tick / 100), "text": f"{tick:g} %"} for tick in across],
        "upwards": [{"at": y(tick), "text": _tick(tick, results.quality)} for tick in upwards],
        "teacher": None if level is None else y(level),
        "front": _stairs([mark for mark in marks if mark["optimal"]], worst),
        "marks": marks,
        "series": [
            {"name": name, "at": at, "colour": at % SERIES, "shape": SHAPES[at % len(SHAPES)]}
            for at, name in enumerate(names)
            if any(mark["series"] == at for mark in marks)
        ]
        if by
        else [],
        "rejected": any(not mark["passed"] for mark in marks),
        "beyond": any(mark["beyond"] for mark in marks),
    }


def _is_shown(value: float, points: Sequence[PointResult], quality: str) -> bool:
    """Whether the axis reaches a quality: where a method fails altogether, it would hide the rest."""
    best = [signed(_mean(point), quality) for point in points if point.optimal]
    room = max(4 * (max(best) - min(best)), _HEIGHT * abs(max(best)))
    return signed(value, quality) >= min(best) - room


def _series(results: SweepResults) -> str:
    """Return what the colours stand for: methods, else the first thing that is chosen by name; '' for nothing."""
    names = [
        name
        for name in varied(results)
        if all(isinstance(point.choices.get(name, ""), str) for point in results.points)
    ]
    if len(results.points) < 2 or not names:
        return ""
    return "method" if "method" in names else names[0]


def _name(point: PointResult, by: str) -> str:
    return told(point.choices.get(by, "")) if by else ""


def _mark(results: SweepResults, point: PointResult, series: int, x: Any, y: Any) -> dict[str, Any]:
    assert point.cost and point.quality
    cost, quality = _ends(point.cost), _ends(point.quality)
    facts = [(name.replace("_", "-"), told(value)) for name, value in point.choices.items() if value != ""]
    facts += [(results.cost, cost_text(point.cost)), (results.quality, quality_text(point.quality, results.quality))]
    facts.append(("passed", f"{point.passed} of {len(point.trials)}"))
    return {
        "x": x(point.cost.mean),
        "y": y(point.quality.mean),
        "wide": None if point.cost.std is None else [x(end) for end in cost],
        "tall": None if point.quality.std is None else [y(end) for end in quality],
        "series": series,
        "colour": series % SERIES,
        "shape": SHAPES[series % len(SHAPES)],
        "optimal": point.optimal,
        "passed": point.passed > 0,
        "facts": facts,
        "title": ", ".join(f"{name} {value}" for name, value in facts),
    }


def _mean(point: PointResult) -> float:
    assert point.quality
    return point.quality.mean


def _ends(mean: Any) -> tuple[float, float]:
    """Return the ends of a bar of one standard deviation."""
    return mean.mean - (mean.std or 0.0), mean.mean + (mean.std or 0.0)


def _stairs(marks: Sequence[dict[str, Any]], edge: float) -> list[dict[str, float]]:
    """Return the border of what is dominated: from the edge of the worst to the cheapest optimal point, then from each
    to the next, to the right and up, and from the last to the right edge.
    """
    first, last = marks[0], marks[-1]
    found = [{"x1": first["x"], "x2": first["x"], "y1": edge, "y2": first["y"]}]
    found.append({"x1": last["x"], "x2": 100.0, "y1": last["y"], "y2": last["y"]})
    for one, other in pairwise(marks):
        found.append({"x1": one["x"], "x2": other["x"], "y1": one["y"], "y2": one["y"]})
        found.append({"x1": other["x"], "x2": other["x"], "y1": one["y"], "y2": other["y"]})
    return found


def _tick(value: float, quality: str) -> str:
    return f"{value:g}" if quality == "error" else f"{value:g} %"
