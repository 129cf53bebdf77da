"""What a net costs with some channels gone, and how a target becomes a number of units kept in each layer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np

from xdonnx.cost import measure_cost
from xdonnx.errors import JobError, NothingToDo, did_you_mean
from xdonnx.figures import amount
from xdonnx.graph import Group, Net
from xdonnx.layers import Layer

KINDS = ("keep", "macs", "params", "size", "latency")
# What these come to is known of a goal that somebody made for the net, not of the net alone.
MEASURED = ("size", "latency")


@dataclass(frozen=True)
class Budget:
    """What may stay.

    Parameters
    ----------
    kind : {'keep', 'macs', 'params', 'size', 'latency'}
        'keep': the fraction of units in every layer that may lose some; the others: of the whole network.
    amount : float
        A fraction of the teacher, above 0 and below 1; or bytes or milliseconds, as `unit` says.
    structure : str
        'channel', 'element', or 'n:m' such as '2:4'.
    include, exclude : tuple of str
        Patterns (`*`, `?`, `[...]`) over layer and node names. Channels go by the layers that make them.
    round_to : int or None
        Channels are kept in multiples of this where a layer has as many. None: for a target over the whole network 8
        where a layer has at least 32 channels and 4 where it has at least 8, since onnxruntime's convolutions are slow
        at other widths; for 'keep' exactly the fraction.
    residual : bool
        Whether channels that several layers add into may go too.
    unit : {'', 'B', 'ms'}
        Of the amount; '' is a fraction.
    """

    kind: str = "macs"
    amount: float = 0.5
    structure: str = "channel"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    round_to: int | None = None
    residual: bool = False
    unit: str = ""

    @property
    def told(self) -> str:
        """The amount as people write it."""
        if not self.unit:
            return f"{100 * self.amount:g}%"
        return amount(self.amount, "B") if self.unit == "B" else f"{self.amount:g} {self.unit}"


@dataclass(frozen=True)
class Goal:
    """A target over the whole network, in numbers.

    Parameters
    ----------
    cost : callable
        What a choice of channels {group: kept} costs; groups that are left out keep all.
    limit : float
        What it may cost at most.
    counts : mapping
        {group: counts that it may keep}, all of them the last; other groups go by `multiple`.
    """

    cost: Callable[[Mapping[int, int]], int]
    limit: float
    counts: Mapping[int, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How many units stay.

    Parameters
    ----------
    structure : str
        As in `Budget`.
    channels : dict
        {index into `net.groups`: channels kept}, for groups that lose some.
    weights : dict
        {layer: weights kept}, for layers that lose some; empty unless the structure is 'element'.
    layers : tuple of str
        Layers that the structure 'n:m' applies to.
    """

    structure: str = "channel"
    channels: Mapping[int, int] = field(default_factory=dict)
    weights: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[str, ...] = ()


def pattern_of(structure: str) -> tuple[int, int] | None:
    """Return (n, m) of a structure 'n:m', None for the others.

    Raises
    ------
    JobError
        There is no such structure.
    """
    if structure in ("channel", "element"):
        return None
    found = re.fullmatch(r"(\d+):(\d+)", structure)
    if not found or not 1 <= int(found[1]) < int(found[2]):
        near = did_you_mean(structure, ("channel", "element", "2:4"))
        raise JobError(f"unknown structure '{structure}'.{near}\n  Structures: channel, element, or n:m such as 2:4.")
    return int(found[1]), int(found[2])


def check_budget(budget: Budget) -> None:
    """Raise JobError for a target that makes no sense for any model."""
    if budget.kind not in KINDS:
        raise JobError(f"unknown target '{budget.kind}'.\n  Targets: {', '.join(KINDS)}.")
    if not (0 < budget.amount < 1 or (budget.unit and budget.amount > 0)):
        raise JobError(
            f"--{budget.kind} is {budget.amount:g}.\n  It is a fraction above 0 and below 1: "
            "0.5 or 50%. One per cent is 1%."
        )
    if budget.round_to is not None and budget.round_to < 1:
        raise JobError(f"--round-to is {budget.round_to}.\n  It is a number of channels: 1 or more.")
    pattern_of(budget.structure)


def make_plan(net: Net, budget: Budget, goal: Goal | None = None) -> Plan:
    """Turn a target into units kept, the same fraction in every layer.

    Parameters
    ----------
    net : Net
    budget : Budget
    goal : Goal, optional
        Of targets that are measured: size and latency.

    Raises
    ------
    JobError
        The target makes no sense, or a pattern matches nothing.
    NothingToDo
        Nothing may go, or the target is out of reach; the message says what is in reach.
    """
    check_budget(budget)
    pattern = pattern_of(budget.structure)
    named = _named(net, budget)
    if budget.structure == "channel":
        return _channel_plan(net, budget, named, goal)
    if budget.kind in ("macs", "latency"):
        raise JobError(
            f"--{budget.kind} does not go with --structure {budget.structure}: "
            "zero weights are multiplied all the same.\n"
            "  Use --keep, --params or --size, or --structure channel."
        )
    layers = [layer for layer in weight_layers(net) if layer.name in named]
    if not layers:
        raise NothingToDo("no convolution but the first may lose weights.\n  Widen --include or --exclude.")
    if pattern:
        return Plan(budget.structure, layers=tuple(layer.name for layer in layers))
    if budget.kind == "keep":
        fraction = budget.amount
    else:
        total = params(net, np.ones(net.labels, bool))
        free = sum(net.array(layer.weight).size for layer in layers)
        fraction = (budget.amount * total - (total - free)) / free
        if fraction <= 0:
            raise NothingToDo(
                f"--params {100 * budget.amount:g}% is out of reach: "
                f"the weights that stay are {(total - free) / total:.0%}."
            )
    sizes = {layer.name: int(net.array(layer.weight).size) for layer in layers}
    return Plan("element", weights={name: max(1, round(fraction * size)) for name, size in sizes.items()})


