"""Where everything stands in the plot of the layers: channels kept above, error below, a column for each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from xdonnx.report import LayerResult
from xdonnx.tries import Try

# Of the two panels, in pixels; the lower one is left out where no error is known.
_TOP, _TALL, _LOW, _DEEP = 22, 84, 140, 120
# How wide the curve of what was tried is.
_WIDE = 360
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


def curve(tries: Sequence[Try]) -> dict[str, Any] | None:
    """Return the places of what was tried: MACs to the right, what was found upwards; None where there is no curve."""
    units = {"latency": "latency, % of the teacher's", "drop": "points lost", "error": "relative L2"}
    name = next((name for name in units if any(getattr(one, name) is not None for one in tries)), "error")
    known = [(one, one.macs, getattr(one, name)) for one in tries if one.macs is not None]
    known = [point for point in known if point[2] is not None]
    if len(known) < 2:
        return None
    unit = units[name]
    times = 100 if name == "latency" else 1
    high = max(max(0.0, value) for *_, value in known) or 1.0
    low = min(0.0, *(value for *_, value in known))
    places = [
        {
            "x": round(_WIDE * share, 2),
            "y": round(_TOP + _TALL * (high - value) / (high - low), 2),
            "title": f"{one.asked}: {100 * share:.1f} % of the MACs, {times * value:.3g} {unit}",
            "passed": one.passed,
            "chosen": one.chosen,
        }
        for one, share, value in sorted(known, key=lambda point: point[1])
    ]
    return {
        "unit": unit,
        "high": f"{times * high:.3g}",
        "low": f"{times * low:.3g}",
        "line": " ".join(f"{place['x']},{place['y']}" for place in places),
        "points": places,
    }


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
