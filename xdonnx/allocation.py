"""How much each layer loses: error curves measured on the samples, and the split of the target that they suggest.

A group's curve says how far the network's last features and its answers move when these channels alone are thinned, all
else being the teacher's and the layers that read them refitted. To first order the squared errors of different groups
add up, so the best split takes every further unit of cost where it is cheapest. SPDY (Frantar & Alistarh, ICML 2022)
solves this for independent layers by dynamic programming. Channels are shared: what a group's channel costs depends on
how many its neighbours keep. So the split descends along the convex hulls of the curves, by the cost of the whole net.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from xdonnx.budget import Budget, Goal, Plan, make_plan, multiple, out_of_reach, target
from xdonnx.columns import from_matrix, to_matrix
from xdonnx.connection import Quadratic, correction, damped, objective, restricted
from xdonnx.convert import Program, stored
from xdonnx.errors import NothingToDo
from xdonnx.events import Event, Log, ignore
from xdonnx.graph import Net
from xdonnx.methods.joint import MOST_JOINT, WIDEST
from xdonnx.methods.wide import sampled_columns
from xdonnx.moments import Moments, enough, measure
from xdonnx.replay import MOST_BYTES, Replay
from xdonnx.shelf import Room, lengths
from xdonnx.solve import refit, remove_jointly
from xdonnx.structure import Channel, units
from xdonnx.student import find_taps, teacher_weights
from xdonnx.walk import Stop, walk

# Shares of its channels at which a group is measured.
LEVELS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
# Where that takes too long: at these, by the energy that goes, scaled to the one error measured in the middle.
COARSE = (0.75, 0.5, 0.25)
# Samples that the answers are measured on, how many every level of every group must be worth for all levels to be
# measured, and how many are walked otherwise.
SAMPLES, WORTH, WALKED = 64, 16, 32
# What measuring may cost with all levels, and otherwise, in multiply-accumulates; so many does a value cost that is
# written and read again. Otherwise it may also cost as much as looking at all samples once.
WORK, LITTLE, VALUE = 8e11, 5e10, 50
RIDGE = 0.01
# Of the room for activations, one in so many bytes may hold the values of what is measured.
SHARE = 8
# Up to so many columns channels leave one by one, exactly; wider layers are ranked once by the energy of a channel.
WIDE = 1200


@dataclass(frozen=True)
class Curve:
    """What it costs a group to lose channels.

    Parameters
    ----------
    group : int
        Index into `net.groups`.
    points : tuple of (kept, error)
        From all channels (error 0) downwards; the error of last features and answers, as a share of their energy.
    """

    group: int
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True, eq=False)
class _Reader:
    """A layer that reads a group: its error, the teacher's matrix, and the unit that each column belongs to."""

    stop: Stop
    quadratic: Quadratic | None  # None where moments would be too large: then nothing is refitted
    teacher: Tensor
    energy: Tensor  # of what each column contributes, as a share of the whole
    unit: Tensor
    bias: bool


def measure_curves(
    net: Net,
    program: Program,
    inputs: Mapping[str, np.ndarray],
    groups: Sequence[int],
    log: Log = ignore,
    room: Room | None = None,
) -> tuple[Curve, ...]:
    """Measure the error curves of these groups.

    Parameters
    ----------
    inputs : {graph input: (n, ...)}
        The samples that fit; those that judge must not be among them.
    groups : sequence of int
        Indices into `net.groups`.
    room : Room, optional
        For the activations; see :func:`xdonnx.walk.walk`.

    Returns
    -------
    tuple of Curve
        In the order of `groups`.
    """
    limit = MOST_BYTES if room is None or room.limit is None else room.limit // SHARE
    probe = _Probe(net, program, inputs, len(groups), limit)
    readers: dict[int, list[_Reader]] = {at: [] for at in groups}
    last = {at: max(net.groups[at].readers, key=list(net.layers).index) for at in groups}
    curves: dict[int, Curve] = {}

    def visit(stop: Stop) -> None:
        mine = [at for at in groups if stop.layer.name in net.groups[at].readers]
        if not mine:
            return
        quadratic, teacher, energy, bias = _reading(stop, torch.float32 if probe.coarse else torch.float64)
        columns = torch.tensor(stop.layer.columns, device=teacher.device)
        columns = torch.cat([columns, columns.new_full((int(bias),), -1)])
        # The inputs are in the moments now, and need not wait for the group's last reader.
        stop = replace(stop, teacher=[], student=[], beside=None)
        for at in mine:
            readers[at].append(_Reader(stop, quadratic, teacher, energy, units(columns, net.groups[at].ids), bias))
            if last[at] == stop.layer.name:
                curves[at] = _curve(net, at, readers.pop(at), probe)
                log(Event("curves", net.groups[at].name, done=len(curves), total=len(groups)))

    if probe.coarse and net.interface.batch is None:
        rows = len(next(iter(inputs.values())))
        places = np.linspace(0, rows - 1, min(rows, WALKED)).astype(int)
        inputs = {name: array[places] for name, array in inputs.items()}
    end = max(last.values(), key=list(net.layers).index, default=None)
    walk(net, program, inputs, visit, room, answers=False, last=end)
    return tuple(curves[at] for at in groups)


