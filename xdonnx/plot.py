"""Where everything stands in the plot of the layers: channels kept above, error below, a column for each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from xdonnx.amounts import amount_of
from xdonnx.errors import JobError
from xdonnx.report import LayerResult, Report, shown

# Of the two panels, in pixels; the lower one is left out where no error is known.
_TOP, _TALL, _LOW, _DEEP = 22, 84, 140, 120
# Of the curve of what was tried; its width is the reader's.
_ROOF, _RISE = 10, 160
# What is found of a try: in which unit it is drawn, times what, and what its axis spans at least.
_FOUND = {
    "latency": ("latency, % of the teacher's", 100, 5.0),
    "drop": ("points lost", 1, 1.0),
    "error": ("relative L2", 1, 0.01),
}
# Errors span decades; so many are shown at most.
_DECADES = 5


def plot(layers: Sequence[LayerResult]) -> dict[str, Any]:
    """Return the places of all bars and ticks, and what a reader of a layer is told."""
    step = min(40.0, max(8.0, 960 / len(layers)))
    known = [
        error for layer in layers for error in (layer.objective_before, layer.objective_after) if error is not None
    ]
    errors = bool(known)
    low, high = _decades(known)
    ticks = [{"y": _TOP + _TALL * (1 - share), "text": f"{100 * share:.0f} %"} for share in (0.0, 0.5, 1.0)]
    if errors:
        ticks += [{"y": _height(10.0**power, low, high), "text": _short(power)} for power in range(low, high + 1)]
    bars = [_bar(layer, at * step, low, high) for at, layer in enumerate(layers)]
    return {
        "errors": errors,
        "height": (_LOW + _DEEP if errors else _TOP + _TALL) + 8,
        "width": round(step * len(layers), 2),
        "step": step,
        "bar": round(step - 2, 2),
        "top": _TOP,
        "tall": _TALL,
        "ticks": ticks,
        "bars": bars,
        "below": any(error < 10.0**low for error in known),
        "data": [_told(layer) for layer in layers],
    }


def error_text(share: float | None) -> str:
    """Return an error as people read it, in per cent of the teacher's energy."""
    return "" if share is None else f"{100 * share:.3g} %"


def curve(report: Report) -> dict[str, Any] | None:
    """Return the places of what was tried: MACs to the right, what was found upwards; None where there is no curve.

    Places to the right are per cent of the width, which is the reader's; upwards they are pixels.
    """
    limits = _limits(report)
    # What a limit was on says more than what was found besides.
    names = sorted(_FOUND, key=lambda name: name not in limits)
    name = next((name for name in names if any(getattr(one, name) is not None for one in report.tries)), "error")
    found = [(one, one.macs, getattr(one, name)) for one in report.tries]
    known = sorted(
        ((one, macs, value) for one, macs, value in found if macs is not None and value is not None),
        key=lambda point: point[1],
    )
    if len(known) < 2:
        return None
    unit, times, least = _FOUND[name]
    limit, said = limits.get(name, (None, ""))
    left, right, across = axis([0.0, 100.0], 100.0)
    values = [0.0, *(times * value for *_, value in known), *([] if limit is None else [limit])]
    low, high, upwards = axis(values, least)

    def x(percent: float) -> float:
        return round(100 * (percent - left) / (right - left), 3)

    def y(value: float) -> float:
        return round(_ROOF + _RISE * (high - value) / (high - low), 2)

    points = [
        {
            "x": x(100 * macs),
            "y": y(times * value),
            "title": f"{one.asked}: {100 * macs:.1f} % of the MACs, {times * value:.3g} {unit}",
            "passed": one.passed,
            "chosen": one.chosen,
        }
        for one, macs, value in known
    ]
    return {
        "unit": unit,
        "top": _ROOF,
        "bottom": _ROOF + _RISE,
        "across": [{"at": x(tick), "text": f"{tick:g} %"} for tick in across],
        "upwards": [{"at": y(tick), "text": f"{tick:g}"} for tick in upwards],
        "limit": None if limit is None else y(limit),
        "said": said,
        "steps": list(pairwise(points)),
        "points": points,
    }


