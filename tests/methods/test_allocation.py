"""Error curves are what replacing the weights really does, and the split by them keeps its target."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import nets
import numpy as np
import onnx
import pytest
import torch

from xdonnx import allocation
from xdonnx.allocation import LEVELS, Curve, allocate, measure_curves
from xdonnx.budget import Budget, Plan, make_plan, target
from xdonnx.convert import convert
from xdonnx.errors import NothingToDo
from xdonnx.events import Event
from xdonnx.graph import Net, read_net
from xdonnx.patch import Patch, masked
from xdonnx.runtime import answer, open_session

CHAIN = """
g (float[N,3,8,8] image, float[8,3,3,3] w1, float[8,8,3,3] w2, float[8,8,3,3] w3, float[4,8,1,1] w4)
  => (float[N,4,h,w] out) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1)
  r1 = Relu (c1)
  c2 = Conv <pads = [1,1,1,1], strides = [2,2]> (r1, w2)
  r2 = Relu (c2)
  c3 = Conv <pads = [1,1,1,1]> (r2, w3)
  r3 = Relu (c3)
  out = Conv (r3, w4)
}"""
NET = read_net(nets.from_text(CHAIN))
PLAIN = nets.build("plain")


def curves_of(net: Net, inputs: Mapping[str, np.ndarray], groups: list[int]) -> tuple[Curve, ...]:
    return measure_curves(net, convert(net, torch.device("cpu")), inputs, groups)


def value(model: onnx.ModelProto, name: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return any value of a model as onnxruntime computes it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if name not in {output.name for output in copy.graph.output}:
        copy.graph.output.append(onnx.ValueInfoProto(name=name))
    return answer(open_session(copy, optimize=False), inputs)[name]


def unrolled(x: np.ndarray) -> np.ndarray:
    """Return the columns (c * 9 + 1, n * h * w) of a 3x3 convolution padded by one, the bias's ones last."""
    n, c, h, w = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    seen = [padded[:, at, i : i + h, j : j + w] for at in range(c) for i in range(3) for j in range(3)]
    return np.concatenate([np.stack(seen).reshape(c * 9, -1), np.ones((1, n * h * w))])


