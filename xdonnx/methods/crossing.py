"""Cross distillation (Bai, Wu, King, Lyu, AAAI 2020) for a given student: its matched layers are refitted.

Where one layer stands for one, each of its input channels is one of the teacher's, and teacher and student are crossed
as in `xdonnx.connection`: where a connection shows the student's input to the teacher's weights, channels that the
student lacks read the teacher's. The last layer of a row, which took the place of one, reads what no layer of the
teacher reads: it is fitted by regression, on its own input, onto what the teacher's layer puts out. A ridge pulls
toward the student's own weights. Where the output is added to another branch, the layer also makes up for its share of
what that lacks in the student.

Least squares know of no ReLU. So a 1x1 layer is then fitted behind the refitted one and merged, as by
`xdonnx.methods.mixing`, which does: on ResNet-56 halved by an l1 norm the relative error of the answers was 0.396 for
0.416 at 10 images per class, 0.474 for 0.492 at one. Zeros of a thinned student would be filled, and who asks for one
connection or ridge gets that alone: there it is left out. Layers too wide for a system have nothing but the mixture,
and are left as they are where they are thinned.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xdonnx.columns import Geometry, from_matrix, to_matrix
from xdonnx.connection import Quadratic, compensated, damped, objective, projected, regression, restricted
from xdonnx.convert import layer_tensors
from xdonnx.crossval import Candidate, measure_folds
from xdonnx.graph import Net
from xdonnx.methods.bench import Trace
from xdonnx.methods.joint import WIDEST
from xdonnx.methods.layerwise import FOLDS, LEAN, LEAST_RIDGE, MOST_FOLDED
from xdonnx.methods.mixing import Mixing, keep, trace
from xdonnx.methods.pairwalk import Meeting, Weights
from xdonnx.moments import WIDEST_FOLDED, enough, paired
from xdonnx.shelf import Chunks
from xdonnx.solve import refit

# A share of zeros above which a weight counts as thinned out: fewer may be chance.
FEW_ZEROS = 0.01
# What is left of two constants that cancel, as a share of them.
ROUNDING = 1e-5


@dataclass(frozen=True, eq=False)
class _Part:
    """What one fold says of a layer: the error of its weights (g, o, d) under each candidate, without a ridge.

    `judge` is the error against what the teacher's layer puts out, each network on its own input.
    """

    errors: tuple[Quadratic, ...]
    judge: Quadratic
    count: int


@dataclass(eq=False)
class Crossing:
    """Cross distillation at every meeting.

    Parameters
    ----------
    net, teacher : Net
        The student's and the teacher's.
    rows, samples : int
        Rows of all chunks, and how many of them are samples, the others being views of these in the same order.
    candidates : tuple of (Connection, float)
        Connection and ridge; where there are several, folds of the samples choose, the first one ahead, and a mixture
        of the outputs is fitted on top.
    rectified : frozenset of str
        The student's layers that nothing but a ReLU reads.
    """

    net: Net
    teacher: Net
    rows: int
    samples: int
    candidates: tuple[Candidate, ...]
    rectified: frozenset[str] = frozenset()
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    traces: list[Trace] = field(default_factory=list)

    def __call__(self, meeting: Meeting) -> Weights | None:
        """Refit one layer; None where it shares its weight, or nothing can be done for it."""
        began = time.perf_counter()
        if meeting.layer.weight in self.net.shared:
            return None
        wide = len(meeting.layer.columns) > WIDEST
        weights = self._mixed(meeting) if wide else self._solved(meeting)
        if weights is not None:
            keep(self.tensors, meeting, weights)
            self.traces.append(trace(meeting, weights, self.rectified, began))
        return weights

    def _solved(self, meeting: Meeting) -> Weights:
        """Refit all weights of a layer."""
        layer, bias = meeting.layer, meeting.bias is not None
        own = to_matrix(meeting.weight, meeting.bias, meeting.geometry).double()
        folds = FOLDS if len(layer.columns) <= WIDEST_FOLDED and own.numel() <= MOST_FOLDED else 1
        crossed = self._teacher_matrix(meeting)
        if crossed is not None:
            candidates = self.candidates
            parts = self._crossed(meeting, *crossed, folds)
        else:
            candidates = tuple({ridge: (regression(), ridge) for _, ridge in self.candidates}.values())
            parts = self._regressed(meeting, len(candidates), folds)
        matrix = _chosen(parts, [ridge for _, ridge in candidates], own, bias=bias)
        weight, fitted = from_matrix(matrix, meeting.geometry, bias, tuple(meeting.weight.shape))
        weights = (weight.to(meeting.weight), None if fitted is None else fitted.to(meeting.weight))
        if len(self.candidates) == 1:
            return weights
        return self._mixed(replace(meeting, weight=weights[0], bias=weights[1])) or weights

    def _mixed(self, meeting: Meeting) -> Weights | None:
        """Mend a layer by a mixture of its outputs alone; None where that would fill zeros of a thinned one."""
        if _thinned(to_matrix(meeting.weight, None, meeting.geometry), bias=False):
            return None
        mixing = Mixing(self.net, self.rows, self.samples, self.rectified)
        return mixing.fitted(replace(meeting, target=meeting.whole_target()))

    def _teacher_matrix(self, meeting: Meeting) -> tuple[Tensor, Chunks, Chunks] | None:
        """Return the teacher's weights on the student's outputs, and what both read, in the student's channels first.

        None where the inputs do not correspond channel by channel. Channels that the student lacks read the teacher's.
        """
        pair, ours, theirs = meeting.pair, meeting.layer, meeting.teacher
        same = ours.kernel == theirs.kernel and ours.dilations == theirs.dilations and ours.pads == theirs.pads
        inputs = pair.inputs
        if len(pair.student) > 1 or not same or inputs is None or (ours.kernel and ours.op != theirs.op):
            return None
        if ours.op == "ConvTranspose" and not ours.depthwise:
            return None  # its weight has the inputs first
        if (inputs < 0).any() or len(set(inputs.tolist())) < len(inputs):
            return None
        weight, bias = layer_tensors(self.teacher, theirs, meeting.weight.device)
        weight, axis = weight[pair.channels], 1 if ours.kernel else -1
        first = torch.tensor(inputs, device=weight.device)
        if ours.depthwise and theirs.depthwise and np.array_equal(pair.channels, inputs):
            both = [x.index_select(axis, first) for x in meeting.teacher_source]
            source = meeting.source
        elif ours.groups == theirs.groups == 1:
            rest = torch.tensor(np.setdiff1d(np.arange(weight.shape[1]), inputs), device=weight.device)
            weight = weight.index_select(1, torch.cat([first, rest]))
            both = [
                torch.cat([x.index_select(axis, first), x.index_select(axis, rest)], axis)
                for x in meeting.teacher_source
            ]
            source = [
                torch.cat([x, t.index_select(axis, rest)], axis)
                for x, t in zip(meeting.source, meeting.teacher_source, strict=True)
            ]
        else:
            return None
        scale, shift = meeting.scale.to(weight), meeting.shift.to(weight)
        weight = weight * scale.reshape([-1] + [1] * (weight.ndim - 1))
        constant = shift if bias is None else scale * bias[pair.channels] + shift
        if meeting.bias is None and bool((constant.abs() > ROUNDING * shift.abs().max()).any()):
            # What only a bias could do is left to a fit to the outputs.
            return None
        given = None if meeting.bias is None else constant
        return to_matrix(weight, given, meeting.geometry).double(), both, source

    def _how(self, meeting: Meeting) -> dict[str, Any]:
        exact = min(ridge for _, ridge in self.candidates) < LEAST_RIDGE
        each = enough(len(meeting.layer.columns), self.rows)
        precision = torch.float64 if exact else torch.float32
        return {"bias": meeting.bias is not None, "each": each, "dtype": precision}

    def _crossed(self, meeting: Meeting, teacher: Tensor, theirs: Chunks, ours: Chunks, folds: int) -> list[_Part]:
        how = self._how(meeting)
        measured = measure_folds(
            theirs, ours, meeting.beside, meeting.geometry, rows=self.rows, samples=self.samples, folds=folds, **how
        )
        alive = torch.zeros(teacher.shape[2], dtype=torch.bool, device=teacher.device)
        alive[: len(meeting.layer.columns)] = True
        alive[teacher.shape[2] - how["bias"] :] = True
        parts = []
        for fold in measured:
            known = projected(fold.moments, teacher)
            found = []
            for connection in (*(one for one, _ in self.candidates), regression()):
                error = objective(connection, fold.moments, teacher, known)
                if fold.missing is not None:
                    error = compensated(error, connection, fold.missing, teacher)
                found.append(restricted(error, alive))
            parts.append(_Part(tuple(found[:-1]), found[-1], fold.moments.count))
        return parts

    def _regressed(self, meeting: Meeting, candidates: int, folds: int) -> list[_Part]:
        """Measure the layer's own input against the teacher's outputs, fold by fold."""
        how, geometry = self._how(meeting), meeting.geometry
        whole = sum(map(len, meeting.source)) == self.rows
        folds = max(1, min(folds, self.samples)) if whole else 1
        parts, start = [], 0
        owners = []
        for chunk in meeting.source:
            owners.append(torch.arange(start, start + len(chunk), device=chunk.device) % self.samples % folds)
            start += len(chunk)
        for fold in range(folds):
            rows = [owner == fold for owner in owners]
            x, y = (
                [value[row] for value, row in zip(values, rows, strict=True) if bool(row.any())]
                for values in (meeting.source, meeting.whole_target())
            )
            if x:
                q, count = _onto(x, y, geometry, **how)
                parts.append(_Part((q,) * candidates, q, count))
        return parts


def _onto(
    source: Chunks, target: Chunks, geometry: Geometry, *, bias: bool, each: int, dtype: torch.dtype
) -> tuple[Quadratic, int]:
    """Return the mean squared error of a layer's weights on its input against given outputs, and the positions."""
    sums: list[Tensor] = []
    count = 0
    for x, _, part in paired(source, source, geometry, bias=bias, each=each, dtype=dtype):
        y = part.outputs(target.__getitem__, geometry).to(x)
        found = [(x @ x.mT).double(), (y @ x.mT).double(), y.double().square().sum((1, 2))]
        sums = [one + more for one, more in zip(sums, found, strict=True)] if sums else found
        count += x.shape[2]
    hess, lin, const = (one / count for one in sums)
    return Quadratic(hess, lin, const), count


