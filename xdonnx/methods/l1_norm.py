"""Magnitude pruning (Li et al., ICLR 2017, "Pruning Filters for Efficient ConvNets"): the baseline that needs no data.

A filter's score is the sum of its absolute weights; the lowest go, with the matching input channels of the next layer.
For single weights the smallest of each layer go. Nothing is refitted: what this loses, others have to win back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from xdonnx.budget import Plan, pattern_of
from xdonnx.columns import from_matrix, to_matrix
from xdonnx.convert import geometry, stored
from xdonnx.events import Event
from xdonnx.graph import Net
from xdonnx.methods.bench import Bench, Outcome
from xdonnx.methods.joint import producer_norms, remaining
from xdonnx.methods.layerwise import weight_structure
from xdonnx.patch import Patch
from xdonnx.shots import Shots


@dataclass(frozen=True)
class L1Norm:
    """Magnitude pruning, no data, no refit.

    References
    ----------
    .. [1] Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets", ICLR 2017. arXiv:1608.08710
    """

    def __call__(self, net: Net, patch: Patch, shots: Shots, plan: Plan, bench: Bench) -> Outcome:
        """Drop the filters, or zero the weights, of smallest magnitude."""
        del shots  # magnitude needs none
        drop: list[int] = []
        for done, (at, keep) in enumerate(plan.channels.items()):
            group = net.groups[at]
            bench.log(Event("fit", group.name, done=done, total=len(plan.channels)))
            ids = remaining(group.ids, patch.drop)
            order = np.argsort(-producer_norms(net, group)[np.isin(group.ids, ids)], kind="stable")
            drop += [int(ids[unit]) for unit in order[keep:]]
        tensors = {}
        for name in (*plan.weights, *plan.layers):
            layer = net.layers[name]
            weight = stored(layer, torch.tensor(patch.tensors.get(layer.weight, net.array(layer.weight))))
            matrix = to_matrix(weight, None, geometry(layer))
            columns = torch.tensor(layer.columns)
            structure = weight_structure(layer, plan, torch.ones_like(columns, dtype=torch.bool), columns, matrix)
            assert structure is not None
            mask = structure.project(matrix, plan.weights.get(name, structure.least))
            made, _ = from_matrix(matrix * mask, geometry(layer), False, tuple(weight.shape))
            tensors[layer.weight] = stored(layer, made).numpy()
        return Outcome(patch.plus(tensors, drop))

    def check(self, structure: str) -> None:
        """Any structure will do."""
        pattern_of(structure)
