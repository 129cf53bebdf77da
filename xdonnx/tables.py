"""How long layers take in onnxruntime with fewer channels: measured, each as a small model of its own.

MACs are a poor clock: a convolution may be bound by memory, onnxruntime's kernels want channels in blocks, and a
depthwise layer costs more than it multiplies. So every layer that may get narrower is timed at a few widths of what it
reads and makes, in turns, and between these the time is taken to be linear in each. Activations, sums and the way
between layouts are left out, which is why nothing is concluded from the tables alone: see `pacing`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from xdonnx.budget import Budget, Goal
from xdonnx.events import Event, Log, ignore
from xdonnx.graph import Net
from xdonnx.layers import Layer
from xdonnx.tallies import Tally, tally
from xdonnx.verification import turns

Array = np.ndarray[Any, Any]
Models = Sequence[Path | onnx.ModelProto]
Feeds = Sequence[Mapping[str, Array]]
Point = tuple[int, int]
"""Channels that a layer reads and makes."""
Clock = Callable[[Models, Feeds, float, bool], Array]
"""Times models in turns for some seconds: (runs, models) milliseconds, by that of one processor if so is said."""

# Seconds for all tables, and for the models that are timed in turns at most; how many these are, and their weights.
SECONDS, EACH, TOGETHER, BYTES = 20.0, 0.6, 24, 2**29
RUNS = 200
# Shares of its channels at which a layer is timed, where it reads or makes some that may go, and where it does both.
ALONE, BOTH = (1.0, 0.75, 0.5, 0.25, 0.125), (1.0, 0.625, 0.3125, 0.125)
MULTIPLES = (16, 8, 4, 2, 1)
# Other programs only ever add to the time of a layer, which is short: what the quickest runs take is its own.
_QUIET = 10
# A finer multiple is worth having if it saves so much of what its channels save on average.
WORTH = 0.5


@dataclass(frozen=True)
class Kind:
    """What a layer's time depends on, but for its widths; layers of one kind share a table.

    Parameters
    ----------
    op : str
    kernel, strides, dilations, pads, output_padding : tuple of int
    groups : int
        0 for a depthwise layer, whose groups are its channels.
    times : int
        Channels that a depthwise layer makes of each; else 1.
    size : tuple of int
        What it reads without the channels; the batch comes first.
    dtype : str
    bias, transposed : bool
    """

    op: str
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    times: int
    size: tuple[int, ...]
    dtype: str
    bias: bool
    transposed: bool


@dataclass(frozen=True)
class Width:
    """How many channels a layer reads and makes, by the channels kept of each group."""

    read: Tally
    made: Tally
    taps: int

    def of(self, channels: Mapping[int, int]) -> Point:
        """Return the channels that it reads and makes."""
        return self.read.kept(channels) // self.taps, self.made.kept(channels)

    def touched(self, group: int) -> bool:
        """Whether it gets narrower with a group."""
        return group in self.read.gone or group in self.made.gone


@dataclass(frozen=True, eq=False)
class Table:
    """Milliseconds of one layer at some widths: `ms` is (read, made), widths rise."""

    read: tuple[int, ...]
    made: tuple[int, ...]
    ms: Array

    def at(self, read: int, made: int) -> float:
        """Return the time at a width, linear in each between those measured, and on the line of the last two beyond."""
        rows = [_line(self.made, row, made) for row in self.ms]
        return max(_line(self.read, rows, read), 0.0)


def stopwatch(device: str) -> Clock:
    """Return the clock that times models in onnxruntime, one sample a run, as `verify` and `bench` do."""

    def clock(models: Models, feeds: Feeds, seconds: float, processor: bool) -> Array:
        # What a GPU does takes no time of the processor; and threads that wait for each other spin, and so take some.
        spent = processor and device == "cpu"
        how: dict[str, Any] = {"timer": time.process_time, "threads": 1} if spent else {}
        found, _ = turns(models, feeds, device=device, repeats=RUNS, seconds=seconds, **how)
        return found

    return clock


def goal_of(net: Net, groups: Sequence[int], budget: Budget, clock: Clock, log: Log = ignore) -> Goal:
    """Time the layers that these groups touch, and return what a choice of channels costs, in nanoseconds.

    Parameters
    ----------
    net : Net
    groups : sequence of int
        Those that may lose channels.
    budget : Budget
        Its `round_to` holds; without one each group keeps a multiple that proves fast.
    clock : Clock
    log : Log
        Told of progress in the stage 'tables'.

    Returns
    -------
    Goal
        Its limit is what all layers of the teacher take together, so that it limits nothing yet.
    """
    kinds = {name: _kind(net, layer) for name, layer in net.layers.items()}
    widths = {name: _width(net, layer, frozenset(groups)) for name, layer in net.layers.items()}
    grids = {name: _grid(net, width) for name, width in widths.items()}
    probes = {} if budget.round_to else {at: _probes(len(net.groups[at].ids)) for at in groups}
    touched = {at: [name for name, width in widths.items() if width.touched(at)] for at in groups}
    points: dict[Kind, set[Point]] = {kind: set() for kind in kinds.values()}
    for name, (read, made) in grids.items():
        points[kinds[name]] |= {(a, b) for a in read for b in made}
    for at, probe in probes.items():
        for name in touched[at]:
            points[kinds[name]] |= {widths[name].of({at: count}) for count in probe.values()}
    times = _timed(points, clock, log)
    parts = [_part(_table(*grids[name], times[kinds[name]]), widths[name]) for name in net.layers]

    def cost(channels: Mapping[int, int]) -> int:
        return sum(part(channels) for part in parts)

    def probed(at: int, count: int) -> float:
        return sum(times[kinds[name]][widths[name].of({at: count})] for name in touched[at])

    counts: dict[int, Sequence[int]] = {}
    for at in groups:
        units = len(net.groups[at].ids)
        if budget.round_to:
            counts[at] = sorted({*range(budget.round_to, units, budget.round_to), units})
            continue
        by = multiple_of({less: probed(at, count) for less, count in probes[at].items()})
        steps = sorted({*range(by, units, by), units})
        counts[at] = undominated({count: cost({at: count}) for count in steps})
    return Goal(cost, float(cost({})), counts)


def coarser(goal: Goal, by: int) -> Goal:
    """Return the goal with counts in multiples of this alone, of less where there are not twice as many channels."""
    return replace(goal, counts={at: _multiples(counts, by) for at, counts in goal.counts.items()})


def _multiples(counts: Sequence[int], by: int) -> list[int]:
    by = min(by, max(_probes(counts[-1])))
    return [count for count in counts if by == 0 or count % by == 0 or count == counts[-1]]


def multiple_of(times: Mapping[int, float]) -> int:
    """Return the finest multiple of channels whose counts are as much faster as they are fewer.

    Parameters
    ----------
    times : mapping
        {channels fewer: milliseconds}, fewer than some multiple of 16: by 0, by powers of 2, and by the largest of
        these, which tells what a channel saves on average.

    Notes
    -----
    Kernels take channels in blocks, so a few fewer than a whole block may save nothing, or cost. A multiple is worth
    having where leaving so many out saves at least half of what they do on average, and so do all coarser ones.
    """
    coarsest = max(times)
    each = (times[0] - times[coarsest]) / max(coarsest, 1)
    found = max(coarsest, 1)
    for by in sorted(times, reverse=True):
        if by in (0, coarsest):
            continue
        if each <= 0 or times[0] - times[by] < WORTH * each * by:
            break
        found = by
    return found


def undominated(times: Mapping[int, float]) -> list[int]:
    """Return the counts, rising, without those that are fewer than another and not faster."""
    kept: list[int] = []
    for count in sorted(times, reverse=True):
        if not kept or times[count] < times[kept[-1]]:
            kept.append(count)
    return kept[::-1]


def _kind(net: Net, layer: Layer) -> Kind:
    """Return what the time of a layer depends on."""
    shape = net.shapes[layer.input]
    return Kind(
        op=layer.op,
        kernel=layer.kernel,
        strides=layer.strides,
        dilations=layer.dilations,
        pads=layer.pads,
        output_padding=layer.output_padding,
        groups=0 if layer.depthwise else layer.groups,
        times=len(layer.out_ids) // layer.groups if layer.depthwise else 1,
        size=(shape[0], *shape[2:]) if layer.kernel else tuple(shape[:-1]),
        dtype=str(net.array(layer.weight).dtype),
        bias=layer.bias is not None,
        transposed=layer.transposed,
    )


def _width(net: Net, layer: Layer, groups: frozenset[int]) -> Width:
    """Return how a layer's widths follow from the channels kept of these groups."""
    made = tally(net, layer.out_ids)
    if layer.depthwise:
        read, taps = Tally(layer.groups, {}), 1  # as many as it makes, which says it all
    else:
        read, taps = tally(net, np.tile(layer.columns, layer.groups)), prod(layer.kernel)
    return Width(read.of(groups), made.of(groups), taps)


