"""What became of each layer: what it kept, what it costs now and how far off it is, as the report lists it."""

from __future__ import annotations

import numpy as np

from xdonnx.graph import Net
from xdonnx.layers import Layer
from xdonnx.methods.bench import Outcome
from xdonnx.patch import kept
from xdonnx.report import LayerResult


def layer_results(net: Net, outcome: Outcome, structure: str, *, residual: bool = True) -> list[LayerResult]:
    """Return a row for each layer of the network, in graph order.

    Parameters
    ----------
    net : Net
    outcome : Outcome
    structure : str
        What was removed; only of channels there is a reason why some stay.
    residual : bool, default=True
        Whether channels that several layers add into were free to go. Where not, that is a reason too.
    """
    keep = kept(net, outcome.patch)
    traces = {trace.layer: trace for trace in outcome.traces}
    rows = []
    for layer in net.layers.values():
        trace = traces.get(layer.name)
        weight = outcome.patch.tensors.get(layer.weight, net.array(layer.weight))
        outputs, columns = _left(layer, keep)
        share = outputs * columns / (len(layer.out_ids) * len(layer.columns))
        biases = len(layer.out_ids) if layer.bias else 0
        single = structure != "channel"
        rows.append(
            LayerResult(
                layer=layer.name,
                op=layer.op,
                kept=int(np.count_nonzero(weight)) if single else outputs,
                units=int(weight.size) if single else len(layer.out_ids),
                params_before=layer.params,
                params_after=round((layer.params - biases) * share) + (outputs if layer.bias else 0),
                macs_before=layer.macs * net.batch,
                macs_after=round(layer.macs * share) * net.batch,
                objective_before=trace.objective_before if trace else None,
                objective_after=trace.objective_after if trace else None,
                seconds=round(trace.seconds, 4) if trace else None,
                pool_weight=trace.pool if trace else None,
                note=_spared(net, layer, weight)
                if single
                else "; ".join(_reasons(net, layer, residual=residual))[:200],
            )
        )
    return rows


def _reasons(net: Net, layer: Layer, *, residual: bool) -> list[str]:
    streams = {group.stream for group in net.groups if group.stream and np.isin(group.ids, layer.out_ids).any()}
    added = [] if residual else [f"{stream}: --residual frees them" for stream in sorted(streams)]
    return [*net.reasons(layer), *added]


def _spared(net: Net, layer: Layer, weight: np.ndarray) -> str:
    """Say why a layer keeps all its weights where single ones go; nothing of one that lost some."""
    if np.count_nonzero(weight) < np.count_nonzero(net.array(layer.weight)):
        return ""
    if not layer.kernel:
        return "single weights go from convolutions only"
    if layer is next(other for other in net.layers.values() if other.kernel):
        return "the first convolution keeps its weights"
    return "its weight is shared" if layer.weight in net.shared else ""


def _left(layer: Layer, keep: np.ndarray) -> tuple[int, int]:
    own = layer.columns >= 0
    return int(keep[layer.out_ids].sum()), len(layer.columns) - int((~keep[layer.columns[own]]).sum())
