"""A network run again and again with other weights in a few layers: what these do not change is not computed anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from xdonnx.convert import Program, Step, call, run_layer, stored
from xdonnx.student import Weights, execute

# What all values of a few samples may take to be held, without regard to what else there is.
MOST_BYTES = 1 << 28


class Replay:
    """A program on some samples, whose values are held where there is room.

    Parameters
    ----------
    program : Program
    inputs : {graph input: (n, ...)}
    weights : {initializer: tensor}
        Of all layers.
    wanted : tuple of str
        The values that are compared.
    room : int, optional
        Bytes that values may take.

    Attributes
    ----------
    truth : list of Tensor
        The wanted values with these weights.
    """

    def __init__(
        self,
        program: Program,
        inputs: Mapping[str, Tensor],
        weights: Weights,
        wanted: tuple[str, ...],
        room: int | None = None,
    ) -> None:
        self._program, self._inputs, self._weights, self._wanted = program, inputs, weights, wanted
        self._held: dict[str, Any] | None = {**program.constants, **inputs}
        room = MOST_BYTES if room is None else min(room, MOST_BYTES)
        for step in program.steps:
            for name, value in _made(step, weights, self._held):
                self._held[name] = value
                room -= getattr(value, "nbytes", 0)
            if room < 0:
                break
        if room < 0:
            self._held = None
            self.truth = execute(program, inputs, weights, wanted)
        else:
            self.truth = [self._held[name] for name in wanted]

    def changed(self, weights: Weights) -> list[Tensor]:
        """Return the wanted values with these weights in place of the program's own."""
        if self._held is None:
            return execute(self._program, self._inputs, {**self._weights, **weights}, self._wanted)
        fresh: dict[str, Any] = {}
        every = {**self._weights, **weights}
        for at, step in enumerate(self._program.steps):
            own = () if step.layer is None else (step.layer.weight, step.layer.bias)
            if not any(name in weights for name in own) and not any(name in fresh for name in step.inputs):
                continue
            fresh.update(_made(step, every, {name: fresh.get(name, self._held.get(name)) for name in step.inputs}))
            for name in step.inputs:
                if self._program.last_read.get(name) == at and name not in self._wanted:
                    fresh.pop(name, None)
        return [fresh.get(name, truth) for name, truth in zip(self._wanted, self.truth, strict=True)]


def _made(step: Step, weights: Weights, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return (name, value) of what a step makes."""
    made: tuple[Any, ...]
    if step.layer is None:
        made = call(step, [values[name] if name else None for name in step.inputs])
    else:
        layer = step.layer
        bias = None if layer.bias is None else weights[layer.bias]
        made = (run_layer(layer, values[layer.input], stored(layer, weights[layer.weight]), bias),)
    return [(name, value) for name, value in zip(step.outputs, made, strict=False) if name]