def _grid(net: Net, width: Width) -> tuple[list[int], list[int]]:
    """Return the numbers of channels read and made at which a layer is timed."""
    levels = BOTH if width.read.gone and width.made.gone else ALONE

    def along(axis: Tally) -> set[int]:
        units = {at: len(net.groups[at].ids) for at in axis.gone}
        return {axis.kept({at: _even(count, level) for at, count in units.items()}) for level in levels}

    return sorted(read // width.taps for read in along(width.read)), sorted(along(width.made))


def _even(units: int, level: float) -> int:
    """Return about a share of the units, in blocks where there are many, so that odd widths disturb no line."""
    by = next(by for by in MULTIPLES if 4 * by <= units or by == 1)
    return units if level == 1 else min(units, max(by, by * round(level * units / by)))


def _probes(units: int) -> dict[int, int]:
    """Return {channels fewer: count}: a count of whole blocks, and those below it that finer multiples would allow."""
    coarsest = next((by for by in MULTIPLES if 2 * by <= units), 0)
    if not coarsest:
        return {0: units}
    whole = coarsest * max(2, 3 * units // (4 * coarsest))
    return {0: whole, **{by: whole - by for by in MULTIPLES if by <= coarsest}}


def _timed(points: Mapping[Kind, set[Point]], clock: Clock, log: Log) -> dict[Kind, dict[Point, float]]:
    """Return the milliseconds of each kind of layer at each width, without those that any call takes."""
    lots = [(kind, part) for kind, wanted in points.items() for part in _parts(kind, sorted(wanted))]
    seconds = min(EACH, SECONDS / len(lots))
    found: dict[Kind, dict[Point, float]] = {kind: {} for kind in points}
    model, feed = one_layer(_NOTHING, (1, 1))
    call = float(np.percentile(clock([model], [feed], seconds, False), _QUIET))
    for done, (kind, part) in enumerate(lots):
        log(Event("tables", f"{kind.op} {'x'.join(map(str, (*kind.kernel, *kind.size)))}", done=done, total=len(lots)))
        models, feeds = zip(*(one_layer(kind, point) for point in part), strict=True)
        quick = np.percentile(clock(models, feeds, seconds, False), _QUIET, axis=0)
        found[kind] |= {point: max(float(ms) - call, 1e-6) for point, ms in zip(part, quick, strict=True)}
    return found


# A layer that takes no time but that of the call.
_NOTHING = Kind("Conv", (1, 1), (1, 1), (1, 1), (0, 0, 0, 0), (), 1, 1, (1, 1, 1), "float32", False, False)


def _parts(kind: Kind, points: Sequence[Point]) -> Iterator[list[Point]]:
    """Split widths into lots that are timed in turns, those alike together; large weights do not all fit in memory."""
    lot: list[Point] = []
    held = 0
    for read, made in points:
        size = (made if not kind.groups else read * made // kind.groups) * prod(kind.kernel) * 4
        if lot and (len(lot) == TOGETHER or held + size > BYTES):
            yield lot
            lot, held = [], 0
        lot.append((read, made))
        held += size
    yield lot


def one_layer(kind: Kind, point: Point) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Return a model of one layer that reads and makes so many channels, and what it is fed."""
    read, made = point
    dtype = np.dtype(kind.dtype)
    groups = kind.groups or made // kind.times
    read = read if kind.groups else groups
    inner = {"Conv": (made, read // groups), "ConvTranspose": (read, made // groups)}.get(
        kind.op, (read, made) if kind.transposed else (made, read)
    )
    fed = np.full((kind.size[0], read, *kind.size[1:]) if kind.kernel else (*kind.size, read), 0.5, dtype)
    options: dict[str, Any] = {}
    if kind.kernel:
        options = {"kernel_shape": kind.kernel, "strides": kind.strides, "dilations": kind.dilations}
        options |= {"pads": kind.pads, "group": groups}
        options |= {"output_padding": kind.output_padding} if any(kind.output_padding) else {}
    elif kind.op == "Gemm":
        options = {"transB": int(not kind.transposed)}
    weights = [numpy_helper.from_array(np.full((*inner, *kind.kernel), 0.01, dtype), "w")]
    if kind.bias:
        weights.append(numpy_helper.from_array(np.zeros(made, dtype), "b"))
    node = helper.make_node(kind.op, ["x", *(tensor.name for tensor in weights)], ["y"], **options)
    element = helper.np_dtype_to_tensor_dtype(dtype)
    given, answer = (
        helper.make_tensor_value_info(name, element, shape) for name, shape in (("x", fed.shape), ("y", None))
    )
    graph = helper.make_graph([node], "layer", [given], [answer], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), {"x": fed}


def _table(read: Sequence[int], made: Sequence[int], times: Mapping[Point, float]) -> Table:
    return Table(tuple(read), tuple(made), np.array([[times[a, b] for b in made] for a in read]))


def _part(table: Table, width: Width) -> Callable[[Mapping[int, int]], int]:
    """Return what a layer costs, in nanoseconds."""

    @cache
    def at(read: int, made: int) -> int:
        return round(1e6 * table.at(read, made))

    return lambda channels: at(*width.of(channels))


def _line(places: Sequence[int], values: Sequence[float] | Array, place: float) -> float:
    """Return the value on the line through the two neighbours of a place."""
    if len(places) == 1:
        return float(values[0])
    at = int(np.clip(np.searchsorted(places, place), 1, len(places) - 1))
    before, after = places[at - 1], places[at]
    share = (place - before) / (after - before)
    return float(values[at - 1] + share * (values[at] - values[at - 1]))
