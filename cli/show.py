"""A report as a person reads it: the verdict first, then before and after, gates, layers, warnings, files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from xdonnx.figures import amount
from xdonnx.limits import compared, doubtful, heavy_loss, limited, next_step
from xdonnx.report import Fidelity, Figures, GateResult, LayerResult, Report, gate_line, gist, preset_of
from xdonnx.tries import Try, tried
from xdonnx_cli.terminal import beside, bullets, heading, headline, percent, plain_table, room, say, shorten, shortened

_COLOURS = {"passed": "bold green", "rejected": "bold red", "failed": "bold red"}
# Layers that are listed: those of the largest error left.
_WORST = 3


def show(console: Console, report: Report, *, written: Sequence[Path] = (), quiet: bool = False) -> None:
    """Print a report.

    Parameters
    ----------
    console : Console
    report : Report
    written : sequence of Path
        Files that the job left, to be named at the end.
    quiet : bool
        The verdict alone.
    """
    verdict(console, report)
    if quiet:
        return
    if step := next_step(report):
        bullets(console, [f"next: {step}"])
    before_after(console, report)
    tries(console, report.tries)
    gates(console, report.gates)
    worst_layers(console, report.layers)
    matched(console, report)
    if report.warnings:
        heading(console, "Warnings")
        bullets(console, report.warnings)
    if written:
        heading(console, "Written")
        for path in written:
            size = f"  ({amount(path.stat().st_size, 'B')})" if path.is_file() else ""
            say(console, f"  {beside(path)}{size}")


def verdict(console: Console, report: Report) -> None:
    """Print what came of it in a line, and why where it is not good."""
    # Without a limit nothing was passed: a green word would say more than is known.
    judged = limited(report)
    line = Text(report.status.upper() if judged else "DONE", _COLOURS[report.status] if judged else "bold")
    line.append(f"  {gist(report)}{'' if judged else '; no limit was set'}", "default not bold")
    if heavy_loss(report.fidelity, report.gates):
        line.append("; MUCH IS LOST, see the warnings", "bold red")
    headline(console, line)
    if report.reasons:
        bullets(console, report.reasons)


def before_after(console: Console, report: Report) -> None:
    """Print what both models cost and how they answer."""
    costs = list(_cost_rows(report.teacher, report.student)) if report.teacher and report.student else []
    found, before = (dict(_fidelity_rows(one)) for one in (report.fidelity, report.given))
    given = [""] * len(costs) + [before[key][2] if key in before else "" for key in found]
    table = plain_table("", "teacher", *["as given"] * any(given), "student", "")
    for (name, teacher, *others), cell in zip([*costs, *found.values()], given, strict=True):
        table.add_row(name, teacher, *[cell] * any(given), *others)
    if table.row_count:
        console.print()
        console.print(table)
    if report.fidelity:
        count = report.fidelity.samples
        kind = f"{'held-out ' * report.fidelity.held_out}sample{'s' * (count != 1)}"
        fitted = "" if report.fidelity.held_out else ", which also fitted the student"
        pool = f" and a pool of {report.pool.used}" if report.pool else ""
        fit = f"fitted on {report.fit_samples}{pool}; " if report.fit_samples is not None else ""
        preset = preset_of(report)
        seen = f"; preset {preset}" if preset else ""
        console.print(Text(f"{fit}judged on {count} {kind}{fitted}{seen}; {report.device}", "dim"))
    if doubt := doubtful(report):
        console.print(Text(doubt, "yellow"))


def _cost_rows(teacher: Figures, student: Figures) -> Iterable[tuple[str, str, str, str]]:
    sizes = amount(teacher.bytes, "B"), amount(student.bytes, "B")
    yield "file size", *sizes, percent(student.bytes, teacher.bytes)
    yield "weights", amount(teacher.params), amount(student.params), percent(student.params, teacher.params)
    # A stray zero is in every model; a share of them is somebody's doing.
    if min(teacher.nonzero / max(teacher.params, 1), student.nonzero / max(student.params, 1)) < 0.99:
        counts = amount(teacher.nonzero), amount(student.nonzero)
        yield "  not zero", *counts, percent(student.nonzero, teacher.nonzero)
    yield "MACs", amount(teacher.macs), amount(student.macs), percent(student.macs, teacher.macs)
    ours, theirs = teacher.latency_ms, student.latency_ms
    if ours and theirs:
        where = theirs.provider.removesuffix("ExecutionProvider")
        times = f"{ours.median:.3g} ms", f"{theirs.median:.3g} ms"
        yield f"latency, {where}", *times, percent(theirs.median, ours.median)


def _fidelity_rows(fidelity: Fidelity | None) -> Iterable[tuple[tuple[str, str], tuple[str, str, str, str]]]:
    """Yield rows, each with what it is of: names of outputs may be cut alike."""
    if fidelity is None:
        return
    drop = fidelity.drop
    change = "" if drop is None else f"{0.0 - drop.value:+.2f} points"
    lost = {"accuracy": "", "agreement": ""} | ({} if drop is None else {drop.of: change})
    if fidelity.accuracy_teacher is not None and fidelity.accuracy_student is not None:
        answers = f"{fidelity.accuracy_teacher:.2f} %", f"{fidelity.accuracy_student:.2f} %"
        yield ("accuracy", ""), ("accuracy", *answers, lost["accuracy"])
    if fidelity.top1_agreement is not None:
        # What is lost of it is what it lacks to all.
        whose = compared(fidelity, shorten(fidelity.classifier or "", 16))
        yield ("agreement", ""), ("agreement", "", f"{fidelity.top1_agreement:.2f} %", whose or lost["agreement"])
    if drop is not None:
        bounds = f"{drop.low:.1f} to {drop.high:.1f}"
        yield ("drop", ""), (f"drop, {100 * drop.confidence:g} % sure", "", bounds, "points")
    for output in fidelity.outputs[:3]:
        if output.relative_l2 is not None:
            name = shorten(output.name, 16)
            yield ("error", output.name), (f"error of {name}", "", f"{output.relative_l2:.4f}", "relative L2")


def tries(console: Console, found: Sequence[Try]) -> None:
    """Print what was tried on the way, and which was taken."""
    if not found:
        return
    table = plain_table("Tries", "MACs", "found", "<")
    table.columns[0].header_style = "bold"
    for row in tried(found):
        table.add_row(f"  {row[0]}", *row[1:])
    console.print()
    console.print(table)


def gates(console: Console, results: Sequence[GateResult]) -> None:
    """Print each limit and how it was met."""
    if not results:
        return
    heading(console, "Gates")
    grid = Table.grid(padding=(0, 1, 0, 0))
    for gate in results:
        word, style = ("passed", "green") if gate.passed else ("FAILED", "bold red")
        if not gate.passed and gate.level == "warn":
            word, style = "warning", "yellow"
        grid.add_row(Text(f"  {word}", style), gate_line(gate))
    console.print(grid)


def worst_layers(console: Console, layers: Sequence[LayerResult]) -> None:
    """Print the layers that answer worst for themselves, where a method measured that."""
    known = [layer for layer in layers if layer.objective_after is not None and layer.objective_before]
    if not known:
        return
    worst = sorted(known, key=lambda layer: -(layer.objective_after or 0.0))[:_WORST]
    table = plain_table("Worst layers", "kept", "error cut", "refitted")
    table.columns[0].header_style = "bold"
    names = shortened([layer.layer for layer in known], room(console, 40))
    for layer in worst:
        before, after = layer.objective_before or 0.0, layer.objective_after or 0.0
        kept = f"{layer.kept} of {layer.units}"
        table.add_row(names[layer.layer], kept, _error(before), _error(after))
    console.print()
    console.print(table)


def matched(console: Console, report: Report) -> None:
    """Print how sure it is that the student's layers are those of the teacher that they were taken for."""
    if not report.matches:
        return
    heading(console, "Matched layers")
    least = min(report.matches, key=lambda match: match.confidence)
    ours = sum(len(match.student) for match in report.matches)
    count = f"{len(report.matches)} of the teacher's, {ours} of the student's"
    name = shorten(least.teacher, room(console, 40))
    say(console, f"  {count}; the least sure '{name}': {least.confidence:.2f} by {least.by}")


def _error(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"
