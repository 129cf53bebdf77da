"""How far each layer is taken apart: what its ranks cost and keep, and which ranks a target comes to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from xdonnx.budget import layers_named
from xdonnx.cost import measure_cost
from xdonnx.errors import JobError, NothingToDo, did_you_mean
from xdonnx.events import Event, Log, ignore
from xdonnx.graph import Net
from xdonnx.layers import Layer
from xdonnx.lowrank import channel_kept, pair_kept

SCHEMES = ("auto", "spatial", "channel")
KINDS = ("macs", "params", "energy", "rank")
DEFAULT_TARGET = ("macs", 0.5)
# Into so many parts is what may be spent divided; the last one for each layer may stay unspent.
_STEPS = 10_000


@dataclass(frozen=True)
class LowRank:
    """What is wanted.

    Parameters
    ----------
    kind : {'macs', 'params', 'energy', 'rank'}
        Of the whole network, at most; of each layer's energy, at least; of each layer.
    amount : float
        A fraction above 0 and below 1; for 'rank' a whole number.
    scheme : {'auto', 'spatial', 'channel'}
        'spatial': a column of the kernel, then a row. 'channel': 1x1, the kernel between fewer channels, 1x1. 'auto':
        in each layer what keeps more at the same cost.
    include, exclude : tuple of str
        Patterns over layer and node names. The first convolution takes part only where `include` matches it.
    round_to : int or None
        Ranks are multiples of this where a layer has as many. None: of 8 or 4, which onnxruntime's convolutions are
        made for; any for the kind 'rank'.
    """

    kind: str = "macs"
    amount: float = 0.5
    scheme: str = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    round_to: int | None = None

    def __str__(self) -> str:
        """Say it in a few words."""
        return f"{self.scheme} {self.kind} {self.amount:g}"


@dataclass(frozen=True)
class Split:
    """One way to take a layer apart.

    Parameters
    ----------
    scheme : {'spatial', 'channel', 'svd'}
        'svd' is the pair of 'spatial' where there is no kernel to share: of 1x1 convolutions and products.
    ranks : tuple of int
        Of each group of channels: one of a pair; those in and out of the core for 'channel'.
    macs, params : int
        Of all its pieces, for one sample; biases, which stay, are not counted.
    kept : float
        Share of the weight's energy, before any sweep of Tucker's.
    """

    scheme: str
    ranks: tuple[int, ...]
    macs: int
    params: int
    kept: float

    @property
    def loss(self) -> float:
        """What the choice makes small: minus the logarithm of the energy kept.

        Its sum over layers is small where the product of what layers keep is large, which goes with the accuracy of the
        whole (Zhang, Zou, He, Sun, "Accelerating Very Deep Convolutional Networks for Classification and Detection",
        TPAMI 2016, arXiv:1505.06798).
        """
        return -math.log(max(self.kept, 1e-12))


@dataclass(frozen=True)
class Menu:
    """The ways to take one layer apart that save something, dearest first; each cheaper one keeps less."""

    layer: Layer
    whole: int
    splits: tuple[Split, ...]


@dataclass(frozen=True)
class Choice:
    """What becomes of each layer.

    Parameters
    ----------
    splits : dict of str to Split
    whole : dict of str to str
        {layer that stays whole: why}.
    """

    splits: Mapping[str, Split] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)


def check_wanted(wanted: LowRank) -> None:
    """Raise JobError for what makes no sense for any model."""
    if wanted.scheme not in SCHEMES:
        near = did_you_mean(wanted.scheme, SCHEMES)
        raise JobError(f"unknown --scheme '{wanted.scheme}'.{near}\n  Schemes: {', '.join(SCHEMES)}.")
    if wanted.kind == "rank":
        if wanted.amount < 1:
            raise JobError(f"--rank is {wanted.amount:g}.\n  It is a number of channels: 1 or more.")
        if wanted.round_to is not None:
            raise JobError("--round-to has no say where --rank is given.\n  Leave it out.")
    elif not 0 < wanted.amount < 1:
        raise JobError(
            f"--{wanted.kind} is {wanted.amount:g}.\n  It is a fraction above 0 and below 1: "
            "0.5 or 50%. One per cent is 1%."
        )
    if wanted.round_to is not None and wanted.round_to < 1:
        raise JobError(f"--round-to is {wanted.round_to}.\n  It is a multiple of channels: 1 or more.")


def choose(net: Net, wanted: LowRank, log: Log = ignore) -> Choice:
    """Return how far each layer is taken apart.

    Parameters
    ----------
    net : Net
    wanted : LowRank
    log : Log
        Told of every layer looked at, in the stage 'ranks'.

    Raises
    ------
    JobError
        The wish makes no sense, or a pattern matches nothing.
    NothingToDo
        No layer may be taken apart with a gain, or the target is out of reach; the message says what is in reach.
    """
    check_wanted(wanted)
    whole = _whole(net, wanted)
    free = [layer for name, layer in net.layers.items() if name not in whole]
    menus: dict[str, Menu] = {}
    for at, layer in enumerate(free):
        log(Event("ranks", layer.name, done=at, total=len(free)))
        menus[layer.name] = menu = _menu(net, layer, wanted)
        if not menu.splits:
            whole[layer.name] = _TOO_DEAR.get(wanted.kind, "no rank saves anything").format(
                wanted.amount if wanted.kind == "rank" else 100 * wanted.amount
            )
    pickable = {name: menu for name, menu in menus.items() if menu.splits}
    if not pickable:
        reasons = "; ".join(list(dict.fromkeys(whole.values()))[:3])
        raise NothingToDo(f"no layer can be taken apart with a gain.\n  Reasons: {reasons}.")
    if wanted.kind in ("energy", "rank"):
        chosen = {name: menu.splits[-1] for name, menu in pickable.items()}
    else:
        total, limit = _limit(net, wanted)
        chosen = _within(pickable, wanted, total, limit)
    whole |= {name: "the target is met without it" for name in pickable if name not in chosen}
    return Choice(chosen, {name: whole[name] for name in _in_order(net, whole)})


def weight_of(net: Net, layer: Layer) -> np.ndarray:
    """Return a layer's weight as (groups, outputs, inputs, kernel...)."""
    array = net.array(layer.weight)
    if not layer.kernel:
        return (array.T if layer.transposed else array)[None]
    return array.reshape(layer.groups, -1, *array.shape[1:])


