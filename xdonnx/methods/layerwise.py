"""Drive the walk: at every layer measure, decide what goes, refit, go on.

One pass over the graph compresses the whole network. A layer's decision is about the channels it reads; whoever makes
those channels loses them without having to be run again, because the reader no longer looks at them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from xdonnx.budget import Plan, pattern_of
from xdonnx.columns import from_matrix, to_matrix
from xdonnx.connection import Connection, Quadratic, regression, restricted
from xdonnx.convert import stored
from xdonnx.crossval import Candidate, Fold, choose, measure_folds, total
from xdonnx.direct import Seen, blended, dear, measure_directly, missed
from xdonnx.events import Event
from xdonnx.graph import Net
from xdonnx.journal import Entry
from xdonnx.layers import Layer
from xdonnx.methods.bench import Bench, Outcome, Trace
from xdonnx.methods.joint import WIDEST, joint_choice, remaining, standing
from xdonnx.methods.wide import Fit, regressed, sampled_columns
from xdonnx.moments import WIDEST_FOLDED, enough
from xdonnx.patch import Patch
from xdonnx.rectified import cost, positions, rectified
from xdonnx.shelf import lengths
from xdonnx.solve import Solver, refit
from xdonnx.structure import Channel, Element, NofM, Structure, units
from xdonnx.walk import Stop, Weights, chunked, walk
from xdonnx.wiring import before_relu

# With more columns, or weights than this, the dozen refits that folds ask for cost more than they bring.
MOST_FOLDED = 1_000_000
# Parts that the samples are cut into to choose a layer's connection and ridge, and the advantage that a change needs.
FOLDS, LEAN = 3, 0.05
# The journal key of what is decided before the first layer; no layer is called so.
_JOINT = ""
# Weights of the rows of a pool, all together, against those of the samples: what is tried on folds, the default first.
SHARES = (0.3, 0.0, 0.1, 1.0)
# Multiply-accumulates that fits to what passes ReLUs may cost, a layer its equal part: some ten seconds on a core.
RECTIFYING = 4e11
# A ridge above which rounding to float32 is far below what the ridge itself changes.
LEAST_RIDGE = 1e-3


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
    rectify : bool
        Whether a layer that a ReLU reads is fitted to what passes it, see :func:`xdonnx.rectified.rectified`.
    exact : bool
        Whether every position of every sample is looked at, in float64. Else many times as many as there are unknowns
        do, see :func:`xdonnx.moments.enough`; float32 products are as good where there is a ridge.
    """

    connection: Connection
    ridge: float
    solver: Solver
    refit: bool = True
    bias: bool = True
    refitter: Refitter | None = None
    compensate: bool = True
    rectify: bool = False
    others: tuple[Candidate, ...] = ()
    exact: bool = False