def axis(
    values: Sequence[float], least: float, *, down: bool = False, most: int = 7
) -> tuple[float, float, list[float]]:
    """Return where an axis begins and ends, and its ticks: round numbers, with room at both ends.

    It spans at least so much, by reaching further down or up: a wide scale would make much of a small difference.
    """
    low, high = min(values), max(values)
    span = max(high - low, least, 1e-9)
    low, high = (high - span, high) if down else (low, low + span)
    rough = span / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    low, high = low - 0.06 * span, high + 0.06 * span
    ticks = [step * at for at in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return low, high, [round(tick, 12) for tick in ticks]


def _limits(report: Report) -> dict[str, tuple[float, str]]:
    """Return {what tries are judged by: the limit they were made for, and that in words}; a latency is in per cent.

    Those of the job, not the gates: these may have been judged again by others.
    """
    found: dict[str, tuple[float, str]] = {}
    gate = report.job.get("gate")
    asked = gate if isinstance(gate, dict) else {}
    for name, unit in (("drop", "points"), ("error", "relative L2")):
        limit = asked.get(f"max_{name}")
        if isinstance(limit, (int, float)):
            found[name] = float(limit), f"at most {shown(limit, unit, exact=True)}"
    latency = report.job.get("latency")
    wanted = None
    if latency is not None:
        with suppress(JobError):  # a report may be of a tool that says it in words of its own
            wanted = amount_of(latency, "latency")
    if wanted is not None:
        whole = report.teacher.latency_ms.median if report.teacher and report.teacher.latency_ms else None
        if not wanted.unit:
            found["latency"] = 100 * wanted.number, f"at most {100 * wanted.number:g} %"
        elif whole:  # as it was timed at the end; each try had a time of its own to be compared with
            found["latency"] = 100 * wanted.number / whole, f"at most {wanted.number:g} ms"
    return found


def _bar(layer: LayerResult, x: float, low: int, high: int) -> dict[str, Any]:
    kept = _TALL * min(1.0, layer.kept / layer.units if layer.units else 1.0)
    after, before = layer.objective_after, layer.objective_before
    return {
        "x": round(x, 2),
        "title": ", ".join([layer.layer, *(f"{key} {value}" for key, value in _facts(layer))]),
        "kept_y": round(_TOP + _TALL - kept, 2),
        "kept_h": round(kept, 2),
        "after_y": None if after is None else _height(after, low, high),
        "before_y": None if before is None else _height(before, low, high),
    }


def _facts(layer: LayerResult) -> list[tuple[str, str]]:
    facts = [("op", layer.op), ("kept", f"{layer.kept:,} of {layer.units:,}")]
    facts.append(("weights", f"{layer.params_before:,} → {layer.params_after:,}"))
    if layer.macs_before is not None and layer.macs_after is not None:
        facts.append(("MACs", f"{layer.macs_before:,} → {layer.macs_after:,}"))
    if layer.objective_before is not None:
        facts.append(("error cut", error_text(layer.objective_before)))
    if layer.objective_after is not None:
        facts.append(("refitted", error_text(layer.objective_after)))
    return [*facts, *([("note", layer.note)] if layer.note else [])]


def _told(layer: LayerResult) -> dict[str, Any]:
    share = layer.kept / layer.units if layer.units else 1.0
    return {"name": layer.layer, "facts": _facts(layer), "error": layer.objective_after, "kept": round(share, 6)}


def _decades(errors: Sequence[float]) -> tuple[int, int]:
    """Return the powers of ten between which all errors lie, or the largest of them where they span too much."""
    known = [math.log10(error) for error in errors if error > 0]
    high = math.ceil(max(known, default=0.0) - 1e-9)
    return max(high - _DECADES, min(high - 1, math.floor(min(known, default=high - 1) + 1e-9))), high


def _height(error: float, low: int, high: int) -> float:
    """Return where an error stands on the logarithmic scale; zero stands on its lowest line."""
    power = math.log10(error) if error > 0 else -math.inf
    return round(_LOW + _DEEP * (1 - max(0.0, (power - low) / (high - low))), 2)


def _short(power: int) -> str:
    return f"{10.0 ** (power + 2):g} %"
