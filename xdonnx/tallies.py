"""How many entries of an axis are left, given how many channels each group keeps: what costs are made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from xdonnx.graph import Net
from xdonnx.labels import Ids


@dataclass(frozen=True)
class Tally:
    """How many entries of an axis are left with so many channels of each group.

    Parameters
    ----------
    whole : int
    gone : mapping
        {group: entries lost, by the number of its channels kept, from 0 on}.
    """

    whole: int
    gone: Mapping[int, np.ndarray]

    def kept(self, channels: Mapping[int, int]) -> int:
        """Return the entries left with these channels {group: kept}."""
        return self.whole - sum(int(lost[channels[at]]) for at, lost in self.gone.items() if at in channels)

    def of(self, groups: Collection[int]) -> Tally:
        """Return what these groups alone change."""
        return Tally(self.whole, {at: lost for at, lost in self.gone.items() if at in groups})


def tally(net: Net, ids: Ids) -> Tally:
    """Count along an axis whose entries bear these labels; a negative label is that of what stays.

    A group keeps its first channels, as in `budget.pretend`: which they are makes no difference to any cost.
    """
    own = ids[ids >= 0]
    often = np.bincount(own, minlength=net.labels)
    gone = {}
    for at, group in enumerate(net.groups):
        each = often[group.ids]
        if each.any():
            gone[at] = int(each.sum()) - np.concatenate([[0], np.cumsum(each)])
    return Tally(len(ids), gone)
