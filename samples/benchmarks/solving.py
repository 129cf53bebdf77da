"""The published algorithm on activations against the same in moment space, and the default against both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import dataspace
import numpy as np
import torch
from torch import Tensor

from xdonnx.columns import from_matrix, to_matrix
from xdonnx.connection import cross, objective
from xdonnx.errors import JobError
from xdonnx.job import opened, planned, prepared
from xdonnx.methods.bench import Bench
from xdonnx.moments import measure
from xdonnx.patch import Patch, cut
from xdonnx.runtime import answer_all, open_session
from xdonnx.solve import PGD
from xdonnx.structure import Channel, units
from xdonnx.walk import Stop, walk
from xdonnx.wanted import Job

Say = Callable[[str], None]
# Of the published code, for residual networks.
STEPS, MU, RATE = 3000, 0.9, 1e-3
PER_CLASS, KEEP = 5, 0.5


@dataclass
class Solved:
    """One convolution, solved by both.

    Parameters
    ----------
    name : str
    shape : tuple of int
        Of its weight.
    positions : int
        Output positions of all samples.
    loses : bool
        Whether it loses channels. One that does not is solved by the published code all the same.
    theirs, ours : list of float
        Seconds that all steps take, run by run: on activations, scaled from a few steps; in moment space, moments
        included, none where nothing is lost.
    error : float
        The error of our weights over that of theirs, both after the same few steps and measured on activations.
    moved : float
        The largest change of a weight that stays, where nothing is lost.
    whole : tuple of float
        Seconds on activations, and the ratio of errors, where all steps were made.
    """

    name: str
    shape: tuple[int, ...]
    positions: int
    loses: bool
    theirs: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    error: float | None = None
    moved: float | None = None
    whole: tuple[float, float] | None = None


@dataclass
class Effort:
    """The layer-wise stage of a whole job: seconds run by run, and how many held-out images are named rightly."""

    name: str
    seconds: list[float] = field(default_factory=list)
    accuracy: float | None = None


def job_of(data: Path, effort: str) -> Job:
    """Return the job that both are measured on; raises JobError where the files are not there."""
    files = [
        data / name
        for name in ("teachers/resnet56_cifar10_op17_bn.onnx", "cifar10/cifar10_fit.npz", "cifar10/cifar10_dev.npz")
    ]
    for path in files:
        if not path.is_file():
            raise JobError(f"nothing at '{path}'.\n  --data DIR or XDONNX_DATA names the folder of real models.")
    model, shots, held = files
    return Job(
        model=model,
        out=Path("student.onnx"),
        shots=(str(shots),),
        per_class=PER_CLASS,
        holdout=str(held),
        keep=KEEP,
        preset_effort=effort,
        device="cpu",
    )


def held_out(data: Path) -> int:
    """Return how many images judge."""
    with np.load(data / "cifar10/cifar10_dev.npz") as held:
        return len(held["labels"])


def solve_layers(job: Job, say: Say, *, repeats: int, steps: int, whole: bool) -> list[Solved]:
    """Walk the network of a job once and solve every 3x3 convolution but the first in both ways, taking turns.

    Parameters
    ----------
    repeats : int
        How often each is timed.
    steps : int
        That the published algorithm makes on activations; its time is scaled to all of them.
    whole : bool
        Whether it makes all of them once, for the first layer of each shape.
    """
    ready = prepared(job, writes=False)
    net, program = ready.net, opened(ready)
    loses = {net.groups[at].readers[0]: at for at in ready.plan.channels if len(net.groups[at].readers) == 1}
    names = [layer.name for layer in net.layers.values() if layer.kernel == (3, 3) and layer.groups == 1][1:]
    found: list[Solved] = []
    shapes: set[tuple[int, ...]] = set()

    def visit(stop: Stop) -> tuple[Tensor, Tensor | None] | None:
        if stop.layer.name not in names:
            return None
        say(f"layers: {len(found) + 1} of {len(names)}")
        at = loses.get(stop.layer.name)
        problem = _Problem(stop, None if at is None else (net.groups[at].ids, ready.plan.channels[at]))
        solved = Solved(stop.layer.name, tuple(stop.weight.shape), problem.positions, at is not None)
        found.append(solved)
        weight = problem.compare(solved, repeats, steps)
        if whole and solved.loses and solved.shape not in shapes:
            shapes.add(solved.shape)
            say(f"layers: {len(found)} of {len(names)}, all {STEPS} steps on activations")
            solved.whole = problem.whole(weight)
        return (weight, stop.bias) if solved.loses else None

    walk(net, program, ready.fit.inputs, visit)
    return found


class _Problem:
    """A layer at which the walk stands, for both algorithms."""

    def __init__(self, stop: Stop, lost: tuple[np.ndarray, int] | None) -> None:
        self.stop = stop
        geometry = stop.geometry
        self.layer = dataspace.Layer(
            torch.cat(list(stop.teacher)),
            torch.cat(list(stop.student)),
            stop.weight,
            geometry.strides[0],
            geometry.pads[0],
        )
        channels = stop.weight.shape[1]
        columns = torch.tensor(stop.layer.columns)
        self.structure = None if lost is None else Channel(units(columns, lost[0]))
        self.keep = channels if lost is None else lost[1]
        assert self.structure is None or self.structure.count == channels, "some channels of the layer are not free"
        self.positions = self.layer.run(self.layer.teacher, stop.weight)[:, 0].numel()

    def ours(self, steps: int) -> Tensor:
        """Return the weights of the algorithm in moment space."""
        stop = self.stop
        assert self.structure is not None
        moments = measure(stop.teacher, stop.student, stop.geometry, bias=False)
        matrix = to_matrix(stop.weight, None, stop.geometry).double()
        solver = PGD(iterations=steps, rate=RATE, refit=False, single=True)
        found = solver(objective(cross(MU), moments, matrix), matrix, self.structure, self.keep)
        weight, _ = from_matrix(found.weight, stop.geometry, False, tuple(stop.weight.shape))
        return weight.to(stop.weight)

    @torch.enable_grad()
    def theirs(self, steps: int) -> dataspace.Fitted:
        """Return the weights of the algorithm on activations."""
        return dataspace.fit(self.layer, self.keep, mu=MU, steps=steps, rate=RATE)

    def compare(self, solved: Solved, repeats: int, steps: int) -> Tensor:
        """Fill in seconds and errors; return our weights."""
        weight = self.stop.weight
        self.theirs(2)  # the first run of a shape sets up more
        for _ in range(repeats):
            fitted = self.theirs(steps)
            solved.theirs.append(fitted.seconds * STEPS / steps)
            if solved.loses:
                began = time.process_time()
                weight = self.ours(STEPS)
                solved.ours.append(time.process_time() - began)
        if solved.loses:
            solved.error = self._error(self.ours(steps), fitted.weight)
        else:
            solved.moved = float((fitted.weight - weight).abs().max())
        return weight

    def whole(self, weight: Tensor) -> tuple[float, float]:
        """Return the seconds of all steps on activations, and the error of our weights over that of theirs."""
        fitted = self.theirs(STEPS)
        return fitted.seconds, self._error(weight, fitted.weight)

    def _error(self, ours: Tensor, theirs: Tensor) -> float:
        return self.layer.error(ours, MU) / self.layer.error(theirs, MU)


def run_efforts(data: Path, say: Say, *, repeats: int, names: tuple[str, ...] = ("balanced", "paper")) -> list[Effort]:
    """Time the layer-wise stage of whole jobs, taking turns, and judge what each makes on held-out images."""
    jobs = {name: job_of(data, name) for name in names}
    found = {name: Effort(name) for name in names}
    ready = prepared(jobs[names[0]], writes=False)
    program = opened(ready)
    for turn in range(repeats):
        for name in names:
            say(f"whole network: {name}, {turn + 1} of {repeats}")
            job = jobs[name]
            began = time.process_time()
            plan = planned(job, ready, program).plan
            bench = Bench(program, torch.Generator().manual_seed(job.seed))
            outcome = job.methods()[0](ready.net, Patch(), ready.fit, plan, bench)
            found[name].seconds.append(time.process_time() - began)
            if turn == 0:
                session = open_session(cut(ready.net, outcome.patch))
                (answers,) = answer_all(session, ready.held_out.inputs, batch=64).values()
                found[name].accuracy = 100 * float((answers.argmax(1) == ready.held_out.labels).mean())
    return list(found.values())