def weight_layers(net: Net) -> list[Layer]:
    """Return the layers that may lose single weights: every convolution but the first."""
    convolutions = [layer for layer in net.layers.values() if layer.kernel]
    return [layer for layer in convolutions[1:] if layer.weight not in net.shared]


def candidates(net: Net, budget: Budget, named: set[str] | None = None) -> list[int]:
    """Return the indices of the groups that may lose channels under this budget."""
    allowed = _named(net, budget) if named is None else named
    return [
        at
        for at, group in enumerate(net.groups)
        if (group.stream is None or budget.residual) and all(maker in allowed for maker in group.producers)
    ]


def layers_named(net: Net, include: Sequence[str], exclude: Sequence[str]) -> set[str]:
    """Return the layers that patterns leave in play; raises JobError for a pattern that matches none."""
    return _named(net, Budget(include=tuple(include), exclude=tuple(exclude)))


def macs(net: Net, keep: np.ndarray) -> int:
    """Return multiply-accumulates of all layers for one sample, given which labels stay."""
    return sum(_left(*part, keep) for part in _parts(net, "macs"))


def params(net: Net, keep: np.ndarray) -> int:
    """Return weights and biases of all layers, given which labels stay."""
    return sum(_left(*part, keep) for part in _parts(net, "params"))


def _parts(net: Net, kind: str) -> Iterator[tuple[Layer, int, bool]]:
    """Yield each layer, its multiply-accumulates or weights, and whether its bias counts too."""
    seen = set[str]()
    for layer in net.layers.values():
        if kind == "macs":
            yield layer, layer.macs, False
            continue
        yield layer, 0 if layer.weight in seen else int(net.array(layer.weight).size), bool(layer.bias)
        seen.add(layer.weight)


def pretend(net: Net, channels: Mapping[int, int]) -> np.ndarray:
    """Return which labels stay if each group kept its first so many: enough to tell what that would cost."""
    keep = np.ones(net.labels, bool)
    for at, count in channels.items():
        keep[net.groups[at].ids[count:]] = False
    return keep


def _left(layer: Layer, amount: int, bias: bool, keep: np.ndarray) -> int:
    """Return what is left of an amount that shrinks with a layer's outputs and columns, and of its bias."""
    outputs = int(keep[layer.out_ids].sum())
    own = layer.columns >= 0
    columns = len(layer.columns) - int((~keep[layer.columns[own]]).sum())
    return amount * outputs * columns // (len(layer.out_ids) * len(layer.columns)) + bias * outputs


def _channel_plan(net: Net, budget: Budget, named: set[str], goal: Goal | None) -> Plan:
    groups = candidates(net, budget, named)
    if not groups:
        named_makers = [group for group in net.groups if named.issuperset(group.producers)]
        if any(group.stream for group in named_makers):
            hint = "--residual would free channels that several layers add into."
        elif budget.include or budget.exclude:
            hint = "Widen --include or --exclude: channels go only where every layer that makes them is named."
        else:
            hint = _why_not(net)
        raise NothingToDo(f"no channel may go.\n  {hint}")

    def counts(fraction: float) -> dict[int, int]:
        found = {at: _rounded(net.groups[at], fraction, multiple(net.groups[at], budget)) for at in groups}
        if goal is not None:
            found |= {at: _nearest(goal.counts[at], fraction) for at in groups if at in goal.counts}
        return found

    if budget.kind == "keep":
        chosen = counts(budget.amount)
    else:
        goal = goal or target(net, budget)
        cost, limit = goal.cost, goal.limit
        fractions = sorted(
            {k / len(net.groups[at].ids) for at in groups for k in range(1, len(net.groups[at].ids) + 1)}
        )
        low, high = 0, len(fractions) - 1
        least = cost(counts(fractions[0]))
        if least > limit:
            raise out_of_reach(budget, least, cost({}))
        while low < high:
            middle = (low + high + 1) // 2
            if cost(counts(fractions[middle])) <= limit:
                low = middle
            else:
                high = middle - 1
        chosen = counts(fractions[low])
    losing = {at: count for at, count in chosen.items() if count < len(net.groups[at].ids)}
    if not losing:
        raise NothingToDo("every layer would keep all its channels.\n  Ask for a smaller target or a finer --round-to.")
    return Plan("channel", channels=losing)


