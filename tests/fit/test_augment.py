"""Views against numpy's own padding, and mixtures decoded pixel by pixel."""

import numpy as np
import pytest
import torch

from xdonnx.augment import SHIFT, VIEWS, image_axes, mixed, moved, widened

FIRST, LAST = (2, 3), (1, 2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(n, channels=3, high=16, wide=24, dtype=np.int64):
    """Images in which no two pixels are alike, samples and channels included."""
    return np.arange(n * channels * high * wide).reshape(n, channels, high, wide).astype(dtype)


def pure(n, high=8, wide=8):
    """Sample `i` is one in channel `i` alone: the channels of a mixed pixel are the shares of the samples in it."""
    x = torch.zeros(n, n, high, wide, dtype=torch.float64)
    x[range(n), range(n)] = 1
    return x


def explanations(view, image):
    """Which flips and shifts up to SHIFT turn an image (c, h, w) into a view of it, by numpy's reflection."""
    high, wide = image.shape[1:]
    down, right = round(SHIFT * high), round(SHIFT * wide)
    found = []
    for flip in (False, True):
        padded = np.pad(image[..., ::-1] if flip else image, ((0, 0), (down, down), (right, right)), mode="reflect")
        for y in range(-down, down + 1):
            for x in range(-right, right + 1):
                if np.array_equal(padded[:, down + y : down + y + high, right + x : right + x + wide], view):
                    found.append((flip, y, x))
    return found


def rectangle(inside):
    """Bounds (top, bottom, left, right) of a mask (h, w), which must be one filled rectangle."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    bounds = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    assert inside[bounds[0] : bounds[1], bounds[2] : bounds[3]].all()
    return tuple(int(bound) for bound in bounds)


# ------------------------------------------------------------------------------------------------------------ Images


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((10, 3, 224, 224), FIRST),
        ((10, 1, 8, 9), FIRST),
        (("N", 3, "height", "width"), FIRST),
        ((None, 3, None, 3), FIRST),
        ((10, 224, 224, 3), LAST),
        ((10, 8, 9, 1), LAST),
        (("N", "height", "width", 3), LAST),
        ((10, 4, 8, 9), None),
        ((3, 8, 8, 8), None),
        ((10, 3, 16), None),
        ((10, 3, 5, 6, 7), None),
        ((10, 3), None),
        ((), None),
    ],
)
def test_images_have_four_axes_and_one_or_three_channels(shape, axes):
    assert image_axes(shape) == axes


# ------------------------------------------------------------------------------------------------------------- Views


@pytest.mark.parametrize("size", [(16, 24), (8, 8), (7, 5), (3, 1)])
def test_a_view_is_its_own_image_flipped_and_shifted_with_what_it_uncovers_mirrored(size):
    images = numbered(40, 3, *size)

    views = moved(torch.tensor(images), FIRST, seeded()).numpy()

    assert views.shape == images.shape and views.dtype == images.dtype
    for view, image in zip(views, images, strict=True):
        assert explanations(view, image)
        assert set(view.ravel()) <= set(image.ravel())


def test_flips_are_even_and_every_shift_up_to_the_most_is_drawn():
    images = numbered(1400, 1)

    views = moved(torch.tensor(images), FIRST, seeded(1)).numpy()

    found = [explanations(view, image) for view, image in zip(views, images, strict=True)]
    assert all(len(each) == 1 for each in found)
    flips, downs, rights = (np.array(drawn) for drawn in zip(*(each[0] for each in found), strict=True))
    assert abs(flips.mean() - 0.5) < 0.05
    for drawn, most in ((downs, 2), (rights, 3)):
        counts = np.bincount(drawn + most, minlength=2 * most + 1)
        expected = len(images) / (2 * most + 1)
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    # Each by its own draw: what one is says nothing about the other.
    draws = np.corrcoef([flips, downs, rights])
    assert np.abs(draws - np.eye(3)).max() < 0.1


def test_channels_last_are_moved_as_channels_first():
    images = torch.tensor(numbered(12))

    first = moved(images, FIRST, seeded(2))
    last = moved(images.permute(0, 2, 3, 1), LAST, seeded(2))

    assert torch.equal(last.permute(0, 3, 1, 2), first)
    assert first.is_contiguous() and last.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.uint8, torch.int64])
def test_the_seed_alone_decides_the_views_whatever_the_type(dtype):
    images = torch.tensor(numbered(5, 1, 8, 6)).to(dtype)
    before = images.clone()

    first, second, other = (moved(images, FIRST, seeded(seed)) for seed in (3, 3, 4))

    assert first.dtype == dtype and torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(first, moved(images.double(), FIRST, seeded(3)).to(dtype))
    assert torch.equal(images, before)


# ---------------------------------------------------------------------------------------------------------- Mixtures


def partners(made, x):
    """For each row {partner: own share} of the blends of `x` (n, d) with one other row that explain it."""
    found = []
    for i, row in enumerate(made):
        apart = x[i] - x
        length = (apart**2).sum(1)
        share = ((row - x) * apart).sum(1) / np.where(length > 0, length, 1)
        off = np.abs(x + share[:, None] * apart - row).max(1)
        found.append({j: float(share[j]) for j in range(len(x)) if j != i and off[j] < 1e-12})
    return found


def test_half_of_a_batch_is_blended_with_the_same_other_sample_in_every_input():
    n, random = 400, np.random.default_rng(0)
    inputs = {"a": random.standard_normal((n, 4)), "b": random.standard_normal((n, 2, 3))}

    made = mixed({name: torch.tensor(x) for name, x in inputs.items()}, seeded(5))

    assert list(made) == ["a", "b"]
    rows = {name: (made[name].numpy().reshape(n, -1), x.reshape(n, -1)) for name, x in inputs.items()}
    blended = np.flatnonzero((rows["a"][0] != rows["a"][1]).any(1))
    np.testing.assert_array_equal(blended, np.flatnonzero((rows["b"][0] != rows["b"][1]).any(1)))
    assert abs(len(blended) / n - 0.5) < 0.1
    found = {name: partners(*pair) for name, pair in rows.items()}
    shares = []
    for i in blended:
        assert len(found["a"][i]) == 1
        ((partner, share),) = found["a"][i].items()
        assert found["b"][i] == pytest.approx({partner: share}, abs=1e-9)
        shares.append(share)
    assert 0 <= min(shares) < 0.05 and 0.95 < max(shares) <= 1
    assert abs(np.mean(shares) - 0.5) < 0.08


def test_nothing_is_blended_where_an_input_holds_integers():
    generator = seeded(6)
    inputs = {"image": torch.randn(64, 3, 4, 4, generator=generator), "tokens": torch.arange(64 * 5).reshape(64, 5)}

    made = mixed(inputs, generator)

    assert made.keys() == inputs.keys()
    assert all(torch.equal(made[name], x) and made[name].dtype == x.dtype for name, x in inputs.items())


def test_without_axes_no_piece_is_pasted():
    x = pure(60)

    made = mixed({"image": x}, seeded(7))["image"]

    assert torch.equal(made, made[:, :, :1, :1].expand_as(made))
    assert not torch.equal(made, x)


def test_a_piece_is_one_rectangle_of_another_image_and_what_is_around_it_stays():
    images = numbered(500, 2, 12, 20)

    made = mixed({"image": torch.tensor(images)}, seeded(8), FIRST)["image"].numpy()

    per_image = images[0].size
    # Every pixel at its place, in its channel; only the sample may be another.
    np.testing.assert_array_equal(made % per_image, images % per_image)
    source = made // per_image
    np.testing.assert_array_equal(source[:, 0], source[:, 1])
    own = np.arange(500)[:, None, None]
    pieced = 0
    for i in np.flatnonzero((source[:, 0] != own).any((1, 2))):
        inside = source[i, 0] != i
        rectangle(inside)
        assert len(set(source[i, 0][inside])) == 1
        pieced += 1
    assert abs(pieced / 500 - 0.5) < 0.1


def test_the_area_of_a_piece_is_uniform_and_so_is_its_place():
    images = numbered(3000, 1, 16, 32, np.int32)

    made = mixed({"image": torch.tensor(images)}, seeded(9), FIRST)["image"].numpy()

    inside = (made != images)[:, 0]
    bounds = np.array([rectangle(each) for each in inside if each.any()])
    top, bottom, left, right = bounds.T
    area = (bottom - top) * (right - left) / (16 * 32)
    assert abs(area.mean() - 0.5) < 0.03
    for share in (0.25, 0.5, 0.75):
        assert abs((area < share).mean() - share) < 0.05
    # As much is left free before a piece as behind it, and both ends are reached.
    for before, behind, size in ((top, bottom, 16), (left, right, 32)):
        free = size - (behind - before)
        some = free > 0
        place = before[some] / free[some]
        assert place.min() == 0 and place.max() == 1
        assert abs(place.mean() - 0.5) < 0.03


def test_a_piece_is_that_of_an_untouched_sample_and_lies_on_the_blend():
    n = 200
    x = pure(n)

    made = mixed({"image": x}, seeded(10), FIRST)["image"].numpy()

    assert made.min() >= 0
    np.testing.assert_allclose(made.sum(1), 1, rtol=1e-12)
    both = 0
    for i, image in enumerate(made):
        shares, where = np.unique(image.reshape(n, -1), axis=1, return_inverse=True)
        if shares.shape[1] == 1:
            continue  # one sample or one blend throughout
        assert shares.shape[1] == 2
        unmixed = [k for k in (0, 1) if shares[:, k].max() == 1]
        piece = min(unmixed, key=lambda k: shares[i, k])
        rectangle((where == piece).reshape(8, 8))
        blend = shares[:, 1 - piece]
        assert blend[i] > 0 and np.count_nonzero(blend) <= 2
        both += np.count_nonzero(blend) == 2
    assert both > n / 8


def test_channels_last_are_mixed_as_channels_first_under_the_same_seed():
    x = pure(30)

    first, again, other = (mixed({"image": x}, seeded(seed), FIRST)["image"] for seed in (11, 11, 12))
    last = mixed({"image": x.permute(0, 2, 3, 1)}, seeded(11), LAST)["image"]

    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(last.permute(0, 3, 1, 2), first)
    assert torch.equal(x, pure(30))


# ------------------------------------------------------------------------------------------------ Rows added to a few


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("n", [1, 3, 10, 50, 63])
def test_samples_are_followed_by_their_mirror_images_and_then_by_views_of_them_in_order(n, last):
    images = numbered(n, 1, 8, 16)
    given = images.transpose(0, 2, 3, 1) if last else images

    made = widened({"image": given}, VIEWS, seeded(13), folds=n)["image"]  # every sample is mixed with itself alone

    rows = made.transpose(0, 3, 1, 2) if last else made
    assert len(rows) % n == 0 and abs(len(rows) - VIEWS) <= n / 2
    np.testing.assert_array_equal(rows[:n], images)
    np.testing.assert_array_equal(rows[n : 2 * n], images[..., ::-1])
    for r, row in enumerate(rows):
        assert explanations(row, images[r % n])


@pytest.mark.parametrize("folds", [1, 2, 3, 5, 9])
def test_rows_hold_samples_of_their_own_fold_alone_and_their_own_most(folds):
    n, total = 5, 400

    def rows(lit):
        images = np.zeros((n, 1, 8, 8))
        images[lit] = 1
        return widened({"image": images}, total, seeded(19), folds=folds)["image"]

    # The draws do not look at the values: lighting one sample at a time shows where each went.
    shares = np.stack([rows(lit) for lit in range(n)], 1)[:, :, 0]

    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-12)
    own = np.arange(total) % n
    for sample in range(n):
        apart = own % folds != sample % folds
        assert shares[apart, sample].max(initial=0) == 0
    assert (shares[: 2 * n][range(2 * n), own[: 2 * n]] == 1).all()
    # Views blend or hold pieces of others where there are any, and still show their own sample most.
    per_sample = np.array([[shares[own == i, j].mean() for j in range(n)] for i in range(n)])
    company = np.array([np.count_nonzero(np.arange(n) % folds == i % folds) for i in range(n)])
    np.testing.assert_array_equal((per_sample > 0).sum(1), company)
    assert (per_sample.diagonal() > 0.5).all()


def test_views_of_one_sample_differ():
    rows = widened({"image": numbered(1, 1, 32, 32)}, VIEWS, seeded(14))["image"]

    # 9 shifts each way and a flip make 162 views, of which 128 draws meet about 88.
    assert len(np.unique(rows, axis=0)) > 64


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8, np.int32])
def test_rows_keep_the_type_and_integers_their_values(dtype):
    images = (25 * np.arange(4)[:, None, None, None] + np.arange(25).reshape(5, 5, 1)).astype(dtype)

    rows = widened({"image": images}, 40, seeded(15), folds=2)["image"]

    assert rows.dtype == dtype and len(rows) == 40
    for r, row in enumerate(rows):
        shown = images[r % 2 :: 2] if r >= 8 else images[r % 4]
        assert shown.min() - 0.2 <= row.min() and row.max() <= shown.max() + 0.2  # a blend in half precision rounds
        if np.dtype(dtype).kind in "iu":
            assert set(row.ravel()) <= set(shown.ravel())


@pytest.mark.parametrize(
    ("inputs", "total"),
    [
        ({"image": numbered(6, 3, 4, 4)}, 11),  # more than half as many already
        ({"image": numbered(6, 3, 4, 4)}, 0),
        ({"image": numbered(2, 3, 4, 4), "mask": numbered(2, 1, 4, 4)}, 32),
        ({"tokens": np.arange(8).reshape(2, 4)}, 32),
        ({"signal": np.arange(24.0).reshape(2, 3, 4)}, 32),
        ({"features": numbered(2, 4, 5, 5)}, 32),
    ],
    ids=["enough", "none wanted", "two inputs", "tokens", "signal", "features"],
)
def test_what_needs_no_views_or_has_none_comes_back_as_it_is(inputs, total):
    generator = seeded(16)
    before = generator.get_state()

    made = widened(inputs, total, generator)

    assert made.keys() == inputs.keys()
    assert all(np.array_equal(made[name], array) for name, array in inputs.items())
    assert torch.equal(generator.get_state(), before)


def test_the_seed_alone_decides_the_rows():
    images = {"image": numbered(3, 3, 16, 16)}

    first, second, other = (widened(images, 24, seeded(seed))["image"] for seed in (17, 17, 18))

    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)
