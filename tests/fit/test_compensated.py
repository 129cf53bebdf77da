"""Layers that make up for another branch, against least squares on outputs of real layers and on a whole block."""

from functools import cache
from pathlib import Path

import nets
import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional

from xdonnx.budget import Budget, make_plan
from xdonnx.columns import from_matrix, to_matrix
from xdonnx.connection import compensated, correction, cross, imitation, objective, regression, soft
from xdonnx.convert import checked, convert
from xdonnx.graph import read_net
from xdonnx.methods.bench import Bench
from xdonnx.methods.layerwise import Rule, layerwise
from xdonnx.moments import measure, measure_missing
from xdonnx.patch import Patch, masked
from xdonnx.runtime import answer, open_session
from xdonnx.solve import Greedy, refit
from xdonnx.walk import walk

SAMPLES = Path(__file__).parents[2] / "samples"
CASES = {
    "plain": dict(),
    "grouped": dict(groups=2),
    "depthwise": dict(groups=4, outputs=4),
    "strided": dict(strides=(2, 1), size=(9, 6)),
    "asymmetric pads": dict(pads=(0, 2, 1, 0)),
    "one axis": dict(kernel=(3,), size=(9,), pads=(1, 1), shots=12),
    "transposed": dict(op="conv_transpose", kernel=(2, 3), strides=(2, 1), groups=2, pads=(0, 1, 0, 1)),
    "linear": dict(op="linear", kernel=(), size=(), shots=20),
    "linear on sequences": dict(op="linear", kernel=(), size=(3, 2)),
}

every_case = pytest.mark.parametrize("how", CASES.values(), ids=CASES.keys())


def run_layer(x, geometry, weight, bias):
    """Ask torch for the layer's output."""
    rank = len(geometry.kernel)
    if geometry.op == "linear":
        return functional.linear(x, weight, bias)
    begins, ends = geometry.pads[:rank], geometry.pads[rank:]
    if geometry.op == "conv_transpose":
        return functional.conv_transpose2d(x, weight, bias, geometry.strides, begins, 0, geometry.groups)
    call = (functional.conv1d, functional.conv2d)[rank - 1]
    x = functional.pad(x, [pad for pair in zip(reversed(begins), reversed(ends), strict=True) for pad in pair])
    return call(x, weight, bias, geometry.strides, 0, geometry.dilations, geometry.groups)


def with_a_branch(random_layer, seed, how):
    """A layer, and the other branch that its output is added to, in teacher and student."""
    layer = random_layer(seed, **how)
    generator = torch.Generator().manual_seed(seed)
    wanted = run_layer(layer.teacher, layer.geometry, layer.weight, layer.bias)
    whole = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    # What lacks is related to what the student sees, or nothing could be made up for.
    other = run_layer(layer.teacher - layer.student, layer.geometry, layer.weight.flip(0), None)
    noise = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    return layer, (whole, whole - other - 0.3 * noise - 0.5)


def quadratic(layer, beside, connection, *, bias=True):
    """The error under test, and the teacher's matrix."""
    chunks = [layer.teacher], [layer.student]
    teacher = to_matrix(layer.weight, layer.bias if bias else None, layer.geometry)
    moments = measure(*chunks, layer.geometry, bias=bias)
    missing = measure_missing(*chunks, ([beside[0]], [beside[1]]), layer.geometry, bias=bias)
    return compensated(objective(connection, moments, teacher), connection, missing, teacher), teacher


def least_squares(layer, x, wanted, *, bias):
    """The layer's matrix whose output on `x` comes nearest to `wanted`, by numpy.

    The design is made by torch's own layer, one unit weight after another.
    """
    size, outputs = layer.weight.numel(), len(layer.bias)
    design = []
    for at in range(size + (outputs if bias else 0)):
        unit = torch.zeros(size + outputs, dtype=torch.float64)
        unit[at] = 1
        design.append(run_layer(x, layer.geometry, unit[:size].reshape(layer.weight.shape), unit[size:]).flatten())
    found = np.linalg.lstsq(torch.stack(design, 1).numpy(), wanted.flatten().numpy(), rcond=None)[0]
    flat = torch.tensor(found)
    return to_matrix(flat[:size].reshape(layer.weight.shape), flat[size:] if bias else None, layer.geometry)


# ------------------------------------------------------------------------------------------------- What a branch lacks


