"""The one training loop: the weights that an earlier method left open move end to end, under any loss.

What is zero stays zero and what is gone stays gone. Steps are few and samples fewer, so the loop is built not to do
harm: every tensor moves at a rate relative to its own size, the rate is found by short trial runs, weights are averaged
along the way, and what comes back is the best that a held-out part of the samples, or of their views, saw, the
start included.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from xdonnx.augment import image_axes, mixed, moved
from xdonnx.errors import JobError, ModelError, did_you_mean
from xdonnx.events import Event
from xdonnx.graph import Net
from xdonnx.methods.bench import Bench, Outcome
from xdonnx.patch import Patch
from xdonnx.pool import UNLABELLED
from xdonnx.shots import Shots
from xdonnx.student import Student, Taps, execute, find_taps, open_student, teacher_weights

# Multiply-accumulates of one training run, and the steps that it may have. 10^13 take about a minute on two cores.
WORK = {"fast": 0.5e13, "balanced": 1.5e13, "best": 3e13, "paper": 8e13}
STEPS = {"fast": 200, "balanced": 400, "best": 2000, "paper": 2000}
FEWEST_STEPS = 60
# Of the samples, how many judge; they are not trained on.
JUDGES = 0.1
# Fewer say less than they are worth as training samples: views judge that training did not draw.
FEWEST_JUDGES = 5
# The share of the samples up to which those that fit layer by layer do without the judges.
MOST_JUDGES = 0.2
VIEWS_THAT_JUDGE = 128
# Trial rates, relative to the size of each tensor, and the length of a trial.
RATES = (0.005, 0.01, 0.02)
TRIAL_STEPS = 40
# A larger rate is taken when its trial is not worse than the best by more than this share.
_AS_GOOD = 1.02
AVERAGE = 0.99
SMALL_BATCH = 16
_CHECKS = 10


@dataclass(frozen=True, eq=False)
class Batch:
    """What a loss looks at.

    Parameters
    ----------
    teacher, student : {value: Tensor}
        At the taps; the teacher's without the channels that the student lost.
    labels : Tensor (n,) or None
        None where samples are unlabelled or mixed; `pool.UNLABELLED` for images of the pool, which come last.
    whole : {value: Tensor}
        The teacher's with all their channels.
    """

    teacher: Mapping[str, Tensor]
    student: Mapping[str, Tensor]
    labels: Tensor | None
    whole: Mapping[str, Tensor] = field(default_factory=dict)


Loss = Callable[[Batch], Tensor]
"""A scalar, lower is better; zero gradient where the student cannot help it."""


@runtime_checkable
class Lesson(Protocol):
    """A loss with parts of its own that learn beside the student.

    Its gradients reach these parts too; it moves them itself.
    """

    def __call__(self, batch: Batch) -> Tensor:
        """Return the loss."""
        ...

    def begin(self, student: Student, steps: int) -> None:
        """Have all parts as new: a run of so many steps starts, a trial or the one that counts."""
        ...

    def after_step(self) -> None:
        """Move the parts: the student moved."""
        ...


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error as a share of the teacher's energy."""
    return (student - teacher).square().sum() / teacher.square().sum().clamp(min=1e-12)


@dataclass(frozen=True)
class Schedule:
    """How long and how the loop runs.

    Parameters
    ----------
    steps, batch : int
    mix : bool
        Whether samples are mixed; labels then say nothing.
    rates : tuple of float
        Tried in turn where there is more than one; relative to the root mean square of each tensor.
    """

    steps: int
    batch: int
    mix: bool
    rates: tuple[float, ...] = RATES


def schedule(net: Net, effort: str, steps: int | None, *, mix: bool) -> Schedule:
    """Return the steps that the effort pays for, given what one sample of this net costs, or those asked for.

    Raises
    ------
    JobError
        There is no such effort, or no step.
    """
    check_schedule(effort, steps)
    macs = max(1, sum(layer.macs for layer in net.layers.values()))
    batch = 32 if macs < 1e9 else 16
    batch = max(batch // net.batch, 1) * net.batch
    # Forward and backward through the student, forward through the teacher.
    affordable = WORK[effort] / (4 * macs * batch)
    return Schedule(steps or int(min(STEPS[effort], max(FEWEST_STEPS, affordable))), batch, mix)


def set_apart(count: int, batch: int, seed: int) -> tuple[int, ...]:
    """Return which of so many shots judge a training, so that the methods before it can leave them out.

    A layer that was fitted on a sample errs less there than elsewhere: such a judge speaks for the start, whatever
    training brings.

    Parameters
    ----------
    count : int
        Shots that fit.
    batch : int
        Rows that the graph takes at once.
    seed : int

    Returns
    -------
    tuple of int
        In order; none where these would be fewer than `FEWEST_JUDGES` or, since they fill batches, more than
        `MOST_JUDGES`.
    """
    judges = _judges(count, batch)
    if judges < FEWEST_JUDGES or judges > MOST_JUDGES * count:
        return ()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed % 2**63))
    return tuple(sorted(order[:judges].tolist()))


