"""Connections against the same error computed on the outputs of real convolutions."""

import pytest
import torch
from torch.nn import functional

from xdonnx.columns import from_matrix, to_matrix
from xdonnx.connection import Quadratic, correction, cross, damped, imitation, named, objective, regression, soft
from xdonnx.errors import JobError
from xdonnx.moments import measure


def outputs(x, layer, weight, bias):
    how = layer.geometry
    return functional.conv2d(x, weight, bias, how.strides, how.pads[:2], how.dilations, how.groups)


def error_of_outputs(layer, name, weight, bias, mu, alpha, beta):
    """The published definitions, per output position."""

    def gap(teacher_input, student_input):
        wanted = outputs(teacher_input, layer, layer.weight, layer.bias)
        found = outputs(student_input, layer, weight, bias)
        return (wanted - found).square().sum() / (wanted.numel() / wanted.shape[1])

    t, s = layer.teacher, layer.student
    if name == "regression":
        return gap(t, s)
    if name == "correction":
        return gap(t, t)
    if name == "imitation":
        return gap(s, s)
    if name == "cross":
        return mu * gap(t, t) + (1 - mu) * gap(s, s)
    return gap(alpha * t + (1 - alpha) * s, (1 - beta) * t + beta * s)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["regression", "correction", "imitation", "cross", "soft"])
def test_five_connections_equal_the_convolution_loss(random_layer, name, groups):
    layer = random_layer(11, groups=groups, strides=(2, 1), pads=(1, 0, 1, 0))
    generator = torch.Generator().manual_seed(12)
    moments = measure([layer.teacher], [layer.student], layer.geometry, bias=True)
    teacher = to_matrix(layer.weight, layer.bias, layer.geometry)
    student = teacher + 0.3 * torch.randn(teacher.shape, generator=generator, dtype=torch.float64)

    q = objective(named(name, mu=0.6, alpha=0.9, beta=0.3), moments, teacher)

    weight, bias = from_matrix(student, layer.geometry, True, tuple(layer.weight.shape))
    expected = error_of_outputs(layer, name, weight, bias, 0.6, 0.9, 0.3)
    torch.testing.assert_close(q(student), expected, rtol=1e-10, atol=0)


def test_a_bias_that_stays_needs_no_column(random_layer):
    layer = random_layer(13)
    moments = measure([layer.teacher], [layer.student], layer.geometry, bias=False)
    q = objective(soft(0.9, 0.5), moments, to_matrix(layer.weight, None, layer.geometry))
    student = 0.8 * layer.weight

    found = q(to_matrix(student, None, layer.geometry))

    expected = error_of_outputs(layer, "soft", student, layer.bias, 0, 0.9, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_the_slope_is_that_of_autograd(random_layer):
    layer = random_layer(14, groups=2)
    moments = measure([layer.teacher], [layer.student], layer.geometry, bias=True)
    teacher = to_matrix(layer.weight, layer.bias, layer.geometry)
    q = objective(regression(), moments, teacher)
    w = (0.5 * teacher).requires_grad_()

    q(w).backward()

    torch.testing.assert_close(q.grad(w.detach()), w.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("special", "plain"),
    [
        (soft(1, 1), regression()),
        (soft(1, 0), correction()),
        (soft(0, 1), imitation()),
        (cross(1), correction()),
        (cross(0), imitation()),
    ],
)
def test_the_corners_of_soft_and_cross_are_the_plain_connections(random_layer, special, plain):
    layer = random_layer(15)
    moments = measure([layer.teacher], [layer.student], layer.geometry, bias=True)
    teacher = to_matrix(layer.weight, layer.bias, layer.geometry)

    mine, theirs = objective(special, moments, teacher), objective(plain, moments, teacher)

    for a, b in ((mine.hess, theirs.hess), (mine.lin, theirs.lin), (mine.const, theirs.const)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_cross_is_content_with_the_teacher_and_regression_is_not(random_layer):
    layer = random_layer(16)
    moments = measure([layer.teacher], [layer.student], layer.geometry, bias=True)
    teacher = to_matrix(layer.weight, layer.bias, layer.geometry)

    assert abs(float(objective(cross(0.6), moments, teacher)(teacher))) < 1e-9
    assert float(objective(regression(), moments, teacher)(teacher)) > 0.1


def test_damping_adds_the_distance_to_the_known_weights(random_layer):
    layer = random_layer(17, groups=2)
    moments = measure([layer.teacher], [layer.student], layer.geometry, bias=True)
    teacher = to_matrix(layer.weight, layer.bias, layer.geometry)
    q = objective(regression(), moments, teacher)
    w = 0.7 * teacher

    found = damped(q, teacher, 0.1, bias=True)(w)

    expected = q(w)
    for group in range(2):
        pull = 0.1 * q.hess[group].diagonal()[:-1].mean()
        expected = expected + pull * (w - teacher)[group, :, :-1].square().sum()
        expected = expected + 1e-6 * pull * (w - teacher)[group, :, -1].square().sum()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    assert damped(q, teacher, 0, bias=True) is q


@pytest.mark.parametrize("bias", [False, True])
def test_damping_makes_few_shots_definite(random_layer, bias):
    layer = random_layer(18, channels=8, shots=1, size=(3, 3), pads=(0, 0, 0, 0))
    quiet = layer.teacher.clone()
    quiet[:, 2:5] = 0  # dead channels
    moments = measure([quiet], [quiet], layer.geometry, bias=bias)
    teacher = to_matrix(layer.weight, layer.bias if bias else None, layer.geometry)
    q = objective(regression(), moments, teacher)
    assert torch.linalg.matrix_rank(q.hess[0]) == 1

    better = damped(q, teacher, 1e-4, bias=bias)

    torch.linalg.cholesky(better.hess)
    torch.testing.assert_close(torch.linalg.solve(better.hess, better.lin.mT).mT, teacher, rtol=1e-6, atol=1e-6)


def test_damping_survives_a_group_that_no_shot_excites():
    teacher = torch.ones(2, 3, 4, dtype=torch.float64)
    hess = torch.stack([torch.eye(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)])
    q = Quadratic(hess, teacher @ hess, torch.zeros(2, dtype=torch.float64))

    better = damped(q, teacher, 0.01, bias=False)

    torch.testing.assert_close(torch.linalg.solve(better.hess, better.lin.mT).mT, teacher)


def test_an_unknown_connection_names_the_known_ones():
    with pytest.raises(JobError, match=r"'regresion'\. Did you mean 'regression'\?\n.*soft"):
        named("regresion", mu=0.5, alpha=0.5, beta=0.5)
    with pytest.raises(JobError, match="regression, correction, imitation, cross, soft"):
        named("zzz", mu=0.5, alpha=0.5, beta=0.5)


@pytest.mark.parametrize(
    ("name", "shares", "option"),
    [("cross", (1.2, 0, 0), "mu"), ("soft", (0, -0.1, 0), "alpha"), ("soft", (0, 0, float("nan")), "beta")],
)
def test_a_share_outside_zero_to_one_is_refused(name, shares, option):
    mu, alpha, beta = shares
    with pytest.raises(JobError, match=f"{option} is .*\n.*between 0 and 1"):
        named(name, mu=mu, alpha=alpha, beta=beta)


@pytest.mark.parametrize("ridge", [-1.0, float("inf"), float("nan")])
def test_a_ridge_that_is_no_fraction_is_refused(ridge):
    eye = torch.eye(2, dtype=torch.float64)[None]
    with pytest.raises(JobError, match="ridge is"):
        damped(Quadratic(eye, eye, torch.zeros(1)), eye, ridge, bias=False)
