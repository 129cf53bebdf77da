"""FSKD (Li, Li, Liu, Zhang, CVPR 2020): mend a pruned network with 1x1 layers that vanish into its own.

  1. Prune without data: the filters of smallest L1 norm go.
  2. For every layer from front to back, earlier layers already mended: put a 1x1 layer Q behind it, before anything
     that is not linear, and fit min |Q x_S + q - x_T|^2, where x_S and x_T are the layer's outputs in the student and,
     restricted to the filters that stay, in the teacher;
  3. merge it: the layer's weights W become Q W, its bias b becomes Q b + q. Nothing grows.
Q has far fewer unknowns than W, so a few samples do. The paper fits by plain least squares, without q; here q takes
part where the layer has a bias to merge it into, and a tiny pull of Q toward the identity decides where the samples
leave Q open (outputs that always go together, or fewer positions than filters). In grouped layers a Q may mix only
the outputs of one group, or the merge would not be exact. All products are taken in the moments of the layer's input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from xdonnx.budget import Plan
from xdonnx.connection import Quadratic, regression
from xdonnx.errors import JobError
from xdonnx.graph import Net
from xdonnx.methods.bench import Bench, Outcome
from xdonnx.methods.joint import producer_norms
from xdonnx.methods.layerwise import Rule, layerwise
from xdonnx.methods.mixing import LEAST
from xdonnx.patch import Patch
from xdonnx.shots import Shots
from xdonnx.solve import Greedy

PULL = 1e-6
"""Of Q toward the identity, relative to the mean energy of the outputs."""


@dataclass(frozen=True)
class FSKD:
    """Channels by L1 norm, then a 1x1 layer behind every layer, merged into it.

    Parameters
    ----------
    ridge : float, optional
        Pull of the 1x1 layers toward the identity, relative to the mean energy of the outputs. Default: 1e-6.

    References
    ----------
    .. [1] Li, Li, Liu, Zhang, "Few Sample Knowledge Distillation for Efficient Network Compression", CVPR 2020.
       arXiv:1812.01839
    """

    ridge: float | None = None

    def __call__(self, net: Net, patch: Patch, shots: Shots, plan: Plan, bench: Bench) -> Outcome:
        """Compress the net from these shots; see `xdonnx.methods.layerwise`."""
        drop = set(patch.drop)
        for at, keep in plan.channels.items():
            group = net.groups[at]
            # What an earlier method took is gone already and comes last, whatever its norm.
            score = np.where(np.isin(group.ids, sorted(drop)), -1.0, producer_norms(net, group))
            order = np.argsort(-score, kind="stable")
            drop.update(int(group.ids[unit]) for unit in order[keep:])
        mended = partial(mixed, ridge=PULL if self.ridge is None else self.ridge)
        # The solver has nothing left to choose.
        rule = Rule(regression(), 0.0, Greedy(), refitter=mended, compensate=False)
        pruned = replace(patch, drop=frozenset(drop))
        return layerwise(net, pruned, shots.inputs, replace(plan, channels={}), rule, bench)

    def check(self, structure: str) -> None:
        """Raise JobError for single weights, which Q W would fill again, or a ridge that makes no sense."""
        if structure != "channel":
            raise JobError(
                f"--method fskd mixes filters, which fills zeros, and does not go with --structure {structure}.\n"
                "  Legal: --structure channel. For single weights: --method cross."
            )
        if self.ridge is not None and not 0 <= self.ridge < float("inf"):
            raise JobError(f"ridge is {self.ridge}.\n  It is a fraction of the mean energy: 0 or more, such as 1e-6.")


def mixed(q: Quadratic, start: Tensor, columns: Tensor, rows: Tensor, *, bias: bool, ridge: float) -> Tensor:
    """Replace a layer's weights by `Q W`, the best mixture of its own outputs: a `Refitter`.

    Parameters
    ----------
    q : Quadratic
        `<W H, W> - 2 <C, W> + c`.
    start : (g, o, d)
        W, the teacher's weights on the columns that stay.
    columns : (d,)
        Not used.
    rows : BoolTensor (g, o)
        Outputs that stay. The others are neither mixed in nor fitted; they keep their weights.
    bias : bool
        Whether the last column is the bias; then a constant is fitted too.
    ridge : float
        Pull toward the identity, relative to the mean energy of the outputs that stay, group by group.

    Returns
    -------
    Tensor (g, o, d), float64

    Notes
    -----
    With the row of the constant added to W, the least squares of Q on outputs `W x` have the moments `W H W'` and
    `C W'`, so `Q = I + (C W' - W H W') inv(W H W' + lambda I)`: what the identity leaves undone, fitted.
    """
    del columns
    start = start.to(q.hess)
    outputs = start.shape[1]
    source, live = start * rows[..., None], rows
    if bias:
        constant = functional.one_hot(torch.tensor([start.shape[2] - 1]), start.shape[2]).to(source)
        source = torch.cat([source, constant.expand(len(source), 1, -1)], 1)
        live = functional.pad(rows, (0, 1), value=True)
    gram = source @ q.hess @ source.mT
    undone = (q.lin - start @ q.hess) @ source.mT * rows[..., None]
    energy = gram.diagonal(dim1=1, dim2=2)[:, :outputs]
    mean = energy.sum(1, keepdim=True) / rows.sum(1, keepdim=True).clamp(min=1)
    pull = max(ridge, LEAST) * mean.where(mean > 0, 1.0).expand_as(energy)
    # The constant is well determined and not pulled. Outputs that go are rows of zeros: any diagonal will do there.
    pull = functional.pad(pull, (0, source.shape[1] - outputs)).where(live, 1.0)
    factor = torch.linalg.cholesky(gram + torch.diag_embed(pull))
    move = torch.cholesky_solve(undone.mT, factor).mT
    return start + move @ source
