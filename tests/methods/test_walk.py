"""Walks that end early, students that read fewer channels, replays, and targets, each against the long way round."""

from __future__ import annotations

from typing import Any

import nets
import numpy as np
import pytest
import torch

from xdonnx import replay
from xdonnx import walk as module
from xdonnx.budget import Budget, macs, params, pretend, target
from xdonnx.convert import Program, convert, run_layer
from xdonnx.graph import Net, read_net
from xdonnx.replay import Replay
from xdonnx.student import execute, find_taps, teacher_weights
from xdonnx.walk import Stop, walk

every_net = pytest.mark.parametrize(
    "name", ["residual", "grouped", "transposed", "padded", "product", "signal", "gate"]
)


def opened(name: str) -> tuple[Net, Program, dict[str, np.ndarray]]:
    net = read_net(nets.build(name))
    return net, convert(net, torch.device("cpu")), nets.samples(net.source, 5, seed=1)


@every_net
def test_a_walk_ends_at_its_last_layer(name: str) -> None:
    net, program, inputs = opened(name)
    layers = list(net.layers)
    for at, last in enumerate(layers):
        seen: list[str] = []
        found = walk(net, program, inputs, lambda stop, seen=seen: seen.append(stop.layer.name), last=last)  # type: ignore[misc]
        assert seen == layers[: at + 1] and found == ({}, {})


@every_net
def test_a_student_is_the_same_whether_it_reads_the_channels_that_are_gone_or_not(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, program, inputs = opened(name)
    read: list[int] = []

    def spied(layer: Any, x: torch.Tensor, *own: Any) -> torch.Tensor:
        read.append(x.shape[1])
        return run_layer(layer, x, *own)

    monkeypatch.setattr(module, "run_layer", spied)

    def half(stop: Stop) -> Any:
        weight = stop.weight.clone()
        weight[:, ::2] = 0
        return weight, stop.bias

    found, widths = [], []
    for most in (module.MOST_READ, 0.0):
        monkeypatch.setattr(module, "MOST_READ", most)
        read.clear()
        found.append(walk(net, program, inputs, half)[1])
        widths.append(sum(read))

    for port in net.interface.outputs:
        for few, all_of_them in zip(found[0][port.name], found[1][port.name], strict=True):
            torch.testing.assert_close(few, all_of_them, rtol=1e-4, atol=1e-5)
    plain = [layer for layer in net.layers.values() if layer.op == "Conv" and layer.groups == 1]
    assert (widths[0] < widths[1]) == any(net.array(layer.weight).shape[1] > 1 for layer in plain)


@every_net
@pytest.mark.parametrize("room", [None, 0], ids=["held", "without room"])
def test_a_replay_answers_as_a_whole_run(name: str, room: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    net, program, inputs = opened(name)
    weights, wanted = teacher_weights(net, program.device), find_taps(net, program).all
    batch = {port: torch.tensor(array) for port, array in inputs.items()}
    held = Replay(program, batch, weights, wanted, room)
    runs: list[str] = []

    def spied(layer: Any, *own: Any) -> torch.Tensor:
        runs.append(layer.name)
        return run_layer(layer, *own)

    monkeypatch.setattr(replay, "run_layer", spied)

    for layer in net.layers.values():
        changed = {layer.weight: weights[layer.weight] * 0.5}
        for mine, whole in zip(
            held.changed(changed), execute(program, batch, {**weights, **changed}, wanted), strict=True
        ):
            assert torch.equal(mine, whole)
        # What lies before the layer is not computed anew.
        assert not set(runs) & set(list(net.layers)[: list(net.layers).index(layer.name)])
        runs.clear()


@every_net
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_a_target_counts_as_the_whole_network_is_counted(name: str, kind: str) -> None:
    net = read_net(nets.build(name))
    goal, count = target(net, Budget(kind, 0.5)).cost, {"macs": macs, "params": params}[kind]
    random = np.random.default_rng(0)
    fixed = goal({}) - count(net, pretend(net, {}))
    for _ in range(20):
        channels = {
            at: int(random.integers(1, len(group.ids) + 1))
            for at, group in enumerate(net.groups)
            if random.random() < 0.7
        }
        assert goal(channels) == fixed + count(net, pretend(net, channels))
