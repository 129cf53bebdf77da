"""What every method is given to work with, and what it hands back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from xdonnx.convert import Program
from xdonnx.events import Log, ignore
from xdonnx.journal import Journal
from xdonnx.patch import Patch
from xdonnx.pool import Pool
from xdonnx.shelf import Room


@dataclass(frozen=True)
class Bench:
    """What a method works with besides the net: the torch program, randomness, and where to report.

    Parameters
    ----------
    program : Program
        Every step checked against onnxruntime.
    generator : torch.Generator
    log : callable
    room : Room
        For the activations of a walk.
    journal : Journal, optional
        Where finished layers are kept, and found again by a job that goes on.
    pool : Pool, optional
        Unlabelled images besides the shots, for methods that draw from them.
    judges : tuple of int
        Shots of a method that trains what another left, by their place: no method before it saw them, so they judge.
        Empty where there are too few to set any apart.
    """

    program: Program
    generator: torch.Generator
    log: Log = ignore
    room: Room = field(default_factory=Room)
    journal: Journal | None = None
    pool: Pool | None = None
    judges: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """What happened at one layer.

    `objective_before` is the error of the removal alone, `objective_after` that after the refit; both are shares of the
    teacher's output energy (without its bias where that is not refitted), under the regression connection; of a given
    student, where a ReLU reads the layer, of what that lets pass. None where the layer was left as it is on inputs that
    differ. `pool` is the weight that the pool had in the refit, all its rows together, where the samples have 1,
    whatever it had in the choice of what goes; None where it had no part.
    """

    layer: str
    objective_before: float | None
    objective_after: float | None
    seconds: float
    pool: float | None = None


@dataclass(frozen=True)
class Outcome:
    """A method's patch and what it saw on the way."""

    patch: Patch
    traces: tuple[Trace, ...] = field(default_factory=tuple)
