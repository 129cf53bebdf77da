"""Drive the walk: at every layer measure, decide what goes, refit, go on.

One pass over the graph compresses the whole network. A layer's decision is about the channels it reads; whoever makes
those channels loses them without having to be run again, because the reader no longer looks at them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from xdonnx.budget import Plan, pattern_of
from xdonnx.connection import Connection, Quadratic, correction, damped, objective, regression
from xdonnx.convert import Program, stored
from xdonnx.crossval import Candidate, choose, measure_folds, total
from xdonnx.events import Event, Log, ignore
from xdonnx.graph import Group, Net
from xdonnx.layers import Layer
from xdonnx.moments import Geometry, from_matrix, measure, to_matrix, unroll
from xdonnx.patch import Patch
from xdonnx.solve import Solver, refit, remove_jointly
from xdonnx.structure import Channel, Element, NofM, Structure
from xdonnx.walk import Stop, Weights, chunked, walk

# A layer with more columns than this is fitted from its columns: the moments and their factors would take over 2 GB.
WIDEST = 6000
# With more columns than this the dozen refits that folds ask for cost more than they bring.
WIDEST_FOLDED = 2500
# Parts that the samples are cut into to choose a layer's connection and ridge, and the advantage that a change needs.
FOLDS, LEAN = 3, 0.05
# Entries of the columns that are then held at once.
MOST_ENTRIES = 1 << 26
# Up to this many readers of the same channels are weighed exactly, with the others adapting; beyond, one by one.
MOST_JOINT = 4


@dataclass(frozen=True)
class Bench:
    """What a method works with besides the net: the torch program, randomness, and where to report.

    Parameters
    ----------
    program : Program
        Every step checked against onnxruntime.
    generator : torch.Generator
    log : callable
    """

    program: Program
    generator: torch.Generator
    log: Log = ignore


@dataclass(frozen=True)
class Trace:
    """What happened at one layer.

    `objective_before` is the error of the removal alone, `objective_after` that after the refit; both are shares of the
    teacher's output energy (without its bias where that is not refitted), under the regression connection. None where
    the layer was left as it is on inputs that differ.
    """

    layer: str
    objective_before: float | None
    objective_after: float | None
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """A method's patch and what it saw on the way."""

    patch: Patch
    traces: tuple[Trace, ...] = field(default_factory=tuple)


class Refitter(Protocol):
    """Fits what is left of a layer once its channels are chosen."""

    def __call__(self, q: Quadratic, start: Tensor, columns: Tensor, rows: Tensor, *, bias: bool) -> Tensor:
        """Return weights (g, o, d) for `q`, from the teacher's in `start`.

        `columns` (d,) holds the label of each column, -1 for none; `rows` (g, o) marks the outputs that stay as far
        as is known; `bias` says whether the last column is the bias. Only columns that stay are passed.
        """
        ...


@dataclass(frozen=True)
class Rule:
    """What a layer-wise method decides: the connection, the pull toward the teacher, and how to solve.

    Parameters
    ----------
    connection : Connection
    ridge : float
        See :func:`xdonnx.connection.damped`.
    solver : Solver
    refit : bool
        Whether layers that lose nothing are refitted too, to make up for upstream error.
    bias : bool
        Whether the bias is refitted.
    refitter : Refitter, optional
        Has the last word on what is left of a layer. Without one the solver has it, or free least squares where there
        was nothing to choose.
    others : tuple of (Connection, float)
        Connections and ridges that a layer is refitted with instead where folds of the samples say so.
    compensate : bool
        Whether the last layer of a residual branch makes up for the error of the other branch too, see
        :func:`xdonnx.connection.compensated`.
    """

    connection: Connection
    ridge: float
    solver: Solver
    refit: bool = True
    bias: bool = True
    refitter: Refitter | None = None
    compensate: bool = True
    others: tuple[Candidate, ...] = ()


