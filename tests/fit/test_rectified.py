"""Fits to what passes a ReLU, against a plain minimiser of the error as the docstring writes it down."""

from __future__ import annotations

import nets
import numpy as np
import pytest
import torch
from test_direct import other_branch

from xdonnx import rectified as module
from xdonnx.budget import Budget, make_plan
from xdonnx.columns import to_matrix, unroll
from xdonnx.connection import regression, soft
from xdonnx.convert import convert, stored
from xdonnx.direct import Seen, measure_directly
from xdonnx.graph import read_net
from xdonnx.methods.bench import Bench
from xdonnx.methods.layerwise import Rule, layerwise
from xdonnx.patch import Patch
from xdonnx.rectified import cost, rectified
from xdonnx.solve import Greedy, refit
from xdonnx.walk import walk
from xdonnx.wiring import before_relu

HOW = {"bias": True, "each": 0}
RIDGE = 0.01


def problem(random_layer, seed=3, *, beside=False, **case):
    """A layer that lost a third of its columns, and its least-squares fit."""
    layer = random_layer(seed, **case)
    teacher = to_matrix(layer.weight, layer.bias, layer.geometry)
    sides = other_branch(layer) if beside else None
    seen = Seen(layer.teacher.split(2), layer.student.split(2), sides, layer.geometry)
    mask = torch.ones_like(teacher, dtype=torch.bool)
    mask[..., : teacher.shape[2] // 3] = False
    candidate = (soft(0.9, 0.5), RIDGE)
    quadratic = measure_directly(seen, candidate, teacher, dtype=torch.float64, **HOW)
    return layer, seen, candidate, teacher, mask, refit(quadratic, mask, teacher)


def error(layer, seen, candidate, teacher, weights, *, summed):
    """The error behind the ReLU with the pull toward the teacher, straight from the activations."""
    (_, (a_t, a_s), (b_t, b_s)), ridge = candidate[0].terms[0], candidate[1]

    def columns(x):
        made = unroll(x, layer.geometry)
        return torch.cat([made, torch.ones_like(made[:, :1])], 1)

    x_t, x_s = columns(layer.teacher), columns(layer.student)
    x, wanted = b_t * x_t + b_s * x_s, teacher @ (a_t * x_t + a_s * x_s)
    made = weights @ x
    if seen.beside is not None:
        s_t, s_s = (
            torch.cat(list(side)).flatten(2).movedim(1, 0).reshape(wanted.shape[0], wanted.shape[1], -1)
            for side in seen.beside
        )
        wanted = wanted + (a_t - b_t) * (s_t - s_s)
        if summed:
            own = b_t * s_t + b_s * s_s
            wanted, made = wanted + own, made + own
    count = x.shape[2]
    wrong = torch.where(wanted > 0, made - wanted, made.relu()).square().sum() / count
    pull = torch.full((x.shape[1],), 1.0).to(x)
    pull[-1] = 1e-6
    curvature = (x.square().sum(2) / count)[:, :-1].mean(1)
    return wrong + ridge * (curvature[:, None, None] * pull * (weights - teacher).square()).sum()


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("case", [{}, {"groups": 2}], ids=["plain", "grouped"])
def test_the_error_behind_the_relu_falls_to_its_minimum(random_layer, monkeypatch, case, summed):
    layer, seen, candidate, teacher, mask, start = problem(random_layer, beside=summed, **case)
    # A minimiser that knows of no factorisation: it sees the error and its slope alone.
    free = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([free], max_iter=400, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def slope():
        optimizer.zero_grad()
        value = error(layer, seen, candidate, teacher, free * mask, summed=summed)
        value.backward()
        return value

    optimizer.step(slope)
    errors = [
        float(error(layer, seen, candidate, teacher, one, summed=summed)) for one in (start, free.detach() * mask)
    ]

    soon = rectified(seen, None, candidate, teacher, start, mask, summed=summed, **HOW)
    monkeypatch.setattr(module, "STEPS", 400)
    late = rectified(seen, None, candidate, teacher, start, mask, summed=summed, **HOW)

    first, least = errors
    assert least < 0.97 * first
    assert float(error(layer, seen, candidate, teacher, late, summed=summed)) == pytest.approx(least, rel=1e-3)
    assert float(error(layer, seen, candidate, teacher, soon, summed=summed)) < first - 0.8 * (first - least)
    assert not soon[~mask].any()


def test_outputs_that_are_never_negative_are_fitted_by_least_squares(random_layer):
    layer = random_layer(5)
    high = layer._replace(bias=layer.bias + 60)
    _, seen, candidate, teacher, mask, start = problem(lambda seed: high)

    found = rectified(seen, None, candidate, teacher, start, mask, summed=False, **HOW)

    torch.testing.assert_close(found, start, rtol=1e-3, atol=1e-3)


def test_rows_of_weights_may_differ_in_what_stays(random_layer):
    layer, seen, candidate, teacher, _, _ = problem(random_layer)
    mask = torch.rand(teacher.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., -1] = True
    quadratic = measure_directly(seen, candidate, teacher, dtype=torch.float64, **HOW)
    start = refit(quadratic, mask, teacher)

    found = rectified(seen, None, candidate, teacher, start, mask, summed=False, **HOW)

    assert not found[~mask].any()
    before, after = (float(error(layer, seen, candidate, teacher, one, summed=False)) for one in (start, found))
    assert after < 0.99 * before


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_pool_of_the_same_rows_changes_nothing_whatever_its_weight(random_layer, share):
    _, seen, candidate, teacher, mask, start = problem(random_layer)

    alone = rectified(seen, None, candidate, teacher, start, mask, summed=False, **HOW)
    both = rectified(seen, (seen, share), candidate, teacher, start, mask, summed=False, **HOW)

    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)


def test_a_pool_draws_the_fit_toward_itself_by_its_weight(random_layer):
    _, seen, _, teacher, mask, start = problem(random_layer)
    candidate = (regression(), RIDGE)
    other = problem(random_layer, seed=8)[1]
    shares = (0.0, 0.3, 3.0)
    only = rectified(other, None, candidate, teacher, start, mask, summed=False, **HOW)

    found = [rectified(seen, (other, s), candidate, teacher, start, mask, summed=False, **HOW) for s in shares]

    away = [float((one - only).norm()) for one in found]
    assert away[0] > away[1] > away[2] > 0


def test_what_it_costs_grows_with_what_stays_and_has_no_bound_where_columns_do_not_fit(random_layer):
    mask = torch.ones(1, 16, 90, dtype=torch.bool)
    half = mask.clone()
    half[..., 45:] = False
    ragged = half.clone()
    ragged[:, 0, 50] = True

    assert 0 < cost(half, 1000) < cost(mask, 1000) < cost(mask, 2000) < float("inf")
    assert cost(ragged, 1000) > cost(half, 1000)  # a system for each row
    assert cost(mask, 10**6) == float("inf")


def test_layers_before_a_relu_are_found_and_what_is_added_before_it():
    plain = before_relu(read_net(nets.build("plain")))
    residual = before_relu(read_net(nets.build("residual")))

    assert plain == {"c1": False}
    assert residual == {"c0": False, "c1": False, "c2": True}


TOKENS = """
g (float[N,1,32,32] image, float[8,1,3,3] w1, float[8] b1, float[12,8] w2, float[12] b2, float[64,12] w3,
   float[64] b3, float[4,64] w4, float[4] b4) => (float[M,4] out) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1, b1)
  r1 = Relu (c1)
  t = Transpose <perm = [0,2,3,1]> (r1)
  flat = Reshape (t, by8)
  h1 = Gemm <transB = 1> (flat, w2, b2)
  r2 = Relu (h1)
  h2 = Gemm <transB = 1> (r2, w3, b3)
  r3 = Relu (h2)
  out = Gemm <transB = 1> (r3, w4, b4)
}"""

WIDE = """
g (float[N,3,6,6] image, float[24,3,3,3] w1, float[24] b1, float[24,24,3,3] w2, float[24] b2, float[24,24,3,3] w3,
   float[24] b3, float[5,24,4,4] w4) => (float[N,5,1,1] out) {
  c1 = Conv (image, w1, b1)
  r1 = Relu (c1)
  c2 = Conv <pads = [1,1,1,1]> (r1, w2, b2)
  r2 = Relu (c2)
  c3 = Conv <pads = [1,1,1,1]> (r2, w3, b3)
  r3 = Relu (c3)
  out = Conv (r3, w4)
}"""


def fitted(net, inputs, *, ridge=RIDGE, **how):
    """What the walk makes of a network that loses some channels, and its outputs."""
    program = convert(net, torch.device("cpu"))
    plan, bench = make_plan(net, Budget("macs", 0.7)), Bench(program, torch.Generator().manual_seed(0))
    patch = layerwise(net, Patch(), inputs, plan, Rule(soft(0.9, 0.5), ridge, Greedy(), **how), bench).patch

    def weights(stop):
        layer = stop.layer
        found = [
            None if name is None else torch.tensor(patch.tensors.get(name, net.array(name)))
            for name in (layer.weight, layer.bias)
        ]
        return stored(layer, found[0]), found[1]

    return patch, walk(net, program, inputs, weights)


def test_a_walk_fits_the_layers_that_a_relu_reads_to_what_passes_it():
    net = read_net(nets.build("signal"))
    inputs = nets.samples(net.source, 32, seed=1)
    patches, errors = [], []
    for rectify in (False, True):
        patch, (teacher, student) = fitted(net, inputs, rectify=rectify)
        patches.append(patch)
        errors.append(float((torch.cat(student["out"]) - torch.cat(teacher["out"])).square().sum()))

    changed = [name for name in patches[0].tensors if (patches[0].tensors[name] != patches[1].tensors[name]).any()]
    assert "w2" in changed and patches[0].drop == patches[1].drop
    assert errors[1] < errors[0]


def test_a_bias_that_is_not_fitted_leaves_a_layer_to_least_squares():
    net = read_net(nets.build("signal"))
    inputs = nets.samples(net.source, 32, seed=1)

    plain, kept = (fitted(net, inputs, rectify=rectify, bias=False)[0] for rectify in (False, True))

    assert all((plain.tensors[name] == kept.tensors[name]).all() for name in plain.tensors)


def test_without_a_ridge_weights_do_not_follow_rounding():
    # 128 positions for 217 columns: the systems are singular, and any noise in them would be fitted.
    net = read_net(nets.from_text(WIDE))
    patches = [fitted(net, nets.samples(net.source, 8, seed=1), rectify=r, ridge=0.0)[0] for r in (False, True)]

    plain, kept = (max(float(np.abs(one).max()) for one in patch.tensors.values()) for patch in patches)

    assert kept < 1.5 * plain


def test_rows_that_a_reshape_makes_count_toward_what_columns_take(monkeypatch):
    net = read_net(nets.from_text(TOKENS, integers={"by8": [-1, 8]}))
    inputs = {"image": np.random.default_rng(0).standard_normal((8, 1, 32, 32)).astype(np.float32)}
    sizes, real = [], module._gathered

    def gathered(*args):
        found = real(*args)
        sizes.append(sum(part.nbytes for part in found))
        return found

    monkeypatch.setattr(module, "_gathered", gathered)
    fitted(net, inputs, rectify=True)
    assert max(sizes) > 1 << 20  # 8192 rows of 12 columns and three times 64 outputs

    sizes.clear()
    monkeypatch.setattr(module, "MOST_BYTES", 1 << 20)
    fitted(net, inputs, rectify=True)
    assert max(sizes, default=0) <= 1 << 20
