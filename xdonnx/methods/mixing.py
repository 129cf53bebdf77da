"""1x1 layers behind the convolutions of a given student, fitted and merged: FSKD for students of other tools.

FSKD (Li, Li, Liu, Zhang, CVPR 2020, arXiv:1812.01839): behind every matched convolution, before anything that is not
linear, stands a 1x1 layer `Q z + q`. In graph order, those before it already set, it is fitted by least squares: z is
what the student's convolution puts out, the target what the teacher's does, of the channels that the student kept. Then
it is merged: the weight becomes Q W, the bias Q b + q, and nothing has grown.

Three things are not the paper's. There is a constant q. Q is pulled toward the identity, as hard as three folds of the
samples say, since few samples leave much of it open. And where a ReLU reads the output, what is below zero in both
networks is no error: with y the teacher's output and u = Q z + q, the error is (u - y)^2 where y is positive and
max(u, 0)^2 elsewhere. That is convex, and each of its majorising quadratics has the same matrix, so that one
factorisation serves all steps (He et al. use the like for channel pruning); Nesterov's momentum makes few of them do.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from xdonnx.columns import Geometry, from_matrix, spread, to_matrix
from xdonnx.convert import run_layer, stored
from xdonnx.graph import Net
from xdonnx.methods.bench import Trace
from xdonnx.methods.layerwise import FOLDS
from xdonnx.methods.pairwalk import Meeting, Weights

# Pulls of Q toward the identity that folds choose among, relative to the mean energy of the outputs.
PULLS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Below this the systems could be singular.
LEAST = 1e-10
# Positions that are looked at, of all samples together, and steps that a ReLU is worth.
POSITIONS, STEPS = 16384, 20
# Rows that are enough to say what a layer's error is.
SHOWN = 64


@dataclass(frozen=True, eq=False)
class Mixer:
    """A 1x1 layer `Q z + q` behind a layer, group by group.

    Parameters
    ----------
    q : (g, o, o), float64
    constant : (g, o) or None
        None where the layer has no bias to merge it into.
    """

    q: Tensor
    constant: Tensor | None

    def merged(self, weight: Tensor, bias: Tensor | None, seen: Geometry) -> Weights:
        """Return weight and bias of the layer that does the work of both; exact, for both are linear."""
        matrix = self.q @ to_matrix(weight, bias, seen).double()
        if self.constant is not None:
            matrix[..., -1] += self.constant
        made, fitted = from_matrix(matrix, seen, bias is not None, tuple(weight.shape))
        return made.to(weight), None if bias is None or fitted is None else fitted.to(bias)


@dataclass(frozen=True, eq=False)
class _Moments:
    """Sums over positions of products of z, what a layer puts out with a row of ones below, and y, the target."""

    zz: Tensor
    yz: Tensor
    yy: Tensor

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(self.zz + other.zz, self.yz + other.yz, self.yy + other.yy)

    def solver(self, pull: float) -> _Solver:
        """Return what solves for any target on these outputs."""
        outputs = self.yz.shape[1]
        energy = self.zz.diagonal(dim1=1, dim2=2)
        pulls = pull * energy[:, :outputs].mean(1, keepdim=True).expand(-1, outputs)
        pulls = torch.where(pulls > 0, pulls, 1.0)
        # The constant is well determined, and pulled no more than rounding asks for.
        rest = LEAST * energy[:, outputs:]
        same = torch.eye(outputs, self.zz.shape[1]).to(self.zz).expand(len(self.zz), -1, -1)
        damped = self.zz + torch.diag_embed(torch.cat([pulls, rest], 1))
        return _Solver(torch.linalg.cholesky(damped), same * pulls[..., None])

    def error(self, matrix: Tensor) -> float:
        """Return the sum of squared errors of a mixer [Q q] (g, o, o + 1)."""
        return float(((matrix @ self.zz - 2 * self.yz) * matrix).sum() + self.yy.sum())


@dataclass(frozen=True, eq=False)
class _Solver:
    factor: Tensor
    pulled: Tensor

    def __call__(self, yz: Tensor) -> Tensor:
        """Return the best mixer for a target with these products with z."""
        found: Tensor = torch.cholesky_solve((yz + self.pulled).mT, self.factor).mT
        return found


@dataclass(eq=False)
class Mixing:
    """What `pairwalk.meet` calls at every pair; remembers the 1x1 layers that it merged.

    Parameters
    ----------
    net : Net
        The student's.
    rows, samples : int
        Rows of all chunks, and how many of them are samples, the others being views of these in the same order.
    rectified : frozenset of str
        The student's layers that nothing but a ReLU reads.
    ridge : float, optional
        Pull toward the identity, relative to the mean energy of the outputs; None: as folds say.
    """

    net: Net
    rows: int
    samples: int
    rectified: frozenset[str] = frozenset()
    ridge: float | None = None
    mixers: dict[str, Mixer] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    traces: list[Trace] = field(default_factory=list)

    def __call__(self, meeting: Meeting) -> Weights | None:
        """Fit and merge one layer; None where it shares its weight."""
        began = time.perf_counter()
        if meeting.layer.weight in self.net.shared:
            return None
        weights = self.fitted(meeting)
        keep(self.tensors, meeting, weights)
        self.traces.append(trace(meeting, weights, self.rectified, began))
        return weights

    def fitted(self, meeting: Meeting) -> Weights:
        """Return the layer's weights with the 1x1 layer merged that brings its outputs closest to the target."""
        layer = meeting.layer
        made = [run_layer(layer, x, meeting.weight, meeting.bias) for x in meeting.source]
        ours, theirs = (self._seen(chunks, meeting) for chunks in (made, meeting.target))
        owners = torch.arange(self.rows, device=ours[0].device) % max(1, self.samples) % FOLDS
        owner = owners.repeat_interleave(ours[0].shape[1])
        z = ours[1] if meeting.bias is None else torch.cat([ours[1], torch.ones_like(ours[1][:, :1])], 1)
        y = theirs[1]
        whole_rows = len(owner) == z.shape[2]
        folds = [_moments(z[..., owner == at], y[..., owner == at]) for at in range(FOLDS) if whole_rows]
        folds = [fold for fold in folds if float(fold.zz.abs().sum()) > 0] or [_moments(z, y)]
        whole = _total(folds)
        solve = whole.solver(self._pull(folds))
        matrix = solve(whole.yz)
        if layer.name in self.rectified:
            matrix = _rectified(solve, matrix, z, y)
        mixer = Mixer(matrix[..., : y.shape[1]], matrix[..., -1] if meeting.bias is not None else None)
        self.mixers[layer.name] = mixer
        return mixer.merged(meeting.weight, meeting.bias, meeting.geometry)

    def _seen(self, chunks: Sequence[Tensor], meeting: Meeting) -> tuple[Tensor, Tensor]:
        """Return outputs at the positions that are looked at: (rows, positions of each), and (g, o, positions)."""
        parts, first = [], 0
        for chunk in chunks:
            flat = chunk.flatten(2) if meeting.layer.kernel else chunk.reshape(len(chunk), -1, chunk.shape[-1]).mT
            each = -(-POSITIONS // max(1, self.rows))
            if each < flat.shape[2]:
                sizes = chunk.shape[2:] if meeting.layer.kernel else chunk.shape[1:-1]
                places = spread(tuple(sizes), len(chunk), each, first).to(chunk.device)
                flat = flat.gather(2, places[:, None].expand(-1, flat.shape[1], -1))
            first += len(chunk)
            parts.append(flat)
        seen = torch.cat(parts).double()
        groups = meeting.layer.groups
        return seen[:, 0], seen.movedim(1, 0).reshape(groups, seen.shape[1] // groups, -1)

    def _pull(self, folds: Sequence[_Moments]) -> float:
        if self.ridge is not None:
            return max(self.ridge, LEAST)
        if len(folds) < 2:
            return PULLS[len(PULLS) // 2]
        errors = np.zeros(len(PULLS))
        for at, unseen in enumerate(folds):
            seen = _total([fold for other, fold in enumerate(folds) if other != at])
            errors += [unseen.error(seen.solver(pull)(seen.yz)) for pull in PULLS]
        return PULLS[int(np.argmin(errors))]


def _moments(z: Tensor, y: Tensor) -> _Moments:
    return _Moments(z @ z.mT, y @ z.mT, y.square().sum((1, 2)))


def _total(folds: Sequence[_Moments]) -> _Moments:
    total = folds[0]
    for fold in folds[1:]:
        total = total + fold
    return total


def _rectified(solve: _Solver, start: Tensor, z: Tensor, y: Tensor) -> Tensor:
    """Return the mixer whose outputs are closest to y after a ReLU, from the one that is closest before it."""
    z, y = z.float(), y.float()
    positive = y > 0
    now = ahead = start
    for step in range(STEPS):
        u = ahead.float() @ z
        # What is wanted where the teacher's is cut off: whatever is below zero stays as it is.
        wanted = torch.where(positive, y, u.clamp(max=0))
        before, now = now, solve((wanted @ z.mT).double())
        ahead = now + step / (step + 3) * (now - before)
    return now


def trace(meeting: Meeting, weights: Weights, rectified: frozenset[str], began: float) -> Trace:
    """Return what new weights changed in the error of a layer's outputs, of what passes the ReLU where one reads them.

    Parameters
    ----------
    meeting : Meeting
    weights : (weight, bias)
    rectified : frozenset of str
        The student's layers that nothing but a ReLU reads.
    began : float
        When work on the layer began, by `time.perf_counter`.
    """
    passed = meeting.layer.name in rectified
    wrong, energy = [0.0, 0.0], 0.0
    every = max(1, sum(map(len, meeting.source)) // SHOWN)
    for chunk, whole in zip(meeting.source, meeting.whole_target(), strict=True):
        x, target = chunk[::every], whole[::every]
        wanted = target.clamp(min=0) if passed else target
        energy += float(wanted.double().square().sum())
        for at, one in enumerate(((meeting.weight, meeting.bias), weights)):
            made = run_layer(meeting.layer, x, *one)
            wrong[at] += float(((made.clamp(min=0) if passed else made) - wanted).double().square().sum())
    before, after = (each / max(energy, 1e-30) for each in wrong)
    return Trace(meeting.layer.name, before, after, time.perf_counter() - began)


def keep(tensors: dict[str, np.ndarray], meeting: Meeting, weights: Weights) -> None:
    """Write a layer's new weights down as the file stores them."""
    layer = meeting.layer
    tensors[layer.weight] = stored(layer, weights[0]).cpu().numpy()
    if layer.bias is not None and weights[1] is not None:
        tensors[layer.bias] = weights[1].cpu().numpy()