@every_case
def test_what_lacks_is_multiplied_with_the_inputs_of_both_networks(random_layer, how):
    """`<W, E[m x']>` is the mean of `m` times the output of the layer with weights W, whatever W."""
    layer, (whole, found) = with_a_branch(random_layer, 1, how)
    random = torch.Generator().manual_seed(2)
    positions = whole.numel() / len(layer.bias)

    made = measure_missing(
        [layer.teacher], [layer.student], ([whole], [found]), layer.geometry, bias=True, columns_at_once=50
    )

    torch.testing.assert_close(made.energy.sum(), (whole - found).square().sum() / positions)
    for product, x in zip(made[:2], (layer.teacher, layer.student), strict=True):
        for _ in range(3):
            weight = torch.randn(layer.weight.shape, generator=random, dtype=torch.float64)
            bias = torch.randn(layer.bias.shape, generator=random, dtype=torch.float64)
            expected = ((whole - found) * run_layer(x, layer.geometry, weight, bias)).sum() / positions
            torch.testing.assert_close(
                (product * to_matrix(weight, bias, layer.geometry)).sum(), expected, rtol=1e-9, atol=1e-9
            )


@pytest.mark.parametrize("how", [CASES["grouped"], CASES["linear on sequences"]], ids=["grouped", "linear"])
def test_what_lacks_does_not_depend_on_how_shots_are_chunked(random_layer, how):
    layer, beside = with_a_branch(random_layer, 3, how | {"shots": 7})
    streams = layer.teacher, layer.student, *beside

    def made(sizes, at_once):
        teacher, student, *other = (x.split(sizes) for x in streams)
        return measure_missing(teacher, student, tuple(other), layer.geometry, bias=True, columns_at_once=at_once)

    whole = made(7, 8192)
    for sizes, at_once in (([3, 4], 8192), (1, 8192), ([1, 1, 5], 1), (7, 20)):
        for mine, theirs in zip(made(sizes, at_once), whole, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_branch_that_agrees_lacks_nothing(random_layer):
    layer, (whole, found) = with_a_branch(random_layer, 4, {})

    def made(mine, theirs):
        sizes = [len(chunk) for chunk in mine]
        chunks = layer.teacher.split(sizes), layer.student.split(sizes)
        return measure_missing(*chunks, (mine, theirs), layer.geometry, bias=True)

    chunks, others = list(whole.split([2, 3])), list(found.split([2, 3]))
    assert made(chunks, chunks) is None
    # As for the layer's inputs, some chunks alone may agree.
    half = made(chunks, [chunks[0], others[1]])
    expected = made([whole], [torch.cat([whole[:2], found[2:]])])
    for mine, theirs in zip(half, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_what_lacks_is_summed_in_float64(random_layer):
    layer, beside = with_a_branch(random_layer, 5, {})
    rough = [x.float() for x in (layer.teacher, layer.student, *beside)]

    def made(teacher, student, whole, found):
        return measure_missing([teacher], [student], ([whole], [found]), layer.geometry, bias=True)

    # The difference itself is taken in the type of the branch.
    lacks = (rough[2] - rough[3]).double()
    exact = made(rough[0].double(), rough[1].double(), lacks, torch.zeros_like(lacks))
    for mine, theirs in zip(made(*rough), exact, strict=True):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=1e-14)


# -------------------------------------------------------------------------------------------------------- Compensation


@every_case
@pytest.mark.parametrize("bias", [False, True])
def test_regression_makes_up_for_all_that_lacks_by_least_squares(random_layer, how, bias):
    layer, (whole, found) = with_a_branch(random_layer, 6, how)
    q, teacher = quadratic(layer, (whole, found), regression(), bias=bias)

    made = refit(q, torch.ones_like(teacher, dtype=torch.bool), teacher)

    own = run_layer(layer.teacher, layer.geometry, layer.weight, layer.bias if bias else None)
    expected = least_squares(layer, layer.student, own + whole - found, bias=bias)
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-8)
    plain = least_squares(layer, layer.student, own, bias=bias)
    assert float((expected - plain).abs().max()) > 0.05  # or it would not matter


@every_case
@pytest.mark.parametrize(("alpha", "beta"), [(0.9, 0.5), (1.0, 0.3), (0.4, 0.2)])
def test_soft_makes_up_for_the_share_that_it_makes_up_for_upstream(random_layer, how, alpha, beta):
    layer, (whole, found) = with_a_branch(random_layer, 7, how)
    q, teacher = quadratic(layer, (whole, found), soft(alpha, beta))

    made = refit(q, torch.ones_like(teacher, dtype=torch.bool), teacher)

    t, s = layer.teacher, layer.student
    wanted = run_layer(alpha * t + (1 - alpha) * s, layer.geometry, layer.weight, layer.bias)
    wanted = wanted + (alpha + beta - 1) * (whole - found)
    expected = least_squares(layer, (1 - beta) * t + beta * s, wanted, bias=True)
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-8)


