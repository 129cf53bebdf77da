"""Which network's input feeds which weights; with the moments that makes one quadratic per layer.

A connection is a list of terms. Each mixes the two networks' inputs once for the teacher's weights and once
for the student's, and asks the two outputs to agree. Dimensions: see `moments`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor

from xdonnx.columns import among
from xdonnx.errors import JobError
from xdonnx.moments import Missing, Moments

Mix = tuple[float, float]
"""Shares of the teacher's and of the student's input."""

NAMES = ("regression", "correction", "imitation", "cross", "soft")


@dataclass(frozen=True)
class Connection:
    """A weighted sum of squared errors `weight * |W_t (a_T x_t + a_S x_s) - W (b_T x_t + b_S x_s)|^2`.

    Parameters
    ----------
    name : str
        As the user calls it.
    terms : tuple of (weight, (a_T, a_S), (b_T, b_S))
        The weight of a term, the mix that the teacher's weights see, the mix that the student's see. A mix
        sums to one, or a bias would be counted wrongly.

    Notes
    -----
    Errors are those of the linear outputs, before any activation, as in the published code; the text of [1]_
    puts the activation inside, which has no closed form.

    References
    ----------
    .. [1] Bai et al., "Few Shot Network Compression via Cross Distillation", AAAI 2020. arXiv:1911.09450
    """

    name: str
    terms: tuple[tuple[float, Mix, Mix], ...]


@dataclass(frozen=True, eq=False)
class Quadratic:
    """`q(W) = <W H, W> - 2 <C, W> + c`, summed over groups.

    Parameters
    ----------
    hess : Tensor (g, d, d)
        H, symmetric and positive semi-definite.
    lin : Tensor (g, o, d)
        C.
    const : Tensor (g,)
        c; makes q an error, in squared activation per output position, summed over outputs.
    """

    hess: Tensor
    lin: Tensor
    const: Tensor

    def __call__(self, w: Tensor) -> Tensor:
        """Error of the weights `w` (g, o, d): a scalar."""
        return ((w @ self.hess - 2 * self.lin) * w).sum() + self.const.sum()

    def grad(self, w: Tensor) -> Tensor:
        """Slope of the error at `w`, (g, o, d)."""
        return 2 * (w @ self.hess - self.lin)


def regression() -> Connection:
    """Each network reads its own input; the student makes up for upstream error ("Ours-NC" of the paper)."""
    return Connection("regression", ((1.0, (1.0, 0.0), (0.0, 1.0)),))


def correction() -> Connection:
    """Both read the teacher's input."""
    return Connection("correction", ((1.0, (1.0, 0.0), (1.0, 0.0)),))


def imitation() -> Connection:
    """Both read the student's input."""
    return Connection("imitation", ((1.0, (0.0, 1.0), (0.0, 1.0)),))


def cross(mu: float) -> Connection:
    """`mu` times correction plus `1 - mu` times imitation ("Ours" of the paper)."""
    _check("mu", mu)
    return Connection("cross", ((mu, (1.0, 0.0), (1.0, 0.0)), (1.0 - mu, (0.0, 1.0), (0.0, 1.0))))


def soft(alpha: float, beta: float) -> Connection:
    """Mixes of the two inputs, one for each network ("Ours-S" of the paper).

    The teacher's weights read `alpha x_t + (1 - alpha) x_s`, the student's `(1 - beta) x_t + beta x_s`. So
    `beta` sets what the student reads and `alpha + beta - 1` the share of upstream error that it makes up for.
    """
    _check("alpha", alpha)
    _check("beta", beta)
    return Connection("soft", ((1.0, (alpha, 1.0 - alpha), (1.0 - beta, beta)),))


