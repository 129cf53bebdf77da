"""Weights taken apart: the best pair of factors, Tucker's three pieces, and what they are said to keep."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import scipy.signal

from xdonnx.lowrank import channel_kept, channel_pieces, composed, pair_kept, pair_pieces, pair_ranks

SHAPES = [
    (1, 8, 6, 3, 3),
    (2, 5, 4, 3, 2),
    (1, 7, 9),
    (1, 6, 4, 5),
    (1, 6, 8, 1, 3),
    (1, 4, 3, 3, 2, 3),
    (3, 4, 2, 1, 1),
]
KERNELS = [shape for shape in SHAPES if np.prod(shape[3:]) > 1]


def weight_of(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def lost(weight: np.ndarray, pieces: tuple[np.ndarray, ...]) -> float:
    return float(np.square(composed(pieces) - weight).sum() / np.square(weight).sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_pair_loses_what_the_singular_values_say_that_any_of_its_rank_must_lose(shape: tuple[int, ...]) -> None:
    """Eckart and Young: no matrix of rank r is nearer than by the squares of the singular values beyond r."""
    weight, kept = weight_of(shape), pair_kept(weight_of(shape))

    # Unfolded by loops: rows are input and first axis of the kernel, columns output and the other axes.
    spectra = []
    for group in weight:
        kernel = group.shape[2:]
        rows = [(i, a) for i in range(group.shape[1]) for a in range(kernel[0] if kernel else 1)]
        matrix = [group[(slice(None), i, *((a,) if kernel else ()))].reshape(-1) for i, a in rows]
        spectra.append(np.linalg.svd(np.array(matrix), compute_uv=False) ** 2)
    spectrum = np.sum(spectra, axis=0)

    assert len(kept) == len(spectrum) == pair_ranks(shape)
    for rank in range(1, len(spectrum) + 1):
        beyond = spectrum[rank:].sum() / spectrum.sum()
        assert lost(weight, pair_pieces(weight, rank)) == pytest.approx(beyond, abs=1e-12)
        assert 1 - kept[rank - 1] == pytest.approx(beyond, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_piece_of_a_pair_spans_axes_of_its_own_and_both_weigh_the_same(shape: tuple[int, ...]) -> None:
    groups, outputs, inputs, *kernel = shape

    first, last = pair_pieces(weight_of(shape), 2)

    assert first.shape == (groups, 2, inputs, *kernel[:1], *[1] * len(kernel[1:]))
    assert last.shape == (groups, outputs, 2, *[1] * len(kernel[:1]), *kernel[1:])
    assert np.square(first).sum() == pytest.approx(np.square(last).sum())


def test_two_pieces_in_a_row_are_the_convolution_that_they_are_composed_to() -> None:
    first, last = pair_pieces(weight_of((1, 3, 2, 3, 4)), 4)
    image = np.random.default_rng(1).standard_normal((2, 9, 8))

    def correlated(channels: np.ndarray, weight: np.ndarray) -> np.ndarray:
        filters = [sum(map(scipy.signal.correlate, channels, each, ["valid"] * len(channels))) for each in weight]
        return np.array(filters)

    once = correlated(image, composed([first, last])[0])
    np.testing.assert_allclose(correlated(correlated(image, first[0]), last[0]), once, atol=1e-12)


@pytest.mark.parametrize("shape", KERNELS)
def test_tuckers_first_guess_keeps_what_is_said_and_each_sweep_keeps_more(shape: tuple[int, ...]) -> None:
    weight, kept = weight_of(shape), channel_kept(weight_of(shape))
    _, outputs, inputs, *_ = shape

    assert kept.shape == (outputs, inputs) and kept[-1, -1] == 1
    for rank_out in range(1, outputs):
        for rank_in in range(1, inputs):
            errors = [lost(weight, channel_pieces(weight, rank_in, rank_out, sweeps=n)) for n in range(4)]
            assert errors[0] == pytest.approx(1 - kept[rank_out - 1, rank_in - 1], abs=1e-12)
            assert all(after <= before + 1e-12 for before, after in pairwise(errors))
            assert errors[3] < errors[0] - 1e-6


@pytest.mark.parametrize("shape", KERNELS)
def test_a_weight_of_low_rank_comes_back_whole(shape: tuple[int, ...]) -> None:
    groups, outputs, inputs, *kernel = shape
    random = np.random.default_rng(2)
    into, core, out = (random.standard_normal((groups, *size)) for size in ((2, inputs), (2, 2, *kernel), (outputs, 2)))
    weight = np.einsum("gor,grs...,gsi->goi...", out, core, into)

    pieces = channel_pieces(weight, 2, 2)

    np.testing.assert_allclose(composed(pieces), weight, atol=1e-10)


def test_a_side_of_full_rank_has_no_piece_of_its_own() -> None:
    weight = weight_of((1, 8, 6, 3, 3))

    assert [piece.shape for piece in channel_pieces(weight, 6, 3)] == [(1, 3, 6, 3, 3), (1, 8, 3, 1, 1)]
    assert [piece.shape for piece in channel_pieces(weight, 2, 8)] == [(1, 2, 6, 1, 1), (1, 8, 2, 3, 3)]
    (whole,) = channel_pieces(weight, 6, 8)
    np.testing.assert_array_equal(whole, weight)


def test_a_weight_of_zeros_is_kept_at_any_rank_and_stays_zero() -> None:
    nothing = np.zeros((1, 4, 3, 3, 3))

    assert (pair_kept(nothing) == 1).all() and (channel_kept(nothing) == 1).all()
    for pieces in (pair_pieces(nothing, 2), channel_pieces(nothing, 2, 2)):
        assert (composed(pieces) == 0).all()