@every_case
def test_errors_of_different_weights_differ_as_those_of_the_sum_do(random_layer, how):
    layer, (whole, found) = with_a_branch(random_layer, 8, how)
    q, teacher = quadratic(layer, (whole, found), regression())
    random = torch.Generator().manual_seed(9)
    first, second = (teacher * torch.rand(teacher.shape, generator=random, dtype=torch.float64) for _ in range(2))

    def error_of_sum(matrix):
        weight, bias = from_matrix(matrix, layer.geometry, True, tuple(layer.weight.shape))
        wanted = run_layer(layer.teacher, layer.geometry, layer.weight, layer.bias) + whole
        gap = wanted - run_layer(layer.student, layer.geometry, weight, bias) - found
        return gap.square().sum() / (whole.numel() / len(layer.bias))

    torch.testing.assert_close(q(first) - q(second), error_of_sum(first) - error_of_sum(second), rtol=1e-9, atol=1e-9)


def test_a_constant_that_lacks_goes_to_the_bias_alone(random_layer):
    layer = random_layer(10, groups=2)
    constant = torch.linspace(-1, 2, 6, dtype=torch.float64)
    whole = run_layer(layer.teacher, layer.geometry, layer.weight, layer.bias)
    agreeing = layer._replace(student=layer.teacher)
    q, teacher = quadratic(agreeing, (whole, whole - constant.reshape(1, 6, 1, 1)), regression())

    made = refit(q, torch.ones_like(teacher, dtype=torch.bool), teacher)

    torch.testing.assert_close(made[..., :-1], teacher[..., :-1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(made[..., -1].flatten(), layer.bias + constant, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "connection",
    [correction(), imitation(), cross(0.6), soft(0.6, 0.4), soft(1, 0), soft(0, 1)],
    ids=lambda c: f"{c.name} {c.terms[0][1:]}",
)
def test_a_connection_that_makes_up_for_nothing_upstream_makes_up_for_nothing_beside(random_layer, connection):
    layer, beside = with_a_branch(random_layer, 11, {})
    moments = measure([layer.teacher], [layer.student], layer.geometry, bias=True)
    plain = objective(connection, moments, to_matrix(layer.weight, layer.bias, layer.geometry))

    q, _ = quadratic(layer, beside, connection)

    torch.testing.assert_close(q.lin, plain.lin, rtol=1e-12, atol=1e-12)
    assert torch.equal(q.hess, plain.hess) and torch.equal(q.const, plain.const)


# --------------------------------------------------------------------------------------------------------- Whole blocks

TWICE = """
g (float[N,3,6,6] image, float[8,3,3,3] w0, float[8] b0, float[8,8,3,3] w1, float[8] b1, float[8,8,3,3] w2, float[8] b2,
   float[8,8,3,3] w3, float[8] b3, float[8,8,3,3] w4, float[8] b4) => (float[N,8,6,6] out) {
  c0 = Conv <pads = [1,1,1,1]> (image, w0, b0)
  r0 = Relu (c0)
  c1 = Conv <pads = [1,1,1,1]> (r0, w1, b1)
  r1 = Relu (c1)
  c2 = Conv <pads = [1,1,1,1]> (r1, w2, b2)
  s = Add (c2, r0)
  r2 = Relu (s)
  c3 = Conv <pads = [1,1,1,1]> (r2, w3, b3)
  r3 = Relu (c3)
  c4 = Conv <pads = [1,1,1,1]> (r3, w4, b4)
  out = Add (c4, r2)
}"""


@cache
def two_blocks(seed=0):
    net = read_net(nets.from_text(TWICE, seed=seed))
    inputs = nets.samples(net.source, 12, seed=seed + 1)
    return net, inputs, checked(net, convert(net, torch.device("cpu")), inputs)


def compressed(net, inputs, program, connection, ridge, compensate):
    plan = make_plan(net, Budget("keep", 0.5, "channel"))
    rule = Rule(connection, ridge, Greedy(), compensate=compensate)
    return layerwise(net, Patch(), inputs, plan, rule, Bench(program, torch.Generator().manual_seed(0))).patch


def values(model, inputs, *names):
    """Intermediate values of a model, by onnxruntime."""
    shown = onnx.ModelProto.FromString(model.SerializeToString())
    there = {output.name for output in shown.graph.output}
    shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in there)
    found = answer(open_session(shown), inputs, names)
    return [found[name] for name in names]


def patches(x):
    """What a 3x3 convolution with pads of one sees of `x`: (n * h * w, c * 9)."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))).astype(np.float64)
    high, wide = x.shape[2:]
    seen = [padded[:, :, i : i + high, j : j + wide] for i in range(3) for j in range(3)]
    return np.stack(seen, 2).transpose(0, 3, 4, 1, 2).reshape(len(x) * high * wide, -1)


def flat(x):
    return x.astype(np.float64).transpose(0, 2, 3, 1).reshape(-1, x.shape[1])


@pytest.mark.parametrize("compensate", [False, True])
def test_the_last_layer_of_a_block_is_fitted_to_what_the_sum_lacks_if_asked_to(compensate):
    net, inputs, program = two_blocks()

    patch = compressed(net, inputs, program, regression(), 0.0, compensate)

    wanted, whole = values(net.source, inputs, "c4", "r2")
    seen, found = values(masked(net, patch), inputs, "r3", "r2")
    assert np.abs(whole - found).max() > 0.05
    keep = ~np.isin(net.layers["c4"].columns, sorted(patch.drop))
    assert keep.sum() == 4 * 9
    design = np.concatenate([patches(seen)[:, keep], np.ones((12 * 36, 1))], 1)
    target = flat(wanted) + (flat(whole - found) if compensate else 0)
    expected = np.linalg.lstsq(design, target, rcond=None)[0].T
    np.testing.assert_allclose(patch.tensors["w4"].reshape(8, -1)[:, keep], expected[:, :-1], atol=2e-4)
    np.testing.assert_allclose(patch.tensors["b4"], expected[:, -1], atol=2e-4)


def test_a_stop_knows_the_other_branch_where_it_was_made_before():
    net, inputs, program = two_blocks()
    beside = {}

    def visit(stop):
        beside[stop.layer.name] = stop.beside and tuple(list(chunks) for chunks in stop.beside)

    walk(net, program, inputs, visit)

    assert [name for name, other in beside.items() if other is not None] == ["c2", "c4"]
    for layer, name in (("c2", "r0"), ("c4", "r2")):
        teacher, student = beside[layer]
        assert all(a is b for a, b in zip(teacher, student, strict=True))
        (expected,) = values(net.source, inputs, name)
        np.testing.assert_allclose(torch.cat(teacher).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("connection", [regression(), soft(0.9, 0.5)], ids=["regression", "soft"])
@pytest.mark.parametrize("seed", range(4))
def test_a_block_errs_less_where_its_last_layer_makes_up_for_the_other_branch(seed, connection):
    net, inputs, program = two_blocks(seed)
    (wanted,) = values(net.source, inputs, "out")

    with_it, without = (
        np.square(values(masked(net, patch), inputs, "out")[0] - wanted).sum()
        for patch in (compressed(net, inputs, program, connection, 0.01, choice) for choice in (True, False))
    )

    assert with_it < without


def test_every_block_of_a_trained_net_but_the_first_errs_less_with_it():
    net = read_net(onnx.load(SAMPLES / "digits_residual.onnx"))
    images = np.load(SAMPLES / "held_out.npz")["images"][:24, None].astype(np.float32) / 255
    inputs = {net.interface.inputs[0].name: images}
    program = checked(net, convert(net, torch.device("cpu")), inputs)
    sums = [node.output[0] for node in net.source.graph.node if node.op_type == "Add"]
    wanted = values(net.source, inputs, *sums)

    with_it, without = (
        [np.square(b - a).sum() for a, b in zip(wanted, values(masked(net, patch), inputs, *sums), strict=True)]
        for patch in (compressed(net, inputs, program, regression(), 0.01, choice) for choice in (True, False))
    )

    assert len(sums) == 6
    assert with_it[0] == pytest.approx(without[0])  # nothing lacks beside the first
    assert all(a < b for a, b in zip(with_it[1:], without[1:], strict=True))


@pytest.mark.parametrize("connection", [correction(), imitation()], ids=["correction", "imitation"])
def test_compensation_changes_nothing_under_a_connection_without_it(connection):
    first, second = (compressed(*two_blocks(), connection, 0.01, choice) for choice in (True, False))

    assert first.drop == second.drop
    for name, array in first.tensors.items():
        np.testing.assert_allclose(array, second.tensors[name], atol=1e-5)