def _judges(count: int, batch: int) -> int:
    return -(-max(1, round(JUDGES * count)) // batch) * batch


def check_schedule(effort: str, steps: int | None) -> None:
    """Raise JobError for an effort or a number of steps that makes no sense."""
    if effort not in STEPS:
        near = did_you_mean(effort, STEPS)
        raise JobError(f"unknown effort '{effort}'.{near}\n  Efforts: {', '.join(STEPS)}.")
    if steps is not None and steps < 1:
        raise JobError(f"--steps is {steps}.\n  It is a number of training steps: 1 or more, such as 600.")


def train(
    net: Net,
    patch: Patch,
    shots: Shots,
    loss: Loss,
    plan: Schedule,
    bench: Bench,
    taps: Taps | None = None,
    *,
    judge: Loss | None = None,
) -> Outcome:
    """Train the student of a patch and return the patch with its new weights.

    Parameters
    ----------
    patch : Patch
        What was removed; its zeros and its drop are kept.
    shots : Shots
        The samples that fit. Those that `bench.judges` names judge instead, else a tenth; where that is fewer than
        `FEWEST_JUDGES`, all are trained on and other views of them judge, which shows harm but not overfitting.
    loss : callable
        A `Lesson` has parts that learn too.
    plan : Schedule
    bench : Bench
        Where it has a pool, half of every batch is drawn from that, never what judges.
    taps : Taps, optional
    judge : callable, optional
        Judges instead of `loss`, whose value a `Lesson` cannot compare between steps.

    Returns
    -------
    Outcome
        Never worse than `patch` under `judge` on what judges; `patch` itself where nothing was better.
    """
    taps = taps or find_taps(net, bench.program)
    if not taps.all:
        text = "no value of floating point can be compared: nothing was trained."
        bench.log(Event("tune", text, level="warning"))
        return Outcome(patch)
    return _Run(net, patch, shots, (loss, judge or loss), plan, bench, taps)()


class _Run:
    """One run of the loop: data, student and the record of what was best."""

    def __init__(
        self, net: Net, patch: Patch, shots: Shots, losses: tuple[Loss, Loss], plan: Schedule, bench: Bench, taps: Taps
    ) -> None:
        self.net, self.start, self.plan, self.taps = net, patch, plan, taps
        self.loss, self.measure = losses
        self.program, self.generator, self.log, self.pool = bench.program, bench.generator, bench.log, bench.pool
        self.seed = int(bench.generator.initial_seed()) % 2**63
        device = bench.program.device
        self.inputs = {name: torch.tensor(array, device=device) for name, array in shots.inputs.items()}
        self.labels = None if shots.labels is None else torch.tensor(shots.labels, device=device)
        port = net.interface.inputs[0]
        self.axes = image_axes(self.inputs[port.name].shape) if len(self.inputs) == 1 else None
        order = torch.randperm(len(shots), generator=self.generator)
        judges = _judges(len(shots), net.batch)
        blends = plan.mix and all(x.is_floating_point() for x in self.inputs.values())
        views = judges < FEWEST_JUDGES and (blends or self.axes is not None)
        whole = views or judges >= len(shots)
        self.judges, self.fits = (order, order) if whole else (order[:judges], order[judges:])
        if bench.judges:
            views = whole = False
            self.judges = torch.tensor(bench.judges)
            self.fits = order[~torch.isin(order, self.judges)]
        sample = {name: x[: net.batch] for name, x in self.inputs.items()}
        self.teacher = teacher_weights(net, device)
        self.frozen = self._frozen()
        self.student = open_student(net, patch, bench.program, taps, sample)
        # A weight that a node besides its layers reads would move there too, in the file but not here.
        reads = Counter(name for node in net.source.graph.node for name in node.input)
        reads.subtract(name for layer in net.layers.values() for name in (layer.weight, layer.bias) if name)
        self.names = sorted(name for name in self.student.weights if reads[name] <= 0)
        self.most = self._rows_at_once(sample)
        if self.most < plan.batch:
            # Row by row there is nothing to gain from a large batch, and a step would take as many runs.
            self.plan = replace(plan, batch=max(1, SMALL_BATCH // self.most) * self.most)
        self.judged_by = "unseen views," if views else "the training samples'" if whole else "held-out"
        self.exam = list(self._views() if views else self._held_out())

    def _rows_at_once(self, sample: Mapping[str, Tensor]) -> int:
        """Return how many rows a run may have: any number, unless the graph was exported for one batch size alone."""
        if self.net.interface.batch is None:
            return self.plan.batch
        twice = {name: torch.cat([x, x]) for name, x in sample.items()}
        try:
            with torch.no_grad():
                once = execute(self.program, sample, self.teacher, self.taps.all)
                both = execute(self.program, twice, self.teacher, self.taps.all)
        except (RuntimeError, ModelError):
            return self.net.batch
        same = all(
            b.shape[0] == 2 * a.shape[0] and torch.allclose(torch.cat([a, a]), b, rtol=1e-3, atol=1e-4)
            for a, b in zip(once, both, strict=True)
        )
        return self.plan.batch if same else self.net.batch

    def __call__(self) -> Outcome:
        weights = self.student.weights
        # Adam's steps are lost in 16 bits, so weights move in 32 whatever the file holds.
        begin = {name: _laid(tensor.float()) for name, tensor in weights.items()}
        before = self._judge(begin)
        if before == 0:
            return Outcome(self.start)
        # Trials as long as the run itself would not pay.
        worth = len(self.plan.rates) > 1 and self.plan.steps > 2 * TRIAL_STEPS
        trials = len(self.plan.rates) * TRIAL_STEPS if worth else 0
        self.done, self.total = 0, trials + self.plan.steps
        rate = sorted(self.plan.rates)[(len(self.plan.rates) - 1) // 2]
        if trials:
            found = {}
            for candidate in self.plan.rates:
                made, _ = self._descend(begin, candidate, TRIAL_STEPS)
                error = found[candidate] = self._judge(made)
                self.log(Event("tune", f"trial: {self.judged_by} loss {error:.4g} at rate {candidate:g}"))
            least = min(found.values())
            rate = max(c for c, error in found.items() if error <= least * _AS_GOOD)
        made, error = self._descend(begin, rate, self.plan.steps, checks=_CHECKS)
        text = f"{self.judged_by} loss {before:.4g} -> {error:.4g} at rate {rate:g}"
        if not error < before:
            text = f"training made nothing better ({text}): the student stays as it was before."
            self.log(Event("tune", text, level="warning"))
            return Outcome(self.start)
        self.log(Event("tune", text))
        for name, tensor in made.items():
            weights[name] = tensor
        return Outcome(self.student.patch(self.net, self.start))

    def _descend(
        self, begin: Mapping[str, Tensor], rate: float, steps: int, checks: int = 0
    ) -> tuple[dict[str, Tensor], float]:
        """Run Adam from `begin` with a warm-up and a cosine; return the best average of weights and its error."""
        generator = torch.Generator().manual_seed(self.seed)
        weights = {name: tensor.clone().requires_grad_(name in self.names) for name, tensor in begin.items()}
        average = {name: tensor.clone() for name, tensor in begin.items()}
        best, least = dict(average), self._judge(average) if checks else math.inf
        sizes = {name: _size(begin[name]) for name in self.names}
        groups = [{"params": [weights[name]], "lr": 0.0, "name": name} for name in self.names]
        optimizer = torch.optim.Adam(groups, lr=0.0)
        warm = max(1, min(50, steps // 5))
        lesson = self.loss if isinstance(self.loss, Lesson) else None
        if lesson is not None:
            lesson.begin(self.student, steps)
        half = self.plan.batch // 2
        others = self.pool.batches(half, self.seed) if self.pool is not None and half else None
        for step in range(steps):
            factor = rate * min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = factor * sizes[group["name"]]
            optimizer.zero_grad(set_to_none=True)
            inputs, labels = self._batch(generator, next(others) if others else None)
            for at in range(0, self.plan.batch, self.most):
                rows = slice(at, at + self.most)
                part = {name: x[rows] for name, x in inputs.items()}
                loss = self._loss(weights, part, None if labels is None else labels[rows])
                if loss.requires_grad:
                    (loss * (self.most / self.plan.batch)).backward()  # type: ignore[no-untyped-call]
            for name, mask in self.student.masks.items():
                if (grad := weights[name].grad) is not None:
                    grad.mul_(mask)
            optimizer.step()
            if lesson is not None:
                lesson.after_step()
            share = min(AVERAGE, (step + 1) / (step + 10))
            for name in self.names:
                average[name].lerp_(weights[name].detach(), 1 - share)
            self.done += 1
            self.log(Event("tune", done=self.done, total=self.total))
            if checks and ((step + 1) % max(1, steps // checks) == 0 or step == steps - 1):
                error = self._judge(average)
                text = f"step {step + 1} of {steps}: {self.judged_by} loss {error:.4g} at rate {factor:.3g}"
                self.log(Event("tune", text))
                if error < least:
                    best, least = {name: tensor.clone() for name, tensor in average.items()}, error
        return (best, least) if checks else (average, math.nan)

    def _batch(
        self, generator: torch.Generator, others: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return views of some samples, and of images of the pool behind them."""
        size = self.plan.batch - (len(next(iter(others.values()))) if others else 0)
        rows = torch.cat(
            [self.fits[torch.randperm(len(self.fits), generator=generator)] for _ in range(-(-size // len(self.fits)))]
        )[:size].to(self.program.device)
        inputs = {name: x[rows] for name, x in self.inputs.items()}
        labels = None if self.labels is None else self.labels[rows]
        if others:
            inputs = {name: torch.cat([x, torch.as_tensor(others[name]).to(x)]) for name, x in inputs.items()}
            labels = None if labels is None else functional.pad(labels, (0, self.plan.batch - size), value=UNLABELLED)
        if self.axes is not None:
            inputs = {name: moved(x, self.axes, generator) for name, x in inputs.items()}
        if self.plan.mix:
            return mixed(inputs, generator, self.axes), None
        return inputs, labels

    def _loss(
        self, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor], labels: Tensor | None, *, exact: bool = False
    ) -> Tensor:
        wanted = self.taps.all
        inputs = {name: _laid(x) for name, x in inputs.items()}
        weights = {name: tensor.to(self.student.weights[name].dtype) for name, tensor in weights.items()}
        with torch.no_grad(), self._precision(exact):
            seen = execute(self.program, inputs, self.teacher if exact else self.frozen, wanted)
        with self._precision(exact):
            made = execute(self.student.program, inputs, weights, wanted)
        teacher = {name: self.student.of_teacher(name, value).float() for name, value in zip(wanted, seen, strict=True)}
        student = {name: self.student.of_student(name, value).float() for name, value in zip(wanted, made, strict=True)}
        whole = {name: value.float() for name, value in zip(wanted, seen, strict=True)}
        return (self.measure if exact else self.loss)(Batch(teacher, student, labels, whole))

    def _precision(self, exact: bool) -> Any:
        """Return the context in which networks run: bfloat16 where the processor multiplies it, else as the file says.

        Weights, their average and the losses stay in float32. So does judging: a good student errs less than
        bfloat16 does.
        """
        return torch.autocast(self.program.device.type, torch.bfloat16, enabled=not exact and self._fast())

    def _fast(self) -> bool:
        return torch.cuda.is_bf16_supported() if self.program.device.type == "cuda" else _cpu_has_bfloat16()

    def _frozen(self) -> dict[str, Tensor]:
        """Return the teacher's weights as training runs them: cast and laid out once, not in every step."""
        if not self._fast():
            return self.teacher
        exact = torch.float32
        return {n: _laid(t.bfloat16() if t.dtype == exact else t) for n, t in self.teacher.items()}

    def _held_out(self) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
        """Yield what judges: samples that are not trained on and, for images, their mirror images."""
        for rows in torch.split(self.judges, self.most):
            inputs = {name: x[rows.to(x.device)] for name, x in self.inputs.items()}
            labels = None if self.labels is None else self.labels[rows.to(self.program.device)]
            yield inputs, labels
            if self.axes is not None:
                yield {name: x.flip(self.axes[1]) for name, x in inputs.items()}, labels

    def _views(self) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
        """Yield what judges where samples are few: views of them, drawn apart from those that train."""
        generator = torch.Generator().manual_seed((self.seed + 1) % 2**63)
        for _ in range(-(-VIEWS_THAT_JUDGE // self.plan.batch)):
            inputs, labels = self._batch(generator)
            for rows in torch.split(torch.arange(self.plan.batch), self.most):
                part = {name: x[rows.to(x.device)] for name, x in inputs.items()}
                yield part, None if labels is None else labels[rows.to(labels.device)]

    @torch.no_grad()
    def _judge(self, weights: Mapping[str, Tensor]) -> float:
        """Return the mean loss over what judges; infinite where it is not a number."""
        losses = [float(self._loss(weights, inputs, labels, exact=True)) for inputs, labels in self.exam]
        sizes = [len(next(iter(inputs.values()))) for inputs, _ in self.exam]
        found = float(np.average(losses, weights=sizes))
        return found if math.isfinite(found) else math.inf


def _cpu_has_bfloat16() -> bool:
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(known and known())


def _laid(tensor: Tensor) -> Tensor:
    """Return it laid out as convolutions run fastest, in both directions: channels last."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _size(tensor: Tensor) -> float:
    """Return the root mean square of what is not zero; 1e-3 where all is."""
    alive = tensor[tensor != 0]
    return float(alive.square().mean().sqrt().clamp(min=1e-3)) if len(alive) else 1e-3
