"""A student's last steps: stamped, written beside its place, judged there, and put in place or aside."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from xdonnx.budget import Budget
from xdonnx.contents import content, digest, files_of, read_by
from xdonnx.errors import VerifyError
from xdonnx.events import Event, Log, hearing, legible
from xdonnx.fidelity import compare
from xdonnx.gate import of_a_job
from xdonnx.limits import warned
from xdonnx.model import add_metadata, file_bytes, fingerprint, write_proto
from xdonnx.pacing import NEAR
from xdonnx.paths import rejected_path
from xdonnx.report import Fidelity, FileInfo, LayerResult, Report, plain, tool
from xdonnx.samples import fraction
from xdonnx.shots import Shots
from xdonnx.targets import limit_of
from xdonnx.tries import Try
from xdonnx.verification import file_facts, verify
from xdonnx.wanted import Job

# Of the intervals in the report, where no gate asks for another.
CONFIDENCE = 0.95
# A refitted student whose error is so many times that of the given one is worse, noise considered.
WORSE = 1.05
# What a file says of its own worth.
WORTH = ("held_out_agreement", "held_out_relative_l2")


@dataclass(frozen=True)
class Judged:
    """A student that is whole but not yet in place, and its report."""

    student: onnx.ModelProto
    report: Report


def stamp(student: onnx.ModelProto, job: Job) -> None:
    """Write into the model where it comes from."""
    facts = {
        "version": tool().version,
        "teacher_sha256": fingerprint(job.model),
        "method": "+".join(job.method),
        "target": job.target(),
    }
    add_metadata(student, facts)


def judged(
    job: Job,
    parts: tuple[Shots, Shots],
    device: str,
    student: onnx.ModelProto,
    layers: list[LayerResult],
    heard: list[str],
    command: str,
    log: Log,
    *,
    own_opset: bool = False,
) -> Judged:
    """Write the student beside where it will lie, and compare that file with the teacher's.

    Parameters
    ----------
    parts : (fit, held out)
    own_opset : bool
        Whether the student may have another opset than the teacher.
    """
    fit, held_out = parts
    with tempfile.TemporaryDirectory(dir=job.out.parent, prefix=f".{legible(job.out.name)}.") as folder:
        candidate = Path(folder) / job.out.name
        write_proto(student, candidate, external=job.external_data)
        apart = fraction(job.holdout) != 0.0
        how: dict[str, Any] = {"device": device, "held_out": apart, "log": hearing(log, heard)}
        fidelity = compare(
            job.model,
            candidate,
            held_out,
            generator=np.random.default_rng(job.seed),
            confidence=job.gate.confidence or CONFIDENCE,
            **how,
        )
        # Stamped with what it was found to be worth, so that the file judged is to the byte the file delivered.
        add_metadata(student, _worth(fidelity))
        write_proto(student, candidate, external=job.external_data)
        budget = job.budget()
        if budget.kind == "size" and file_bytes(candidate) > limit_of(budget, job.model):
            raise VerifyError(
                f"the student has {file_bytes(candidate):,} bytes, more than --size {budget.told}.\n"
                "  This is a defect of xdonnx: please report it with the model's operators (xdonnx inspect)."
            )
        report = verify(
            job.model,
            candidate,
            held_out,
            of_a_job(job.gate, job.structure),
            seed=job.seed,
            command=command,
            fitted=fit if apart else None,
            shots_path=", ".join(job.shots) or "synthetic",
            known=fidelity,
            own_opset=own_opset,
            **how,
        )
        if report.exit_code not in (0, 3):
            raise VerifyError("; ".join(report.reasons))
    before = None if job.student is None else _before(job, job.student, held_out, how, heard)
    was, now = worst_error(before), worst_error(report.fidelity)
    if was is not None and now is not None and now > WORSE * was:
        text = (
            f"the refit made the student's answers worse: relative L2 {was:.4g} -> {now:.4g}.\n"
            "  See with xdonnx match which layers were taken for each other, or give more samples."
        )
        how["log"](Event("verify", text, level="warning"))
    if text := _missed(budget, report):
        how["log"](Event("verify", text, level="warning"))
    found = {"layers": tuple(layers), "warnings": (*heard, *report.warnings), "given": before}
    return Judged(student, report.model_copy(update=found))


def _missed(budget: Budget, report: Report) -> str:
    """Return by how much the student that was judged misses a latency that was asked for, noise considered, or ''."""
    teacher = report.teacher.latency_ms if report.teacher else None
    student = report.student.latency_ms if report.student else None
    if budget.kind != "latency" or teacher is None or student is None or student.ratio is None:
        return ""
    wanted, ratio = budget.amount / (teacher.median if budget.unit else 1.0), student.ratio
    if wanted - 2 * NEAR <= ratio.high and ratio.low <= wanted:
        return ""
    return (
        f"--latency {budget.told} is {wanted:.1%} of what the teacher took in the end, {teacher.median:.3g} ms, and "
        f"the student took {ratio.value:.1%} ({ratio.low:.1%} to {ratio.high:.1%}): the machine was not as fast as "
        "when widths were chosen. Make it where nothing else runs, and time both again: xdonnx bench"
    )


def _before(job: Job, student: Path, held_out: Shots, how: Mapping[str, Any], heard: Sequence[str]) -> Fidelity | None:
    """Return how a given student answers before the refit; None, and a warning, where that cannot be compared."""
    log: Log = how["log"]
    known = set(heard)

    def told(event: Event) -> None:
        # What is amiss with the samples was said of the refitted student.
        if event.level != "warning":
            log(event)
        elif event.text not in known:
            log(replace(event, text=f"the given student, before it was refitted: {event.text}"))

    generator = np.random.default_rng(job.seed)
    confidence = job.gate.confidence or CONFIDENCE
    try:
        found = compare(
            job.model, student, held_out, generator=generator, confidence=confidence, **{**how, "log": told}
        )
    except VerifyError as error:
        told(Event("verify", str(error), level="warning"))
        return None
    return found.model_copy(update={"worst": ()})


def delivered(
    job: Job, fitted: int, judged: Judged, tries: Sequence[Try], heard: Sequence[str], started: datetime
) -> Report:
    """Put the student in place, or beside it where it failed, and return the whole report."""
    report = judged.report
    out = job.out if report.exit_code == 0 else rejected_path(job.out)
    write_proto(judged.student, out, external=job.external_data)
    return report.model_copy(
        update={
            "files": report.files.model_copy(update={"student": file_facts(out), "read": _read(job)}),
            "job": plain(job.model_dump()),
            "tries": tuple(tries),
            "fit_samples": fitted,
            "warnings": warned(report, heard),
            "started": started.isoformat(timespec="seconds"),
            "seconds": round((datetime.now().astimezone() - started).total_seconds(), 3),
        }
    )


def _read(job: Job) -> dict[str, FileInfo]:
    """Return the files and folders that a job reads besides teacher and samples, by the options that name them."""
    found = {}
    for name, paths in read_by(job).items():
        there = [path for path in paths if path.exists()]
        if name not in ("model", "shots") and there:
            sizes = [file.stat().st_size for path in there for file in files_of(path).values()]
            whole = content(there[0]) if len(there) == 1 else digest(content(path).encode() for path in there)
            found[name] = FileInfo(path=legible(", ".join(map(str, there))), sha256=whole, bytes=sum(sizes))
    return found


def _worth(fidelity: Fidelity) -> dict[str, str]:
    facts = zip(WORTH, (fidelity.top1_agreement, worst_error(fidelity)), strict=True)
    return {key: f"{value:.6g}" for key, value in facts if value is not None}


def worst_error(fidelity: Fidelity | None) -> float | None:
    """Return the relative L2 of the output that is furthest off; None where none was compared."""
    outputs = fidelity.outputs if fidelity else ()
    return max((output.relative_l2 for output in outputs if output.relative_l2 is not None), default=None)
