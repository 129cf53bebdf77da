"""The report as Markdown: a page for a pull request or a job's summary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from xdonnx.limits import compared, heavy_loss, limited, next_step
from xdonnx.report import LayerResult, Report, gate_figures, judged_by
from xdonnx.tries import tried

# What means something to Markdown inside a line, or opens HTML. An underscore within a word does not.
_MARKS = re.compile(r"[\\|<>&`*\[\]~]|(?<![^\W_])_|_(?![^\W_])")

_LINES = 60


def summary(report: Report) -> str:
    """Return the report as Markdown of at most 60 lines."""
    where = f"{report.device}, seed {report.seed}, {report.seconds:.1f} s, xdonnx {report.tool.version}"
    status = report.status if limited(report) else "done, no limit was set"
    lines = [f"# xdonnx: {_models(report)}{status} (exit code {report.exit_code})", "", where, ""]
    if heavy_loss(report.fidelity, report.gates):
        lines += ["**Much is lost**, see the warnings.", ""]
    lines += _bullets(report.reasons, 6)
    if step := next_step(report):
        lines += [f"Next: {_plain(step)}.", ""]
    if report.gates:
        lines += ["| gate | measured | judged | limit | |", "|---|---|---|---|---|"]
        for gate in report.gates:
            verdict = "passed" if gate.passed else {"fail": "**failed**", "warn": "warning"}[gate.level]
            value, _, limit = gate_figures(gate)
            lines.append(f"{_row(gate.name, value, judged_by(gate), limit)} {verdict} |")
        lines.append("")
    lines += _before_after(report) + _worst_layers(report.layers)
    if report.warnings:
        lines += ["Warnings:", "", *_bullets(report.warnings, 8)]
    command = _clip(report.command, 1000)
    end = ["```", command, "```"] if command else []
    return "\n".join([*lines, *_tries(report, _LINES - len(lines) - len(end)), *end]) + "\n"


def _tries(report: Report, room: int) -> list[str]:
    """List what was tried, as far as there is room; what was taken in any case, as it comes first."""
    rows = sorted(zip(report.tries, tried(report.tries), strict=True), key=lambda row: not row[0].chosen)
    if not rows or room < 4:
        return []
    lines = [_row(*cells) for _, cells in rows[: room - 3]]
    return ["| tried | MACs | found | |", "|---|---|---|---|", *lines, ""]


def _models(report: Report) -> str:
    """Return which file was made of which, without their folders."""
    names = [re.split(r"[\\/]", file.path)[-1] for file in (report.files.teacher, report.files.student) if file]
    return " → ".join(_plain(_clip(name, 80)) for name in names) + ": " * bool(names)


def _before_after(report: Report) -> list[str]:
    rows = []
    teacher, student, fidelity = report.teacher, report.student, report.fidelity
    if teacher and student:
        for name in ("bytes", "params", "nonzero", "macs"):
            before, after = getattr(teacher, name), getattr(student, name)
            rows.append(_row(name, f"{before:,}", f"{after:,}", f"{100 * after / before:.1f} %" if before else ""))
        a, b = teacher.latency_ms, student.latency_ms
        if a and b:
            times = (f"{t.median:.3f} ({t.q1:.3f} to {t.q3:.3f})" for t in (a, b))
            ratio = f"{100 * b.median / a.median:.1f} %" if a.median else ""
            rows.append(_row(f"latency, ms, {b.provider.removesuffix('ExecutionProvider')}", *times, ratio))
    if fidelity and fidelity.accuracy_teacher is not None and fidelity.accuracy_student is not None:
        percent = (f"{fidelity.accuracy_teacher:.2f} %", f"{fidelity.accuracy_student:.2f} %")
        rows.append(_row("top-1 accuracy", *percent, compared(fidelity)))
    if fidelity and fidelity.top1_agreement is not None:
        rows.append(_row("top-1 agreement", "", f"{fidelity.top1_agreement:.2f} %", compared(fidelity)))
    if fidelity and fidelity.drop:
        drop = fidelity.drop
        sure = f"({drop.low:.2f} to {drop.high:.2f} at {100 * drop.confidence:g} %)"
        rows.append(_row(f"drop of {drop.of}, points", "", f"{drop.value:.2f} {sure}", ""))
    errors = [output for output in fidelity.outputs if output.relative_l2 is not None] if fidelity else []
    if errors:
        worst = max(errors, key=lambda output: output.relative_l2 or 0.0)
        rows.append(_row(f"relative L2 of '{worst.name}'", "", f"{worst.relative_l2:.6f}", ""))
    rows += _as_given(report)
    if not rows:
        return []
    samples = f"{fidelity.samples} {'held-out ' * fidelity.held_out}samples" if fidelity else ""
    return [_row(samples, "teacher", "student", "student / teacher"), "|---|---|---|---|", *rows, ""]


def _as_given(report: Report) -> list[str]:
    """Say in a row how a given student answered before it was refitted."""
    given = report.given
    if given is None:
        return []
    errors = [output.relative_l2 for output in given.outputs if output.relative_l2 is not None]
    equal = [output.agreement for output in given.outputs if output.agreement is not None]
    parts = [
        *([] if given.accuracy_student is None else [f"accuracy {given.accuracy_student:.2f} %"]),
        *([] if given.top1_agreement is None else [f"agreement {given.top1_agreement:.2f} %"]),
        *([f"relative L2 {max(errors):.6f}"] if errors else []),
        *([f"equal elements {min(equal):.2f} %"] if equal else []),
    ]
    return [_row("as given, before the refit", "", ", ".join(parts), "")] if parts else []


def _worst_layers(layers: Iterable[LayerResult]) -> list[str]:
    """List the five layers of the largest error left, among those whose error is known."""
    known = [layer for layer in layers if layer.objective_after is not None]
    if not known:
        return []
    worst = sorted(known, key=lambda layer: -(layer.objective_after or 0.0))[:5]
    lines = ["| worst layers | op | kept | error before | error after |", "|---|---|---|---|---|"]
    for layer in worst:
        before = "" if layer.objective_before is None else f"{layer.objective_before:.4g}"
        kept = f"{layer.kept} of {layer.units}"
        lines.append(_row(layer.layer, layer.op, kept, before, f"{layer.objective_after:.4g}"))
    return [*lines, ""]


def _row(*cells: str) -> str:
    return "| " + " | ".join(_plain(_clip(cell, 120)) for cell in cells) + " |"


def _bullets(lines: Sequence[str], most: int) -> list[str]:
    """Return up to `most` lines as a list; the last one counts the rest."""
    if not lines:
        return []
    kept = list(lines) if len(lines) <= most else [*lines[: most - 1], f"and {len(lines) - most + 1} more"]
    return [f"- {_plain(_clip(line, 300))}" for line in kept] + [""]


def _plain(text: str) -> str:
    """Return the text such that Markdown shows it as it is: names may hold columns, tags, links and emphasis."""
    return _MARKS.sub(r"\\\g<0>", text)


def _clip(text: str, most: int) -> str:
    """Return the text in one line of bounded length."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
