"""What can be said of a model before it is compressed: operators, layers, and which channels may go or why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx

from xdonnx.budget import Budget, candidates, macs, params, pretend
from xdonnx.coverage import IN_TORCH
from xdonnx.graph import Net
from xdonnx.labels import Ids
from xdonnx.layers import Layer


@dataclass(frozen=True)
class OperatorUse:
    """How often an operator stands in the file, and where a job runs it.

    Parameters
    ----------
    op : str
        With its domain where that is not ONNX's own.
    count : int
    runs : {'torch', 'onnxruntime', 'folded'}
        'folded': it is computed once, or merged into the layer before it, when the file is read.
    """

    op: str
    count: int
    runs: str


@dataclass(frozen=True)
class LayerSurvey:
    """One layer.

    Parameters
    ----------
    layer, node, op : str
        The value it makes, its node's name, its operator.
    kernel : tuple of int
        Empty for products with a matrix.
    groups, inputs, outputs : int
        Channels it reads and makes.
    size : tuple of int
        Height and width, or whatever its positions are, of what it makes.
    macs : int
        Of one sample; `share` is the fraction of the network's.
    params : int
    free : int
        Output channels of which a job may remove some.
    added : int
        Those that `residual` would free besides.
    whole : str
        Why the other channels stay, where there are any.
    """

    layer: str
    node: str
    op: str
    kernel: tuple[int, ...]
    groups: int
    inputs: int
    outputs: int
    size: tuple[int, ...]
    macs: int
    share: float
    params: int
    free: int
    added: int
    whole: str


@dataclass(frozen=True)
class GroupSurvey:
    """Channels about which one decision is made; `stream` says where several layers add into them."""

    group: str
    units: int
    producers: tuple[str, ...]
    readers: tuple[str, ...]
    stream: str | None


@dataclass(frozen=True)
class Reach:
    """What a job can get at.

    Parameters
    ----------
    share : float
        Fraction of the MACs that stands in layers which make or read channels that may go.
    floor : float
        Fraction of the MACs that would be left with one channel wherever one may go.
    """

    share: float
    floor: float


@dataclass(frozen=True)
class Survey:
    """Everything that `inspect` shows.

    Parameters
    ----------
    producer, ir_version, opset, inputs, outputs
        As the file has them.
    assumed : tuple of str
        Free input sizes that nobody gave, and what MACs take them to be.
    macs, params : int
        Of all layers: MACs for one sample, weights and biases.
    operators, layers, groups
        In descending number, and in graph order.
    pins : dict
        {reason: channels that stay for it}, the most frequent first.
    plain, residual : Reach
        Without and with the removal of channels that several layers add into.
    """

    producer: str
    ir_version: int
    opset: Mapping[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    assumed: tuple[str, ...]
    macs: int
    params: int
    operators: tuple[OperatorUse, ...]
    layers: tuple[LayerSurvey, ...]
    groups: tuple[GroupSurvey, ...]
    pins: Mapping[str, int]
    plain: Reach
    residual: Reach

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, texts, lists and dicts."""
        return asdict(self)


def survey(net: Net) -> Survey:
    """Say of a net what there is to compress and what stands in the way.

    Parameters
    ----------
    net : Net

    Returns
    -------
    Survey
    """
    total = sum(layer.macs for layer in net.layers.values())
    plain, residual = (_labels(net, candidates(net, Budget(residual=both))) for both in (False, True))
    source = net.source
    return Survey(
        producer=" ".join(part for part in (source.producer_name, source.producer_version) if part),
        ir_version=source.ir_version,
        opset=dict(net.interface.opset),
        inputs=tuple(str(port) for port in net.interface.inputs),
        outputs=tuple(str(port) for port in net.interface.outputs),
        assumed=net.assumed,
        macs=total,
        params=params(net, np.ones(net.labels, bool)),
        operators=tuple(_operators(net)),
        layers=tuple(_layer(net, layer, plain, residual, total) for layer in net.layers.values()),
        groups=tuple(GroupSurvey(g.name, len(g.ids), g.producers, g.readers, g.stream) for g in net.groups),
        pins=_pins(net),
        plain=_reach(net, residual=False),
        residual=_reach(net, residual=True),
    )


def _operators(net: Net) -> Iterator[OperatorUse]:
    """Count the file's operators; those of which none is left in the net that jobs work on were folded."""
    left = {_name(node.domain, node.op_type) for node in net.model.graph}
    counts = Counter(_name(node.domain, node.op_type) for node in _nodes(net.source))
    for op, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        runs = "folded" if op not in left else "torch" if op in IN_TORCH else "onnxruntime"
        yield OperatorUse(op, count, runs)


def _nodes(source: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of the graph; a function of the file's own counts as what it consists of."""
    own = {(function.domain, function.name): function for function in source.functions}
    queue = list(source.graph.node)
    while queue:
        node = queue.pop()
        function = own.get((node.domain, node.op_type))
        if function is None:
            yield node
        else:
            queue += function.node


def _name(domain: str, op: str) -> str:
    return op if domain in ("", "ai.onnx") else f"{domain}.{op}"


def _labels(net: Net, groups: list[int]) -> Ids:
    return np.concatenate([np.zeros(0, np.int64), *(net.groups[at].ids for at in groups)])


def _layer(net: Net, layer: Layer, plain: Ids, residual: Ids, total: int) -> LayerSurvey:
    free = int(np.isin(layer.out_ids, plain).sum())
    added = int(np.isin(layer.out_ids, residual).sum()) - free
    reasons = net.reasons(layer)
    if added:
        streams = {g.stream for g in net.groups if g.stream and np.isin(g.ids, layer.out_ids).any()}
        reasons += [f"{stream}: --residual frees them" for stream in sorted(streams)]
    taps = int(np.prod(layer.kernel))
    return LayerSurvey(
        layer=layer.name,
        node=layer.node,
        op=layer.op,
        kernel=layer.kernel,
        groups=layer.groups,
        inputs=len(layer.columns) // taps * layer.groups,
        outputs=len(layer.out_ids),
        size=tuple(net.shapes.get(layer.name, ())[2:] if layer.kernel else net.shapes.get(layer.name, ())[1:-1]),
        macs=layer.macs,
        share=layer.macs / total if total else 0.0,
        params=layer.params,
        free=free,
        added=added,
        whole="; ".join(reasons) if free < len(layer.out_ids) else "",
    )


def _pins(net: Net) -> dict[str, int]:
    """Count the channels of each reason, among those that layers make."""
    made = {int(label) for layer in net.layers.values() for label in layer.out_ids}
    counts = Counter(reason for label, reason in net.pinned.items() if label in made)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _reach(net: Net, *, residual: bool) -> Reach:
    groups = candidates(net, Budget(residual=residual))
    labels = _labels(net, groups)
    total = sum(layer.macs for layer in net.layers.values())
    touched = sum(
        layer.macs
        for layer in net.layers.values()
        if np.isin(layer.out_ids, labels).any() or np.isin(layer.columns, labels).any()
    )
    least = macs(net, pretend(net, dict.fromkeys(groups, 1)))
    return Reach(share=touched / total if total else 0.0, floor=least / total if total else 1.0)
