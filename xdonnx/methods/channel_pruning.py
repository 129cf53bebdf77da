"""Channel Pruning (He, Zhang, Sun, ICCV 2017): the LASSO chooses a layer's input channels, least squares refit it.

For every layer from front to back, with y the teacher's output and x_j channel j of the pruned network's input:
  1. min over beta of |y - sum_j beta_j w_j x_j|^2 / 2 + lambda |beta|_1, the weights w fixed, lambda as large as the
     wanted number of non-zero betas allows; channels with beta = 0 go;
  2. min over W of |y - sum of W_j x_j over the channels that stay|^2, with an intercept.
y from the teacher's own input makes up for upstream error ("asymmetric"). The paper doubles, then halves its way to
lambda, with a margin of a tenth on the number of channels. The betas are piecewise linear in lambda, so here every
lambda at which a channel comes or goes is visited from above (the homotopy of Osborne et al.), which ends at the same
support with no margin. The intercept is free in both steps. Layers that lose nothing stay as they are. The last layer
of a residual branch also makes up for the shortcut's error, as in the paper (`Rule.compensate`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xdonnx.budget import Plan
from xdonnx.connection import Quadratic, regression
from xdonnx.contributions import contributions
from xdonnx.errors import JobError
from xdonnx.graph import Net
from xdonnx.methods.bench import Bench, Outcome
from xdonnx.methods.layerwise import Rule, layerwise
from xdonnx.patch import Patch
from xdonnx.shots import Shots
from xdonnx.solve import Solution, refit
from xdonnx.structure import Channel, Structure

TURNS = 20
"""Comings and goings of channels, per channel, after which the homotopy is cut off: 3.5 is the most that was seen."""

APART = 1e-10
"""Added to the diagonal, relative to its mean, so that channels which say the same are not a singular system."""


@dataclass(frozen=True)
class ChannelPruning:
    """Channels by LASSO, weights and bias by least squares.

    Parameters
    ----------
    ridge : float, optional
        Pull toward the teacher's weights, relative to the mean curvature. Default: none, as in the paper; where the
        shots leave weights open, those nearest to the teacher's are taken.

    References
    ----------
    .. [1] He, Zhang, Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017. arXiv:1707.06168
    .. [2] Osborne, Presnell, Turlach, "A new approach to variable selection in least squares problems", IMA Journal of
       Numerical Analysis 20, 2000
    """

    ridge: float | None = None

    def __call__(self, net: Net, patch: Patch, shots: Shots, plan: Plan, bench: Bench) -> Outcome:
        """Compress the net from these shots; see `xdonnx.methods.layerwise`."""
        rule = Rule(regression(), self.ridge or 0.0, by_lasso, refit=False)
        return layerwise(net, patch, shots.inputs, plan, rule, bench)

    def check(self, structure: str) -> None:
        """Raise JobError for single weights, as a beta belongs to a channel, or a ridge that makes no sense."""
        if structure != "channel":
            raise JobError(
                f"--method channel-pruning removes whole channels and does not go with --structure {structure}.\n"
                "  Legal: --structure channel. For single weights: --method cross."
            )
        if self.ridge is not None and not 0 <= self.ridge < float("inf"):
            raise JobError(
                f"ridge is {self.ridge}.\n  It is a fraction of the mean curvature: 0 or more, such as 0.01."
            )


def by_lasso(q: Quadratic, start: Tensor, structure: Structure, keep: int) -> Solution:
    """Keep the channels that the LASSO takes up first, refitted: a `Solver`.

    Parameters
    ----------
    q : Quadratic
    start : (g, o, d)
        The teacher's weights.
    structure : Channel
    keep : int

    Returns
    -------
    Solution
        `converged` says whether the LASSO has a solution with that many channels; where not, channels of which the
        shots say nothing fill up, those of largest energy first.
    """
    assert isinstance(structure, Channel), f"{type(structure).__name__} has no channels"
    structure.check(keep)
    start = start.to(q.hess)
    kept = torch.ones(structure.count, dtype=torch.bool)
    turns, found = 0, True
    if keep < structure.count:
        free = structure.columns.to(start.device) >= 0
        among, target = contributions(adapted(q, free), start[..., free], Channel(structure.columns[free.cpu()]))
        # Small and sequential: the CPU walks the path faster than any other device.
        gram, right = among[:, :-1, :-1].sum(0).cpu(), target[:, :-1].sum(0).cpu()
        beta, _, turns = lasso(gram, right, keep)
        present = (structure.table >= 0).any(1)
        energy = gram.diagonal().where(present, -torch.inf)
        order = sorted(range(structure.count), key=lambda at: (-abs(float(beta[at])), -float(energy[at])))
        kept[order[keep:]] = False
        found = int((beta != 0).sum()) == keep
    mask = structure.spread(kept, start)
    weight = refit(q, mask, start)
    return Solution(weight, mask, float(q(weight)), turns, found)


def adapted(q: Quadratic, free: Tensor) -> Quadratic:
    """Return the error as a function of the `free` columns (d,), the others at their best for each choice of those."""
    if bool(free.all()):
        return q
    within = torch.linalg.pinv(q.hess[:, ~free][:, :, ~free], hermitian=True, rtol=APART)
    across = q.hess[:, ~free][:, :, free]
    fixed = q.lin[..., ~free]
    hess = q.hess[:, free][:, :, free] - across.mT @ within @ across
    lin = q.lin[..., free] - fixed @ within @ across
    return Quadratic(hess, lin, q.const - ((fixed @ within) * fixed).sum((1, 2)))


def lasso(gram: Tensor, target: Tensor, keep: int) -> tuple[Tensor, float, int]:
    """Minimise `b' gram b / 2 - b' target + strength |b|_1` at the largest strength that leaves `keep` non-zeros.

    Parameters
    ----------
    gram : (u, u)
        Positive semi-definite.
    target : (u,)
    keep : int
        Below u.

    Returns
    -------
    beta : Tensor (u,)
        With fewer non-zeros if `keep` are never reached.
    strength : float
        In the middle of the stretch on which these betas are not zero.
    turns : int
        How often one joined or left.

    Notes
    -----
    On the active set A with signs s the minimum is `inv(gram_AA) (target_A - strength s)`, linear in the strength, and
    so is the slope of every other beta. As the strength falls the next event is the larger of two: a slope reaches it,
    and its beta joins, or an active beta reaches zero, and leaves.
    """
    mean = float(gram.diagonal().mean())
    gram = gram + APART * (mean if mean > 0 else 1.0) * torch.eye(len(gram), dtype=gram.dtype)
    beta, sign = torch.zeros_like(target), torch.zeros_like(target)
    strength, changed, turns = float(target.abs().max()), int(target.abs().argmax()), 0
    sign[changed] = target[changed].sign()
    barred = 0.0  # the sign with which the beta that left cannot come straight back
    while strength > 0 and turns < TURNS * len(target):
        turns += 1
        active = sign.nonzero()[:, 0]
        factor = torch.linalg.cholesky(gram[active][:, active])
        still, fall = torch.cholesky_solve(torch.stack([target[active], sign[active]], 1), factor).unbind(1)
        rest, push = target - gram[:, active] @ still, gram[:, active] @ fall
        joins = torch.stack([rest / (1 - push), -rest / (1 + push)])
        joins[:, active] = 0
        if barred:
            joins[0 if barred > 0 else 1, changed] = 0
        leaves = (still / fall).masked_fill(active == changed, 0)
        # Beyond the present strength lies what has been; of equals rounding puts one just beyond.
        joins, leaves = (
            torch.where((at > 0) & (at <= strength * (1 + 1e-9)), at, 0.0).clamp(max=strength) for at in (joins, leaves)
        )
        event = max(float(joins.max()), float(leaves.max()))
        if len(active) == keep or event == 0:
            strength = (strength + event) / 2
            beta[active] = still - strength * fall
            break
        strength = event
        if float(joins.max()) >= float(leaves.max()):
            side, changed = divmod(int(joins.argmax()), len(target))
            sign[changed], barred = 1.0 - 2.0 * side, 0.0
        else:
            changed = int(active[leaves.argmax()])
            barred, sign[changed] = float(sign[changed]), 0.0
    return beta, strength, turns
