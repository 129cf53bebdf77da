"""Intervals against the definitions they come from, computed another way, and against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, stats

from xdonnx.intervals import drop_interval, newcombe, paired_drop, relative_error, smallest_drop, tango, wilson

COUNTS = [(12, 2, 50), (0, 1, 44), (3, 0, 1000), (0, 0, 30), (7, 7, 40), (5, 30, 60), (10, 0, 10), (1, 7, 21)]


def profiled_bounds(lost: int, gained: int, samples: int, confidence: float) -> tuple[float, float]:
    """Tango's bounds from the definition: the nuisance probability by maximizing the likelihood numerically."""

    def score(difference: float) -> float:
        def likelihood(q: float) -> float:
            p = np.array([q + difference, q, 1 - 2 * q - difference])
            counts = np.array([lost, gained, samples - lost - gained])
            return -float(np.sum(counts * np.log(np.maximum(p, 1e-300))))

        ends = max(0.0, -difference), (1 - difference) / 2
        q = optimize.minimize_scalar(likelihood, bounds=ends, method="bounded", options={"xatol": 1e-13}).x
        variance = samples * (2 * q + difference - difference**2)
        return float((lost - gained - samples * difference) / np.sqrt(variance))

    z = stats.norm.ppf((1 + confidence) / 2)
    value = (lost - gained) / samples
    edge = 1 - 1e-9
    low = optimize.brentq(lambda d: score(d) - z, -edge, min(value, edge) - 1e-9)
    high = 1.0 if value == 1 else optimize.brentq(lambda d: score(d) + z, value + 1e-9, edge)
    return 100 * low, 100 * high


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("lost", "gained", "samples"), COUNTS)
def test_tango_bounds_are_where_the_profiled_score_reaches_the_quantile(
    lost: int, gained: int, samples: int, confidence: float
) -> None:
    found = tango(lost, gained, samples, confidence)

    low, high = profiled_bounds(lost, gained, samples, confidence)
    assert found.value == pytest.approx(100 * (lost - gained) / samples)
    assert (found.low, found.high) == pytest.approx((low, high), abs=2e-3)


@pytest.mark.parametrize(("lost", "gained", "samples"), COUNTS)
def test_swapping_teacher_and_student_mirrors_the_interval(lost: int, gained: int, samples: int) -> None:
    there, back = tango(lost, gained, samples), tango(gained, lost, samples)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there.low <= there.value <= there.high


def test_paired_drop_counts_who_is_right() -> None:
    teacher = np.array([1, 1, 1, 1, 0, 0, 1, 0])
    student = np.array([1, 0, 0, 1, 1, 0, 0, 0])
    assert paired_drop(teacher, student, 0.9) == tango(3, 1, 8, 0.9)


def test_tango_covers_the_true_drop_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    shares, samples, draws = np.array([0.10, 0.04, 0.86]), 60, 800
    truth = 100 * (shares[0] - shares[1])

    intervals = [tango(int(b), int(c), samples) for b, c, _ in generator.multinomial(samples, shares, draws)]

    covered = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    assert 0.93 <= covered <= 0.98


@pytest.mark.parametrize("cells", [(36, 12, 2, 0), (1, 1, 7, 12), (20, 5, 5, 20), (0, 9, 9, 0), (50, 0, 0, 0)])
def test_newcombe_joins_two_wilson_intervals_by_the_correlation(cells: tuple[int, int, int, int]) -> None:
    both, lost, gained, neither = cells
    n = sum(cells)

    found = newcombe(*cells)

    def wilson_of(hits: int) -> tuple[float, float, float]:
        interval = stats.binomtest(hits, n).proportion_ci(method="wilson")
        return hits / n, interval.low, interval.high

    (p, p_low, p_high), (q, q_low, q_high) = wilson_of(both + lost), wilson_of(both + gained)
    table = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], cells, axis=0).astype(float)
    constant = np.any(table.std(axis=0) == 0)
    phi = 0.0 if constant else float(np.corrcoef(table.T)[0, 1])
    if phi > 0:  # shrunk by n / 2 in the numerator, not below zero
        numerator = both * neither - lost * gained
        phi *= max(numerator - n / 2, 0) / numerator
    low = p - q - np.sqrt((p - p_low) ** 2 - 2 * phi * (p - p_low) * (q_high - q) + (q_high - q) ** 2)
    high = p - q + np.sqrt((p_high - p) ** 2 - 2 * phi * (p_high - p) * (q - q_low) + (q - q_low) ** 2)
    assert (found.low, found.high) == pytest.approx((100 * low, 100 * high), abs=1e-9)


def test_tango_and_newcombe_agree_within_a_few_points() -> None:
    one, other = tango(12, 5, 200), newcombe(150, 12, 5, 33)
    assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=0.5)


@pytest.mark.parametrize(("hits", "samples"), [(0, 10), (10, 10), (7, 9), (498, 509)])
def test_wilson_is_scipys(hits: int, samples: int) -> None:
    found = wilson(hits, samples, 0.9)
    expected = stats.binomtest(hits, samples).proportion_ci(0.9, method="wilson")
    assert (found.low / 100, found.high / 100) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_drop_of_agreement_is_the_interval_of_the_disagreement() -> None:
    assert drop_interval("agreement", 3, 0, 40, 0.9) == wilson(3, 40, 0.9)
    assert drop_interval("accuracy", 3, 1, 40, 0.9) == tango(3, 1, 40, 0.9)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("samples", [1, 3, 4, 7, 30, 200])
def test_smallest_drop_is_the_first_whose_interval_excludes_zero(samples: int, confidence: float) -> None:
    shown = [lost for lost in range(1, samples + 1) if tango(lost, 0, samples, confidence).low > 1e-9]
    expected = 100 * shown[0] / samples if shown else None
    assert smallest_drop(samples, confidence) == expected


def test_relative_error_is_the_ratio_of_norms_and_its_interval_that_of_scipys_bootstrap() -> None:
    generator = np.random.default_rng(3)
    teacher = generator.normal(size=(40, 6)) * generator.gamma(2, size=(40, 1))
    gap = 0.1 * generator.normal(size=(40, 6))
    errors, sizes = np.sum(gap**2, axis=1), np.sum(teacher**2, axis=1)

    found = relative_error(errors, sizes, 0.9, generator=np.random.default_rng(0), draws=4000)

    assert found.value == pytest.approx(np.linalg.norm(gap) / np.linalg.norm(teacher))
    expected = stats.bootstrap(
        (errors, sizes),
        lambda e, s, axis=-1: np.sqrt(e.sum(axis) / s.sum(axis)),
        paired=True,
        confidence_level=0.9,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=0.02)


def test_relative_error_repeats_with_the_seed_and_not_with_another() -> None:
    errors, sizes = np.arange(1.0, 9.0), np.arange(9.0, 1.0, -1)
    one, same, other = (relative_error(errors, sizes, generator=np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one == same
    assert one != other and one.value == other.value


def test_relative_error_passes_over_resamples_without_a_teacher() -> None:
    found = relative_error([0.0, 0.0, 1.0], [0.0, 0.0, 4.0], generator=np.random.default_rng(0))
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