def first_spans(kernel: Sequence[int]) -> tuple[bool, ...]:
    """Return which axes of a kernel the first piece of a pair spans: axis 0, and for its stride any that is 1."""
    return tuple(at == 0 or size == 1 for at, size in enumerate(kernel))


_TOO_DEAR = {
    "energy": "no rank that saves keeps {0:g} % of its energy",
    "rank": "rank {0:g} saves nothing",
}


def _whole(net: Net, wanted: LowRank) -> dict[str, str]:
    """Return {layer that may not be taken apart: why}, also of convolutions that are no layers."""
    named = layers_named(net, wanted.include, wanted.exclude)
    shared = net.shared
    first = next(layer.name for layer in net.layers.values() if layer.kernel)
    found = {}
    for name, layer in net.layers.items():
        if layer.op == "ConvTranspose":
            found[name] = "a transposed convolution"
        elif layer.depthwise:
            found[name] = "a depthwise convolution, whose filters read one channel each"
        elif layer.weight in shared:
            found[name] = f"another layer reads its weight '{layer.weight}' too"
        elif not np.isfinite(net.array(layer.weight)).all():
            found[name] = "its weight holds what is no number"
        elif name not in named:
            found[name] = "left out by --include or --exclude"
        elif name == first and not wanted.include:
            found[name] = "the first convolution, which --include would free"
    for node in net.model.graph:
        name = str(node.outputs[0].name)
        ours = node.op_type in ("Conv", "ConvTranspose", "Gemm") and node.domain in ("", "ai.onnx")
        if ours and name not in net.layers:
            found[name] = "its weight is computed by the graph, or its shape is not known"
    return found