def _reading(stop: Stop, dtype: torch.dtype) -> tuple[Quadratic | None, Tensor, Tensor, bool]:
    """Return a layer's error, the teacher's matrix, the energy of each column, and whether the last one is the bias."""
    if len(stop.layer.columns) > WIDEST:
        teacher = to_matrix(stop.weight, None, stop.geometry).double()
        columns = sampled_columns(stop.teacher[:1], stop.geometry)
        energy = teacher.square().sum((0, 1)) * columns.square().mean((0, 2))
        return None, teacher, energy / energy.sum().clamp(min=1e-30), False
    bias = stop.bias is not None
    each = enough(len(stop.layer.columns), sum(lengths(stop.teacher)))
    each = -(-each // 2) if dtype == torch.float32 else each
    moments = measure(stop.teacher, stop.teacher, stop.geometry, bias=bias, each=each, dtype=torch.float32)
    mean = moments.tt.to(dtype)
    moments = Moments(mean, mean, mean, moments.count)
    teacher = to_matrix(stop.weight, stop.bias, stop.geometry).to(mean)
    quadratic = damped(objective(correction(), moments, teacher), teacher, RIDGE, bias=bias)
    energy = (quadratic.lin * teacher).sum((0, 1)) / quadratic.const.sum().clamp(min=1e-30)
    return quadratic, teacher, energy, bias


class _Probe:
    """The network with some layers' weights replaced, held against the teacher at its end."""

    def __init__(
        self, net: Net, program: Program, inputs: Mapping[str, np.ndarray], groups: int, room: int = MOST_BYTES
    ) -> None:
        taps = find_taps(net, program)
        self.wanted = (*taps.stages[-1:], *taps.answers)
        self.features = len(taps.stages[-1:])
        rows = len(next(iter(inputs.values())))
        values = sum(prod(shape[1:]) for shape in net.shapes.values())
        cost = max(1, sum(layer.macs for layer in net.layers.values()) + VALUE * values)
        count = int(WORK / (cost * max(1, groups * len(LEVELS))))
        self.coarse = count < WORTH
        if self.coarse:
            count = max(2, int(max(rows, LITTLE / cost) / max(1, groups)))
        count = min(SAMPLES, count)
        size = net.batch if net.interface.batch is not None else min(count, rows)
        count = min(max(size, count // size * size), rows // size * size)
        # Spread over all samples, which may be sorted by class.
        places = np.linspace(0, rows - 1, count).astype(int)
        batches = [
            {name: torch.tensor(array[places[at : at + size]], device=program.device) for name, array in inputs.items()}
            for at in range(0, count, size)
        ]
        teacher = teacher_weights(net, program.device)
        with torch.no_grad():
            self.batches = [Replay(program, batch, teacher, self.wanted, room // len(batches)) for batch in batches]

    def error(self, changed: Mapping[str, Tensor]) -> float:
        """Return the mean over the compared values of the squared error relative to their energy.

        Features that the changed layers come after are left out: their zero says nothing, and would halve the rest.
        """
        wrong, energy = np.zeros(len(self.wanted)), np.zeros(len(self.wanted))
        for batch in self.batches:
            with torch.no_grad():
                made = batch.changed(changed)
            for at, (a, b) in enumerate(zip(made, batch.truth, strict=True)):
                wrong[at] += float((a - b).double().square().sum())
                energy[at] += float(b.double().square().sum())
        share = wrong / np.maximum(energy, 1e-30)
        compared = share[self.features :] if self.features and not wrong[0] else share
        found = float(np.mean(compared)) if len(compared) else 0.0
        return found if math.isfinite(found) else 1.0


def _curve(net: Net, at: int, readers: Sequence[_Reader], probe: _Probe) -> Curve:
    """Thin one group level by level, each level going on from the one before."""
    total = len(net.groups[at].ids)
    kept = torch.ones(total, dtype=torch.bool)
    points, lost = [(total, 0.0)], [0.0]
    scale = 0.0
    for level in COARSE if probe.coarse else LEVELS:
        count = max(1, round(level * total))
        if count >= points[-1][0]:
            continue
        kept = _thinned(readers, kept, count, rough=probe.coarse)
        lost.append(sum(float(reader.energy[~_alive(reader, kept)].sum()) for reader in readers))
        measured = not probe.coarse or (level <= COARSE[1] and not scale)
        points.append((count, probe.error(_refitted(readers, kept)) if measured else 0.0))
        if probe.coarse and measured:
            scale = points[-1][1] / max(lost[-1], 1e-30)
    if probe.coarse:
        points = [(count, energy * scale) for (count, _), energy in zip(points, lost, strict=True)]
    return Curve(at, tuple(points))


def _alive(reader: _Reader, kept: Tensor) -> Tensor:
    """Return the columns of a reader that stay, (d,)."""
    return (reader.unit < 0) | kept.to(reader.unit.device)[reader.unit.clamp(min=0)]


def _refitted(readers: Sequence[_Reader], kept: Tensor) -> dict[str, Tensor]:
    """Return {initializer: value} of the readers with these units alone."""
    changed = {}
    for reader in readers:
        alive = _alive(reader, kept)
        matrix = reader.teacher * alive
        if reader.quadratic is not None:
            matrix[..., alive] = _settled(restricted(reader.quadratic, alive), reader.teacher[..., alive])
        weight, bias = from_matrix(matrix, reader.stop.geometry, reader.bias, tuple(reader.stop.weight.shape))
        layer = reader.stop.layer
        changed[layer.weight] = stored(layer, weight.to(reader.stop.weight))
        if layer.bias is not None and bias is not None:
            changed[layer.bias] = bias.to(reader.stop.weight)
    return changed


def _settled(q: Quadratic, start: Tensor) -> Tensor:
    """Return the best weights (g, o, d), in the precision of `q`."""
    if q.hess.dtype == torch.float32:
        # Only to be compared with other groups': half the time where it is well enough conditioned.
        scale = q.hess.diagonal(dim1=1, dim2=2).rsqrt()
        factor, failed = torch.linalg.cholesky_ex(q.hess * scale[:, :, None] * scale[:, None])
        if not bool(failed.any()):
            slack = (q.lin - start @ q.hess) * scale[:, None]
            return start + torch.cholesky_solve(slack.mT, factor).mT * scale[:, None]
        q = Quadratic(q.hess.double(), q.lin.double(), q.const.double())
    return refit(q, torch.ones_like(start, dtype=torch.bool), start).to(start)


def _thinned(readers: Sequence[_Reader], kept: Tensor, count: int, *, rough: bool) -> Tensor:
    """Return which units stay when `count` of those in `kept` do; `rough`: a quarter leaves at once."""
    order = torch.nonzero(kept).flatten()
    place = torch.full((len(kept) + 1,), -1)
    place[order] = torch.arange(len(order))
    problems = []
    for reader in readers:
        if reader.quadratic is None or len(reader.unit) > WIDE or len(readers) > MOST_JOINT:
            break
        unit = place.to(reader.unit.device)[reader.unit]  # -1 picks the last entry, which is -1
        alive = (unit >= 0) | (reader.unit < 0)
        problems.append((restricted(reader.quadratic, alive), reader.teacher[..., alive], Channel(unit[alive])))
    if len(problems) == len(readers):
        stays = order[remove_jointly(problems, count, rough=rough).cpu()]
    else:
        score = torch.zeros(len(kept), dtype=torch.float64)
        for reader in readers:
            own = (reader.unit >= 0).cpu()
            score.index_add_(0, reader.unit.cpu()[own], reader.energy.cpu()[own].double())
        stays = order[torch.argsort(score[order], descending=True, stable=True)[:count]]
    made = torch.zeros_like(kept)
    made[stays] = True
    return made


def allocate(net: Net, curves: Sequence[Curve], budget: Budget, goal: Goal | None = None) -> Plan:
    """Split a target over the groups so that the sum of their errors is small.

    Parameters
    ----------
    curves : sequence of Curve
        From :func:`measure_curves`, one for each group that may lose channels.
    budget : Budget
        Over the whole network.
    goal : Goal, optional
        Of targets that are measured: size and latency.

    Returns
    -------
    Plan
        Within the target.

    Raises
    ------
    NothingToDo
        The target is out of reach even with as few channels left as rounding allows.
    """
    goal = goal or target(net, budget)
    cost, limit = goal.cost, goal.limit
    steps = {curve.group: _ladder(net, curve, budget, goal) for curve in curves}
    fewest = {curve.group: min(curve.points)[0] for curve in curves}
    at = _descended(steps, fewest, cost, limit)
    chosen = {group: steps[group][place][0] for group, place in at.items()}
    if cost(chosen) > limit:
        raise out_of_reach(budget, cost(chosen), cost({}))
    # A descent by steps can miss by one what the same fraction everywhere happens to hit; and where nothing was to be
    # measured all splits are alike, and the even one is the safest.
    uniform = make_plan(net, budget, goal).channels
    even = {group: uniform.get(group, ladder[0][0]) for group, ladder in steps.items()}
    errors = {group: dict(ladder) for group, ladder in steps.items()}
    if cost(even) <= limit and _sum(errors, even) <= _sum(errors, chosen):
        chosen = even
    losing = {group: count for group, count in sorted(chosen.items()) if count < len(net.groups[group].ids)}
    if not losing:
        raise NothingToDo("every layer would keep all its channels.\n  Ask for a smaller target or a finer --round-to.")
    return Plan("channel", channels=losing)


def _descended(
    steps: Mapping[int, Sequence[tuple[int, float]]],
    fewest: Mapping[int, int],
    cost: Callable[[Mapping[int, int]], int],
    limit: float,
) -> dict[int, int]:
    """Return {group: place on its ladder} after the cheapest steps down to the limit, or to the end of all ladders."""
    at = dict.fromkeys(steps, 0)

    def now_with(group: int, place: int) -> int:
        return cost({g: steps[g][place if g == group else p][0] for g, p in at.items()})

    def price(group: int) -> tuple[bool, float, int]:
        """Return the rise in error per unit of cost of a group's next step; steps that were not measured come last."""
        (_, before), (count, after) = steps[group][at[group] : at[group] + 2]
        return count < fewest[group], (after - before) / max(now - now_with(group, at[group] + 1), 1), group

    now = cost({group: ladder[0][0] for group, ladder in steps.items()})
    # Prices only rise, as neighbours shrink, so one that is looked at again and still the least is the least of all.
    queue = [price(group) for group, ladder in steps.items() if len(ladder) > 1]
    heapq.heapify(queue)
    while now > limit and queue:
        group = queue[0][2]
        again = price(group)
        if len(queue) > 1 and again > min(queue[1:3]):
            heapq.heapreplace(queue, again)
            continue
        at[group] += 1
        now = now_with(group, at[group])
        if at[group] + 1 < len(steps[group]):
            heapq.heapreplace(queue, price(group))
        else:
            heapq.heappop(queue)
    # The last step may have gone further than it had to: give back what fits, the dearest first.
    for group in sorted(at, key=lambda g: -steps[g][at[g]][1]):
        while at[group] and now_with(group, at[group] - 1) <= limit:
            at[group] -= 1
    return at


def _sum(errors: Mapping[int, Mapping[int, float]], chosen: Mapping[int, int]) -> float:
    return sum(errors[group][count] for group, count in chosen.items())


def _ladder(net: Net, curve: Curve, budget: Budget, goal: Goal) -> list[tuple[int, float]]:
    """Return (kept, error) for every count that rounding allows, falling, on the convex hull of the curve.

    Between two counts on the hull the slope is constant, so a step is as dear as the way to the next corner: without
    the hull a steep stretch would hide a cheap one behind it.
    """
    points = sorted(curve.points)
    errors = np.maximum.accumulate([error for _, error in points][::-1])[::-1]
    hull: list[tuple[int, float]] = []
    for count, error in zip([count for count, _ in points], errors, strict=True):
        while len(hull) > 1 and _above(hull[-2], hull[-1], (count, float(error))):
            hull.pop()
        hull.append((count, float(error)))
    total, by = points[-1][0], multiple(net.groups[curve.group], budget)
    allowed = sorted(goal.counts.get(curve.group) or {total, *range(by, total, by)}, reverse=True)
    found = np.interp(allowed, [count for count, _ in hull], [error for _, error in hull])
    # Below the fewest channels measured the error is taken to grow as one over them.
    fewest = hull[0][0]
    return [(count, float(error) * max(1.0, fewest / count)) for count, error in zip(allowed, found, strict=True)]


def _above(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