def layerwise(
    net: Net,
    patch: Patch,
    inputs: Mapping[str, np.ndarray],
    plan: Plan,
    rule: Rule,
    bench: Bench,
    samples: int = 0,
    others: Mapping[str, np.ndarray] | None = None,
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
    others : {graph input: (m, ...)}, optional
        Rows of a pool: fitted with a smaller weight, see `SHARES`. They never judge, nor say which channels of a
        residual stream go; a layer that is too wide for moments does without them.

    Returns
    -------
    Outcome
    """
    batches = chunked(net, inputs)
    rows = sum(len(next(iter(batch.values()))) for batch in batches)
    drop = set(patch.drop) | _joint(net, patch.drop, inputs, plan, rule, bench)
    visitor = _Visitor(net, plan, rule, bench, drop, dict(patch.tensors), rows, samples or rows, len(batches))
    walk(net, bench.program, inputs, visitor, bench.room, others, answers=False)
    return Outcome(Patch(visitor.tensors, frozenset(visitor.drop)), tuple(visitor.traces))


def _joint(
    net: Net, gone: frozenset[int], inputs: Mapping[str, np.ndarray], plan: Plan, rule: Rule, bench: Bench
) -> set[int]:
    """Return the labels that go from channels which several layers read, as an earlier run found them or anew."""
    known = bench.journal and bench.journal.entry(_JOINT)
    if known:
        return set(known.facts["drop"])
    found = joint_choice(net, bench.program, inputs, plan, rule.ridge, bench.log, bench.room, gone)
    if bench.journal and found:
        bench.journal.keep(_JOINT, Entry(facts={"drop": sorted(found)}))
    return found


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
        chunks: int,
    ) -> None:
        self.net, self.plan, self.rule, self.bench = net, plan, rule, bench
        self.drop, self.tensors = drop, tensors
        self.traces: list[Trace] = []
        self.shares: dict[str, float] = {}
        self.rows, self.samples, self.chunks = rows, samples, chunks
        self.relus = before_relu(net) if rule.rectify else {}
        self.decides: dict[str, list[int]] = {}
        for at in plan.channels:
            readers = net.groups[at].readers
            if len(readers) == 1:
                self.decides.setdefault(readers[0], []).append(at)

    def __call__(self, stop: Stop) -> Weights | None:
        layer, began = stop.layer, time.perf_counter()
        done, journal = len(self.traces), self.bench.journal
        self.bench.log(Event("fit", layer.name, done=done, total=len(self.net.layers)))
        known = journal.entry(layer.name) if journal and self._open(stop) else None
        if known:
            return self._recalled(stop, known)
        dropped = frozenset(self.drop)
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
        share = self.shares.get(layer.name)
        self.traces.append(Trace(layer.name, before, after, time.perf_counter() - began, share))
        if journal and weights is not None and self._open(stop):
            facts = {"drop": sorted(self.drop - dropped), "trace": [before, after, self.traces[-1].seconds, share]}
            own = {name: self.tensors[name] for name in (layer.weight, layer.bias) if name in self.tensors}
            journal.keep(layer.name, Entry(own, facts))
        return weights

    def _recalled(self, stop: Stop, known: Entry) -> Weights:
        """Return the weights that an earlier run gave a layer."""
        self.tensors.update(known.arrays)
        self.drop.update(known.facts["drop"])
        self.traces.append(Trace(stop.layer.name, *known.facts["trace"]))
        return self._fitted(stop)

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
        layer, rule = stop.layer, self.rule
        if len(layer.columns) > WIDEST:
            own = slice(self.chunks)
            return self._fit_wide(replace(stop, teacher=stop.teacher[own], student=stop.student[own]))
        with_bias = rule.bias and stop.bias is not None
        each = 0 if rule.exact else enough(len(layer.columns), self.rows)
        precision = torch.float32 if not rule.exact and rule.ridge >= LEAST_RIDGE else torch.float64
        how: dict[str, Any] = {"bias": with_bias, "each": each, "dtype": precision}
        teacher = to_matrix(stop.weight, stop.bias if with_bias else None, stop.geometry).double()
        columns = torch.tensor(layer.columns, device=teacher.device)
        if with_bias:
            columns = torch.cat([columns, columns.new_full((1,), -1)])
        whole = Seen(stop.teacher, stop.student, stop.beside if rule.compensate else None, stop.geometry)
        seen, pool = whole.apart(self.chunks)
        wide = len(layer.columns) > WIDEST_FOLDED or teacher.numel() > MOST_FOLDED
        costly = dear(len(layer.columns), each * self.rows) or (wide and bool(rule.others))
        if not rule.exact and not stop.agree and costly:
            quadratic = measure_directly(seen, (rule.connection, rule.ridge), teacher, **how)
            if pool:
                others = measure_directly(pool, (rule.connection, rule.ridge), teacher, **how)
                quadratic = blended(quadratic, others, SHARES[0])
                self.shares[layer.name] = SHARES[0]
            matrix, mask = self._settle(layer, quadratic, teacher, columns)
            matrix = self._rectified(
                layer, (seen, pool, SHARES[0]), (rule.connection, rule.ridge), teacher, matrix, mask, how
            )
            before, after = missed(seen, teacher, (teacher * mask, matrix), bias=with_bias)
        else:
            folding = bool(rule.others) and not stop.agree and not wide
            matrix, before, after = self._fit_moments(seen, pool, folding, teacher, columns, layer, how)
        weight, bias = from_matrix(matrix, stop.geometry, with_bias, tuple(stop.weight.shape))
        fitted = bias.to(stop.bias) if bias is not None and stop.bias is not None else stop.bias
        return (weight.to(stop.weight), fitted), max(before, 0.0), max(after, 0.0)

    def _fit_moments(
        self,
        seen: Seen,
        pool: Seen | None,
        folding: bool,
        teacher: Tensor,
        columns: Tensor,
        layer: Layer,
        how: dict[str, Any],
    ) -> tuple[Tensor, float, float]:
        """Fit a layer whose moments are cheap enough.

        Folds of the samples may choose another weight of the pool, and then another connection and ridge.
        """
        rule, with_bias = self.rule, how["bias"]
        parts = {"rows": self.rows, "samples": self.samples, "folds": FOLDS if folding else 1}
        folds = _measured(seen, **parts, **how)
        others = None if pool is None else _measured(pool, rows=0, samples=1, folds=1, **how)[0]
        if len(folds) > 1:
            folds = [fold.with_teacher(teacher) for fold in folds]
            others = others and others.with_teacher(teacher)
        whole = total(folds)
        candidates = ((rule.connection, rule.ridge), *rule.others)
        first = whole.and_share(others, SHARES[0]).quadratic(candidates[0], teacher, bias=with_bias)
        matrix, mask = self._settle(layer, first, teacher, columns)
        alive = self._alive(columns)
        known: dict[str, Any] = {"bias": with_bias, "pool": others}
        share = best = 0
        if others is not None:
            same = candidates[:1] * len(SHARES)
            share = choose(folds, same, teacher, mask, alive, lean=0.0, shares=SHARES, **known)
            self.shares[layer.name] = SHARES[share]
        best = choose(folds, candidates, teacher, mask, alive, lean=LEAN, shares=SHARES[share:][:1], **known)
        if best or share:
            fitted = whole.and_share(others, SHARES[share])
            quadratic = restricted(fitted.quadratic(candidates[best], teacher, bias=with_bias), alive)
            matrix[..., alive] = refit(quadratic, mask[..., alive], teacher[..., alive])
        matrix = self._rectified(layer, (seen, pool, SHARES[share]), candidates[best], teacher, matrix, mask, how)
        judge = whole.quadratic((regression(), 0.0), teacher, bias=with_bias)
        energy = max(float(((teacher @ whole.moments.tt) * teacher).sum()), 1e-30)
        return matrix, float(judge(teacher * mask)) / energy, float(judge(matrix)) / energy

    def _rectified(
        self,
        layer: Layer,
        rows: tuple[Seen, Seen | None, float],
        candidate: Candidate,
        teacher: Tensor,
        matrix: Tensor,
        mask: Tensor,
        how: dict[str, Any],
    ) -> Tensor:
        """Return the weights fitted to what passes the ReLU behind the layer, where there is one and it is cheap."""
        seen, pool, share = rows
        summed = self.relus.get(layer.name)
        if summed is None or (summed and seen.beside is None) or len(candidate[0].terms) > 1:
            return matrix
        if layer.bias is not None and not how["bias"]:
            return matrix  # what passes the ReLU cannot be told without it
        # A reshape before the layer may have made more rows than the graph's inputs have.
        count = max(how["each"] * self.rows, positions(seen, how["each"]))
        count += 0 if pool is None else how["each"] * sum(lengths(pool.teacher))
        if cost(mask, count, how["dtype"]) > RECTIFYING / len(self.net.layers):
            return matrix
        others = None if pool is None else (pool, share)
        return rectified(seen, others, candidate, teacher, matrix, mask, summed=summed, **how)

    def _settle(self, layer: Layer, quadratic: Quadratic, teacher: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's weights (g, o, d), zero where dropped, and the mask of what stays."""
        made, mask = torch.zeros_like(teacher), torch.zeros_like(teacher, dtype=torch.bool)
        settled = False

        def solve(structure: Structure, keep: int, alive: Tensor) -> None:
            solution = self.rule.solver(restricted(quadratic, alive), teacher[..., alive], structure, keep)
            made.zero_()[..., alive] = solution.weight
            mask.zero_()[..., alive] = solution.mask

        for at in self.decides.get(layer.name, []):
            ids = remaining(self.net.groups[at].ids, self.drop)
            alive = self._alive(columns)
            unit = units(columns, ids)
            channel = Channel(unit[alive])
            solve(channel, min(self.plan.channels[at], channel.count), alive)
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
        return standing(columns, self.drop)

    def _fit_wide(self, stop: Stop) -> tuple[Weights, float, float]:
        """Fit a layer with more columns than moments can hold.

        Channels go by the energy of what they add. Single weights go by magnitude and the rest stays as it is: rows
        differ in support, and so would need a system each.
        """
        layer = stop.layer
        text = f"'{layer.name}' has {len(layer.columns)} columns: fitted by regression, whatever the connection."
        self.bench.log(Event("fit", text, level="warning"))
        x_t, x_s = (sampled_columns(chunks, stop.geometry) for chunks in (stop.teacher, stop.student))
        teacher = to_matrix(stop.weight, None, stop.geometry).double()
        columns = torch.tensor(layer.columns, device=teacher.device)
        for at in self.decides.get(layer.name, []):
            ids = remaining(self.net.groups[at].ids, self.drop)
            unit = units(columns, ids)
            energy = teacher.square().sum((0, 1)) * x_s.square().sum((0, 2))
            score = torch.stack([energy[unit == u].sum() for u in range(len(ids))])
            order = torch.argsort(score, descending=True, stable=True)
            self.drop.update(int(ids[int(u)]) for u in order[self.plan.channels[at] :])
        alive = self._alive(columns)
        structure = weight_structure(layer, self.plan, alive, columns, teacher)
        if structure is not None:
            mask = alive.expand(teacher.shape).clone()
            keep = min(self.plan.weights.get(layer.name, structure.least), structure.count)
            mask[..., alive] = structure.project(teacher[..., alive], keep)
            target = teacher @ x_t
            left = float((target - teacher * mask @ x_s).square().sum() / target.square().sum().clamp(min=1e-30))
            fit = Fit(teacher * mask, left, left)
        else:
            fit = regressed(teacher, x_t, x_s, alive, self.rule.ridge)
        weight, _ = from_matrix(fit.weight, stop.geometry, False, tuple(stop.weight.shape))
        return (weight.to(stop.weight), stop.bias), fit.before, fit.after


def _measured(seen: Seen, **how: Any) -> list[Fold]:
    return measure_folds(seen.teacher, seen.student, seen.beside, seen.geometry, **how)


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
