"""The report of a job: what was measured and what the gate says of it.

`report.json` is the truth; `summary.md` and every other form are drawn from it. A report of an older or newer
minor version reads; what a newer one has in addition is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError
from pydantic_core import to_jsonable_python

from xdonnx.errors import JobError
from xdonnx.events import legible
from xdonnx.matches import MatchResult
from xdonnx.sheet import PoolSheet
from xdonnx.strict import STRICT
from xdonnx.tries import Try

# 1.1 has the worst shots, and says which outputs were not compared. 1.2 has the pool, the memory taken, what was tried
# on the way, how a given student was matched and answered before, and of how many classes top-1 is.
SCHEMA_VERSION = "1.2"

# The unit of a gate and the decimals in which it is shown, where these suffice to see whether the limit was kept.
UNITS = {"points": 2, "relative L2": 6, "fraction": 4, "ratio": 3, "bytes": 0, "weights": 0}
COUNTS = frozenset({"bytes", "weights"})
# Gates that are limits from below; all others are from above.
AT_LEAST = frozenset({"min_shrink", "smaller", "removed"})

_NO_BOUND = "no bound"


class Tool(BaseModel):
    """What made the report; None for a package that is not installed."""

    model_config = STRICT
    name: str = "xdonnx"
    version: str
    onnx: str | None
    onnxruntime: str | None
    torch: str | None


class FileInfo(BaseModel):
    """A file that went in or came out. For shots: the arrays as they were fed, and where they came from."""

    model_config = STRICT
    path: str
    sha256: str
    bytes: int


class Files(BaseModel):
    """The files of the job; in `read` what else it rests on, by option: hold-out, pool, plan, a given student."""

    model_config = STRICT
    teacher: FileInfo | None = None
    student: FileInfo | None = None
    shots: FileInfo | None = None
    read: dict[str, FileInfo] = {}


class LatencyRatio(BaseModel):
    """How many times as slow a model is as another, timed in turns with it, and the band that noise leaves."""

    model_config = STRICT
    value: float
    low: float
    high: float
    confidence: float


class Latency(BaseModel):
    """Milliseconds of one run in onnxruntime, of `batch` samples; `threads` 0 is onnxruntime's own choice."""

    model_config = STRICT
    median: float
    q1: float
    q3: float
    provider: str
    threads: int
    runs: int
    batch: int
    ratio: LatencyRatio | None = Field(None, description="over the model timed first in the same turns; None for that")


class Figures(BaseModel):
    """What one model costs. Bytes are those of the file with its external data; MACs are those of one run."""

    model_config = STRICT
    bytes: int
    params: int
    nonzero: int
    macs: int
    latency_ms: Latency | None = None


class Drop(BaseModel):
    """Points of accuracy that the student lost; of agreement with the teacher where labels are none or say nothing."""

    model_config = STRICT
    value: float
    low: float
    high: float
    confidence: float
    of: Literal["accuracy", "agreement"]
    method: str
    lost: int = Field(description="samples only the teacher has right; of agreement: where they differ")
    gained: int = Field(description="samples only the student has right; of agreement: 0")


class OutputError(BaseModel):
    """How far one output is from the teacher's, over all samples; None where that has no meaning.

    `relative_l2` is the norm of the difference over the norm of the teacher; `low` and `high` bound it, and are None
    where so few samples bound nothing.
    `agreement`, the percentage of equal elements, is for outputs that are no floating-point numbers.
    """

    model_config = STRICT
    name: str
    relative_l2: float | None
    low: float | None = None
    high: float | None = None
    confidence: float | None = None
    max_abs: float | None
    cosine: float | None
    agreement: float | None = None
    compared: bool = Field(
        default=True,
        description="false where nothing bounds its error: the student's has another length than the teacher's on some "
        "samples, or it is no tensor",
    )


class Answer(BaseModel):
    """The class that a model puts first, and the number that it gives it; None where that is not finite."""

    model_config = STRICT
    top: int
    name: str = Field("", description="of the class, where folders named the classes")
    score: float | None


class WorstShot(BaseModel):
    """A sample on which the student is far from the teacher."""

    model_config = STRICT
    sample: str = Field(description="where it came from")
    row: int = Field(description="its place among the samples that judged, from 0")
    label: int | None = None
    label_name: str = ""
    teacher: Answer | None = Field(None, description="None where no output classifies")
    student: Answer | None = None
    relative_l2: float | None = Field(description="of its worst output; None where the teacher's is zero throughout")
    thumbnail: str | None = Field(None, repr=False, description="data URI of a PNG, at most 64 pixels a side, as fed")


