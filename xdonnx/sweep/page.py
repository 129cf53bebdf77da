"""A sweep as one HTML file that opens anywhere: the curves, the points, every trial, and what failed."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from xdonnx.sweep.chart import chart
from xdonnx.sweep.options import told
from xdonnx.sweep.results import (
    TITLES,
    PointResult,
    SweepResults,
    TeacherResult,
    TrialResult,
    caption,
    cost_text,
    count_line,
    failures,
    named,
    ordered,
    quality_text,
    varied,
)

_TEMPLATES = Path(__file__).parents[1] / "templates"
_WORDS = {0: ("Passed", "passed"), 3: ("Rejected", "failed"), 130: ("Interrupted", "warning")}


def page(results: SweepResults) -> str:
    """Return the results as an HTML page that holds all it needs."""
    templates = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    word, tone = _WORDS.get(results.exit_code, ("Failed", "failed"))
    return templates.get_template("sweep.html").render(
        results=results,
        word=word,
        tone=tone,
        counts=count_line(results),
        when=_when(results.started),
        tiles=list(_tiles(results)),
        cost=TITLES[results.cost],
        names=[name.replace("_", "-") for name in varied(results)],
        models=[_model(results, teacher) for teacher in results.models],
        trials=[_trial(trial) for trial in results.trials],
        choices=list(dict.fromkeys(name for trial in results.trials for name in trial.choices)),
        failures=[text for text, _ in failures(results)],
        facts=list(_facts(results)),
    )


def _when(started: str) -> str:
    return datetime.fromisoformat(started).strftime("%Y-%m-%d %H:%M %z").strip() if started else ""


def _tiles(results: SweepResults) -> Iterator[dict[str, str]]:
    """Yield, for each model, the cheapest point of which all trials passed."""
    for teacher in results.models:
        whole = [point for point in ordered(results, teacher.name) if point.passed == len(point.trials)]
        if whole:
            point = whole[0]
            chosen = [told(point.choices[name]) for name in varied(results) if point.choices.get(name, "") != ""]
            quality = f"{results.quality} {quality_text(point.quality, results.quality)}"
            yield {
                "label": f"{teacher.name}: least {TITLES[results.cost]} that passed",
                "value": cost_text(point.cost),
                "detail": "; ".join([quality, ", ".join(chosen)]) if chosen else quality,
            }


def _model(results: SweepResults, teacher: TeacherResult) -> dict[str, Any]:
    names, points = varied(results), ordered(results, teacher.name)
    return {
        "name": teacher.name,
        "about": _about(teacher),
        "chart": chart(results, teacher),
        "caption": caption(results, teacher, several=len(results.seeds) > 1),
        "points": [_point(results, point, names) for point in points],
    }


def _about(teacher: TeacherResult) -> str:
    parts = [f"{teacher.bytes:,} bytes"] if teacher.bytes is not None else []
    parts += [f"{teacher.macs:,} MACs"] if teacher.macs is not None else []
    parts += [f"{teacher.accuracy:.2f} % accuracy"] if teacher.accuracy is not None else []
    return ", ".join(parts)


def _point(results: SweepResults, point: PointResult, names: list[str]) -> dict[str, Any]:
    assert point.cost and point.quality
    return {
        "optimal": point.optimal,
        "chosen": [told(point.choices.get(name, "")) for name in names],
        "cost": cost_text(point.cost),
        "quality": quality_text(point.quality, results.quality),
        "passed": f"{point.passed} of {len(point.trials)}",
        "tone": "passed" if point.passed == len(point.trials) else "warning" if point.passed else "failed",
        "sort": {"cost": point.cost.mean, "quality": point.quality.mean},
    }


def _trial(trial: TrialResult) -> dict[str, Any]:
    tones = {"passed": "passed", "rejected": "failed", "failed": "failed", "refused": "warning", "waiting": "plain"}
    share = trial.macs
    judged = next(
        (f"{value:.2f} %" for value in (trial.accuracy, trial.agreement) if value is not None),
        "" if trial.error is None else f"{trial.error:.4f}",
    )
    return {
        "name": named(trial),
        "status": trial.status,
        "tone": tones[trial.status],
        "macs": "" if share is None else f"{100 * share:.1f} %",
        "bytes": "" if trial.bytes is None else f"{100 * trial.bytes:.1f} %",
        "latency": "" if trial.latency is None else f"{100 * trial.latency:.0f} %",
        "judged": judged,
        "seconds": "" if trial.seconds is None else f"{trial.seconds:.1f}",
        "folder": trial.folder if trial.status in ("passed", "rejected") else "",
        "command": trial.command,
    }


def _facts(results: SweepResults) -> Iterator[tuple[str, str]]:
    yield "file", f"{results.file.path} (sha256 {results.file.sha256[:12]})"
    yield "seeds", ", ".join(map(str, results.seeds))
    yield "trials", f"done {results.backend}; {results.taken} of them by the latest start, in {results.seconds:.1f} s"
    if results.search:
        how = ("sampler", "trials", "batch", "seed")
        yield "search", ", ".join(f"{name} {results.search[name]}" for name in how)
    for teacher in results.models:
        yield teacher.name, f"{teacher.file.path} (sha256 {teacher.file.sha256[:12]})"
    versions = [(name, getattr(results.tool, name)) for name in ("onnx", "onnxruntime", "torch")]
    yield "made by", ", ".join([f"xdonnx {results.tool.version}", *(f"{n} {v}" for n, v in versions if v)])
