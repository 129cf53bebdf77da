"""What a sweep found: sweep.json, and the tables drawn from it.

`sweep.json` is the truth; `sweep.csv`, `sweep.md` and `report.html` are drawn from it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from xdonnx.errors import MachineError
from xdonnx.report import FileInfo, Tool
from xdonnx.strict import STRICT
from xdonnx.sweep.front import COSTS, QUALITIES, Point, Spread
from xdonnx.sweep.options import told
from xdonnx.sweep.records import Record
from xdonnx.sweep.trials import Trial, said

SCHEMA_VERSION = "1.0"
Status = Literal["passed", "rejected", "failed", "refused", "waiting"]
# As people call them.
TITLES = {"macs": "MACs", "bytes": "bytes", "weights": "weights", "latency": "latency"}
STAR = "★"


class Mean(BaseModel):
    """A mean over seeds and the standard deviation between them (n - 1), which one alone does not have."""

    model_config = STRICT
    mean: float
    std: float | None = None


class TeacherResult(BaseModel):
    """A model of the sweep; its figures are those of the first trial that measured them."""

    model_config = STRICT
    name: str
    file: FileInfo
    macs: int | None = None
    bytes: int | None = None
    weights: int | None = None
    latency_ms: float | None = None
    accuracy: float | None = None


class TrialResult(BaseModel):
    """A job. Costs are shares of the teacher's; accuracy and agreement are per cent, the error is relative L2."""

    model_config = STRICT
    key: str
    folder: str = Field(description="below the folder of the sweep: report.json, and the student where it is kept")
    model: str
    choices: dict[str, Any]
    seed: int
    status: Status
    exit_code: int | None = Field(description="as xdonnx compress would end; None while it waits")
    reason: str = ""
    macs: float | None = None
    bytes: float | None = None
    weights: float | None = None
    latency: float | None = None
    accuracy: float | None = None
    agreement: float | None = None
    error: float | None = None
    drop: float | None = None
    seconds: float | None = None
    student_sha256: str | None = None
    command: str = Field(description="makes the same student, with as many threads of torch")


class PointResult(BaseModel):
    """Trials that differ by their seeds alone."""

    model_config = STRICT
    model: str
    choices: dict[str, Any]
    trials: tuple[str, ...] = Field(description="their keys")
    done: int = Field(description="trials that gave a student")
    passed: int = Field(description="trials that kept every limit")
    cost: Mean | None
    quality: Mean | None
    optimal: bool = Field(description="whether no other point of the model costs less and is as good, or is better")


class SweepResults(BaseModel):
    """Everything that a sweep found out."""

    model_config = STRICT
    schema_version: str = SCHEMA_VERSION
    title: str
    status: Literal["complete", "interrupted"]
    exit_code: int
    started: str = Field(description="of the latest start; ISO 8601, with the time zone")
    seconds: float = Field(description="of the latest start")
    taken: int = Field(description="trials that the latest start did")
    tool: Tool
    command: str
    file: FileInfo
    backend: str
    cost: Literal["macs", "bytes", "weights", "latency"]
    quality: Literal["accuracy", "agreement", "error"]
    seeds: tuple[int, ...]
    search: dict[str, Any] | None
    models: tuple[TeacherResult, ...]
    points: tuple[PointResult, ...]
    trials: tuple[TrialResult, ...]
    warnings: tuple[str, ...] = ()


def schema() -> dict[str, Any]:
    """Return the JSON Schema of sweep.json."""
    return SweepResults.model_json_schema(mode="serialization")


def trial_result(trial: Trial, record: Record | None) -> TrialResult:
    """Return what is known of a trial."""
    facts: dict[str, Any] = {"status": "waiting", "exit_code": None}
    if trial.refused:
        facts = {"status": "refused", "exit_code": 2, "reason": trial.refused}
    elif record is not None:
        facts = {name: record[name] for name in ("status", "exit_code")}
        facts["reason"] = record["error"] or "; ".join(record.get("reasons", ()))
        facts |= {ours: record.get(theirs) for ours, theirs in {**COSTS, **QUALITIES}.items()}
        facts |= {name: record.get(name) for name in ("drop", "seconds")}
        facts["student_sha256"] = (record.get("student") or {}).get("sha256")
    return TrialResult(
        key=trial.key,
        folder=f"trials/{trial.folder}",
        model=trial.model,
        choices=dict(trial.choices),
        seed=trial.seed,
        command=(record or {}).get("command", ""),
        **facts,
    )


def point_result(point: Point) -> PointResult:
    """Return a point as sweep.json has it."""
    return PointResult(
        model=point.model,
        choices=dict(point.choices),
        trials=tuple(trial.key for trial in point.trials),
        done=len(point.records),
        passed=point.passed,
        cost=_mean(point.cost),
        quality=_mean(point.quality),
        optimal=point.optimal,
    )


def _mean(spread: Spread | None) -> Mean | None:
    return None if spread is None else Mean(mean=spread.mean, std=spread.std)


def exit_code(trials: Sequence[TrialResult], records: Mapping[str, Record]) -> int:
    """Return how a sweep ends that was not interrupted.

    8 where the machine failed a trial, which is tried again; 1 where xdonnx itself did; 0 where a trial passed its
    gate, 3 where some were judged and none passed; else what the first trial ended with.
    """
    again = {records[trial.key]["exit_code"] for trial in trials if not records.get(trial.key, {}).get("final", True)}
    codes = [trial.exit_code for trial in trials if trial.exit_code is not None]
    if MachineError.exit_code in again:
        return MachineError.exit_code
    if again:
        return 1
    return next((code for code in (0, 3) if code in codes), codes[0] if codes else 0)