class Fidelity(BaseModel):
    """How the student answers compared with the teacher. Agreement and accuracy are per cent of the samples."""

    model_config = STRICT
    samples: int
    held_out: bool = Field(description="whether none of the samples was used to fit the student")
    top1_agreement: float | None = None
    accuracy_teacher: float | None = None
    accuracy_student: float | None = None
    drop: Drop | None = None
    smallest_drop: float | None = Field(None, description="points that so many samples can tell from none")
    outputs: tuple[OutputError, ...]
    classifier: str | None = Field(None, description="the output whose top-1 is compared")
    classes: int | None = Field(None, description="of that output: the scores of each sample")
    probable: bool = Field(False, description="whether these are probabilities, or logarithms of such")
    fit_error: float | None = Field(None, description="relative L2 of the worst output on samples that fitted")
    worst: tuple[WorstShot, ...] = Field((), description="of the largest disagreement, the worst first")


class GateResult(BaseModel):
    """One limit and how it was met; value, bound and limit are in `unit`.

    `bound` is the number that was compared with `limit`: the value itself, or the end of its interval when a
    confidence was asked for; ten digits of it are compared. None is a number without bounds: the teacher's output is
    zero throughout and the student's is not, or has another length, or too few samples bound nothing.
    """

    model_config = STRICT
    name: str
    value: float | None
    bound: float | None
    limit: float
    unit: str
    level: Literal["fail", "warn"]
    passed: bool


class Memory(BaseModel):
    """Bytes of memory that a job might take and took: of the GPU where one ran it, else of the whole process."""

    model_config = STRICT
    limit: int
    peak: int
    spilled: int = Field(description="bytes of activations that were written to temporary files for want of room")


class LayerResult(BaseModel):
    """What became of one layer, named by the value it produces."""

    model_config = STRICT
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
    pool_weight: float | None = Field(default=None, description="of the pool in its refit; that of all samples is 1")
    note: str = ""


class InterfaceCheck(BaseModel):
    """'same', or a line for each difference; the doc string counts as metadata."""

    model_config = STRICT
    inputs: Literal["same"] | tuple[str, ...] = "same"
    outputs: Literal["same"] | tuple[str, ...] = "same"
    opset: Literal["same"] | tuple[str, ...] = "same"
    metadata: Literal["same"] | tuple[str, ...] = "same"


class Report(BaseModel):
    """Everything that a job found out."""

    model_config = STRICT
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
    given: Fidelity | None = Field(default=None, description="of a given student, before it was refitted")
    gates: tuple[GateResult, ...] = ()
    layers: tuple[LayerResult, ...] = ()
    interface: InterfaceCheck | None = None
    warnings: tuple[str, ...] = ()
    memory: Memory | None = None
    matches: tuple[MatchResult, ...] = ()
    fit_samples: int | None = Field(None, description="samples that fitted the student; None for two given files")
    pool: PoolSheet | None = None
    tries: tuple[Try, ...] = Field(default=(), description="what was tried to meet a latency, or the gate: --smallest")


