"""Adam on a quadratic error, carrying along only the columns that are still there.

A column that the ramp of `solve.PGD` has removed never comes back, so its weights, its slope and its averages need no
further arithmetic: without it, every step is the same to rounding. For dimensions see `moments`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xdonnx.columns import among

MEAN, SQUARE, EPSILON = 0.9, 0.999, 1e-8
"""How much Adam's averages keep of themselves in a step, and what it adds to the root of the second; as in torch."""


class Adam:
    """Adam as torch has it, with slope and both averages masked as in the published code.

    Parameters
    ----------
    hess : (g, d, d)
    lin : (g, o, d)
    w : (g, o, d)
        Where to start.
    frozen : BoolTensor (d,)
        Columns that keep their start value.
    rate : float
    slow : float
        Factor on the rate after step number `after`.
    after : int
    dtype
        Of the steps.
    """

    def __init__(
        self,
        hess: Tensor,
        lin: Tensor,
        w: Tensor,
        frozen: Tensor,
        *,
        rate: float,
        slow: float,
        after: int,
        dtype: torch.dtype,
    ) -> None:
        # The code's loss is a mean over outputs, and Adam's epsilon makes the scale matter.
        scale = 2 / (w.shape[0] * w.shape[1])
        # What is carried is the way from the start: a slope of zero there, as all connections have it that show both
        # networks the same, then is zero to the last bit. Adam makes whole steps of the least rounding.
        self._pull = ((w @ hess - lin) * (scale * ~frozen)).to(dtype)
        self._hess = (hess * (scale * ~frozen)).to(dtype)
        self._start, self._alive = w, torch.arange(w.shape[2], device=w.device)
        self._way, self._mean, self._square, self._slope = (torch.zeros_like(self._pull) for _ in range(4))
        self._mask = self._pull.new_empty(0)
        self._rate, self._slow, self._after = rate, slow, after
        self._steps = torch.zeros((), dtype=torch.float32, device=w.device)

    @property
    def weight(self) -> Tensor:
        """Where it has come to, (g, o, d) in float64."""
        found = torch.zeros_like(self._start)
        left = self._start[..., self._alive] + self._way
        found[..., self._alive] = left * self._mask if len(self._mask) else left
        return found

    def move(self, w: Tensor) -> None:
        """Go on from other weights (g, o, d)."""
        self._way.copy_((w - self._start)[..., self._alive])

    def step(self, t: int) -> None:
        """Make the step of number `t`."""
        torch.baddbmm(self._pull, self._way, self._hess, out=self._slope)
        if len(self._mask):
            self._slope.mul_(self._mask)
        # One pass over the memory where six operations of torch would take as many: small layers are all overhead.
        torch._fused_adam_(
            [self._way],
            [self._slope],
            [self._mean],
            [self._square],
            [],
            [self._steps.fill_(t + 1)],
            lr=self._rate * (self._slow if t > self._after else 1.0),
            beta1=MEAN,
            beta2=SQUARE,
            weight_decay=0.0,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
        )

    def keep(self, mask: Tensor) -> None:
        """Set all weights that a mask (g, o, d) lacks to zero, for good."""
        columns = mask.any(0).any(0)[self._alive]
        if not bool(columns.all()):
            spots, gone = columns.nonzero()[:, 0], (~columns).nonzero()[:, 0]
            left = self._start[..., self._alive[gone]].to(self._pull)
            self._pull.baddbmm_(left, self._hess.index_select(1, gone), alpha=-1)
            self._alive = self._alive[spots]
            self._hess = among(self._hess, spots)
            self._pull, self._way, self._mean, self._square, self._slope = (
                one.index_select(2, spots) for one in (self._pull, self._way, self._mean, self._square, self._slope)
            )
        stays = mask[..., self._alive]
        if bool(stays.all()):
            self._mask = self._pull.new_empty(0)
            return
        self._mask = stays.to(self._pull)
        self._way = torch.where(stays, self._way, -self._start[..., self._alive].to(self._way))
        self._mean.mul_(self._mask)
        self._square.mul_(self._mask)


class Descent:
    """Steps of plain gradient descent that never overshoot, group by group, in float64; as `Adam` to handle."""

    def __init__(self, hess: Tensor, lin: Tensor, w: Tensor, frozen: Tensor) -> None:
        top = torch.linalg.eigvalsh(hess)[:, -1:, None]
        self._hess, self._lin = hess, lin
        self._rate, self._movable = torch.where(top > 0, 1 / top, 0.0), (~frozen).expand(w.shape)
        self.weight = w.clone()

    def move(self, w: Tensor) -> None:
        """Go on from other weights (g, o, d)."""
        self.weight = w

    def step(self, t: int) -> None:
        """Make the step of number `t`."""
        slope = self.weight @ self._hess - self._lin
        self.weight = self.weight - self._rate * slope * self._movable

    def keep(self, mask: Tensor) -> None:
        """Set all weights that a mask (g, o, d) lacks to zero, for good."""
        self._movable = self._movable & mask
        self.weight = self.weight * mask
