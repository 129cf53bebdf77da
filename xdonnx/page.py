"""The report as one HTML file that opens anywhere: no network, no fonts, no libraries; light, dark and on paper."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from xdonnx.figures import amount
from xdonnx.limits import compared, heavy_loss, limited
from xdonnx.plot import curve, error_text, plot
from xdonnx.report import (
    AT_LEAST,
    Fidelity,
    FileInfo,
    GateResult,
    LayerResult,
    Report,
    WorstShot,
    gate_figures,
    gate_line,
    gist,
    interval_line,
    judged_by,
    preset_of,
)
from xdonnx.sheet import INDICATORS, PoolSheet
from xdonnx.tries import tried

_TEMPLATES = Path(__file__).parent / "templates"
# Rows of outputs; a detector with forty of them says enough with the worst.
_OUTPUTS = 6
_SMALLEST = "smallest drop, points"


def page(report: Report) -> str:
    """Return the report as an HTML page that holds all it needs."""
    templates = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Without a limit nothing was passed: a green word would say more than is known.
    judged = limited(report)
    # Of a given student nothing was to go; which of its layers are the teacher's stands beside each.
    whole = {} if report.matches else _whole(report.layers)
    rows = _rows(report)
    return templates.get_template("report.html").render(
        report=report,
        word={"passed": "Passed" if judged else "Done", "rejected": "Rejected", "failed": "Failed"}[report.status],
        tone={"passed": "passed" if judged else "plain"}.get(report.status, "failed"),
        judged=judged,
        lost=bool(heavy_loss(report.fidelity, report.gates)),
        gist=gist(report),
        title=_title(report),
        when=_when(report.started),
        tiles=list(_tiles(report)),
        gates=[_gate(report, gate) for gate in report.gates],
        rows=rows,
        given=any(row["given"] for row in rows),
        samples=_samples(report),
        layers=[_layer(layer) for layer in report.layers],
        plot=plot(report.layers) if report.layers else None,
        tries=tried(report.tries),
        curve=curve(report),
        worst=[_shot(shot) for shot in report.fidelity.worst] if report.fidelity else [],
        pool=_pool(report.pool, report.layers) if report.pool else None,
        pooled=any(layer.pool_weight is not None for layer in report.layers),
        whole=list(whole.items()),
        whole_count=sum(map(len, whole.values())),
        interface=_interface(report),
        facts=list(_facts(report)),
        files=[
            {"name": name, "path": file.path, "sha256": file.sha256, "size": f"{file.bytes:,} bytes"}
            for name, file in (*dict(report.files).items(), *_read(report))
            if isinstance(file, FileInfo)
        ],
        job=json.dumps(report.job, indent=2, ensure_ascii=False) if report.job else "",
    )


def _read(report: Report) -> Iterator[tuple[str, FileInfo]]:
    """Yield the other files that a job read; its student is not the one that it made."""
    for name, file in report.files.read.items():
        yield "given student" if name == "student" else name, file


def _title(report: Report) -> str:
    named = [PurePath(file.path).name for file in (report.files.teacher, report.files.student) if file]
    return " → ".join(named) or "xdonnx report"


def _when(started: str) -> str:
    try:
        return datetime.fromisoformat(started).strftime("%Y-%m-%d %H:%M %z").strip()
    except ValueError:
        return started


def _percent(after: float, before: float) -> str:
    return f"{100 * after / before:.1f} %" if before else "–"


def _tiles(report: Report) -> Iterator[dict[str, str]]:
    """Yield the few numbers that matter most."""
    teacher, student, fidelity, given = report.teacher, report.student, report.fidelity, report.given

    def tile(label: str, value: str, detail: str) -> dict[str, str]:
        return {"label": label, "value": value, "detail": detail}

    if teacher and student:
        for name, label, unit in (("macs", "MACs", ""), ("bytes", "file size", "B")):
            before, after = getattr(teacher, name), getattr(student, name)
            yield tile(label, _percent(after, before), f"{amount(before, unit)} → {amount(after, unit)}")
        a, b = teacher.latency_ms, student.latency_ms
        if a and b:
            yield tile("latency", _percent(b.median, a.median), f"{a.median:.3g} → {b.median:.3g} ms")
    if fidelity is None:
        return
    if fidelity.accuracy_teacher is not None and fidelity.accuracy_student is not None:
        before = "" if given is None or given.accuracy_student is None else f", as given {given.accuracy_student:.2f} %"
        detail = f"teacher {fidelity.accuracy_teacher:.2f} %{before}"
        yield tile("accuracy", f"{fidelity.accuracy_student:.2f} %", detail)
    elif fidelity.top1_agreement is not None:
        before = "" if given is None or given.top1_agreement is None else f", as given {given.top1_agreement:.2f} %"
        yield tile("agreement", f"{fidelity.top1_agreement:.2f} %", f"with the teacher{before}")
    elif errors := _errors(fidelity):
        was = _errors(given) if given else []
        yield tile("worst error", f"{max(errors):.4f}", "relative L2" + (f", as given {max(was):.4f}" if was else ""))
    if fidelity.drop:
        drop = fidelity.drop
        yield tile("drop", f"{drop.value:.2f} points", f"{drop.low:.2f} to {drop.high:.2f}")


def _errors(fidelity: Fidelity) -> list[float]:
    return [output.relative_l2 for output in fidelity.outputs if output.relative_l2 is not None]


def _gate(report: Report, gate: GateResult) -> dict[str, Any]:
    tone, word = ("passed", "passed") if gate.passed else ("failed", "failed")
    if not gate.passed and gate.level == "warn":
        tone, word = "warning", "warning"
    value, _, limit = gate_figures(gate)
    return {
        "name": gate.name,
        "tone": tone,
        "word": word,
        "line": gate_line(gate),
        "value": value,
        "bound": judged_by(gate),
        "limit": limit,
        "interval": interval_line(report, gate.name),
        "range": _range(report, gate),
    }


def _range(report: Report, gate: GateResult) -> dict[str, Any] | None:
    """Return where value, interval and limit stand on a line, in per cent of it."""
    if gate.value is None:
        return None
    fidelity, sure = report.fidelity, None
    if gate.name == "max_drop" and fidelity and fidelity.drop:
        sure = fidelity.drop.low, fidelity.drop.high
    if gate.name == "max_error" and fidelity:
        known = [output for output in fidelity.outputs if output.relative_l2 is not None and output.high is not None]
        worst = max(known, key=lambda output: output.relative_l2 or 0.0, default=None)
        sure = (worst.low or 0.0, worst.high or 0.0) if worst else None
    points: list[float] = [0.0, gate.value, gate.limit, *(sure or ()), *([] if gate.bound is None else [gate.bound])]
    low, high = min(points), max(points)
    margin = 0.06 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def place(number: float) -> float:
        return round(100 * (number - low) / (high - low), 2)

    limit = place(gate.limit)
    least = gate.name in AT_LEAST
    return {
        "value": place(gate.value),
        "limit": limit,
        "sure": sure and (place(sure[0]), place(sure[1])),
        "allowed": (limit, round(100 - limit, 2)) if least else (0, limit),
    }


def _row(name: str, teacher: str, student: str, **more: Any) -> dict[str, Any]:
    blank = {"about": "", "teacher_about": "", "given": "", "given_about": "", "student_about": "", "share": None}
    return {"name": name, "teacher": teacher, "student": student} | blank | more


def _cost_rows(report: Report) -> Iterator[dict[str, Any]]:
    teacher, student = report.teacher, report.student
    if not teacher or not student:
        return
    for field, name in (
        ("bytes", "file size, bytes"),
        ("params", "weights"),
        ("nonzero", "not zero"),
        ("macs", "MACs"),
    ):
        before, after = getattr(teacher, field), getattr(student, field)
        share = 100 * after / before if before else None
        yield _row(name, f"{before:,}", f"{after:,}", share=share)
    a, b = teacher.latency_ms, student.latency_ms
    if a and b:
        threads = f"{b.threads} threads" if b.threads else "threads of onnxruntime's choice"
        yield _row(
            "latency, ms",
            f"{a.median:.3f}",
            f"{b.median:.3f}",
            about=f"{b.provider.removesuffix('ExecutionProvider')}, batch {b.batch}, {threads}, {b.runs} runs",
            teacher_about=f"quartiles {a.q1:.3f} to {a.q3:.3f}",
            student_about=f"quartiles {b.q1:.3f} to {b.q3:.3f}",
            share=100 * b.median / a.median if a.median else None,
        )


def _rows(report: Report) -> list[dict[str, Any]]:
    """Return the rows of the table of both models, with what a given student was before its refit."""
    before = {row["name"]: row for row in _fidelity_rows(report.given, most=None)}
    rows = [*_cost_rows(report), *_fidelity_rows(report.fidelity)]
    for row in rows:
        its = before.get(row["name"])
        if its and its["name"] != _SMALLEST:  # which is the samples', not a student's
            row |= {"given": its["student"], "given_about": its["student_about"]}
    return rows


def _fidelity_rows(fidelity: Fidelity | None, most: int | None = _OUTPUTS) -> Iterator[dict[str, Any]]:
    if fidelity is None:
        return
    whose = {"about": compared(fidelity)}
    if fidelity.accuracy_teacher is not None and fidelity.accuracy_student is not None:
        yield _row(
            "top-1 accuracy", f"{fidelity.accuracy_teacher:.2f} %", f"{fidelity.accuracy_student:.2f} %", **whose
        )
    if fidelity.top1_agreement is not None:
        yield _row("top-1 agreement", "", f"{fidelity.top1_agreement:.2f} %", **whose)
    if drop := fidelity.drop:
        sure = f"{drop.low:.2f} to {drop.high:.2f} at {100 * drop.confidence:g} % confidence"
        # Without labels nothing can be gained.
        moved = f"lost {drop.lost}, gained {drop.gained}"
        if drop.of == "agreement":
            moved = f"{drop.lost} differ{'s' * (drop.lost == 1)}"
        yield _row(f"drop of {drop.of}, points", "", f"{drop.value:.2f}", about=moved, student_about=sure)
    if fidelity.drop and fidelity.smallest_drop is not None:
        about = "that so many samples can tell from none"
        yield _row(_SMALLEST, "", f"{fidelity.smallest_drop:.2f}", about=about)
    known = [output for output in fidelity.outputs if output.relative_l2 is not None]
    for output in sorted(known, key=lambda output: -(output.relative_l2 or 0.0))[:most]:
        bounds = f"{output.low:.6f} to {output.high:.6f}" if output.low is not None and output.high is not None else ""
        more = [
            *([] if output.max_abs is None else [f"largest difference {output.max_abs:.4g}"]),
            *([] if output.cosine is None else [f"cosine {output.cosine:.6f}"]),
        ]
        yield _row(
            f"error of '{output.name}'",
            "",
            f"{output.relative_l2:.6f}",
            about="; ".join(["relative L2", *more]),
            student_about=bounds,
        )
    if most is not None and len(known) > most:
        yield _row(f"and {len(known) - most} outputs of smaller error", "", "")
    for output in fidelity.outputs:
        if output.agreement is not None:
            yield _row(f"equal elements of '{output.name}'", "", f"{output.agreement:.2f} %")


def _samples(report: Report) -> str:
    if report.fidelity is None:
        return ""
    count, held = report.fidelity.samples, report.fidelity.held_out
    pool = f" and a pool of {report.pool.used}" if report.pool else ""
    fitted = "" if report.fit_samples is None else f"fitted on {report.fit_samples}{pool}, "
    also = "" if held else ", which also fitted the student"
    return f"{fitted}judged on {count} {'held-out ' * held}sample{'s' * (count != 1)}{also}"


def _layer(layer: LayerResult) -> dict[str, str]:
    macs = [number for number in (layer.macs_before, layer.macs_after) if number is not None]
    return {
        "name": layer.layer,
        "op": layer.op,
        "kept": f"{layer.kept:,} of {layer.units:,}",
        "params": f"{amount(layer.params_before)} → {amount(layer.params_after)}",
        "macs": " → ".join(map(amount, macs)),
        "before": error_text(layer.objective_before),
        "after": error_text(layer.objective_after),
        "pool": "" if layer.pool_weight is None else f"{layer.pool_weight:g}",
        "note": layer.note,
    }


def _shot(shot: WorstShot) -> dict[str, Any]:
    def answer(top: int, name: str) -> str:
        return name or f"class {top}"

    def scored(which: str) -> str:
        given = getattr(shot, which)
        if given is None:
            return ""
        return answer(given.top, given.name) + ("" if given.score is None else f" ({given.score:.3g})")

    lost, badge = False, ""
    if shot.teacher and shot.student:
        if shot.label is None:
            lost = shot.teacher.top != shot.student.top
            badge = "they disagree" if lost else ""
        else:
            lost = shot.teacher.top == shot.label != shot.student.top
            badge = "only the teacher is right" if lost else ""
    return {
        "sample": shot.sample,
        "lost": lost,
        "badge": badge,
        "thumbnail": shot.thumbnail,
        "label": "" if shot.label is None else answer(shot.label, shot.label_name),
        "teacher": scored("teacher"),
        "student": scored("student"),
        "error": "no bound" if shot.relative_l2 is None else f"{shot.relative_l2:.4g}",
    }


def _pool(pool: PoolSheet, layers: Sequence[LayerResult]) -> dict[str, Any]:
    """Return both ends of the pool, and what was made of it in words."""
    left = [
        *([f"{pool.twins:,} left out as samples"] if pool.twins else []),
        *([f"{len(pool.unreadable):,} unreadable"] if pool.unreadable else []),
    ]
    found = [f"{pool.used:,} images, {pool.draw} draw", *left]
    ends = (("Most related", pool.most_related), ("Least related", pool.least_related))
    note = "Nothing of this model says how related an image is."
    if pool.quantiles:
        spread = ", ".join(f"{q:.2f}" for q in pool.quantiles)
        note = (
            "Scores are the teacher's, without samples of its task: of mean 0 and deviation 1, lower is more related "
            f"(the least, three quartiles and the most: {spread}). "
            f"The draw varies as that of {pool.effective:,.0f} images drawn evenly."
        )
    return {
        "facts": "; ".join(found),
        "ends": [
            (title, [{"sample": i.sample, "thumbnail": i.thumbnail, "score": f"{i.score:.2f}"} for i in images])
            for title, images in ends
            if images
        ],
        "note": note,
        "weights": _weights(layers),
        "indicators": [(name, INDICATORS.get(name, "")) for name in pool.indicators] if pool.quantiles else [],
    }


def _weights(layers: Sequence[LayerResult]) -> str:
    """Say how much the pool counted where layers were fitted on it; nothing where none was."""
    found = Counter(layer.pool_weight for layer in layers if layer.pool_weight is not None)
    if not found:
        return ""
    counts = (f"{weight:g} in {count} layer{'s' * (count != 1)}" for weight, count in found.most_common())
    return (
        f"Weight of the pool in the refit of a layer, where all samples together have 1: {', '.join(counts)}. Folds of "
        "the samples chose it where these were made; what goes was chosen before that, with the pool."
    )


def _whole(layers: Sequence[LayerResult]) -> dict[str, list[str]]:
    """Return {reason: layers that kept all their units}, the commonest reason first."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        if layer.kept == layer.units:
            found.setdefault(layer.note or "left whole by the target", []).append(layer.layer)
    return dict(sorted(found.items(), key=lambda entry: -len(entry[1])))


def _interface(report: Report) -> dict[str, Any] | None:
    if report.interface is None:
        return None
    sections = [found for _, found in report.interface if found != "same"]
    return {"differences": [line for found in sections for line in found]}


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    versions = [(name, getattr(report.tool, name)) for name in ("onnx", "onnxruntime", "torch")]
    yield "made by", f"xdonnx {report.tool.version}"
    yield "with", ", ".join(f"{name} {version}" for name, version in versions if version) or "nothing known"
    yield "device, seed", f"{report.device}, {report.seed}"
    if used := report.memory:
        spilled = f", {amount(used.spilled, 'B')} in files" if used.spilled else ""
        yield "memory", f"{amount(used.peak, 'B')} at most, of {amount(used.limit, 'B')} allowed{spilled}"
    if preset := preset_of(report):
        yield "preprocessing", f"preset {preset}"
