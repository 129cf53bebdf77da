"""The report of a job: what was measured, what the gate says of it, and how that reads on paper.

`report.json` is the truth; `summary.md` and every other form are drawn from it. A report of an older or newer
minor version reads; what a newer one has in addition is passed over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xdonnx.errors import JobError, MachineError
from xdonnx.events import Event, Log, ignore

SCHEMA_VERSION = "1.0"

# The unit of a gate and the decimals in which it is shown, and therefore compared.
UNITS = {"points": 2, "relative L2": 6, "fraction": 4, "ratio": 3}

# A report is written whole or not at all: a key that is not in the schema, or a number that JSON cannot hold,
# is our mistake. Readers of the schema must live with keys to come, so it does not forbid them.
_STRICT = ConfigDict(
    frozen=True,
    extra="forbid",
    allow_inf_nan=False,
    json_schema_extra=lambda schema: schema.pop("additionalProperties", None),
)


class Tool(BaseModel):
    """What made the report; None for a package that is not installed."""

    model_config = _STRICT
    name: str = "xdonnx"
    version: str
    onnx: str | None
    onnxruntime: str | None
    torch: str | None


class FileInfo(BaseModel):
    """A file that went in or came out. For shots: the arrays as they were fed, and where they came from."""

    model_config = _STRICT
    path: str
    sha256: str
    bytes: int


class Files(BaseModel):
    """The files of the job."""

    model_config = _STRICT
    teacher: FileInfo | None = None
    student: FileInfo | None = None
    shots: FileInfo | None = None


class Latency(BaseModel):
    """Milliseconds of one run in onnxruntime, of `batch` samples; `threads` 0 is onnxruntime's own choice."""

    model_config = _STRICT
    median: float
    q1: float
    q3: float
    provider: str
    threads: int
    runs: int
    batch: int


class Figures(BaseModel):
    """What one model costs. Bytes are those of the file with its external data; MACs are those of one run."""

    model_config = _STRICT
    bytes: int
    params: int
    nonzero: int
    macs: int
    latency_ms: Latency | None = None


class Drop(BaseModel):
    """Points of accuracy that the student lost; of agreement with the teacher where nothing is labelled."""

    model_config = _STRICT
    value: float
    low: float
    high: float
    confidence: float
    of: Literal["accuracy", "agreement"]
    method: str
    lost: int = Field(description="samples only the teacher has right; without labels: where they disagree")
    gained: int = Field(description="samples only the student has right; without labels: 0")


class OutputError(BaseModel):
    """How far one output is from the teacher's, over all samples; None where that has no meaning.

    `relative_l2` is the norm of the difference over the norm of the teacher; `low` and `high` bound it.
    `agreement`, the percentage of equal elements, is for outputs that are no floating-point numbers.
    """

    model_config = _STRICT
    name: str
    relative_l2: float | None
    low: float | None = None
    high: float | None = None
    confidence: float | None = None
    max_abs: float | None
    cosine: float | None
    agreement: float | None = None


class Fidelity(BaseModel):
    """How the student answers compared with the teacher. Agreement and accuracy are per cent of the samples."""

    model_config = _STRICT
    samples: int
    held_out: bool = Field(description="whether none of the samples was used to fit the student")
    top1_agreement: float | None = None
    accuracy_teacher: float | None = None
    accuracy_student: float | None = None
    drop: Drop | None = None
    smallest_drop: float | None = Field(None, description="points that so many samples can tell from none")
    outputs: tuple[OutputError, ...]


class GateResult(BaseModel):
    """One limit and how it was met; value, bound and limit are in `unit`.

    `bound` is the number that was compared with `limit`: the value itself, or the end of its interval when a
    confidence was asked for. Both are rounded as they are shown before they are compared. None is a number
    without bounds: the teacher's output is zero throughout and the student's is not.
    """

    model_config = _STRICT
    name: str
    value: float | None
    bound: float | None
    limit: float
    unit: str
    level: Literal["fail", "warn"]
    passed: bool