# What people read


def varied(results: SweepResults) -> list[str]:
    """Return what differs between points, models apart; all that was chosen where nothing does."""
    names = list(dict.fromkeys(name for point in results.points for name in point.choices))
    found = [name for name in names if len({str(point.choices.get(name, "")) for point in results.points}) > 1]
    return found or names


def ordered(results: SweepResults, model: str) -> list[PointResult]:
    """Return the points of a model, the cheapest first; those without a student are left out."""
    mine = [point for point in results.points if point.model == model and point.cost and point.quality]
    sign = 1 if results.quality == "error" else -1
    return sorted(mine, key=lambda p: (p.cost.mean if p.cost else 0, sign * (p.quality.mean if p.quality else 0)))


def failures(results: SweepResults) -> list[tuple[str, int]]:
    """Return why trials gave no student, each reason with the trials in a line, and how many they are."""
    found: dict[str, list[TrialResult]] = {}
    for trial in results.trials:
        if trial.status in ("failed", "refused"):
            found.setdefault(trial.reason, []).append(trial)
    return [(f"{_few([named(trial) for trial in its])}: {reason}", len(its)) for reason, its in found.items()]


def named(part: TrialResult | PointResult) -> str:
    """Return the model and the choices of a trial or a point, in a line."""
    words = [said(name, value) for name, value in part.choices.items() if value != ""]
    seed = [f"seed {part.seed}"] if isinstance(part, TrialResult) else []
    return ", ".join([part.model, *words, *seed])


def _few(names: Sequence[str], most: int = 3) -> str:
    return "; ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def cost_text(cost: Mean | None) -> str:
    """Return a cost as people read it: '48.6 %', with its spread where it has one that shows."""
    if cost is None:
        return ""
    spread = f" ± {100 * cost.std:.1f}" if cost.std is not None and 100 * cost.std >= 0.05 else ""
    return f"{100 * cost.mean:.1f}{spread} %"


def quality_text(quality: Mean | None, kind: str) -> str:
    """Return a quality as people read it: '97.33 ± 0.42 %'."""
    if quality is None:
        return ""
    decimals, unit = (4, "") if kind == "error" else (2, " %")
    spread = f" ± {quality.std:.{decimals}f}" if quality.std is not None else ""
    return f"{quality.mean:.{decimals}f}{spread}{unit}"


def count_line(results: SweepResults) -> str:
    """Return how many trials there are of each status."""
    statuses = [trial.status for trial in results.trials]
    words = {"passed": "passed", "rejected": "rejected by their gate", "failed": "failed", "refused": "refused"}
    words["waiting"] = "to be done"
    counts = [f"{statuses.count(status)} {word}" for status, word in words.items() if status in statuses]
    return f"{len(statuses)} trial{'s' * (len(statuses) != 1)}: {', '.join(counts)}"


def as_csv(results: SweepResults) -> str:
    """Return a line for each trial."""
    names = list(dict.fromkeys(name for trial in results.trials for name in trial.choices))
    optimal = {key for point in results.points if point.optimal for key in point.trials}
    figures = [*COSTS, *QUALITIES, "drop", "seconds"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", *names, "seed", "status", "optimal", *figures, "folder", "student_sha256", "reason"])
    for trial in results.trials:
        numbers = [getattr(trial, name) for name in figures]
        line = [trial.model, *(trial.choices.get(name, "") for name in names), trial.seed, trial.status]
        line += [int(trial.key in optimal), *numbers, trial.folder, trial.student_sha256]
        writer.writerow([*line, " ".join(trial.reason.split())])
    return text.getvalue()


def as_markdown(results: SweepResults) -> str:
    """Return the points of each model as a table, the cheapest first, and what failed."""
    return "\n".join(_lines(results)).rstrip() + "\n"


def _lines(results: SweepResults) -> Iterator[str]:
    names, several = varied(results), len(results.seeds) > 1
    yield from (f"# {_escaped(results.title)}", "", f"{count_line(results)}.", "")
    for teacher in results.models:
        rows = ordered(results, teacher.name)
        if not rows:
            continue
        yield from (f"## {_escaped(teacher.name)}", "")
        heads = ["", *names, f"{TITLES[results.cost]}, share of the teacher's", results.quality, "passed"]
        yield f"| {' | '.join(heads)} |"
        yield f"|---|{'---|' * len(names)}---:|---:|---:|"
        for point in rows:
            texts = [cost_text(point.cost), quality_text(point.quality, results.quality)]
            bold = [f"**{text}**" if point.optimal else text for text in texts]
            chosen = [_escaped(told(point.choices.get(name, ""))) for name in names]
            cells = [STAR * point.optimal, *chosen, *bold, f"{point.passed} of {len(point.trials)}"]
            yield f"| {' | '.join(cells)} |"
        yield ""
        yield caption(results, teacher, several=several)
        yield ""
    if lost := failures(results):
        yield from ("No student:", "", *(f"- {_escaped(' '.join(text.split()))}" for text, _ in lost), "")
    if results.warnings:
        yield from ("Warnings:", "", *(f"- {_escaped(text)}" for text in results.warnings), "")
    if results.command:
        yield from ("```", results.command, "```")


def caption(results: SweepResults, teacher: TeacherResult, *, several: bool) -> str:
    """Return what has to be known to read the table of a model."""
    spread = "Mean ± standard deviation between seeds. " if several else ""
    known = "" if teacher.accuracy is None else f" Teacher: {teacher.accuracy:.2f} % accuracy."
    best = "costs less and is as good, or costs as much and is better"
    return f"{spread}{STAR}: no other {best}.{known}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
