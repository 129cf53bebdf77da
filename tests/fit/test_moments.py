"""Moments against loops written by hand, and unrolled layers against torch's own."""

from itertools import product

import pytest
import torch
from torch.nn import functional

from xdonnx.columns import Geometry, from_matrix, to_matrix, unroll
from xdonnx.errors import ShotsError
from xdonnx.moments import Moments, measure

CASES = {
    "plain": dict(),
    "grouped": dict(groups=2),
    "depthwise": dict(groups=4, outputs=4),
    "strided": dict(strides=(2, 3)),
    "dilated": dict(dilations=(2, 1)),
    "asymmetric pads": dict(pads=(0, 2, 1, 0)),
    "one axis": dict(kernel=(3,), size=(9,), strides=(2,)),
    "three axes": dict(kernel=(2, 1, 3), size=(4, 3, 5), shots=2),
    "transposed": dict(op="conv_transpose", strides=(2, 2)),
    "transposed with all its options": dict(
        op="conv_transpose",
        groups=2,
        strides=(3, 2),
        dilations=(1, 2),
        pads=(0, 1, 0, 1),
        output_padding=(2, 1),
    ),
    "transposed and cropped": dict(op="conv_transpose", kernel=(2, 2), strides=(2, 2), pads=(2, 1, 2, 1)),
    "transposed, one axis": dict(op="conv_transpose", kernel=(4,), size=(5,), strides=(2,)),
    "linear": dict(op="linear", kernel=(), size=()),
    "linear on sequences": dict(op="linear", kernel=(), size=(3, 2)),
}

every_case = pytest.mark.parametrize("how", CASES.values(), ids=CASES.keys())


def run_layer(x, layer):
    """Ask torch for the layer's output; pads of torch are symmetric, so others are padded first."""
    geometry, rank = layer.geometry, len(layer.geometry.kernel)
    if geometry.op == "linear":
        return functional.linear(x, layer.weight, layer.bias)
    begins, ends = geometry.pads[:rank], geometry.pads[rank:]
    if geometry.op == "conv_transpose":
        assert begins == ends
        call = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[rank - 1]
        extra = geometry.output_padding or 0
        return call(x, layer.weight, layer.bias, geometry.strides, begins, extra, geometry.groups, geometry.dilations)
    call = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    flat = [pad for pair in zip(reversed(begins), reversed(ends), strict=True) for pad in pair]
    x = functional.pad(x, flat)
    return call(x, layer.weight, layer.bias, geometry.strides, 0, geometry.dilations, geometry.groups)


def columns_by_hand(x, geometry):
    """The patch that each output position of a convolution sees, element by element."""
    rank, groups = len(geometry.kernel), geometry.groups
    per_group = x.shape[1] // groups
    begins, ends = geometry.pads[:rank], geometry.pads[rank:]
    sizes = [
        (x.shape[2 + a] + begins[a] + ends[a] - geometry.dilations[a] * (geometry.kernel[a] - 1) - 1)
        // geometry.strides[a]
        + 1
        for a in range(rank)
    ]
    columns = [[] for _ in range(groups)]
    for shot in x:
        for position in product(*map(range, sizes)):
            for group in range(groups):
                patch = []
                for channel in range(per_group):
                    for offset in product(*map(range, geometry.kernel)):
                        at = [
                            position[a] * geometry.strides[a] + offset[a] * geometry.dilations[a] - begins[a]
                            for a in range(rank)
                        ]
                        inside = all(0 <= at[a] < x.shape[2 + a] for a in range(rank))
                        patch.append(float(shot[(group * per_group + channel, *at)]) if inside else 0.0)
                columns[group].append(patch)
    return torch.tensor(columns, dtype=torch.float64).mT


@every_case
def test_a_layer_is_its_matrix_times_its_columns(random_layer, how):
    layer = random_layer(1, **how)
    matrix = to_matrix(layer.weight, layer.bias, layer.geometry)
    columns = unroll(layer.teacher, layer.geometry)
    ones = torch.ones_like(columns[:, :1])

    made = (matrix @ torch.cat([columns, ones], 1)).flatten(0, 1)

    expected = run_layer(layer.teacher, layer)
    axis = -1 if layer.geometry.op == "linear" else 1
    torch.testing.assert_close(made, expected.movedim(axis, 0).flatten(1), rtol=1e-12, atol=1e-12)


@every_case
def test_weight_and_bias_come_back_from_the_matrix(random_layer, how):
    layer = random_layer(2, **how)
    shape = tuple(layer.weight.shape)

    both = from_matrix(to_matrix(layer.weight, layer.bias, layer.geometry), layer.geometry, True, shape)
    alone = from_matrix(to_matrix(layer.weight, None, layer.geometry), layer.geometry, False, shape)

    assert torch.equal(both[0], layer.weight) and torch.equal(both[1], layer.bias)
    assert torch.equal(alone[0], layer.weight) and alone[1] is None


