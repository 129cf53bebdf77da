"""The whole tool on one screen: a `Job` says what is wanted, `run` does it and returns the report."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from pydantic import BaseModel, ConfigDict, field_validator

from xdonnx.budget import KINDS, Budget, Plan, make_plan, pattern_of
from xdonnx.convert import checked, convert
from xdonnx.errors import JobError, MachineError, ShotsError, VerifyError, did_you_mean
from xdonnx.events import Event, Log, ignore
from xdonnx.fidelity import compare, fixed_batch
from xdonnx.gate import Gate
from xdonnx.graph import Net, read_net
from xdonnx.images import Preprocess
from xdonnx.layers import Layer
from xdonnx.methods import make
from xdonnx.methods.layerwise import Bench, Outcome
from xdonnx.model import Port, file_bytes, fingerprint, interface, model_files, read_proto, sized, write_proto
from xdonnx.patch import Patch, cut, kept, masked, store_sparse
from xdonnx.report import Fidelity, FileInfo, LayerResult, Report, tool
from xdonnx.runtime import answer, open_session
from xdonnx.shots import Shots, read_shots, split, synthetic, unseen
from xdonnx.verification import check_interface, verify
from xdonnx.walk import chunked

# Masked and cut student may differ by this much of the largest value: only the order of float32 sums changes.
SAME = 1e-3
DEFAULT_TARGET = ("macs", 0.5)
# Of the intervals in the report, where no gate asks for another.
CONFIDENCE = 0.95


class Job(BaseModel):
    """What is wanted. Every field is a flag of `xdonnx compress`, under the same name."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    model: Path
    out: Path
    shots: tuple[str, ...] = ()
    labels: Path | None = None
    per_class: int | None = None
    max_shots: int | None = None
    holdout: str = "0.2"
    skip_bad: bool = False
    synthetic_shots: int | None = None
    preprocess: Preprocess = Preprocess()
    input_shape: Mapping[str, tuple[int, ...]] = {}

    keep: float | None = None
    macs: float | None = None
    params: float | None = None
    structure: str = "channel"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    round_to: int | None = None
    residual: bool = False

    method: tuple[str, ...] = ("cross",)
    connection: str = "auto"
    mu: float | None = None
    alpha: float | None = None
    beta: float | None = None
    solver: str = "auto"
    ridge: float | None = None
    preset_effort: str = "balanced"

    gate: Gate = Gate()
    force: bool = False
    external_data: str = "auto"
    device: str = "auto"
    seed: int = 0

    @field_validator("shots", "method", "include", "exclude", mode="before")
    @classmethod
    def _one_or_many(cls, given: Any) -> Any:
        return (str(given),) if isinstance(given, (str, Path)) else given

    def budget(self) -> Budget:
        """Return the target; raises JobError when several are given."""
        given = {kind: getattr(self, kind) for kind in KINDS if getattr(self, kind) is not None}
        if len(given) > 1:
            flags = " and ".join(f"--{kind}" for kind in given)
            raise JobError(f"{flags} are both given.\n  Give one target.")
        pattern = pattern_of(self.structure)
        if pattern and given:
            raise JobError(
                f"--structure {self.structure} keeps what its pattern says.\n  Leave --{next(iter(given))} out."
            )
        if not given and not pattern and self.structure != "channel":
            raise JobError(f"--structure {self.structure} needs a target.\n  Pass --keep 0.1 or --params 30%.")
        kind, amount = next(iter(given.items())) if given else (("keep", 0.5) if pattern else DEFAULT_TARGET)
        return Budget(kind, amount, self.structure, self.include, self.exclude, self.round_to, self.residual)

    def methods(self) -> list[Any]:
        """Return the methods with their options; raises JobError for combinations that make no sense."""
        options = self.model_dump(include={"connection", "mu", "alpha", "beta", "solver", "ridge"})
        options["effort"] = self.preset_effort
        made = [make(name, options) for name in self.method]
        defaults = {"connection": "auto", "solver": "auto", "effort": "balanced"}
        for name, value in options.items():
            if value != defaults.get(name) and not any(hasattr(method, name) for method in made):
                flag = "preset-effort" if name == "effort" else name
                raise JobError(f"--{flag} is no option of --method {' or '.join(self.method)}.\n  Leave it out.")
        for method in made:
            method.check(self.structure)
        return made