def plain(value: Any) -> Any:
    """Return what was asked for as a report can hold it: mappings, lists, numbers and legible text."""
    if isinstance(value, (str, Path)):
        return legible(str(value))
    if isinstance(value, Mapping):
        return {plain(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return to_jsonable_python(value, fallback=str)


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
    value, _, limit = gate_figures(gate)
    judged = "" if gate.bound == gate.value else f" ({judged_by(gate)})"
    word = "at least" if gate.name in AT_LEAST else "at most"
    return f"{gate.name}: {value}{judged}, allowed {word} {limit}"


def judged_by(gate: GateResult) -> str:
    """Return the number that was compared with the limit, and which end it is where it is that of an interval."""
    bound = gate_figures(gate)[1]
    if gate.bound is None or gate.bound == gate.value:
        return bound
    # The noise of a latency is granted to the student; what samples leave open is held against it.
    return f"at least {bound} allowing for noise" if gate.name == "not_slower" else f"may be {bound}"


def gate_figures(gate: GateResult) -> tuple[str, str, str]:
    """Return value, bound and limit as people read them, the bound with decimals enough to see the verdict."""
    limit = shown(gate.limit, gate.unit, exact=True)
    found = [shown(gate.bound, gate.unit, more=more) for more in range(5)]
    exact = shown(gate.bound, gate.unit, exact=True)
    bound = next((text for text in found if _kept(text, limit, gate.name) is gate.passed), exact)
    return bound if gate.value == gate.bound else shown(gate.value, gate.unit), bound, limit


def _kept(bound: str, limit: str, name: str) -> bool:
    """Whether a limit is kept, by what is written of both."""
    if bound == _NO_BOUND:
        return False
    judged, allowed = (float(text.partition(" ")[0].replace(",", "")) for text in (bound, limit))
    return judged >= allowed if name in AT_LEAST else judged <= allowed


def gist(report: Report) -> str:
    """Return the outcome in a sentence: how small, how fast, how faithful."""
    parts: list[str] = []
    teacher, student, fidelity = report.teacher, report.student, report.fidelity
    if teacher and student:
        for name, of in (("macs", "MACs"), ("nonzero", "weights not zero"), ("bytes", "bytes")):
            before, after = getattr(teacher, name), getattr(student, name)
            # Where channels went, their weights went too: the sentence names one of the two.
            if before and (name == "bytes" or (after != before and not parts)):
                parts.append(f"{100 * after / before:.1f} % of the {of}")
    if fidelity and fidelity.accuracy_student is not None and fidelity.accuracy_teacher is not None:
        parts.append(f"accuracy {fidelity.accuracy_teacher:.2f} → {fidelity.accuracy_student:.2f} %")
    elif fidelity and fidelity.top1_agreement is not None:
        parts.append(f"agreement {fidelity.top1_agreement:.2f} %")
    elif fidelity and (errors := [o.relative_l2 for o in fidelity.outputs if o.relative_l2 is not None]):
        parts.append(f"relative L2 error {max(errors):.4f}")
    return ", ".join(parts)


def interval_line(report: Report, gate: str) -> str:
    """Say how sure the number that a gate judges is; nothing where it carries no interval."""
    fidelity = report.fidelity
    if fidelity is None:
        return ""
    if gate == "max_drop" and fidelity.drop:
        drop = fidelity.drop
        text = f"{drop.low:.2f} to {drop.high:.2f} points at {100 * drop.confidence:g} % confidence"
        least = fidelity.smallest_drop
        return text if least is None else f"{text}; {fidelity.samples} samples can show {least:.2f} points at best"
    bounded = [output for output in fidelity.outputs if output.high is not None and output.confidence is not None]
    if gate == "max_error" and bounded:
        worst = max(bounded, key=lambda output: output.relative_l2 or 0.0)
        return f"{worst.low:.6f} to {worst.high:.6f} at {100 * (worst.confidence or 0):g} % confidence, '{worst.name}'"
    return ""


def shown(number: float | None, unit: str, *, exact: bool = False, more: int = 0) -> str:
    """Return a gate's number as people read it.

    Parameters
    ----------
    number : float, optional
        None has no bound.
    unit : str
    exact : bool
        With ten digits: a limit, which nobody rounds.
    more : int
        Decimals beyond those that are usual.
    """
    if number is None:
        return _NO_BOUND
    decimals = UNITS.get(unit, 4)
    if unit == "fraction":  # people read per cent; four decimals of a fraction are two of those
        number, decimals, unit = 100 * number, decimals - 2, "%"
    text = f"{number:.10g}" if exact and decimals else f"{number:,.{decimals + more}f}"
    return text if unit == "ratio" else f"{text} {unit}"


def preset_of(report: Report) -> str:
    """Return the preset that prepared the images; nothing where the job names none."""
    preprocess = report.job.get("preprocess")
    preset = preprocess.get("preset") if isinstance(preprocess, dict) else None
    return preset if isinstance(preset, str) else ""


def read_report(path: str | Path) -> Report:
    """Read a report.json, or the one in a report folder.

    Raises
    ------
    JobError
        It is missing, no report, damaged, or of another major version.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    hint = "Name the folder or the report.json that compress or verify wrote."
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise JobError(f"no report at '{path}': {error.strerror}.\n  {hint}") from error
    except ValueError as error:
        raise JobError(f"'{path}' is no report: it is not JSON ({error}).\n  {hint}") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(version, str):
        raise JobError(f"'{path}' is no report: it names no schema_version.\n  {hint}")
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        writer = raw.get("tool", {}).get("version", "") if isinstance(raw.get("tool"), dict) else ""
        raise JobError(
            f"'{path}' has schema {version}, this xdonnx reads {SCHEMA_VERSION}.\n"
            f"  Use the xdonnx that wrote it{f': pip install xdonnx=={writer}' if writer else ''}."
        )
    try:
        return _validated(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise JobError(f"'{path}' is damaged: {where}: {first['msg']}.\n  {hint}") from error


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