def target(net: Net, budget: Budget) -> Goal:
    """Return a target of MACs or weights over the whole network as a goal.

    Raises
    ------
    JobError
        The target is of another kind: see `sizing` and `pacing`.
    """
    if budget.kind in MEASURED:
        raise JobError(f"a target of {budget.kind} needs a goal.\n  Jobs make one; make_plan and allocate take it.")
    fixed = _other_macs(net) if budget.kind == "macs" else 0
    parts = list(_parts(net, budget.kind))
    owners = np.full(net.labels + 1, -1)  # the last place is that of columns of no label
    for at, group in enumerate(net.groups):
        owners[group.ids] = at
    touching = [np.unique(owners[np.concatenate([layer.out_ids, layer.columns])]).tolist() for layer, _, _ in parts]
    # A split is found by thousands of questions that differ in one group, which few layers make or read.
    known: dict[tuple[int | None, ...], int] = {}

    def of(channels: Mapping[int, int]) -> int:
        total, keep = fixed, None
        for place, (part, groups) in enumerate(zip(parts, touching, strict=True)):
            key = (place, *(channels.get(at) for at in groups))
            if key not in known:
                keep = pretend(net, channels) if keep is None else keep
                known[key] = _left(*part, keep)
            total += known[key]
        return total

    return Goal(of, budget.amount * of({}))


def floor(net: Net, budget: Budget) -> float:
    """Return the share of MACs, or of weights, that is left where as little stays as may."""
    if budget.structure == "channel":
        cost = target(net, budget).cost
        return cost(fewest(net, budget)) / max(cost({}), 1)
    named = _named(net, budget)
    free = sum(int(net.array(layer.weight).size) for layer in weight_layers(net) if layer.name in named)
    return 1 - free / max(params(net, np.ones(net.labels, bool)), 1)


def fewest(net: Net, budget: Budget) -> dict[int, int]:
    """Return {group: the fewest channels that rounding leaves it} of the groups that may lose some."""
    groups = {at: net.groups[at] for at in candidates(net, budget)}
    return {at: min(multiple(group, budget), len(group.ids)) for at, group in groups.items()}


def out_of_reach(budget: Budget, least: float, whole: float) -> NothingToDo:
    """Return the error that says how far one can get."""
    unit = {"size": "B"}.get(budget.kind)
    best = f"{least / whole:.1%} remain" if unit is None else f"{amount(least, unit)} ({least / whole:.1%}) remain"
    return NothingToDo(
        f"--{budget.kind} {budget.told} is out of reach: with as few channels left as --round-to allows, {best}.\n"
        "  Ask for more than that, pass --round-to 1, or pass --residual."
    )


def multiple(group: Group, budget: Budget) -> int:
    """Return the number of channels of which the group keeps a multiple, or keeps all."""
    if budget.round_to is not None:
        return budget.round_to
    if budget.kind == "keep":
        return 1
    return 8 if len(group.ids) >= 32 else 4 if len(group.ids) >= 8 else 1


def _other_macs(net: Net) -> int:
    """Return what nodes cost that are no layers, such as products of two activations: removal does not touch it."""
    shapes = {port.name: net.shapes[port.name] for port in net.interface.inputs if port.name in net.shapes}
    whole = measure_cost(net.source, shapes).macs // net.batch
    return max(0, whole - sum(layer.macs for layer in net.layers.values()))


def _rounded(group: Group, fraction: float, multiple: int) -> int:
    units = len(group.ids)
    count = max(1, math.floor(fraction * units + 0.5))
    if multiple > 1:
        count = max(multiple, multiple * math.floor(count / multiple + 0.5))
    return min(count, units)


def _nearest(counts: Sequence[int], fraction: float) -> int:
    return min(counts, key=lambda count: (abs(count - fraction * counts[-1]), -count))


def _named(net: Net, budget: Budget) -> set[str]:
    """Return the layers that the patterns leave in play."""
    allowed = set(net.layers)
    for option, patterns in (("include", budget.include), ("exclude", budget.exclude)):
        matched: set[str] = set()
        for pattern in patterns:
            hits = {n for n, layer in net.layers.items() if any(fnmatchcase(t, pattern) for t in (n, layer.node) if t)}
            if not hits:
                raise JobError(f"--{option} '{pattern}' matches no layer.\n  {_alike(net, pattern)}")
            matched |= hits
        if patterns:
            allowed = allowed & matched if option == "include" else allowed - matched
    return allowed


def _alike(net: Net, pattern: str) -> str:
    names: Sequence[str] = list(net.layers)
    near = get_close_matches(pattern.strip("*"), names, n=3, cutoff=0.3) or list(names)[:3]
    return f"Layers are named by the value they make, such as {', '.join(repr(n) for n in near)}."


def _why_not(net: Net) -> str:
    reasons = list(dict.fromkeys(net.pinned.values()))[:3]
    return "Reasons: " + "; ".join(reasons) + "." if reasons else "Widen --include or --exclude."