@pytest.mark.parametrize(
    "how", [how for how in CASES.values() if how.get("op", "conv") == "conv"], ids=lambda how: " ".join(how) or "plain"
)
def test_moments_are_those_of_loops_by_hand(random_layer, how):
    layer = random_layer(3, **{"shots": 2, **how})

    found = measure([layer.teacher], [layer.student], layer.geometry, bias=True)

    x_t, x_s = (columns_by_hand(x, layer.geometry) for x in (layer.teacher, layer.student))
    x_t, x_s = (torch.cat([x, torch.ones_like(x[:, :1])], 1) for x in (x_t, x_s))
    assert found.count == x_t.shape[2]
    for mine, left, right in ((found.tt, x_t, x_t), (found.ts, x_t, x_s), (found.ss, x_s, x_s)):
        torch.testing.assert_close(mine, left @ right.mT / found.count, rtol=1e-12, atol=1e-12)


def test_moments_do_not_depend_on_how_shots_are_chunked(random_layer):
    layer = random_layer(4, shots=7, groups=2)
    whole = measure([layer.teacher], [layer.student], layer.geometry, bias=True)

    for sizes, at_once in (((3, 4), 8192), ((1, 1, 5), 1), ((7,), 100)):
        streams = layer.teacher.split(sizes), layer.student.split(sizes)
        parts = measure(*streams, layer.geometry, bias=True, columns_at_once=at_once)
        assert parts.count == whole.count
        for mine, theirs in zip((parts.tt, parts.ts, parts.ss), (whole.tt, whole.ts, whole.ss), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_added_moments_are_those_of_all_shots(random_layer):
    layer = random_layer(5, shots=6)
    whole = measure([layer.teacher], [layer.student], layer.geometry, bias=False)

    one, two = (
        measure([t], [s], layer.geometry, bias=False)
        for t, s in zip(layer.teacher.split((2, 4)), layer.student.split((2, 4)), strict=True)
    )
    both = one + two

    assert both.count == whole.count
    for mine, theirs in zip((both.tt, both.ts, both.ss), (whole.tt, whole.ts, whole.ss), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_streams_that_agree_share_one_product(random_layer):
    layer = random_layer(6)
    apart = measure([layer.teacher], [layer.teacher.clone()], layer.geometry, bias=True)

    shared = measure([layer.teacher], [layer.teacher], layer.geometry, bias=True)

    assert shared.tt is shared.ts is shared.ss
    torch.testing.assert_close(shared.tt, apart.ts, rtol=1e-12, atol=1e-12)
    merged = shared + shared
    assert merged.tt is merged.ss and merged.count == 2 * shared.count


def test_streams_may_agree_in_some_chunks_only(random_layer):
    layer = random_layer(7, shots=4)
    first, second = layer.teacher.split(2)
    changed = layer.student[2:]

    found = measure([first, second], [first, changed], layer.geometry, bias=True)

    expected = measure([layer.teacher], [torch.cat([first, changed])], layer.geometry, bias=True)
    for mine, theirs in ((found.tt, expected.tt), (found.ts, expected.ts), (found.ss, expected.ss)):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_float32_inputs_are_summed_in_float64(random_layer):
    layer = random_layer(8)
    teacher, student = layer.teacher.float(), layer.student.float()
    exact = measure([teacher.double()], [student.double()], layer.geometry, bias=True)

    found = measure([teacher], [student], layer.geometry, bias=True)
    rough = measure([teacher], [student], layer.geometry, bias=True, dtype=torch.float32)

    assert found.ts.dtype == rough.ts.dtype == torch.float64
    torch.testing.assert_close(found.ts, exact.ts, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(rough.ts, exact.ts, rtol=1e-5, atol=1e-5)


def test_wide_layers_are_summed_block_by_block():
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(40, 1100, generator=generator, dtype=torch.float64)

    found = measure([x], [x], Geometry("linear"), bias=True)

    x = torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(found.tt[0], x.T @ x / 40, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.tt, found.tt.mT)


def test_no_shots_is_an_error(random_layer):
    layer = random_layer(10)
    with pytest.raises(ShotsError, match="nothing to measure"):
        measure([], [], layer.geometry, bias=True)
    with pytest.raises(ShotsError, match="nothing to measure"):
        measure([layer.teacher[:0]], [layer.student[:0]], layer.geometry, bias=True)


def test_moments_weigh_by_count():
    eye = torch.eye(2, dtype=torch.float64)[None]
    merged = Moments(eye, eye, eye, 1) + Moments(4 * eye, 5 * eye, 6 * eye, 3)
    assert merged.count == 4
    torch.testing.assert_close(merged.tt, 3.25 * eye)
    torch.testing.assert_close(merged.ss, 4.75 * eye)
