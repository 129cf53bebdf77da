"""A target becomes units kept, or one clear error."""

from __future__ import annotations

import nets
import numpy as np
import onnx
import pytest

from xdonnx.budget import Budget, floor, macs, make_plan, params, pretend
from xdonnx.cost import measure_cost
from xdonnx.errors import JobError, NothingToDo
from xdonnx.graph import read_net
from xdonnx.patch import Patch, cut
from xdonnx.survey import survey

RESIDUAL = read_net(nets.build("residual"))


@pytest.mark.parametrize("name", nets.ALL)
def test_predicted_macs_and_params_are_those_of_the_cut_model(name: str) -> None:
    net = read_net(nets.build(name))
    counts = {at: max(1, len(group.ids) // 2) for at, group in enumerate(net.groups)}
    keep = pretend(net, counts)
    student = cut(net, Patch({}, frozenset(np.flatnonzero(~keep).tolist())))
    shape = [1, *(d.dim_value for d in net.source.graph.input[0].type.tensor_type.shape.dim[1:])]
    cost = measure_cost(student, {"image": tuple(shape)})
    assert macs(net, keep) == cost.macs
    weights = {la.weight for la in net.layers.values()} | {la.bias for la in net.layers.values()}
    sizes = {t.name: int(np.prod(t.dims)) for t in student.graph.initializer}
    assert params(net, keep) == sum(sizes[name] for name in weights if name)


@pytest.mark.parametrize("target", [0.9, 0.7, 0.5])
def test_the_macs_target_is_met_and_not_by_far_missed(target: float) -> None:
    whole = macs(RESIDUAL, np.ones(RESIDUAL.labels, bool))
    plan = make_plan(RESIDUAL, Budget("macs", target, round_to=1, residual=True))
    spent = macs(RESIDUAL, pretend(RESIDUAL, plan.channels)) / whole
    assert target - 0.2 < spent <= target


def test_a_weight_that_two_layers_share_is_counted_once() -> None:
    net = read_net(
        nets.from_text("""
g (float[N,3,8,8] image, float[8,3,3,3] w1, float[8] b1, float[8,8,3,3] w2, float[8] b2, float[8,8,3,3] w3, float[8] b3)
  => (float[N,8,8,8] out) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1, b1)
  c2 = Conv <pads = [1,1,1,1]> (c1, w2, b2)
  c3 = Conv <pads = [1,1,1,1]> (c2, w2, b2)
  out = Conv <pads = [1,1,1,1]> (c3, w3, b3)
}""")
    )
    whole = params(net, np.ones(net.labels, bool))
    (free,) = make_plan(net, Budget("params", 0.75, "element")).weights.items()

    assert free == ("out", 8 * 8 * 9 - whole // 4)
    assert floor(net, Budget("params", 0.75, "element")) == 1 - 8 * 8 * 9 / whole
    assert survey(net).params == whole


def test_streams_go_only_when_asked_for() -> None:
    assert set(make_plan(RESIDUAL, Budget("keep", 0.5)).channels) == {1}
    assert set(make_plan(RESIDUAL, Budget("keep", 0.5, residual=True)).channels) == {0, 1}


def test_round_to_keeps_multiples() -> None:
    plan = make_plan(RESIDUAL, Budget("keep", 0.6, round_to=4))
    assert plan.channels == {1: 4}
    # 0.6 of 8 channels is 5 when nothing asks for multiples.
    assert make_plan(RESIDUAL, Budget("keep", 0.6)).channels == {1: 5}


def test_patterns_go_by_the_layers_that_make_channels() -> None:
    net = read_net(nets.build("concat"))
    assert set(make_plan(net, Budget("keep", 0.5, include=("c2",))).channels) == {1}
    assert set(make_plan(net, Budget("keep", 0.5, exclude=("c[12]",))).channels) == {2}


def test_element_plans_skip_the_first_convolution_and_the_classifier() -> None:
    plan = make_plan(RESIDUAL, Budget("keep", 0.25, "element"))
    assert plan.weights == {"c1": 144, "c2": 144}


def test_params_of_an_element_plan_counts_what_stays() -> None:
    plan = make_plan(RESIDUAL, Budget("params", 0.5, "element"))
    total = sum(layer.params for layer in RESIDUAL.layers.values())
    left = total - 2 * 576 + sum(plan.weights.values())
    assert abs(left - 0.5 * total) <= 2


@pytest.mark.parametrize(
    ("budget", "kind", "text"),
    [
        (Budget("keep", 0.0), JobError, "above 0 and below 1"),
        (Budget("keep", 1.5), JobError, "above 0 and below 1"),
        (Budget("keep", 1.0), JobError, "above 0 and below 1"),
        (Budget("macs", 1.0), JobError, "One per cent is 1%"),
        (Budget("speed", 0.5), JobError, "unknown target"),
        (Budget("latency", 0.5), JobError, "needs a goal"),
        (Budget("keep", 0.5, "circle"), JobError, "unknown structure 'circle'"),
        (Budget("keep", 0.5, "4:2"), JobError, "unknown structure"),
        (Budget("keep", 0.5, round_to=0), JobError, "1 or more"),
        (Budget("keep", 0.5, include=("conv9*",)), JobError, "--include 'conv9\\*' matches no layer"),
        (Budget("keep", 0.5, exclude=("C1",)), JobError, "such as 'c1'"),
        (Budget("macs", 0.5, "element"), JobError, "multiplied all the same"),
        (Budget("macs", 0.01), NothingToDo, "out of reach"),
        (Budget("params", 0.001, "element"), NothingToDo, "out of reach"),
        (Budget("keep", 0.5, exclude=("c1",)), NothingToDo, "--residual would free"),
    ],
)
def test_a_target_that_makes_no_sense_is_one_clear_error(budget: Budget, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        make_plan(RESIDUAL, budget)


def test_a_model_in_which_nothing_may_go_says_why() -> None:
    text = """
g (float[N,3,8,8] image, float[8,3,3,3] w1) => (float[N,8,8,8] out) { out = Conv <pads = [1,1,1,1]> (image, w1) }"""
    model = nets.from_text(text)
    assert isinstance(model, onnx.ModelProto)
    with pytest.raises(NothingToDo, match="it is graph output 'out'"):
        make_plan(read_net(model), Budget("keep", 0.5))
