"""Columns at chosen positions against those of all, and how the positions lie."""

import pytest
import torch

from xdonnx.columns import columns, grid, spread, unroll

CASES = {
    "plain": dict(),
    "strided, dilated, lopsided": dict(strides=(2, 1), dilations=(1, 2), pads=(2, 0, 1, 3)),
    "grouped": dict(groups=2),
    "depthwise": dict(groups=4, outputs=4),
    "transposed": dict(op="conv_transpose", strides=(2, 2)),
    "one axis": dict(kernel=(3,), size=(9,)),
    "three axes": dict(kernel=(2, 3, 1), size=(4, 5, 3)),
    "linear": dict(op="linear", kernel=(), size=()),
    "linear on sequences": dict(op="linear", kernel=(), size=(6,)),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_columns_at_places_are_those_columns_of_all(random_layer, case, bias):
    layer = random_layer(3, **CASES[case])
    sizes = grid(layer.teacher, layer.geometry)
    whole = columns(layer.teacher, layer.geometry, bias=bias)
    positions = whole.shape[2] // len(layer.teacher)
    places = torch.randint(positions, (len(layer.teacher), 4), generator=torch.Generator().manual_seed(0))

    found = columns(layer.teacher, layer.geometry, places, bias=bias)

    assert positions == torch.Size(sizes).numel()
    each = torch.arange(len(places))[:, None] * positions + places
    torch.testing.assert_close(found, whole[..., each.flatten()], rtol=0, atol=0)
    torch.testing.assert_close(whole[:, : whole.shape[1] - bias], unroll(layer.teacher, layer.geometry))


def test_columns_take_the_precision_that_is_asked_for(random_layer):
    layer = random_layer(3)
    assert columns(layer.teacher, layer.geometry, bias=True, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("sizes", [(56, 56), (7, 7), (1024,), (8, 9, 10)])
def test_positions_lie_evenly_over_the_grid(sizes):
    places = spread(sizes, 64, 40)
    assert places.shape == (64, 40)
    at, seen = places.flatten(), []
    for size in reversed(sizes):
        seen.append(at % size)
        at = at // size
    assert int(at.max()) == 0
    for axis, size in zip(seen, reversed(sizes), strict=True):
        assert axis.unique().numel() == size
        # Random positions would miss the middle by 1 / sqrt(12 * 2560) = 0.6 % of the size.
        assert float(axis.double().mean()) == pytest.approx((size - 1) / 2, abs=0.004 * size)


def test_few_positions_of_a_shot_are_far_apart_and_no_two_shots_show_the_same():
    places = spread((32, 32), 20, 8)
    assert all(row.unique().numel() == 8 for row in places)
    assert places.unique(dim=0).shape[0] == 20


def test_the_second_chunk_goes_on_where_the_first_one_ended():
    whole = spread((14, 14), 10, 6)
    torch.testing.assert_close(torch.cat([spread((14, 14), 4, 6), spread((14, 14), 6, 6, first=4)]), whole)
