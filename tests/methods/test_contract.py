"""What every method promises, over the table of methods and the small teachers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import nets
import numpy as np
import pytest
import torch
from helpers import same_answers

from xdonnx.budget import Budget, Plan, make_plan
from xdonnx.convert import checked, convert
from xdonnx.errors import JobError, NothingToDo
from xdonnx.graph import Net, read_net
from xdonnx.methods import METHODS, make
from xdonnx.methods.bench import Bench, Outcome
from xdonnx.patch import Patch, cut, kept, masked
from xdonnx.runtime import answer, open_session
from xdonnx.shots import Shots

STRUCTURES = ["channel", "element", "2:4"]


def legal(method: str, structure: str) -> bool:
    try:
        make(method, {}).check(structure)
    except JobError:
        return False
    return True


PAIRS = [(method, structure) for method in METHODS for structure in STRUCTURES if legal(method, structure)]


@cache
def parsed(name: str) -> Net:
    return read_net(nets.build(name))


def compressed(name: str, method: str, structure: str, **options: Any) -> tuple[Net, Plan, Outcome, Mapping[str, Any]]:
    net = parsed(name)
    inputs = nets.samples(net.source, 12)
    kind = "macs" if structure == "channel" else "keep"
    plan = make_plan(net, Budget("keep" if kind == "macs" else kind, 0.5, structure, residual=True))
    bench = Bench(checked(net, convert(net, torch.device("cpu")), inputs), torch.Generator().manual_seed(0))
    shots = Shots(inputs, np.arange(12) % 2, tuple(map(str, range(12))))
    found, patch = make(method, {"steps": 6, **options}), Patch()
    if getattr(found, "follows", False):
        patch = make("l1-norm", {})(net, patch, shots, plan, bench).patch
    return net, plan, found(net, patch, shots, plan, bench), inputs


TWO_READERS = """
g (float[N,3,8,8] image, float[16,3,3,3] w1, float[16] b1, float[8,16,3,3] w2, float[8] b2, float[8,16,1,1] w3,
   float[8] b3, float[16,4] w4, float[4] b4) => (float[N,4] out) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1, b1)
  r1 = Relu (c1)
  c2 = Conv <pads = [1,1,1,1]> (r1, w2, b2)
  c3 = Conv (r1, w3, b3)
  k = Concat <axis = 1> (c2, c3)
  p = GlobalAveragePool (k)
  f = Flatten (p)
  out = Gemm (f, w4, b4)
}"""
CHAINS = [("l1-norm", method) for method, structure in PAIRS if structure == "channel"] + [("cross", "l1-norm")]


@pytest.mark.parametrize(("first", "second"), CHAINS)
def test_what_an_earlier_method_took_counts_toward_the_plan_where_several_layers_read(first: str, second: str) -> None:
    net = read_net(nets.from_text(TWO_READERS, seed=3))
    plan = make_plan(net, Budget("keep", 0.5))
    assert any(len(net.groups[at].readers) > 1 for at in plan.channels)
    inputs = nets.samples(net.source, 12)
    shots = Shots(inputs, np.arange(12) % 2, tuple(map(str, range(12))))
    bench = Bench(checked(net, convert(net, torch.device("cpu")), inputs), torch.Generator().manual_seed(0))

    before = make(first, {})(net, Patch(), shots, plan, bench).patch
    after = make(second, {"steps": 6})(net, before, shots, plan, bench).patch

    assert after.drop == before.drop
    assert {at: int(kept(net, after)[net.groups[at].ids].sum()) for at in plan.channels} == plan.channels


@pytest.mark.parametrize("name", nets.ALL)
@pytest.mark.parametrize(("method", "structure"), PAIRS)
def test_every_method_keeps_the_contract(method: str, name: str, structure: str) -> None:
    try:
        net, plan, outcome, inputs = compressed(name, method, structure)
    except JobError as error:
        assert method == "bp" and "no row of scores" in str(error)
        return
    except NothingToDo:
        assert structure != "channel" and len([la for la in parsed(name).layers.values() if la.kernel]) == 1
        return
    patch = outcome.patch
    # The teacher's shapes,
    for tensor, array in patch.tensors.items():
        assert array.shape == net.array(tensor).shape
        assert array.dtype == net.array(tensor).dtype
        assert np.isfinite(array).all()
    # the budget,
    keep = kept(net, patch)
    for at, count in plan.channels.items():
        assert int(keep[net.groups[at].ids].sum()) == count
    for layer, count in plan.weights.items():
        assert np.count_nonzero(patch.tensors[net.layers[layer].weight]) <= count
    for layer in plan.layers:
        runs = np.abs(patch.tensors[net.layers[layer].weight]) > 0
        if net.layers[layer].op == "ConvTranspose":
            runs = runs.swapaxes(0, 1)  # stored input channels first
        for start in range(0, runs.shape[1], 4):
            assert (runs[:, start : start + 4].sum(1) <= 2).all()
    # and the promise of the cut.
    same_answers(masked(net, patch), cut(net, patch), inputs)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_patch(method: str) -> None:
    first, second = (compressed("residual", method, "channel")[2].patch for _ in range(2))
    assert first.drop == second.drop
    assert all(np.array_equal(array, second.tensors[name]) for name, array in first.tensors.items())


def error(name: str, method: str, structure: str, **options: Any) -> float:
    net, _, outcome, inputs = compressed(name, method, structure, **options)
    (teacher,), (student,) = (answer(open_session(m), inputs).values() for m in (net.source, cut(net, outcome.patch)))
    return float(np.square(teacher - student).sum() / np.square(teacher).sum())


@pytest.mark.parametrize("structure", ["channel", "element"])
@pytest.mark.parametrize("name", sorted(set(nets.ALL) - {"flatten", "product"}))
def test_cross_is_no_worse_than_l1_norm_on_the_shots(name: str, structure: str) -> None:
    assert error(name, "cross", structure) <= error(name, "l1-norm", structure) * 1.02


@pytest.mark.parametrize("effort", ["fast", "best", "paper"])
def test_every_effort_runs_and_fits(effort: str) -> None:
    assert error("plain", "cross", "channel", effort=effort) < error("plain", "l1-norm", "channel")


@pytest.mark.parametrize("connection", ["soft", "cross", "correction", "imitation", "regression"])
@pytest.mark.parametrize("solver", ["pgd", "admm"])
def test_every_connection_and_solver_beats_removal_alone(connection: str, solver: str) -> None:
    fitted = error("residual", "cross", "element", connection=connection, solver=solver)
    assert fitted < error("residual", "l1-norm", "element")


def test_a_layer_too_wide_for_moments_is_fitted_from_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = error("flatten", "cross", "channel")
    monkeypatch.setattr("xdonnx.methods.layerwise.WIDEST", 20)
    wide = error("flatten", "cross", "channel")
    assert wide < error("flatten", "l1-norm", "channel")
    assert wide < 3 * exact + 1e-3


def test_a_layer_too_wide_for_moments_keeps_its_budget_of_single_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xdonnx.methods.layerwise.WIDEST", 20)
    net, plan, outcome, _ = compressed("residual", "cross", "element")
    for name, count in plan.weights.items():
        assert np.count_nonzero(outcome.patch.tensors[net.layers[name].weight]) <= count


def test_l1_norm_keeps_the_filters_of_largest_norm() -> None:
    net, plan, outcome, _ = compressed("plain", "l1-norm", "channel")
    norms = np.abs(net.array("w1")).reshape(8, -1).sum(1)
    group = net.groups[0]
    assert plan.channels == {0: 4}
    left = [int(i) for i in group.ids if int(i) not in outcome.patch.drop]
    assert left == sorted(int(i) for i in group.ids[np.argsort(-norms)[:4]])


def test_a_second_method_keeps_what_the_first_dropped() -> None:
    net, _, first, inputs = compressed("plain", "l1-norm", "channel")
    bench = Bench(checked(net, convert(net, torch.device("cpu")), inputs), torch.Generator().manual_seed(0))
    shots = Shots(dict(inputs), None, tuple(map(str, range(12))))
    second = make("cross", {})(net, first.patch, shots, Plan(), bench)
    assert second.patch.drop == first.patch.drop
