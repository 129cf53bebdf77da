"""One connection measured alone against the same connection from the moments, and what thinning the positions costs."""

import pytest
import torch

from xdonnx.columns import Geometry, to_matrix
from xdonnx.connection import correction, cross, imitation, regression, soft
from xdonnx.crossval import measure_folds
from xdonnx.direct import DEAR, Seen, dear, measure_directly, missed
from xdonnx.moments import AMPLE, FEWEST, LEAST, PER_COLUMN, enough, measure
from xdonnx.solve import refit

CONNECTIONS = [regression(), correction(), imitation(), soft(0.9, 0.5), soft(1.0, 0.3), cross(0.6)]
CASES = {
    "plain": dict(),
    "grouped": dict(groups=2, strides=(2, 1)),
    "transposed": dict(op="conv_transpose", strides=(2, 2)),
    "linear on sequences": dict(op="linear", kernel=(), size=(3,)),
}


def other_branch(layer, seed=5):
    """The other branch of a block in the two networks, in the output's shape and two chunks."""
    generator = torch.Generator().manual_seed(seed)
    if layer.geometry.op == "linear":
        shape = (*layer.teacher.shape[:-1], len(layer.bias))
    elif layer.geometry.op == "conv_transpose":
        shape = torch.nn.functional.conv_transpose2d(layer.teacher, layer.weight, None, (2, 2), (1, 1)).shape
    else:
        g = layer.geometry
        shape = torch.nn.functional.conv2d(layer.teacher, layer.weight, None, g.strides, g.pads[:2], 1, g.groups).shape
    whole = torch.randn(shape, generator=generator, dtype=torch.float64)
    return whole.split(2), (whole + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)).split(2)


@pytest.mark.parametrize("each", [0, 3])
@pytest.mark.parametrize("connection", CONNECTIONS, ids=lambda c: c.name)
@pytest.mark.parametrize("case", CASES)
def test_alone_is_what_the_moments_say(random_layer, case, connection, each):
    layer = random_layer(11, **CASES[case])
    teacher = to_matrix(layer.weight, layer.bias, layer.geometry)
    chunks = layer.teacher.split(2), layer.student.split(2)
    beside = other_branch(layer)
    how = {"bias": True, "each": each, "dtype": torch.float64}
    (fold,) = measure_folds(*chunks, beside, layer.geometry, rows=5, samples=5, folds=1, **how)
    wanted = fold.quadratic((connection, 0.01), teacher, bias=True)

    found = measure_directly(Seen(*chunks, beside, layer.geometry), (connection, 0.01), teacher, **how)

    for mine, theirs in zip((found.hess, found.lin, found.const), (wanted.hess, wanted.lin, wanted.const), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_what_is_missed_is_the_regression_error(random_layer):
    layer = random_layer(12)
    teacher = to_matrix(layer.weight, layer.bias, layer.geometry)
    chunks, beside = (layer.teacher.split(2), layer.student.split(2)), other_branch(layer)
    (fold,) = measure_folds(
        *chunks, beside, layer.geometry, bias=True, rows=5, samples=5, folds=1, each=0, dtype=torch.float64
    )
    judge = fold.quadratic((regression(), 0.0), teacher, bias=True)
    energy = float(((teacher @ fold.moments.tt) * teacher).sum())

    found = missed(Seen(*chunks, beside, layer.geometry), teacher, (teacher, 0.5 * teacher), bias=True)

    # Few enough positions that all are looked at; in float32.
    assert found == pytest.approx([float(judge(teacher)) / energy, float(judge(0.5 * teacher)) / energy], rel=1e-5)


def test_wide_layers_on_many_positions_are_dear():
    assert not dear(576, enough(576, 64) * 64)
    assert dear(4608, enough(4608, 64) * 64)
    assert not dear(1, int(DEAR / 2) - 1)


def test_positions_grow_with_the_unknowns_and_are_shared_among_the_rows():
    assert enough(500, 64) * 64 >= FEWEST > enough(500, 64) * 64 - 64
    # Few unknowns need fewer, as those of a depthwise layer.
    assert enough(1, 64) * 64 == LEAST and enough(32, 64) * 64 == AMPLE * 32 < FEWEST
    assert enough(100_000, 1) == PER_COLUMN * 100_000
    assert enough(10, 10**9) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_enough_positions_fit_nearly_as_well_as_all(dtype):
    """Images whose neighbouring pixels say nearly the same: a fit to thinned positions, judged on all of others."""
    generator = torch.Generator().manual_seed(0)
    geometry = Geometry("conv", 1, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    rows, channels = 96, 12

    def images(noise):
        coarse = torch.randn((rows, channels, 9, 9), generator=generator)
        fine = torch.nn.functional.interpolate(coarse, size=(28, 28), mode="bilinear")
        return (fine + noise * torch.randn(fine.shape, generator=generator)).relu()

    teacher = images(0.2)
    student = (teacher + 0.1 * torch.randn(teacher.shape, generator=generator)).relu()
    weight = torch.randn((8, channels, 3, 3), generator=generator) / 10
    matrix = to_matrix(weight, torch.zeros(8), geometry).double()
    mask = torch.ones_like(matrix, dtype=torch.bool)
    mask[..., : 9 * channels // 2] = False
    fit, judge = (slice(0, 48), slice(48, 96))

    def error(each, dtype):
        seen = Seen([teacher[fit]], [student[fit]], None, geometry)
        q = measure_directly(seen, (soft(0.9, 0.5), 0.01), matrix, bias=True, each=each, dtype=dtype)
        held = Seen([teacher[judge]], [student[judge]], None, geometry)
        found = measure_directly(held, (regression(), 0.0), matrix, bias=True, each=0, dtype=torch.float64)
        return float(found(refit(q, mask, matrix)))

    each = enough(9 * channels, 48)
    assert each < 28 * 28 / 4
    assert error(each, dtype) == pytest.approx(error(0, torch.float64), rel=0.01)


def test_float32_products_change_moments_by_rounding_alone(random_layer):
    layer = random_layer(13, channels=16, size=(40, 40))
    how = {"bias": True}
    exact = measure([layer.teacher], [layer.student], layer.geometry, **how)
    rounded = measure([layer.teacher], [layer.student], layer.geometry, dtype=torch.float32, **how)
    scale = exact.ss.diagonal(dim1=1, dim2=2).sqrt()
    wrong = (rounded.ss - exact.ss).abs() / (scale[:, :, None] * scale[:, None])
    assert float(wrong.max()) < 1e-6