@dataclass(frozen=True)
class Prepared:
    """A job with everything read and checked, before any work: what `--dry-run` shows."""

    net: Net
    fit: Shots
    held_out: Shots
    plan: Plan
    device: str


def run(job: Job, log: Log = ignore, *, command: str = "") -> Report:
    """Compress a model and say what it cost.

    Parameters
    ----------
    job : Job
    log : callable
        Told of progress and warnings.
    command : str
        What the user typed, for the report.

    Returns
    -------
    Report
        Exit code 0: `job.out` is written. 3: a gate failed; the candidate lies beside it as `.rejected.onnx`.

    Raises
    ------
    XdonnxError
        Nothing was written.
    """
    started, warnings = datetime.now().astimezone(), []

    def note(event: Event) -> None:
        if event.level == "warning":
            warnings.append(event.text)
        log(event)

    methods = job.methods()
    ready = prepared(job, note)
    net, fit = ready.net, ready.fit
    first = chunked(net, fit.inputs, most=4)[0]
    program = checked(net, convert(net, torch.device(ready.device)), first, note)
    bench = Bench(program, torch.Generator().manual_seed(job.seed), note)
    outcome = Outcome(Patch())
    for method in methods:
        found = method(net, outcome.patch, fit, ready.plan, bench)
        outcome = Outcome(found.patch, (*outcome.traces, *found.traces))
    note(Event("cut", "Cut the graph"))
    student = cut(net, outcome.patch)
    check_interface(net.source, student)
    _check_same(masked(net, outcome.patch), student, first)
    if job.structure != "channel":
        _store_sparse(student, first, note)
    _stamp(student, job, net)
    layers = _layer_results(net, outcome, job.structure)
    return _judge_and_write(job, ready, student, layers, tuple(warnings), started, command, log)


def prepared(job: Job, log: Log = ignore, *, writes: bool = True) -> Prepared:
    """Read and check everything that a job names, so that mistakes show before any work.

    Parameters
    ----------
    job : Job
    log : callable
    writes : bool
        Whether OUT will be written, and so has to be free.

    Raises
    ------
    XdonnxError
        Of the kind whose exit code fits.
    """
    budget = job.budget()
    job.methods()
    if writes:
        _check_out(job)
    device = _device(job.device)
    log(Event("read", f"Read {job.model.name}"))
    proto = read_proto(job.model)
    open_session(job.model)
    ports = sized(interface(proto).inputs, job.input_shape)
    whole, held = _read_shots(job, ports, log)
    fit, held_out = split(whole, per_class=job.per_class, max_shots=job.max_shots, holdout=held, seed=job.seed)
    if held != 0.0:
        judging = unseen(held_out, fit)
        if not len(judging):
            raise ShotsError(
                f"all {len(held_out)} held-out samples are also among those that fit, so they cannot judge.\n"
                "  Hold out others, or pass --holdout 0 to judge on those that fit and say so."
            )
        if len(judging) < len(held_out):
            many = len(held_out) - len(judging)
            log(Event("shots", f"{many} held-out samples are also among those that fit: left out.", level="warning"))
        held_out = judging
    # Reading the shots has warned of the first five by name.
    for name in whole.skipped[5:]:
        log(Event("shots", f"left out, unreadable: {name}", level="warning"))
    sizes = {**{name: array.shape for name, array in whole.inputs.items()}, **job.input_shape}
    net = read_net(proto, sizes)
    plan = make_plan(net, budget)
    batch = fixed_batch(ports, whole) or 1
    for part, does in ((fit, "fit"), (held_out, "judge")):
        if len(part) < batch:
            raise ShotsError(
                f"the graph takes {batch} samples at once, and {len(part)} {does}.\n"
                "  Give more samples, or export the model with a free batch axis."
            )
    return Prepared(net, fit, held_out, plan, device)


def _read_shots(job: Job, ports: Sequence[Port], log: Log) -> tuple[Shots, float | Shots]:
    if job.synthetic_shots is not None:
        if job.shots:
            raise JobError("--shots and --synthetic-shots are both given.\n  Leave the random ones out.")
        log(Event("shots", "samples are random noise: what is measured on them says little.", level="warning"))
        noise = synthetic(ports, job.synthetic_shots, np.random.default_rng(job.seed))
        return noise, _fraction(job.holdout) or 0.0
    if not job.shots:
        raise JobError("no samples.\n  Pass --shots PATH: a folder of images, an .npz or an .npy.")
    whole = read_shots(job.shots, ports, job.preprocess, labels=job.labels, skip_bad=job.skip_bad, log=log)
    fraction = _fraction(job.holdout)
    if fraction is not None:
        return whole, fraction
    return whole, read_shots([job.holdout], ports, job.preprocess, skip_bad=job.skip_bad, log=log)