def layerwise(
    net: Net, patch: Patch, inputs: Mapping[str, np.ndarray], plan: Plan, rule: Rule, bench: Bench, samples: int = 0
) -> Outcome:
    """Compress the net in one walk.

    Parameters
    ----------
    patch : Patch
        What earlier methods changed; dropped channels stay dropped.
    inputs : {graph input: (n, ...)}
        The shots that fit.
    plan : Plan
    rule : Rule
    bench : Bench
    samples : int
        How many of the rows are samples, the others being views of them in the same order; 0: all.

    Returns
    -------
    Outcome
    """
    rows = sum(len(next(iter(batch.values()))) for batch in chunked(net, inputs))
    drop = set(patch.drop) | joint_choice(net, patch, inputs, plan, rule, bench)
    visitor = _Visitor(net, plan, rule, bench, drop, dict(patch.tensors), rows, samples or rows)
    walk(net, bench.program, inputs, visitor)
    return Outcome(Patch(visitor.tensors, frozenset(visitor.drop)), tuple(visitor.traces))


class _Visitor:
    """The state of one walk: what has been decided so far."""

    def __init__(
        self,
        net: Net,
        plan: Plan,
        rule: Rule,
        bench: Bench,
        drop: set[int],
        tensors: dict[str, np.ndarray],
        rows: int,
        samples: int,
    ) -> None:
        self.net, self.plan, self.rule, self.bench = net, plan, rule, bench
        self.drop, self.tensors = drop, tensors
        self.traces: list[Trace] = []
        self.rows, self.samples = rows, samples
        self.decides: dict[str, list[int]] = {}
        for at in plan.channels:
            readers = net.groups[at].readers
            if len(readers) == 1:
                self.decides.setdefault(readers[0], []).append(at)

    def __call__(self, stop: Stop) -> Weights | None:
        layer, began = stop.layer, time.perf_counter()
        done = len(self.traces)
        self.bench.log(Event("fit", layer.name, done=done, total=len(self.net.layers)))
        # Where nothing was done the error is none, or was not looked at.
        before = after = 0.0 if stop.agree else None
        weights: Weights | None = None
        if self._open(stop):
            weights, before, after = self._fit(stop)
            self.tensors[layer.weight] = stored(layer, weights[0]).cpu().numpy()
            if layer.bias is not None and weights[1] is not None:
                self.tensors[layer.bias] = weights[1].cpu().numpy()
        elif layer.weight in self.tensors or layer.bias in self.tensors:
            weights = self._fitted(stop)
        self.traces.append(Trace(layer.name, before, after, time.perf_counter() - began))
        return weights

    def _fitted(self, stop: Stop) -> Weights:
        """Return the weights that an earlier method gave a layer which this one leaves alone."""
        layer, found = stop.layer, [stop.weight, stop.bias]
        for at, name in enumerate((layer.weight, layer.bias)):
            if name in self.tensors:
                tensor = torch.tensor(self.tensors[name]).to(stop.weight)
                found[at] = tensor if at else stored(layer, tensor)
        assert found[0] is not None
        return found[0], found[1]

    def _open(self, stop: Stop) -> bool:
        layer = stop.layer
        read = set(layer.columns[layer.columns >= 0].tolist())
        if layer.weight in self.net.shared:
            return False  # what suits one reader would be forced on the others
        loses = layer.name in self.decides or layer.name in self.plan.weights or layer.name in self.plan.layers
        return bool(loses or read & self.drop or (self.rule.refit and not stop.agree))

    def _fit(self, stop: Stop) -> tuple[Weights, float, float]:
        layer = stop.layer
        with_bias = self.rule.bias and stop.bias is not None
        if len(layer.columns) > WIDEST:
            return self._fit_wide(stop)
        rule, beside = self.rule, stop.beside if self.rule.compensate else None
        folds = measure_folds(
            stop.teacher,
            stop.student,
            beside,
            stop.geometry,
            bias=with_bias,
            rows=self.rows,
            samples=self.samples,
            folds=FOLDS if rule.others and not stop.agree and len(layer.columns) <= WIDEST_FOLDED else 1,
        )
        whole = total(folds)
        moments = whole.moments
        teacher = to_matrix(stop.weight, stop.bias if with_bias else None, stop.geometry).to(moments.tt)
        columns = torch.tensor(layer.columns, device=teacher.device)
        if with_bias:
            columns = torch.cat([columns, columns.new_full((1,), -1)])
        judge = whole.quadratic((regression(), 0.0), teacher, bias=with_bias)
        candidates = ((rule.connection, rule.ridge), *rule.others)
        matrix, mask = self._settle(layer, whole.quadratic(candidates[0], teacher, bias=with_bias), teacher, columns)
        alive = self._alive(columns)
        best = choose(folds, candidates, teacher, mask, alive, bias=with_bias, lean=LEAN)
        if best:
            quadratic = restricted(whole.quadratic(candidates[best], teacher, bias=with_bias), alive)
            matrix[..., alive] = refit(quadratic, mask[..., alive], teacher[..., alive])
        weight, bias = from_matrix(matrix, stop.geometry, with_bias, tuple(stop.weight.shape))
        energy = max(float(((teacher @ moments.tt) * teacher).sum()), 1e-30)
        before, after = float(judge(teacher * mask)) / energy, float(judge(matrix)) / energy
        fitted = bias.to(stop.bias) if bias is not None and stop.bias is not None else stop.bias
        return (weight.to(stop.weight), fitted), max(before, 0.0), max(after, 0.0)

    def _settle(self, layer: Layer, quadratic: Quadratic, teacher: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's weights (g, o, d), zero where dropped, and the mask of what stays."""
        made, mask = torch.zeros_like(teacher), torch.zeros_like(teacher, dtype=torch.bool)
        settled = False

        def solve(structure: Structure, keep: int, alive: Tensor) -> None:
            solution = self.rule.solver(restricted(quadratic, alive), teacher[..., alive], structure, keep)
            made.zero_()[..., alive] = solution.weight
            mask.zero_()[..., alive] = solution.mask

        for at in self.decides.get(layer.name, []):
            ids = self.net.groups[at].ids
            alive = self._alive(columns)
            unit = units(columns, ids)
            solve(Channel(unit[alive]), self.plan.channels[at], alive)
            stays = mask.any(0).any(0)
            gone = [int(label) for u, label in enumerate(ids) if not bool(stays[unit == u].any())]
            self.drop.update(gone)
            settled = True
        alive = self._alive(columns)
        structure = weight_structure(layer, self.plan, alive, columns, teacher)
        if structure is not None:
            solve(structure, min(self.plan.weights.get(layer.name, structure.least), structure.count), alive)
        elif self.rule.refitter is not None:
            mask.zero_()[..., alive] = True
            stay = torch.tensor(~np.isin(layer.out_ids, sorted(self.drop)), device=columns.device)
            made.zero_()[..., alive] = self.rule.refitter(
                restricted(quadratic, alive),
                teacher[..., alive],
                columns[alive],
                stay.reshape(teacher.shape[:2]),
                bias=len(columns) > len(layer.columns),
            )
        elif not settled:
            mask[..., alive] = True
            made[..., alive] = refit(restricted(quadratic, alive), mask[..., alive], teacher[..., alive])
        return made, mask

    def _alive(self, columns: Tensor) -> Tensor:
        dropped = torch.tensor(sorted(self.drop), dtype=torch.long, device=columns.device)
        return ~torch.isin(columns, dropped)

    def _fit_wide(self, stop: Stop) -> tuple[Weights, float, float]:
        """Fit a layer with more columns than moments can hold, from the columns themselves.

        With fewer positions than columns the ridge solution is `W_T + E (X'X + lambda I)^-1 X'`, where E is what the
        removal leaves undone (the Woodbury identity); channels go by the energy of what they add. Single weights go by
        magnitude and the rest stays as it is: rows differ in support, and so would need a system each.
        """
        layer = stop.layer
        text = f"'{layer.name}' has {len(layer.columns)} columns: fitted by regression, whatever the connection."
        self.bench.log(Event("fit", text, level="warning"))
        x_t, x_s = (sampled_columns(chunks, stop.geometry) for chunks in (stop.teacher, stop.student))
        teacher = to_matrix(stop.weight, None, stop.geometry).double()
        columns = torch.tensor(layer.columns, device=teacher.device)
        for at in self.decides.get(layer.name, []):
            ids = self.net.groups[at].ids
            unit = units(columns, ids)
            energy = teacher.square().sum((0, 1)) * x_s.square().sum((0, 2))
            score = torch.stack([energy[unit == u].sum() for u in range(len(ids))])
            order = torch.argsort(score, descending=True, stable=True)
            self.drop.update(int(ids[int(u)]) for u in order[self.plan.channels[at] :])
        alive = self._alive(columns)
        mask = alive.expand(teacher.shape).clone()
        target = teacher @ x_t
        structure = weight_structure(layer, self.plan, alive, columns, teacher)
        if structure is not None:
            keep = min(self.plan.weights.get(layer.name, structure.least), structure.count)
            mask[..., alive] = structure.project(teacher[..., alive], keep)
            left = float((target - teacher * mask @ x_s).square().sum() / target.square().sum().clamp(min=1e-30))
            weight, _ = from_matrix(teacher * mask, stop.geometry, False, tuple(stop.weight.shape))
            return (weight.to(stop.weight), stop.bias), left, left
        undone = target - teacher[..., alive] @ x_s[:, alive]
        before = float(undone.square().sum() / target.square().sum().clamp(min=1e-30))
        gram = x_s[:, alive].mT @ x_s[:, alive]
        pull = max(self.rule.ridge, 1e-6) * gram.diagonal(dim1=1, dim2=2).sum(1) / max(int(alive.sum()), 1)
        size = gram.shape[-1]
        gram = gram + (pull * size).reshape(-1, 1, 1) * torch.eye(size, dtype=gram.dtype, device=gram.device) / size
        step = torch.linalg.solve(gram, undone.mT).mT @ x_s[:, alive].mT
        made = torch.where(mask, teacher, 0.0)
        made[..., alive] += step
        after = float((target - made @ x_s).square().sum() / target.square().sum().clamp(min=1e-30))
        weight, _ = from_matrix(made, stop.geometry, False, tuple(stop.weight.shape))
        return (weight.to(stop.weight), stop.bias), before, after


def restricted(quadratic: Quadratic, alive: Tensor) -> Quadratic:
    """Return the same error as a function of some columns, the others held at zero."""
    if bool(alive.all()):
        return quadratic
    hess = quadratic.hess[:, alive][:, :, alive]
    return Quadratic(hess, quadratic.lin[..., alive], quadratic.const)


def units(columns: Tensor, ids: np.ndarray) -> Tensor:
    """Return the position in `ids` of each column's label, -1 where it is not among them."""
    found = torch.full_like(columns, -1)
    for unit, label in enumerate(ids):
        found[columns == int(label)] = unit
    return found


def weight_structure(layer: Layer, plan: Plan, alive: Tensor, columns: Tensor, teacher: Tensor) -> Structure | None:
    """Return the structure over single weights that the plan asks of this layer, over the columns still alive."""
    if layer.name not in plan.weights and layer.name not in plan.layers:
        return None
    free = torch.ones_like(alive)
    free[len(layer.columns) :] = False  # the bias
    free = free[alive]
    rows = teacher.shape[0] * teacher.shape[1]
    pattern = pattern_of(plan.structure)
    if pattern is None:
        return Element(free, rows)
    return NofM(*pattern, int(np.prod(layer.kernel)), free, rows)


def sampled_columns(chunks: list[Tensor], geometry: Geometry) -> Tensor:
    """Return the unrolled columns (g, d, positions) in float64, evenly thinned where they are too many."""
    parts = []
    for chunk in chunks:
        part = unroll(chunk, geometry)
        most = max(1, MOST_ENTRIES // (part.shape[1] * len(chunks)))
        stride = -(-part.shape[2] // most)
        parts.append(part[:, :, ::stride])
    return torch.cat(parts, 2).double()


def joint_choice(
    net: Net, patch: Patch, inputs: Mapping[str, np.ndarray], plan: Plan, rule: Rule, bench: Bench
) -> set[int]:
    """Return the labels that go from channels which several layers read.

    The first reader must not decide for all, so every reader's moments are taken in a walk of the teacher alone, and a
    channel's cost is summed over them.
    """
    open_groups = {at: net.groups[at] for at in plan.channels if len(net.groups[at].readers) > 1}
    if not open_groups:
        return set()
    last = {at: max(group.readers, key=list(net.layers).index) for at, group in open_groups.items()}
    problems: dict[int, list[tuple[Quadratic, Tensor, Channel]]] = {at: [] for at in open_groups}
    drop: set[int] = set()

    def visit(stop: Stop) -> None:
        name = stop.layer.name
        mine = [at for at, group in open_groups.items() if name in group.readers]
        if mine and len(stop.layer.columns) <= WIDEST:
            moments = measure(stop.teacher, stop.teacher, stop.geometry, bias=stop.bias is not None)
            teacher = to_matrix(stop.weight, stop.bias, stop.geometry).to(moments.tt)
            quadratic = objective(correction(), moments, teacher)
            quadratic = damped(quadratic, teacher, max(rule.ridge, 1e-4), bias=stop.bias is not None)
            columns = torch.tensor(stop.layer.columns, device=teacher.device)
            if stop.bias is not None:
                columns = torch.cat([columns, columns.new_full((1,), -1)])
            for at in mine:
                problems[at].append((quadratic, teacher, Channel(units(columns, open_groups[at].ids))))
        for at in mine:
            if last[at] == name:
                bench.log(Event("fit", f"{open_groups[at].name}: read by {len(open_groups[at].readers)} layers"))
                drop.update(_least_missed(net, open_groups[at], problems.pop(at), plan.channels[at]))

    walk(net, bench.program, inputs, visit)
    return drop


def _least_missed(net: Net, group: Group, problems: list[tuple[Quadratic, Tensor, Channel]], keep: int) -> list[int]:
    if problems and len(problems) <= MOST_JOINT:
        stays = remove_jointly(problems, keep).cpu().numpy()
        return [int(label) for label, stay in zip(group.ids, stays, strict=True) if not stay]
    score = np.zeros(len(group.ids))
    for quadratic, teacher, channel in problems:
        energy = (teacher @ quadratic.hess * teacher).sum((0, 1)) / quadratic.const.sum().clamp(min=1e-30)
        for unit in range(len(group.ids)):
            score[unit] += float(energy[channel.columns == unit].sum())
    if not problems:
        score = producer_norms(net, group)
    order = np.argsort(-score, kind="stable")
    return [int(group.ids[unit]) for unit in order[keep:]]


def producer_norms(net: Net, group: Group) -> np.ndarray:
    """Return the L1 norm of the filters that make each unit, summed over producers (Li et al., ICLR 2017)."""
    score = np.zeros(len(group.ids))
    for name in group.producers:
        layer = net.layers[name]
        weight = np.abs(net.array(layer.weight))
        if layer.op == "ConvTranspose":
            rows = weight.reshape(layer.groups, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(len(layer.out_ids), -1)
        elif layer.transposed:
            rows = weight.T
        else:
            rows = weight.reshape(len(layer.out_ids), -1)
        norms = rows.sum(1)
        for unit, label in enumerate(group.ids):
            score[unit] += norms[layer.out_ids == label].sum()
    return score
