"""Knowledge squeezed by attention, under an adversary: a recovery step on a student that is already compressed.

Tuning (see :mod:`xdonnx.methods.tune`) compares all features alike. Here, on top of that,
  1. the last maps of up to four sizes are squeezed, coarse to fine, into one vector each, by attention that learned
     from the teacher's answers where to look: linear heads predict these answers from every vector;
  2. the student's vectors, from attention of its own and 1x1 transforms to the teacher's widths, and its answers are
     to be the teacher's;
  3. an adversary on answers and vectors tells the two networks apart, and the class by the teacher's arg-max; the
     student learns to pass for the teacher.
Attention, heads, transforms and adversary are thrown away afterwards. No labels are used, and zeros stay zero.

The vectors cannot become alike by saying nothing. The teacher's attention learns from its heads alone, no gradient of
the comparison reaches it, and its vectors are weighted means of features that never change; errors are shares of the
teacher's energy, so a student whose vectors are zero errs by 1.

"Hierarchical" is read from the paper's abstract: the vector of a level is part of the query of the next finer one.
The adversary pulls at most by a set share of what the comparison pulls, so that it can neither take over nor explode.
What is judged is :func:`~xdonnx.methods.tune.matching`, as for `tune`: a loss that moves cannot say which weights are
best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from xdonnx.budget import Plan
from xdonnx.events import Event, Log, ignore
from xdonnx.graph import Net
from xdonnx.methods.adversary import Adversary
from xdonnx.methods.attention import Attention, attention, of_student, random, squeezed
from xdonnx.methods.bench import Bench, Outcome
from xdonnx.methods.training import Batch, check_schedule, relative_error, schedule, train
from xdonnx.methods.tune import matching
from xdonnx.patch import Patch
from xdonnx.shots import Shots
from xdonnx.student import Student, Taps, find_taps

MOST_LEVELS = 4
# Of Adam, for attention, transforms and heads.
RATE = 2e-3
# The share of the steps over which squeezed terms grow to their weight: attention has to learn first where to look.
RAMP = 0.2


@dataclass(frozen=True)
class Lambdas:
    """The weights of the terms, beside a weight of 1 for what `tune` compares.

    They are small because features overfit least: on ResNet-20 with a tenth of its weights, 10 images per class and 150
    steps, the relative error of the answers on other images was 0.429 at `answers=1`, 0.423 at 0.3, 0.419 at 0.1 (with
    `vectors=0.3`, without an adversary; one draw) and 0.416 after `tune`.

    Parameters
    ----------
    answers : float
        Of the relative squared error of the answers, L_b.
    vectors : float
        Of that of the squeezed vectors, L_is.
    adversary : float
        How hard the adversary pulls at answers and vectors, as a share of what the two errors pull.
    """

    answers: float = 0.1
    vectors: float = 0.1
    adversary: float = 0.3


@dataclass(frozen=True)
class Squeeze:
    """Label-free recovery by squeezed features, answers and an adversary.

    Parameters
    ----------
    effort : {'fast', 'balanced', 'best', 'paper'}, default='balanced'
        Steps, as for `tune`.

    steps : int, optional
        Steps to make, whatever the effort.

    adversarial : bool, default=True
        Whether an adversary has a say; without one answers and squeezed features are compared alone.

    Notes
    -----
    Models that do not classify have no class to tell: their adversary only gives a verdict, and answers that are maps
    or lists are averaged over positions. `lambdas` weighs the terms, see :class:`Lambdas`.

    References
    ----------
    .. [1] Li, Shu, Xie, Qu, Kong, "Hierarchical Knowledge Squeezed Adversarial Network Compression", AAAI 2020.
    .. [2] Shu, Li, Xie, Qu, Kong, "Knowledge Squeezed Adversarial Network Compression", arXiv:1904.05100
    """

    effort: str = "balanced"
    steps: int | None = None
    adversarial: bool = True
    lambdas: Lambdas = Lambdas()

    # It fits what another method removed, and draws from a pool.
    follows = True
    pools = True

    def __post_init__(self) -> None:
        check_schedule(self.effort, self.steps)

    def __call__(self, net: Net, patch: Patch, shots: Shots, plan: Plan, bench: Bench) -> Outcome:
        """Train the student of `patch`."""
        del plan  # what goes was decided before
        taps = find_taps(net, bench.program)
        lesson = Squeezing(
            levels(net, taps),
            taps.answers,
            self.lambdas,
            adversarial=self.adversarial,
            seed=(int(bench.generator.initial_seed()) + 2) % 2**63,
            log=bench.log,
        )
        wanted = schedule(net, self.effort, self.steps, mix=True)
        return train(net, patch, shots, lesson, wanted, bench, taps, judge=matching)

    def check(self, structure: str) -> None:
        """Any structure will do: what is zero stays zero."""


def levels(net: Net, taps: Taps) -> dict[str, int]:
    """Return {stage: axis of its channels} for the last stages that layers end in, fine to coarse.

    What only slices or pools the stage before says nothing new; a stage without a row for each sample cannot be read.
    """
    rows = net.shapes[net.interface.inputs[0].name][:1]
    sizes = {net.shapes[name][2:] for name in net.layers}
    stages = [name for name in taps.stages if net.shapes[name][:1] == rows and net.shapes[name][2:] in sizes]
    return {name: net.tracks[name].axis if name in net.tracks else 1 for name in stages[-MOST_LEVELS:]}


@dataclass(frozen=True, eq=False)
class Parts:
    """What learns beside the student and is thrown away: attention of both networks, heads, the adversary."""

    teacher: Attention
    student: Attention
    heads: tuple[tuple[Tensor, Tensor], ...]
    optimizer: torch.optim.Optimizer
    adversary: Adversary | None


class Squeezing:
    """The loss of `squeeze`, a :class:`~xdonnx.methods.training.Lesson`.

    Parameters
    ----------
    levels : {stage: axis}
        Where maps are squeezed, from fine to coarse, and the axis of their channels.
    answers : tuple of str
        The first tells classes, if it is a row of scores.
    lambdas : Lambdas
    adversarial : bool
    seed : int
        Of the parts: every run begins with the same.
    log : callable
    """

    def __init__(
        self,
        levels: Mapping[str, int],
        answers: tuple[str, ...],
        lambdas: Lambdas,
        *,
        adversarial: bool = True,
        seed: int = 0,
        log: Log = ignore,
    ) -> None:
        self.levels, self.answers, self.lambdas = levels, answers, lambdas
        self.adversarial, self.seed, self.log = adversarial, seed, log
        self.parts: Parts | None = None
        self._told: set[str] = set()

    def begin(self, student: Student, steps: int) -> None:
        """Have all parts as new."""
        self.picks, self.ramp, self.step = student.picks, max(1.0, RAMP * steps), 0
        self.parts = None
        self._seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def __call__(self, batch: Batch) -> Tensor:
        """Return the loss of student and parts."""
        error = matching(batch)
        teacher = [_map(batch.whole[name], axis) for name, axis in self.levels.items()]
        if not teacher or (rows := self._rows(batch.teacher, len(teacher[0]))) is None:
            self._tell("no stage to squeeze, or no answers to squeeze it for: trained as tune does.", level="warning")
            return error
        parts = self.parts = self.parts or self._opened(batch, teacher, rows)
        student = [_map(batch.student[name], axis) for name, axis in self.levels.items()]
        scales = [features.square().mean().sqrt().clamp(min=1e-6) for features in teacher]
        wanted = squeezed(parts.teacher, teacher, scales)
        task = [
            relative_error(torch.addmm(bias, vector / scale, weight.T), rows)
            for vector, scale, (weight, bias) in zip(wanted, scales, parts.heads, strict=True)
        ]
        ours = self._rows(batch.student, len(rows))
        assert ours is not None, "it answers as the teacher does"
        made = torch.cat([ours, *squeezed(parts.student, student, scales)], 1)
        given = torch.cat([rows, *wanted], 1).detach()
        sizes = [part.shape[1] for part in (rows, *wanted)]
        found = self._compared(made, given, sizes)
        if parts.adversary is not None:
            classes = self._classes(batch.teacher, len(rows))
            self._seen.append((given, made.detach(), classes))
            found = found + self._pushed(parts.adversary.push(made, classes), made, given, sizes)
        return error + min(1.0, self.step / self.ramp) * found + torch.stack(task).mean()

    def after_step(self) -> None:
        """Move the parts: attention and heads by the gradients that they gathered, the adversary by what was seen."""
        self.step += 1
        if self.parts is None:
            return
        self.parts.optimizer.step()
        self.parts.optimizer.zero_grad(set_to_none=True)
        adversary = self.parts.adversary
        if adversary is not None and self._seen:
            given, made, classes = zip(*self._seen, strict=True)
            adversary.learn(torch.cat(given), torch.cat(made), None if classes[0] is None else torch.cat(classes))
            if adversary.retired:
                self._tell("the adversary broke down: squeezed without it from there on.", level="warning")
        self._seen.clear()

    def _opened(self, batch: Batch, teacher: list[Tensor], rows: Tensor) -> Parts:
        generator = torch.Generator().manual_seed(self.seed)
        widths, device = [features.shape[2] for features in teacher], rows.device
        whole = attention(widths, generator, device)
        picks = [
            self.picks[name][1] if name in self.picks else torch.arange(width, device=device)
            for name, width in zip(self.levels, widths, strict=True)
        ]
        ours, theirs = whole.trained(), of_student(whole, picks).trained()
        heads = tuple(
            (
                random(rows.shape[1], width, generator, device).requires_grad_(),
                torch.zeros(rows.shape[1], device=device, requires_grad=True),
            )
            for width in widths
        )
        learned = [*ours.parameters(), *theirs.parameters(), *(tensor for head in heads for tensor in head)]
        adversary = None
        if self.adversarial:
            scored = self._classes(batch.teacher, len(rows)) is not None
            classes = batch.teacher[self.answers[0]].shape[1] if scored else 0
            adversary = Adversary(rows.shape[1] + sum(widths), classes, generator, device)
        with_one = "with" if self.adversarial else "without"
        self._tell(f"{len(widths)} stages are squeezed into {sum(widths)} numbers, {with_one} an adversary")
        return Parts(ours, theirs, heads, torch.optim.Adam(learned, lr=RATE), adversary)

    def _tell(self, text: str, level: str = "info") -> None:
        if text not in self._told:
            self._told.add(text)
            self.log(Event("tune", text, level=level))

    def _compared(self, made: Tensor, given: Tensor, sizes: list[int]) -> Tensor:
        """Return the weighted errors of answers and vectors, which lie side by side."""
        pairs = zip(torch.split(made, sizes, 1), torch.split(given, sizes, 1), strict=True)
        errors = [relative_error(ours, theirs) for ours, theirs in pairs]
        return self.lambdas.answers * errors[0] + self.lambdas.vectors * torch.stack(errors[1:]).mean()

    def _pushed(self, push: Tensor | None, made: Tensor, given: Tensor, sizes: list[int]) -> Tensor:
        """Return what has the adversary's gradient, its size set by that of the comparison's."""
        leaf = made.detach().requires_grad_()
        (pull,) = torch.autograd.grad(self._compared(leaf, given, sizes), leaf)
        size = 0.0 if push is None else float(push.norm())
        if push is None or not 0 < size < math.inf:
            return made.new_zeros(())
        push = push * (self.lambdas.adversary * float(pull.norm()) / size)
        return (made * push).sum()

    def _rows(self, values: Mapping[str, Tensor], many: int) -> Tensor | None:
        """Return the answers as a row for each sample, maps and lists as means over positions; None without any."""
        answers = [values[name] for name in self.answers]
        rows = [value.reshape(many, value.shape[1], -1).mean(2) for value in answers if _has_rows(value, many)]
        return torch.cat(rows, 1) if rows else None

    def _classes(self, teacher: Mapping[str, Tensor], many: int) -> Tensor | None:
        """Return the class that the teacher sees in each of so many samples, None where it does not classify."""
        if not self.answers or (scores := teacher[self.answers[0]]).ndim not in (2, 4) or len(scores) != many:
            return None
        return scores.flatten(1).argmax(1) if scores[0].numel() == scores.shape[1] > 1 else None


def _has_rows(value: Tensor, many: int) -> bool:
    return value.ndim > 1 and len(value) == many and value.numel() > 0


def _map(value: Tensor, axis: int) -> Tensor:
    """Return a value as (n, positions, channels)."""
    return value.movedim(axis, -1).flatten(1, -2)
