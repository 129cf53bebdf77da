"""What each channel adds to a layer's output, compared without looking at the output: in the Gram of the inputs."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from xdonnx.connection import Quadratic
from xdonnx.structure import Channel


def contributions(q: Quadratic, w: Tensor, channel: Channel) -> tuple[Tensor, Tensor]:
    """Inner products of what channels add to the output, `w_j x_j`, with each other and with the target.

    The error of an output whose channels are scaled by `s` is `s' among s - 2 s' target + const`, group by group.

    Parameters
    ----------
    q : Quadratic
    w : (g, o, d)
        Weights that read the channels.
    channel : Channel
        Which columns belong together.

    Returns
    -------
    among : Tensor (g, count + 1, count + 1)
        `<w_j H_jk, w_k>`, in squared activation per output position, summed over outputs. The last row and column
        stand for all columns of no channel together.
    target : Tensor (g, count + 1)
        `<C_j, w_j>`.
    """
    w = w.to(q.hess)
    columns = channel.columns.to(w.device)
    # A product with ones rather than index_add, which is not deterministic on GPUs.
    member = functional.one_hot(columns.where(columns >= 0, channel.count), channel.count + 1).to(w)
    among = member.T @ ((w.mT @ w) * q.hess) @ member
    return (among + among.mT) / 2, (w * q.lin).sum(1) @ member
