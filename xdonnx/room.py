"""How much of the machine's memory the activations of a walk may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from xdonnx.events import Event, Log, ignore
from xdonnx.figures import amount
from xdonnx.graph import Net
from xdonnx.machine import SHARE, free_memory, peak_memory, taken_memory
from xdonnx.methods.joint import WIDEST
from xdonnx.shelf import Room
from xdonnx.walk import chunked, largest_value

# Matrices of d x d in float64 that the fit of one layer holds at once, and chunks of the largest value.
_MATRICES, _CHUNKS = 9, 8


@dataclass(frozen=True)
class Allowance:
    """What a job may take, and the room for activations that this leaves.

    Parameters
    ----------
    limit : int
        Bytes of memory, of the GPU where one runs the job.
    room : Room
    device : str
    """

    limit: int
    room: Room
    device: str

    def peak(self) -> int:
        """Return the most bytes that were taken so far."""
        if self.device == "cpu":
            return peak_memory()
        return int(torch.cuda.max_memory_reserved(torch.device(self.device)))


def allowance(
    net: Net, inputs: Mapping[str, np.ndarray], device: str, asked: int | None = None, log: Log = ignore
) -> Allowance:
    """Return what a job may take from here on.

    Parameters
    ----------
    inputs : {graph input: (n, ...)}
        The samples that fit.
    asked : int, optional
        Bytes, at most. By default `SHARE` of what is free.
    """
    if device == "cpu":
        taken, free = taken_memory(), free_memory()
    else:
        free, whole = torch.cuda.mem_get_info(torch.device(device))
        taken = whole - free
    limit = asked if asked is not None else int(taken + SHARE * free)
    needed = taken + working_memory(net, inputs)
    if needed > limit:
        text = (
            f"the job may take {amount(limit, 'B')}, and needs about {amount(needed, 'B')} besides activations: "
            "these go to files, and the peak may pass the limit."
        )
        log(Event("fit", text, level="warning"))
    return Allowance(limit, Room(max(0, limit - needed)), device)


def working_memory(net: Net, inputs: Mapping[str, np.ndarray]) -> int:
    """Return about how many bytes the fit of the largest layer takes, and the chunks that a step works on."""
    rows = max((len(next(iter(batch.values()))) for batch in chunked(net, inputs)), default=1)
    system = max((layer.groups * min(len(layer.columns), WIDEST) ** 2 for layer in net.layers.values()), default=0)
    return _MATRICES * 8 * system + _CHUNKS * 4 * rows * largest_value(net)