def fitted(matrix: np.ndarray, hess: np.ndarray, alive: np.ndarray, pull: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the best matrix on the columns that are left, and its error, pull included."""
    right = (matrix @ hess + matrix * pull)[:, alive]
    damped = hess + np.diag(pull)
    made = np.zeros_like(matrix)
    made[:, alive] = np.linalg.solve(damped[np.ix_(alive, alive)], right.T).T
    return made, float(((made - matrix) @ damped * (made - matrix)).sum())


def test_a_curve_is_what_onnxruntime_says_of_the_masked_model() -> None:
    net, inputs = read_net(PLAIN), nets.samples(PLAIN, rows=6)
    curve = curves_of(net, inputs, [0])[0]

    columns = unrolled(value(masked(net, Patch()), "p1", inputs).astype(np.float64))
    hess = columns @ columns.T / columns.shape[1]
    matrix = np.concatenate([net.array("w2").reshape(6, -1), net.array("b2")[:, None]], 1).astype(np.float64)
    pull = np.full(73, 0.01 * np.diag(hess)[:-1].mean())
    pull[-1] *= 1e-6
    channel = np.append(np.repeat(np.arange(8), 9), -1)
    whole = value(masked(net, Patch()), "out", inputs)
    left, points = list(range(8)), [(8, 0.0)]
    while len(left) > 1:
        # What leaves is what is missed least once the others have adapted.
        rises = {c: fitted(matrix, hess, np.isin(channel, [*left, -1]) & (channel != c), pull)[1] for c in left}
        left.remove(min(rises, key=lambda c: rises[c]))
        made, _ = fitted(matrix, hess, np.isin(channel, [*left, -1]), pull)
        new = {"w2": made[:, :-1].reshape(6, 8, 3, 3).astype(np.float32), "b2": made[:, -1].astype(np.float32)}
        gone = {int(net.groups[0].ids[c]) for c in range(8) if c not in left}
        found = value(masked(net, Patch(new, frozenset(gone))), "out", inputs)
        points.append((len(left), float(np.square(found - whole).sum() / np.square(whole).sum())))

    assert [kept for kept, _ in curve.points] == [kept for kept, _ in points] == list(range(8, 0, -1))
    assert [error for _, error in curve.points] == pytest.approx([error for _, error in points], rel=1e-3)


@pytest.mark.parametrize("name", nets.ALL)
def test_curves_start_at_nothing_and_fall_in_kept(name: str) -> None:
    model = nets.build(name)
    net, events = read_net(model), list[Event]()
    groups = list(range(len(net.groups)))
    program = convert(net, torch.device("cpu"))
    curves = measure_curves(net, program, nets.samples(model), groups, events.append)
    assert [curve.group for curve in curves] == groups
    assert [(event.stage, event.done, event.total) for event in events] == [
        ("curves", at + 1, len(groups)) for at in groups
    ]
    for curve in curves:
        units = len(net.groups[curve.group].ids)
        assert curve.points[0] == (units, 0.0)
        kept = [count for count, _ in curve.points]
        assert kept == sorted(set(kept), reverse=True) and kept[-1] == max(1, round(LEVELS[-1] * units))
        # Few samples and no activation in between: errors are real, not rounding.
        assert all(error >= 0 for _, error in curve.points) and curve.points[-1][1] > 1e-6


def test_a_fixed_batch_is_kept_to() -> None:
    model = nets.build("plain")
    for port in (*model.graph.input, *model.graph.output):
        port.type.tensor_type.shape.dim[0].dim_value = 2
    free = curves_of(read_net(PLAIN), nets.samples(PLAIN, rows=6), [0])
    fixed = curves_of(read_net(model), {"image": nets.samples(PLAIN, rows=7)["image"][:7]}, [0])
    assert [kept for kept, _ in fixed[0].points] == [kept for kept, _ in free[0].points]
    assert fixed[0].points[-1][1] == pytest.approx(free[0].points[-1][1], rel=0.5)


def test_wide_layers_are_ranked_by_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channel 3 is made loud and channel 5 silent: the silent one goes first, the loud one last."""
    net, inputs = read_net(PLAIN), nets.samples(PLAIN, rows=6)
    exact = curves_of(net, inputs, [0])[0]
    monkeypatch.setattr(allocation, "WIDE", 8)
    ranked = curves_of(net, inputs, [0])[0]
    monkeypatch.setattr(allocation, "WIDEST", 8)
    unfitted = curves_of(net, inputs, [0])[0]

    # Ranked once, but refitted: no better than exact choice at the first removal. Not refitted at all: worse by far.
    assert ranked.points[1][1] >= exact.points[1][1] * (1 - 1e-6)
    for (_, fit), (_, raw) in zip(ranked.points[1:], unfitted.points[1:], strict=True):
        assert raw > fit
    # By hand: the channels of the largest energy stay, the weights as they are.
    seen = value(masked(net, Patch()), "p1", inputs)
    columns = unrolled(seen)[:-1]
    energy = (np.square(net.array("w2").reshape(6, -1)).sum(0) * np.square(columns).mean(1)).reshape(8, 9).sum(1)
    gone = frozenset(int(net.groups[0].ids[c]) for c in np.argsort(energy)[:4])
    whole = value(masked(net, Patch()), "out", inputs)
    halved = value(masked(net, Patch({}, gone)), "out", inputs)
    error = np.square(halved - whole).sum() / np.square(whole).sum()
    assert dict(unfitted.points)[4] == pytest.approx(error, rel=1e-4)


def test_features_that_come_before_a_layer_do_not_dilute_its_error() -> None:
    model = nets.build("residual")
    net, inputs = read_net(model), nets.samples(model)
    at = next(at for at, group in enumerate(net.groups) if "out" in group.readers)
    group = net.groups[at]
    # Keeping all but the readers' last step: only the product at the end changes if its reader alone is silenced.
    probe = allocation._Probe(net, convert(net, torch.device("cpu")), inputs, 1)
    assert len(probe.wanted) == 2 and group.readers[-1] == "out"
    silent = {"wf": torch.zeros(5, 8), "bf": torch.zeros(5)}
    assert probe.error(silent) == pytest.approx(1.0)


def convex(group: int, steps: list[float]) -> Curve:
    """Return a curve over 8 channels that rises by these steps from 8 kept to 1."""
    return Curve(group, tuple(zip(range(8, 0, -1), [0.0, *np.cumsum(steps).tolist()], strict=True)))


def total(curves: list[Curve], channels: Mapping[int, int]) -> float:
    return sum(dict(curve.points)[channels.get(curve.group, 8)] for curve in curves)


def best(curves: list[Curve], budget: Budget) -> float:
    """Return the least sum of errors within the target, of all splits there are."""
    goal = target(NET, budget)
    cost, limit = goal.cost, goal.limit
    splits = (dict(enumerate(kept)) for kept in itertools.product(range(1, 9), repeat=3))
    return min(total(curves, split) for split in splits if cost(split) <= limit)


@pytest.mark.parametrize(
    ("kind", "amount"), [*(("params", a) for a in (0.25, 0.5, 0.75)), ("macs", 0.25), ("macs", 0.4)]
)
def test_the_split_of_convex_curves_is_the_best_there_is(kind: str, amount: float) -> None:
    """Of all 512 splits; elsewhere whole steps can leave it a little behind, which the next test bounds."""
    curves = [convex(at, [scale * 2.0**step for step in range(7)]) for at, scale in enumerate((1e-4, 1e-2, 1e-3))]
    budget = Budget(kind, amount, round_to=1)
    plan = allocate(NET, curves, budget)
    goal = target(NET, budget)
    cost, limit = goal.cost, goal.limit
    assert cost(plan.channels) <= limit
    assert total(curves, plan.channels) == pytest.approx(best(curves, budget))
    assert plan.channels.get(0, 8) < plan.channels.get(1, 8), "the cheap layer loses more than the dear one"


@pytest.mark.parametrize("seed", range(40))
def test_no_split_exceeds_its_target_or_is_worse_than_the_same_fraction_everywhere(seed: int) -> None:
    draw = np.random.default_rng(seed)
    curves = [convex(at, np.sort(draw.exponential(size=7) ** 2).tolist()) for at in range(3)]
    budget = Budget(["macs", "params"][seed % 2], float(draw.uniform(0.2, 0.8)), round_to=1)
    goal = target(NET, budget)
    cost, limit = goal.cost, goal.limit
    plan = allocate(NET, curves, budget)
    assert cost(plan.channels) <= limit
    assert total(curves, plan.channels) <= total(curves, make_plan(NET, budget).channels)
    assert total(curves, plan.channels) <= 1.75 * best(curves, budget)


def test_a_cheap_stretch_behind_a_steep_one_is_found() -> None:
    """Group 0 jumps at its first step and then loses nothing more: its hull is what counts."""
    curves = [convex(0, [0.1, 0, 0, 0, 0, 0, 0]), convex(1, [0.05] * 7), convex(2, [0.05] * 7)]
    plan = allocate(NET, curves, Budget("params", 0.5, round_to=1))
    assert plan.channels[0] == 1


def test_without_any_error_measured_all_layers_lose_alike() -> None:
    budget = Budget("macs", 0.5, round_to=1)
    assert allocate(NET, [convex(at, [0.0] * 7) for at in range(3)], budget) == make_plan(NET, budget)


@pytest.mark.parametrize(("rounding", "allowed"), [(None, {4, 8}), (2, {2, 4, 6, 8}), (3, {3, 6, 8}), (16, set())])
def test_rounding_is_obeyed(rounding: int | None, allowed: set[int]) -> None:
    curves = [convex(at, [10.0**-at] * 7) for at in range(3)]
    budget = Budget("macs", 0.6, round_to=rounding)
    if not allowed:
        with pytest.raises(NothingToDo, match="out of reach"):
            allocate(NET, curves, budget)
        return
    plan = allocate(NET, curves, budget)
    assert set(plan.channels.values()) <= allowed and min(plan.channels.values()) < 8


def test_what_an_even_split_reaches_a_measured_one_reaches_too() -> None:
    """Curves end at an eighth of the channels; the target may ask for less than that."""
    short = [Curve(at, ((8, 0.0), (4, 0.1), (2, 0.3))) for at in range(3)]
    goal = target(NET, (budget := Budget("macs", 0.07, round_to=1)))
    cost, limit = goal.cost, goal.limit
    assert isinstance(make_plan(NET, budget), Plan)
    plan = allocate(NET, short, budget)
    assert cost(plan.channels) <= limit and min(plan.channels.values()) == 1
    # Where it need not, nothing goes below what was measured.
    enough = 1.001 * cost(dict.fromkeys(range(3), 2)) / cost({})
    assert allocate(NET, short, Budget("macs", enough, round_to=1)).channels == dict.fromkeys(range(3), 2)


def test_out_of_reach_is_nothing_to_do() -> None:
    with pytest.raises(NothingToDo, match=r"out of reach: .* remain") as raised:
        allocate(NET, [convex(at, [1.0] * 7) for at in range(3)], Budget("macs", 0.01, round_to=1))
    assert raised.value.exit_code == 7


def test_coarse_curves_are_scaled_to_the_error_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"image": np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)}
    groups = [at for at, group in enumerate(NET.groups) if not group.stream]
    fine = curves_of(NET, inputs, groups)
    monkeypatch.setattr(allocation, "WORK", 0)
    coarse = curves_of(NET, inputs, groups)
    assert len(coarse) == 3
    for one, other in zip(fine, coarse, strict=True):
        assert [kept for kept, _ in other.points] == [8, 6, 4, 2]
        errors = [error for _, error in other.points]
        assert errors[0] == 0 and errors == sorted(errors)
        # Fewer samples measure it, so it is not the same to the last digit.
        assert errors[2] == pytest.approx(dict(one.points)[4], rel=0.3)
