"""Cross Distillation on activations, as its authors' code runs it: what moments are measured against.

For one convolution, with the inputs of teacher and student cached for all shots:
  1. start from the teacher's weights;
  2. in every step take the slope of `mu * |W_T * h_T - W * h_T|^2 + (1 - mu) * |W_T * h_S - W * h_S|^2`, a mean over
     outputs and positions, by running the convolution forwards and backwards on both inputs, and step by Adam;
  3. in the first third keep ever fewer input channels, those of largest norm, and set the others to zero for good;
  4. in the rest fit the channels that are left, at a tenth of the rate.
Convolutions are torch's own and nothing is taken from xdonnx, so that the two check each other.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution without groups, and what it reads.

    Parameters
    ----------
    teacher, student : Tensor (n, c, h, w)
        Its input in the two networks, all shots.
    weight : Tensor (o, c, kh, kw)
        The teacher's.
    stride, padding : int
    """

    teacher: Tensor
    student: Tensor
    weight: Tensor
    stride: int
    padding: int

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the layer's output, without its bias."""
        return functional.conv2d(x, weight, None, self.stride, self.padding)

    def error(self, weight: Tensor, mu: float) -> float:
        """Return the published loss, per position and summed over outputs, in float64."""
        total = 0.0
        for share, x in ((mu, self.teacher), (1 - mu, self.student)):
            gap = self.run(x, self.weight).double() - self.run(x, weight).double()
            total += share * float(gap.square().sum()) * gap.shape[1] / gap.numel()
        return total


class Fitted(NamedTuple):
    """Weights (o, c, kh, kw), and how long all steps together took."""

    weight: Tensor
    seconds: float


def fit(layer: Layer, keep: int, *, mu: float, steps: int, rate: float = 1e-3) -> Fitted:
    """Return weights that keep `keep` input channels.

    Parameters
    ----------
    layer : Layer
    keep : int
    mu : float
        Share of the teacher's input, see above.
    steps : int
        The published number is 3000.
    rate : float
        Of Adam.

    Notes
    -----
    The outputs to be met are computed once, before the first step and before the clock starts.
    """
    inputs = ((mu, layer.teacher), (1 - mu, layer.student))
    terms = [(share, x, layer.run(x, layer.weight)) for share, x in inputs if share]
    weight = layer.weight.clone().requires_grad_()
    adam = torch.optim.Adam([weight], lr=rate)
    mask = torch.ones(weight.shape[1], dtype=weight.dtype)
    third, channels = steps // 3, weight.shape[1]
    began = time.process_time()
    for step in range(steps):
        adam.zero_grad()
        loss = torch.zeros(())
        for share, x, wanted in terms:
            loss = loss + share * (layer.run(x, weight) - wanted).square().mean()
        loss.backward()
        along = mask[:, None, None]
        assert weight.grad is not None
        weight.grad *= along
        for average in ("exp_avg", "exp_avg_sq") if step else ():
            adam.state[weight][average] *= along
        adam.step()
        if step <= third:
            kept = keep + (channels - keep) * (third - step) // third if third else keep
            norms = weight.detach().square().sum((0, 2, 3)).sqrt()
            mask = torch.zeros_like(mask)
            mask[torch.argsort(norms, descending=True, stable=True)[:kept]] = 1
            with torch.no_grad():
                weight *= mask[:, None, None]
        else:
            adam.param_groups[0]["lr"] = rate / 10
    return Fitted(weight.detach(), time.process_time() - began)