def _mean(errors: Sequence[Quadratic], counts: Sequence[int]) -> Quadratic:
    shares = [count / sum(counts) for count in counts]
    hess, lin, const = (
        sum((share * part for share, part in zip(shares[1:], parts[1:], strict=True)), shares[0] * parts[0])
        for parts in zip(*((one.hess, one.lin, one.const) for one in errors), strict=True)
    )
    return Quadratic(hess, lin, const)


def _thinned(own: Tensor, *, bias: bool) -> bool:
    """Whether another tool set single weights to zero."""
    return float((own[..., : own.shape[2] - bias] == 0).double().mean()) > FEW_ZEROS


def _chosen(parts: Sequence[_Part], ridges: Sequence[float], own: Tensor, *, bias: bool) -> Tensor:
    """Return the weights that minimise the error under the candidate that does best on folds which it did not see."""
    mask = torch.ones_like(own, dtype=torch.bool)
    if _thinned(own, bias=bias):
        columns = own.shape[2] - bias
        mask[..., :columns] = own[..., :columns] != 0  # what another tool set to zero stays zero

    def solved(some: Sequence[_Part], index: int) -> Tensor:
        whole = _mean([part.errors[index] for part in some], [part.count for part in some])
        return refit(damped(whole, own, ridges[index], bias=bias), mask, own)

    best = 0
    if len(parts) > 1 and len(ridges) > 1:
        errors = [
            sum(
                float(unseen.judge(solved([part for part in parts if part is not unseen], index))) * unseen.count
                for unseen in parts
            )
            for index in range(len(ridges))
        ]
        least = int(np.argmin(errors))
        best = least if errors[least] < (1 - LEAN) * errors[0] else 0
    return solved(parts, best)
