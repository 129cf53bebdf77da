"""ThiNet (Luo, Wu, Lin, ICCV 2017): a filter is judged by the next layer, which loses what it makes.

For every layer from front to back:
  1. write an output of the layer, without its bias, as a sum over input channels, y = sum_j z_j;
  2. T = {}; as long as too few channels have gone, add to T the channel j that makes the energy of the lost sum,
     |sum of z_k over T and j|^2, smallest;
  3. fit one scale per channel that stays, min |y_T - sum_j s_j z_j|^2, and multiply the channel's weights by it.
The paper draws one output at random per sample, position and filter; here all take part, through the inner products
of the z_j. It fine-tunes after every layer, so that y of the pruned network serves as y_T. Nothing is fine-tuned here,
so y_T is the teacher's output and the scales make up for upstream error. Layers that lose nothing stay as they are.
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
from xdonnx.solve import Solution
from xdonnx.structure import Channel, Structure

NOISE = 1e-10
"""Share of the largest energy below which a direction says nothing, and its scales stay at one."""


@dataclass(frozen=True)
class ThiNet:
    """Greedy removal of the channels whose sum is smallest, then one scale per channel.

    References
    ----------
    .. [1] Luo, Wu, Lin, "ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression", ICCV 2017.
       arXiv:1707.06342
    """

    def __call__(self, net: Net, patch: Patch, shots: Shots, plan: Plan, bench: Bench) -> Outcome:
        """Compress the net from these shots; see `xdonnx.methods.layerwise`."""
        rule = Rule(regression(), 0.0, smallest_sum, refit=False, bias=False, refitter=rescaled, compensate=False)
        return layerwise(net, patch, shots.inputs, plan, rule, bench)

    def check(self, structure: str) -> None:
        """Raise JobError for single weights: a scale belongs to a channel."""
        if structure != "channel":
            raise JobError(
                f"--method thinet removes whole channels and does not go with --structure {structure}.\n"
                "  Legal: --structure channel. For single weights: --method cross."
            )


def smallest_sum(q: Quadratic, start: Tensor, structure: Structure, keep: int) -> Solution:
    """Remove channels whose sum has little energy and scale the others: a `Solver`.

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
    """
    assert isinstance(structure, Channel), f"{type(structure).__name__} has no channels"
    structure.check(keep)
    start = start.to(q.hess)
    among, target = contributions(q, start, structure)
    kept = ~_quietest(among[:, :-1, :-1].sum(0), structure, structure.count - keep)
    mask = structure.spread(kept, start)
    weight = start * mask * _scales(among, target, structure, kept)
    return Solution(weight, mask, float(q(weight)), structure.count - keep, True)


def rescaled(q: Quadratic, start: Tensor, columns: Tensor, rows: Tensor, *, bias: bool) -> Tensor:
    """Scale every channel that is left, in layers that lost some to other readers' choice: a `Refitter`."""
    del rows, bias  # the bias is no input channel; outputs that go matter to the energies like all others
    labels, place = torch.unique(columns, return_inverse=True)
    fixed = int(bool((labels < 0).any()))
    channel = Channel(place - fixed)
    kept = torch.ones(channel.count, dtype=torch.bool, device=columns.device)
    return start.to(q.hess) * _scales(*contributions(q, start, channel), channel, kept)


def _quietest(among: Tensor, channel: Channel, leaving: int) -> Tensor:
    """Mark the channels that leave, by the energy of all that have left, (count,)."""
    gone = torch.zeros(len(among), dtype=torch.bool, device=among.device)
    # Channels that an earlier method took have no column left; they count as gone before all others.
    own = among.diagonal().where((channel.table >= 0).any(1).to(among.device), -torch.inf)
    with_gone = torch.zeros_like(own)
    for _ in range(leaving):
        rise = (own + 2 * with_gone).masked_fill(gone, torch.inf)
        at = int(rise.argmin())
        gone[at] = True
        with_gone += among[at]
    return gone


def _scales(among: Tensor, target: Tensor, channel: Channel, kept: Tensor) -> Tensor:
    """Best factor of every column, (g, 1, d), by least squares; one where the shots leave it open."""
    at = kept.nonzero()[:, 0]
    ours = among[:, at][:, :, at]
    # The columns of no channel keep their weights and take their share of the target.
    rest = target[:, at] - among[:, at, -1] - ours.sum(2)
    move = torch.linalg.pinv(ours, hermitian=True, rtol=NOISE) @ rest[..., None]
    scale = torch.ones_like(target)
    scale[:, at] += move[..., 0]
    return scale[:, channel.columns.to(scale.device)][:, None]