def _in_order(net: Net, names: Mapping[str, str]) -> Iterator[str]:
    made = (str(node.outputs[0].name) for node in net.model.graph)
    return (name for name in made if name in names)


def _menu(net: Net, layer: Layer, wanted: LowRank) -> Menu:
    """Return the ways to take a layer apart that cost less and of which none keeps more at the same cost."""
    weight = weight_of(net, layer)
    by_params = wanted.kind == "params"
    whole = weight.size if by_params else layer.macs
    pointwise = all(size == 1 for size in layer.kernel)
    rows: list[tuple[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    if wanted.scheme != "channel" or pointwise:
        rows.append(("svd" if pointwise else "spatial", *_pairs(net, layer, weight, wanted)))
    if wanted.scheme != "spatial" and not pointwise:
        rows.append(("channel", *_cores(net, layer, weight, wanted)))
    splits = []
    for scheme, ranks, macs, params, kept in rows:
        # What saves MACs and adds weights, or the other way round, is no gain.
        gain = (macs <= layer.macs) & (params <= weight.size) & ((params if by_params else macs) < whole)
        if wanted.kind == "energy":
            gain &= kept >= wanted.amount
        # By cost, then by what is kept: a running maximum leaves out whatever a cheaper one betters.
        where = np.flatnonzero(gain)
        cost = (params if by_params else macs)[where]
        where = where[np.lexsort((-kept[where], cost))]
        best = -1.0
        for at in where:
            if kept[at] > best:
                best = float(kept[at])
                splits.append(Split(scheme, tuple(map(int, ranks[at])), int(macs[at]), int(params[at]), best))
    of = _cost_of(wanted)
    return Menu(layer, whole, _undominated(splits, of, wanted, whole))


def _undominated(splits: list[Split], cost: Callable[[Split], int], wanted: LowRank, whole: int) -> tuple[Split, ...]:
    if wanted.kind == "rank":
        # One of each scheme, of other costs: the one that loses less for what it saves.
        return tuple(sorted(splits, key=lambda split: -split.loss / (whole - cost(split)))[-1:])
    best, found = -1.0, []
    for split in sorted(splits, key=lambda split: (cost(split), -split.kept)):
        if split.kept > best:
            best = split.kept
            found.append(split)
    # The cheapest is the last; for a share of energy it is the one that is wanted.
    return tuple(reversed(found))


def _cost_of(wanted: LowRank) -> Callable[[Split], int]:
    return (lambda split: split.params) if wanted.kind == "params" else (lambda split: split.macs)


Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _pairs(net: Net, layer: Layer, weight: np.ndarray, wanted: LowRank) -> Columns:
    """Return ranks (n, 1), MACs, weights and energy kept of a pair of factors."""
    groups, outputs, inputs, *kernel = weight.shape
    kept = pair_kept(weight)
    ranks = _ranks(len(kept), wanted)
    before, after = _sizes(net, layer)
    middle = [a if first else b for a, b, first in zip(after, before, first_spans(kernel), strict=True)]
    first = ranks * groups * inputs * math.prod(kernel[:1])
    last = ranks * groups * outputs * math.prod(kernel[1:])
    at_first, at_last = (math.prod(middle), math.prod(after)) if kernel else (layer.positions, layer.positions)
    return ranks[:, None], first * at_first + last * at_last, first + last, kept[ranks - 1]


def _cores(net: Net, layer: Layer, weight: np.ndarray, wanted: LowRank) -> Columns:
    """Return ranks (n, 2) in and out, MACs, weights and energy kept of Tucker's pieces."""
    groups, outputs, inputs, *kernel = weight.shape
    kept = channel_kept(weight)
    sides = [np.union1d(_ranks(size, wanted), [size]) for size in (inputs, outputs)]
    if wanted.kind == "rank":
        sides = [np.array([min(size, int(wanted.amount))]) for size in (inputs, outputs)]
    into, out = (grid.reshape(-1) for grid in np.meshgrid(*sides, indexing="ij"))
    before, after = (math.prod(sizes) for sizes in _sizes(net, layer))
    # A side of full rank has no piece of its own.
    narrow = groups * inputs * np.where(into < inputs, into, 0)
    core = groups * into * out * math.prod(kernel)
    widen = groups * outputs * np.where(out < outputs, out, 0)
    macs = narrow * before + (core + widen) * after
    return np.stack([into, out], 1), macs, narrow + core + widen, kept[out - 1, into - 1]


def _sizes(net: Net, layer: Layer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return height and width, or as many axes as there are, of what a convolution reads and makes."""
    axes = slice(2, 2 + len(layer.kernel))
    return net.shapes[layer.input][axes], net.shapes[layer.name][axes]


def _ranks(most: int, wanted: LowRank) -> np.ndarray:
    """Return the ranks to look at."""
    if wanted.kind == "rank":
        return np.array([min(most, int(wanted.amount))])
    step = wanted.round_to or (8 if most >= 32 else 4 if most >= 8 else 1)
    return np.arange(step, most + 1, step)


def _limit(net: Net, wanted: LowRank) -> tuple[int, float]:
    """Return what the net costs, and what it may cost."""
    shapes = {port.name: net.shapes[port.name] for port in net.interface.inputs if port.name in net.shapes}
    source = measure_cost(net.source, shapes)
    if wanted.kind == "macs":
        total = source.macs // net.batch
        return total, wanted.amount * total
    # The student has no BatchNormalization; neither may it hide behind the weights of those.
    total = measure_cost(ir.to_proto(net.model), shapes).params
    return total, wanted.amount * min(total, source.params)


def _within(menus: Mapping[str, Menu], wanted: LowRank, total: int, limit: float) -> dict[str, Split]:
    """Return the splits of the least loss that bring the total below the limit.

    One way for each layer, and one sum to keep: the multiple-choice knapsack, by dynamic programming over steps of what
    may be spent beyond the cheapest choice. Costs are rounded up to whole steps, so that the limit holds.
    """
    cost = _cost_of(wanted)
    least = total - sum(menu.whole - cost(menu.splits[-1]) for menu in menus.values())
    if least > limit:
        ways = ["widen --include or --exclude"] if wanted.include or wanted.exclude else []
        ways += ["pass --round-to 1"] if wanted.round_to != 1 else []
        ways = ["ask for more than that", *ways]
        raise NothingToDo(
            f"--{wanted.kind} {100 * wanted.amount:g}% is out of reach: with every layer at the lowest rank that "
            f"--round-to allows, {least / total:.1%} remain.\n  {' or '.join(ways).capitalize()}."
        )
    step = max((limit - least) / _STEPS, 1e-9)
    best, picks = np.zeros(_STEPS + 1), []
    for menu in menus.values():
        cheapest = cost(menu.splits[-1])
        spent = [math.ceil((price - cheapest) / step) for price in (menu.whole, *map(cost, menu.splits))]
        losses = [0.0, *(split.loss for split in menu.splits)]
        found, pick = np.full(_STEPS + 1, np.inf), np.zeros(_STEPS + 1, np.int64)
        for at, (steps, loss) in enumerate(zip(spent, losses, strict=True)):
            if steps <= _STEPS:
                better = best[: _STEPS + 1 - steps] + loss < found[steps:]
                found[steps:][better] = best[: _STEPS + 1 - steps][better] + loss
                pick[steps:][better] = at
        best = found
        picks.append((pick, spent))
    left, chosen = _STEPS, {}
    for (name, menu), (pick, spent) in reversed(list(zip(menus.items(), picks, strict=True))):
        at = int(pick[left])
        left -= spent[at]
        if at:
            chosen[name] = menu.splits[at - 1]
    return {name: chosen[name] for name in menus if name in chosen}