def _fraction(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _check_out(job: Job) -> None:
    whens = ("auto", "always", "never")
    if job.external_data not in whens:
        near = did_you_mean(job.external_data, whens)
        raise JobError(f"unknown --external-data '{job.external_data}'.{near}\n  Choices: {', '.join(whens)}.")
    if not job.out.parent.is_dir():
        raise JobError(f"the folder of '{job.out}' does not exist.\n  Make it: mkdir -p '{job.out.parent}'")
    if job.out.is_dir():
        raise JobError(f"'{job.out}' is a folder.\n  Name a file: -o {job.out / 'student.onnx'}")
    # A candidate that fails its gate, and weights kept outside, go to files of their own beside OUT.
    written = [job.out, rejected_path(job.out)]
    written += [path.with_name(f"{path.name}.data") for path in written]
    teacher = {path.resolve() for path in model_files(job.model)} if job.model.is_file() else set()
    for path in written:
        if path.resolve() in teacher:
            what = "OUT is MODEL" if path == job.out else f"'{path}' would be written, and is part of MODEL"
            raise JobError(f"{what}: '{job.out}'.\n  The teacher is never overwritten; name another file.")
    if not job.force:
        for path in (job.out, written[2]):
            if path.exists():
                raise JobError(f"'{path}' exists.\n  Pass --force to replace it.")
    if not os.access(job.out.parent, os.W_OK):
        raise MachineError(f"cannot write into '{job.out.parent}'.")


def _device(name: str) -> str:
    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise JobError(f"unknown device '{name}'.\n  Devices: auto, cpu, cuda:0.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(
            f"device '{name}' is not here: torch sees {torch.cuda.device_count()} GPUs.\n  See xdonnx doctor."
        )
    if device.type not in ("cpu", "cuda"):
        raise JobError(f"device '{name}' is not supported.\n  Devices: auto, cpu, cuda:0.")
    return name


def _check_same(silenced: onnx.ModelProto, student: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> None:
    """Masked and cut student answer alike, or removal touched what it must not."""
    expected, found = (answer(open_session(model), inputs) for model in (silenced, student))
    for name, array in expected.items():
        if array.dtype.kind != "f":
            continue
        # Below 0.01 the absolute gap counts: onnxruntime's Sigmoid is inexact near zero.
        scale = max(float(np.abs(array).max(initial=0.0)), 1e-2)
        gap = float(np.abs(array - found[name]).max(initial=0.0)) / scale
        if not gap <= (10 * SAME if array.dtype == np.float16 else SAME):
            raise VerifyError(
                f"output '{name}' of the cut student differs from the masked one by {gap:.1e} of its largest value.\n"
                "  This is a defect of xdonnx: please report it with the model's operators (xdonnx inspect)."
            )


def _store_sparse(student: onnx.ModelProto, inputs: Mapping[str, np.ndarray], log: Log) -> None:
    """Store zeros sparsely where onnxruntime loads that and answers alike; dense otherwise."""
    sparse = onnx.ModelProto()
    sparse.CopyFrom(student)
    if not store_sparse(sparse):
        return
    try:
        _check_same(student, sparse, inputs)
    except Exception as error:  # whatever onnxruntime says of a sparse file, the dense one is right
        log(Event("cut", f"weights stay dense, onnxruntime does not take them sparse: {error}", level="warning"))
        return
    student.CopyFrom(sparse)


def _stamp(student: onnx.ModelProto, job: Job, net: Net) -> None:
    """Write into the model where it comes from."""
    budget = job.budget()
    facts = {
        "version": tool().version,
        "teacher_sha256": fingerprint(job.model),
        "method": "+".join(job.method),
        "target": f"{budget.structure} {budget.kind} {budget.amount:g}",
    }
    _add_metadata(student, facts)


def _add_metadata(student: onnx.ModelProto, facts: Mapping[str, str]) -> None:
    names = {f"xdonnx.{key}" for key in facts}
    others = [entry for entry in student.metadata_props if entry.key not in names]
    del student.metadata_props[:]
    student.metadata_props.extend(others)
    for key, value in facts.items():
        student.metadata_props.add(key=f"xdonnx.{key}", value=value)


def _judge_and_write(
    job: Job,
    ready: Prepared,
    student: onnx.ModelProto,
    layers: list[LayerResult],
    warnings: tuple[str, ...],
    started: datetime,
    command: str,
    log: Log,
) -> Report:
    with tempfile.TemporaryDirectory(dir=job.out.parent, prefix=f".{job.out.name}.") as folder:
        candidate = Path(folder) / job.out.name
        write_proto(student, candidate, external=job.external_data)
        heard: list[str] = []

        def note(event: Event) -> None:
            if event.level == "warning":
                heard.append(event.text)
            log(event)

        held_out = _fraction(job.holdout) != 0.0
        fidelity = compare(
            job.model,
            candidate,
            ready.held_out,
            generator=np.random.default_rng(job.seed),
            device=ready.device,
            confidence=job.gate.confidence or CONFIDENCE,
            held_out=held_out,
            log=note,
        )
        # Stamped with what it was found to be worth, so that the file judged is to the byte the file delivered.
        _add_metadata(student, _worth(fidelity))
        write_proto(student, candidate, external=job.external_data)
        report = verify(
            job.model,
            candidate,
            ready.held_out,
            job.gate,
            device=ready.device,
            seed=job.seed,
            command=command,
            job=job.model_dump(mode="json", fallback=str),
            held_out=held_out,
            shots_path=", ".join(job.shots) or "synthetic",
            known=fidelity,
            log=note,
        )
        if report.exit_code not in (0, 3):
            raise VerifyError("; ".join(report.reasons))
        out = job.out if report.exit_code == 0 else rejected_path(job.out)
        write_proto(student, out, external=job.external_data)
    written = FileInfo(path=str(out), sha256=fingerprint(out), bytes=file_bytes(out))
    return report.model_copy(
        update={
            "files": report.files.model_copy(update={"student": written}),
            "layers": tuple(layers),
            "fit_samples": len(ready.fit),
            "warnings": tuple(dict.fromkeys((*warnings, *heard, *report.warnings))),
            "started": started.isoformat(timespec="seconds"),
            "seconds": round((datetime.now().astimezone() - started).total_seconds(), 3),
        }
    )


def _worth(fidelity: Fidelity) -> dict[str, str]:
    worst = max((o.relative_l2 for o in fidelity.outputs if o.relative_l2 is not None), default=None)
    facts = {"held_out_agreement": fidelity.top1_agreement, "held_out_relative_l2": worst}
    return {key: f"{value:.6g}" for key, value in facts.items() if value is not None}


def rejected_path(out: Path) -> Path:
    """Return where a candidate that failed its gate is kept."""
    return out.with_name(f"{out.stem}.rejected.onnx")


def _layer_results(net: Net, outcome: Outcome, structure: str) -> list[LayerResult]:
    keep = kept(net, outcome.patch)
    traces = {trace.layer: trace for trace in outcome.traces}
    rows = []
    for layer in net.layers.values():
        trace = traces.get(layer.name)
        weight = outcome.patch.tensors.get(layer.weight, net.array(layer.weight))
        outputs, columns = _left(layer, keep)
        share = outputs * columns / (len(layer.out_ids) * len(layer.columns))
        biases = len(layer.out_ids) if layer.bias else 0
        single = structure != "channel"
        rows.append(
            LayerResult(
                layer=layer.name,
                op=layer.op,
                kept=int(np.count_nonzero(weight)) if single else outputs,
                units=int(weight.size) if single else len(layer.out_ids),
                params_before=layer.params,
                params_after=round((layer.params - biases) * share) + (outputs if layer.bias else 0),
                macs_before=layer.macs * net.batch,
                macs_after=round(layer.macs * share) * net.batch,
                objective_before=trace.objective_before if trace else None,
                objective_after=trace.objective_after if trace else None,
                seconds=round(trace.seconds, 4) if trace else None,
                note="; ".join(net.reasons(layer))[:200] if not single else "",
            )
        )
    return rows


def _left(layer: Layer, keep: np.ndarray) -> tuple[int, int]:
    own = layer.columns >= 0
    return int(keep[layer.out_ids].sum()), len(layer.columns) - int((~keep[layer.columns[own]]).sum())
