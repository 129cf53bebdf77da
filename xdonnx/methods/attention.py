"""Task-driven attention: the maps of a network at several depths, each squeezed into one vector.

With L_i the map of level i, g a summary of the last map and d_{i+1} the vector of the level above:
  M_i = softmax over the p positions of  w_i . relu(K_i L_i + Q_i [g, d_{i+1}])
  d_i = sum over positions of M_i L_i
so that what was seen coarsely says where to look more finely. The relu is needed: were the scores linear in their sum,
the query would add the same number at every position, and the softmax would cancel it.

d_i is a weighted mean of the network's own features: attention chooses among them and can neither scale nor invent any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers in which keys and queries meet.
FEATURES = 32


@dataclass(frozen=True, eq=False)
class Attention:
    """The weights of one network's attention, levels from fine to coarse.

    Parameters
    ----------
    summary : Tensor (f, c of the last level)
        A 1x1 transform of the last map, which is then averaged.
    keys : tuple of Tensor (f, c_i)
    queries : tuple of Tensor (f, f + width of the vector above)
        Of the last level (f, f).
    scores : tuple of Tensor (f,)
    transforms : tuple of Tensor (teacher's c_i, c_i)
        1x1 transforms to the teacher's widths; none for the teacher. A transform and a mean over positions commute,
        so vectors are transformed rather than maps.
    """

    summary: Tensor
    keys: tuple[Tensor, ...]
    queries: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]
    transforms: tuple[Tensor, ...] = ()

    def parameters(self) -> Iterator[Tensor]:
        """Yield all tensors."""
        yield self.summary
        for part in (self.keys, self.queries, self.scores, self.transforms):
            yield from part

    def trained(self) -> Attention:
        """Return it as tensors of its own that gather gradients."""
        parts = (self.keys, self.queries, self.scores, self.transforms)
        return Attention(_leaf(self.summary), *(tuple(map(_leaf, part)) for part in parts))


def random(rows: int, columns: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return a matrix that keeps the size of what it is multiplied with."""
    return torch.randn(rows, columns, generator=generator).to(device) / math.sqrt(max(1, columns))


def attention(widths: Sequence[int], generator: torch.Generator, device: torch.device) -> Attention:
    """Return the attention of a teacher whose maps have these widths, as it begins: nearly the plain mean."""
    above = (*widths[1:], 0)
    return Attention(
        random(FEATURES, widths[-1], generator, device),
        tuple(random(FEATURES, width, generator, device) for width in widths),
        tuple(random(FEATURES, FEATURES + width, generator, device) for width in above),
        tuple(random(1, FEATURES, generator, device)[0] for _ in widths),
    )


def of_student(teacher: Attention, picks: Sequence[Tensor]) -> Attention:
    """Return the attention of a student as it begins: the teacher's, on the channels that are left.

    Parameters
    ----------
    picks : sequence of Tensor (student's c_i,)
        Which of the teacher's channels each level still has.
    """
    return Attention(
        teacher.summary[:, picks[-1]],
        tuple(key[:, pick] for key, pick in zip(teacher.keys, picks, strict=True)),
        teacher.queries,
        teacher.scores,
        tuple(torch.eye(key.shape[1]).to(key)[:, pick] for key, pick in zip(teacher.keys, picks, strict=True)),
    )


def squeezed(weights: Attention, maps: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the vector of each level, in the teacher's widths.

    Parameters
    ----------
    maps : sequence of Tensor (n, p_i, c_i)
        From fine to coarse; channels last, as they lie in memory.
    scales : sequence of Tensor ()
        The size of the teacher's features at each level: attention reads them in such units.

    Returns
    -------
    tuple of Tensor (n, teacher's c_i)
        In the units of the maps.
    """
    found: list[Tensor] = []
    query = maps[-1].mean(1) / scales[-1] @ weights.summary.T
    for level in reversed(range(len(maps))):
        asked = torch.cat([query, found[0] / scales[level + 1]], 1) if found else query
        values = maps[level]
        keys = values @ (weights.keys[level] / scales[level]).T
        seen = torch.relu(keys + (asked @ weights.queries[level].T).unsqueeze(1))
        share = torch.softmax(seen @ weights.scores[level], 1)
        vector = torch.bmm(share.unsqueeze(1), values).squeeze(1)
        found.insert(0, vector @ weights.transforms[level].T if weights.transforms else vector)
    return tuple(found)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()