class LayerResult(BaseModel):
    """What became of one layer, named by the value it produces."""

    model_config = _STRICT
    layer: str
    op: str
    kept: int
    units: int
    params_before: int
    params_after: int
    macs_before: int | None
    macs_after: int | None
    objective_before: float | None = None
    objective_after: float | None = None
    seconds: float | None = None
    note: str = ""


class InterfaceCheck(BaseModel):
    """'same', or a line for each difference; the doc string counts as metadata."""

    model_config = _STRICT
    inputs: Literal["same"] | tuple[str, ...] = "same"
    outputs: Literal["same"] | tuple[str, ...] = "same"
    opset: Literal["same"] | tuple[str, ...] = "same"
    metadata: Literal["same"] | tuple[str, ...] = "same"


class Report(BaseModel):
    """Everything that a job found out."""

    model_config = _STRICT
    schema_version: str = SCHEMA_VERSION
    status: Literal["passed", "rejected", "failed"]
    exit_code: int
    reasons: tuple[str, ...] = ()
    started: str = Field(description="ISO 8601, with the time zone")
    seconds: float
    tool: Tool
    command: str
    job: dict[str, Any]
    seed: int
    device: str
    files: Files
    teacher: Figures | None = None
    student: Figures | None = None
    fidelity: Fidelity | None = None
    gates: tuple[GateResult, ...] = ()
    layers: tuple[LayerResult, ...] = ()
    interface: InterfaceCheck | None = None
    warnings: tuple[str, ...] = ()
    fit_samples: int | None = Field(None, description="samples that fitted the student; None for two given files")


def tool() -> Tool:
    """Return the versions in use; imports none of the packages."""

    def version(*names: str) -> str | None:
        for name in names:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return None

    return Tool(
        version=version("xdonnx") or "unknown",
        onnx=version("onnx"),
        onnxruntime=version("onnxruntime-gpu", "onnxruntime"),
        torch=version("torch"),
    )


def gate_line(gate: GateResult) -> str:
    """Say in a line what was measured and what was allowed."""
    judged = "" if gate.bound == gate.value else f" (bound {shown(gate.bound, gate.unit)})"
    word = "at least" if gate.name == "min_shrink" else "at most"
    limit = shown(gate.limit, gate.unit, exact=True)
    return f"{gate.name}: {shown(gate.value, gate.unit)}{judged}, allowed {word} {limit}"


def shown(number: float | None, unit: str, *, exact: bool = False) -> str:
    """Return a gate's number as people read it; `exact` for a limit, which nobody rounds."""
    if number is None:
        return "no bound"
    decimals = UNITS[unit]
    if unit == "fraction":  # people read per cent; four decimals of a fraction are two of those
        number, decimals, unit = 100 * number, decimals - 2, "%"
    text = f"{number:.10g}" if exact else f"{number:.{decimals}f}"
    return text if unit == "ratio" else f"{text} {unit}"


def summary(report: Report) -> str:
    """Return the report as Markdown of at most 60 lines."""
    where = f"{report.device}, seed {report.seed}, {report.seconds:.1f} s, xdonnx {report.tool.version}"
    lines = [f"# xdonnx: {report.status} (exit code {report.exit_code})", "", where, ""]
    lines += _bullets(report.reasons, 6)
    if report.gates:
        lines += ["| gate | measured | judged | limit | |", "|---|---|---|---|---|"]
        for gate in report.gates:
            verdict = "passed" if gate.passed else {"fail": "**failed**", "warn": "warning"}[gate.level]
            numbers = (shown(gate.value, gate.unit), shown(gate.bound, gate.unit))
            limit = shown(gate.limit, gate.unit, exact=True)
            lines.append(_row(gate.name, *numbers, limit, verdict))
        lines.append("")
    lines += _before_after(report) + _worst_layers(report.layers)
    if report.warnings:
        lines += ["Warnings:", "", *_bullets(report.warnings, 8)]
    command = _clip(report.command, 1000)
    return "\n".join([*lines, *(["```", command, "```"] if command else [])]) + "\n"


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
        rows.append(_row("top-1 accuracy", *percent, ""))
    if fidelity and fidelity.top1_agreement is not None:
        rows.append(_row("top-1 agreement", "", f"{fidelity.top1_agreement:.2f} %", ""))
    if fidelity and fidelity.drop:
        drop = fidelity.drop
        sure = f"({drop.low:.2f} to {drop.high:.2f} at {100 * drop.confidence:g} %)"
        rows.append(_row(f"drop of {drop.of}, points", "", f"{drop.value:.2f} {sure}", ""))
    errors = [output for output in fidelity.outputs if output.relative_l2 is not None] if fidelity else []
    if errors:
        worst = max(errors, key=lambda output: output.relative_l2 or 0.0)
        rows.append(_row(f"relative L2 of '{worst.name}'", "", f"{worst.relative_l2:.6f}", ""))
    if not rows:
        return []
    samples = f"{fidelity.samples} {'held-out ' * fidelity.held_out}samples" if fidelity else ""
    return [_row(samples, "teacher", "student", "student / teacher"), "|---|---|---|---|", *rows, ""]


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
        lines.append(_row(f"`{layer.layer}`", layer.op, kept, before, f"{layer.objective_after:.4g}"))
    return [*lines, ""]


