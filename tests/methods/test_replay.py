"""What is computed again after a change of weights, and where a walk may end."""

from __future__ import annotations

import nets
import numpy as np
import pytest
import torch

from xdonnx import replay as module
from xdonnx.convert import convert
from xdonnx.graph import read_net
from xdonnx.replay import Replay
from xdonnx.student import execute, find_taps, teacher_weights
from xdonnx.walk import walk

NETS = ["plain", "residual", "grouped", "depthwise", "signal"]


def opened(name):
    net = read_net(nets.build(name))
    program = convert(net, torch.device("cpu"))
    generator = torch.Generator().manual_seed(4)
    inputs = {
        port.name: torch.randn([3, *(int(size) for size in port.shape[1:])], generator=generator)
        for port in net.interface.inputs
    }
    return net, program, inputs


@pytest.mark.parametrize("room", [None, 0], ids=["held", "no room"])
@pytest.mark.parametrize("name", NETS)
def test_a_changed_layer_gives_what_the_whole_network_gives(name, room):
    net, program, inputs = opened(name)
    weights, wanted = teacher_weights(net, torch.device("cpu")), find_taps(net, program).all
    replay = Replay(program, inputs, weights, wanted, room)

    for layer in net.layers.values():
        changed = {layer.weight: 0.5 * weights[layer.weight]}
        found = replay.changed(changed)
        truth = execute(program, inputs, {**weights, **changed}, wanted)
        for mine, theirs in zip(found, truth, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    # Nothing that was held has changed.
    for mine, theirs in zip(replay.changed({}), execute(program, inputs, weights, wanted), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_what_a_change_does_not_reach_is_not_computed_anew(monkeypatch):
    net, program, inputs = opened("residual")
    weights, wanted = teacher_weights(net, torch.device("cpu")), find_taps(net, program).all
    replay = Replay(program, inputs, weights, wanted)
    ran = []
    real = module._made
    monkeypatch.setattr(module, "_made", lambda step, *rest: ran.append(step.name) or real(step, *rest))
    (*_, last) = net.layers.values()

    replay.changed({last.weight: 2 * weights[last.weight]})

    assert ran[0] == last.name
    assert not set(ran) & (set(net.layers) - {last.name})


def test_a_walk_that_ends_at_a_layer_stops_there_as_the_whole_walk_does():
    net, program, inputs = opened("residual")
    arrays = {name: x.numpy() for name, x in inputs.items()}
    names = list(net.layers)
    whole, part = {}, {}

    def note(seen):
        def visit(stop):
            seen[stop.layer.name] = [chunk.numpy().copy() for chunk in stop.student]
            return 0.5 * stop.weight, stop.bias

        return visit

    walk(net, program, arrays, note(whole))
    walk(net, program, arrays, note(part), answers=False, last=names[1])

    assert list(part) == names[:2] and list(whole) == names
    for name, chunks in part.items():
        for mine, theirs in zip(chunks, whole[name], strict=True):
            np.testing.assert_array_equal(mine, theirs)