def named(name: str, *, mu: float, alpha: float, beta: float) -> Connection:
    """Connection that a job calls `name`.

    Parameters
    ----------
    name : {'regression', 'correction', 'imitation', 'cross', 'soft'}
    mu
        For 'cross': the share of correction, 0 to 1.
    alpha, beta
        For 'soft': how much of its own input each network sees, 0 to 1.

    Raises
    ------
    JobError
        If there is no such connection, or a share lies outside 0 to 1.
    """
    if name == "cross":
        return cross(mu)
    if name == "soft":
        return soft(alpha, beta)
    plain = {"regression": regression, "correction": correction, "imitation": imitation}
    if name in plain:
        return plain[name]()
    near = get_close_matches(name, NAMES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise JobError(f"unknown connection {name!r}.{hint}\n  Connections: {', '.join(NAMES)}.")


class Projected(NamedTuple):
    """The teacher's weights times its layer's moments, (g, o, d) each: all that a target of any connection is made of.

    Parameters
    ----------
    tt, ts, st, ss : Tensor
        `W_T tt`, `W_T ts`, `W_T ts'`, `W_T ss`; the same tensor where the two networks still agree.
    """

    tt: Tensor
    ts: Tensor
    st: Tensor
    ss: Tensor


def projected(moments: Moments, teacher_matrix: Tensor) -> Projected:
    """Return the teacher's weights (g, o, d) times each moment."""
    teacher = teacher_matrix.to(moments.tt)
    tt = teacher @ moments.tt
    if moments.tt is moments.ss:
        return Projected(tt, tt, tt, tt)
    return Projected(tt, teacher @ moments.ts, teacher @ moments.ts.mT, teacher @ moments.ss)


def objective(
    connection: Connection, moments: Moments, teacher_matrix: Tensor, known: Projected | None = None
) -> Quadratic:
    """Reconstruction error of a layer as a quadratic in the student's weights.

    Nothing here depends on the number of shots: the moments already hold all of them.

    Parameters
    ----------
    connection
        Which input feeds which network.
    moments : (g, d, d) each
        Of the unrolled inputs.
    teacher_matrix : (g, o, d)
        Weights that the student imitates.
    known : Projected, optional
        From `projected`, where several connections are asked for.

    Returns
    -------
    Quadratic
        In squared activation per output position, summed over outputs; float64.
    """
    teacher = teacher_matrix.to(moments.tt)
    terms = [term for term in connection.terms if term[0]]
    hess = _summed([(weight, _mixed(moments, own, own)) for weight, _, own in terms])
    if known is None:
        # The matrices first: where a term shows both networks the same, its slope at the teacher's weights is then
        # zero to the last bit, as it is in data space.
        lin = teacher @ _summed([(weight, _mixed(moments, other, own)) for weight, other, own in terms])
        same = all(other == own for _, other, own in terms)
        target = lin if same else teacher @ _summed([(w, _mixed(moments, other, other)) for w, other, _ in terms])
    else:
        lin = _summed([(weight, _mixed(known, other, own)) for weight, other, own in terms])
        target = _summed([(weight, _mixed(known, other, other)) for weight, other, _ in terms])
    return Quadratic(hess, lin, (target * teacher).sum((1, 2)))


def compensated(q: Quadratic, connection: Connection, missing: Missing, teacher_matrix: Tensor) -> Quadratic:
    """Let a layer also make up for what another branch, which its output is added to, lacks in the student.

    Parameters
    ----------
    q
        From `objective` for the same connection.
    missing
        From `moments.measure_missing`.
    teacher_matrix : (g, o, d)
        As in `objective`.

    Returns
    -------
    Quadratic
        The error of the sum.

    Notes
    -----
    A term makes up for the share `a_T - b_T` of upstream error (1 for regression, 0 for correction and imitation,
    `alpha + beta - 1` for soft), so it is given that share of what lacks. He, Zhang, Sun ("Channel Pruning", ICCV
    2017) do the same for the last layer of a residual branch, with share 1.
    """
    teacher = teacher_matrix.to(q.lin)
    lin, const = q.lin, q.const
    for weight, (a_t, a_s), (b_t, b_s) in connection.terms:
        share = a_t - b_t
        lin = lin + weight * share * (b_t * missing.teacher + b_s * missing.student)
        wanted = a_t * missing.teacher + a_s * missing.student
        const = const + weight * share * (2 * (teacher * wanted).sum((1, 2)) + share * missing.energy)
    return Quadratic(q.hess, lin, const)


def damped(q: Quadratic, toward: Tensor, ridge: float, *, bias: bool, curvature: Tensor | None = None) -> Quadratic:
    """Add a pull toward known weights, `lambda * |W - toward|^2`, that makes the minimum unique.

    Parameters
    ----------
    toward : (g, o, d)
        Normally the teacher's weights.
    ridge
        lambda as a fraction of the mean diagonal of H, group by group, bias apart; 0 changes nothing.
    bias
        Whether the last column is the bias. It is practically not pulled (a millionth of lambda): its input is
        exactly one, so a few shots determine it well, and it has to move when the removed inputs had a mean.
    curvature : (g, 1), optional
        The mean diagonal of H, where `q` has only some of its columns.

    Returns
    -------
    Quadratic
        Positive definite for any ridge above 0, dead inputs and missing shots notwithstanding.

    Raises
    ------
    JobError
        If `ridge` is negative or not finite.
    """
    if not 0 <= ridge < float("inf"):
        raise JobError(f"ridge is {ridge}.\n  It is a fraction of the mean curvature: 0 or more, such as 0.01.")
    if ridge == 0:
        return q
    toward = toward.to(q.hess)
    diagonal = q.hess.diagonal(dim1=1, dim2=2)
    mean = mean_curvature(q.hess, bias=bias) if curvature is None else curvature
    # A group that no shot ever excites says nothing: any positive pull returns `toward`.
    mean = torch.where(mean > 0, mean, 1.0)
    pull = (ridge * mean).expand_as(diagonal).clone()
    if bias:
        pull[:, -1] *= 1e-6
    pulled = toward * pull[:, None]
    hess = q.hess.clone()
    hess.diagonal(dim1=1, dim2=2).add_(pull)
    return Quadratic(hess, q.lin + pulled, q.const + (pulled * toward).sum((1, 2)))


def mean_curvature(hess: Tensor, *, bias: bool) -> Tensor:
    """Return the mean diagonal of H, group by group, (g, 1); the bias, where it is the last column, left out."""
    diagonal = hess.diagonal(dim1=1, dim2=2)
    inputs = diagonal[:, :-1] if bias else diagonal
    return inputs.mean(1, keepdim=True) if inputs.shape[1] else torch.ones_like(diagonal[:, :1])


def mixed_curvature(connection: Connection, curvatures: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the mean diagonal that H has under a connection, from those of `tt`, `ts` and `ss`."""
    tt, ts, ss = curvatures
    return _summed([(w, t * t * tt + 2 * t * s * ts + s * s * ss) for w, _, (t, s) in connection.terms])


def restricted(quadratic: Quadratic, alive: Tensor) -> Quadratic:
    """Return the same error as a function of the `alive` columns (d,), the others held at zero."""
    if bool(alive.all()):
        return quadratic
    places = alive.nonzero()[:, 0]
    return Quadratic(among(quadratic.hess, places), quadratic.lin.index_select(2, places), quadratic.const)


def _mixed(moments: Moments | Projected, left: Mix, right: Mix) -> Tensor:
    """Mean of `(left mix of inputs) (right mix of inputs)'`, or the teacher's weights times it."""
    if moments.tt is moments.ss:
        return moments.tt  # shares of a mix sum to one
    parts: list[tuple[float, Tensor]] = [(left[0] * right[0], moments.tt)]
    if left == right and isinstance(moments, Moments):
        # Symmetric to the last bit, as what it is made of.
        parts.append((left[0] * right[1], moments.both))
    else:
        across = moments.st if isinstance(moments, Projected) else moments.ts.mT
        parts += [(left[0] * right[1], moments.ts), (left[1] * right[0], across)]
    return _summed([*parts, (left[1] * right[1], moments.ss)])


def _summed(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Return a weighted sum; one tensor of weight 1 as it is."""
    parts = [(share, part) for share, part in parts if share]
    share, part = parts[0]
    if len(parts) == 1:
        return part if share == 1 else part * share
    made = part * share
    for share, part in parts[1:]:
        made.add_(part, alpha=share)
    return made


def _check(option: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise JobError(f"{option} is {value}.\n  It is a share: between 0 and 1.")