def _row(*cells: str) -> str:
    return "| " + " | ".join(_clip(cell, 120).replace("|", "\\|") for cell in cells) + " |"


def _bullets(lines: Sequence[str], most: int) -> list[str]:
    """Return up to `most` lines as a list; the last one counts the rest."""
    if not lines:
        return []
    kept = list(lines) if len(lines) <= most else [*lines[: most - 1], f"and {len(lines) - most + 1} more"]
    return [f"- {_clip(line, 300)}" for line in kept] + [""]


def _clip(text: str, most: int) -> str:
    """Return the text in one line of bounded length."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def write_report(report: Report, folder: str | Path, *, log: Log = ignore) -> None:
    """Write `report.json` and `summary.md`; append the latter to the file that GITHUB_STEP_SUMMARY names.

    Raises
    ------
    MachineError
        The folder cannot be written. A step summary that cannot is a warning event only.
    """
    folder, text = Path(folder), summary(report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / ".report.json"
        draft.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        os.replace(draft, folder / "report.json")
        (folder / "summary.md").write_text(text, encoding="utf-8")
    except OSError as error:
        raise MachineError(f"cannot write the report to '{folder}': {error}.") from error
    step = os.environ.get("GITHUB_STEP_SUMMARY")
    if step:
        try:
            with Path(step).open("a", encoding="utf-8") as stream:
                stream.write(text)
        except OSError as error:
            # Inside a container the path may not exist; the report itself is safe.
            log(Event("verify", f"cannot append to GITHUB_STEP_SUMMARY: {error}", level="warning"))


def read_report(path: str | Path) -> Report:
    """Read a report.json, or the one in a report folder.

    Raises
    ------
    JobError
        It is missing, no report, damaged, or of another major version.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "Name the folder or the report.json that compress wrote."
        raise JobError(f"no report at '{path}': {error.strerror}.\n  {hint}") from error
    except ValueError as error:
        raise JobError(f"'{path}' is no report: it is not JSON ({error}).") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(version, str):
        raise JobError(f"'{path}' is no report: it names no schema_version.")
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise JobError(
            f"'{path}' has schema {version}, this xdonnx reads {SCHEMA_VERSION}.\n  Use the xdonnx that wrote it."
        )
    try:
        return _validated(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise JobError(f"'{path}' is damaged: {where}: {first['msg']}.") from error


def schema() -> dict[str, Any]:
    """Return the JSON Schema of report.json."""
    return Report.model_json_schema(mode="serialization")


def _validated(raw: dict[str, Any]) -> Report:
    try:
        return Report.model_validate(raw)
    except ValidationError as error:
        extra = [entry["loc"] for entry in error.errors() if entry["type"] == "extra_forbidden"]
        if not extra:
            raise
    for place in extra:
        part: Any = raw
        for step in place[:-1]:
            part = part[step]
        del part[place[-1]]
    return Report.model_validate(raw)
