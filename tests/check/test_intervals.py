"""Intervals against the definitions they come from, computed another way, and against simulation."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import optimize, stats

from xdonnx.intervals import (
    Interval,
    drop_interval,
    newcombe,
    paired_drop,
    relative_error,
    smallest_drop,
    tango,
    wilson,
)

COUNTS = [(12, 2, 50), (0, 1, 44), (3, 0, 1000), (0, 0, 30), (7, 7, 40), (5, 30, 60), (10, 0, 10), (1, 7, 21)]


def profiled_bounds(lost: int, gained: int, samples: int, confidence: float) -> tuple[float, float]:
    """Tango's bounds from the definition, with an eighth of a sample of continuity correction.

    The nuisance probability is found by maximizing the likelihood numerically.
    """

    def score(difference: float, correction: float) -> float:
        def likelihood(q: float) -> float:
            p = np.array([q + difference, q, 1 - 2 * q - difference])
            counts = np.array([lost, gained, samples - lost - gained])
            return -float(np.sum(counts * np.log(np.maximum(p, 1e-300))))

        ends = max(0.0, -difference), (1 - difference) / 2
        q = optimize.minimize_scalar(likelihood, bounds=ends, method="bounded", options={"xatol": 1e-13}).x
        variance = samples * (2 * q + difference - difference**2)
        return float((lost - gained - samples * difference + correction) / np.sqrt(variance))

    z = stats.norm.ppf((1 + confidence) / 2)
    value = (lost - gained) / samples
    edge = 1 - 1e-9
    low = optimize.brentq(lambda d: score(d, -0.125) - z, -edge, min(value, edge) - 1e-9)
    high = 1.0 if value == 1 else optimize.brentq(lambda d: score(d, 0.125) + z, value + 1e-9, edge)
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


# What becomes of a sample: (only the teacher is right, only the student is).
CHANGES = [
    (0.005, 0.0), (0.02, 0.0), (0.02, 0.01), (0.03, 0.0), (0.05, 0.005), (0.05, 0.01), (0.05, 0.05), (0.06, 0.005),
    (0.1, 0.0), (0.1, 0.02), (0.1, 0.1), (0.14, 0.0), (0.15, 0.05), (0.2, 0.0), (0.2, 0.1), (0.3, 0.03), (0.44, 0.1),
]  # fmt: skip


def tables(samples: int, lost: float, gained: float) -> Iterator[tuple[int, int, float]]:
    """Yield every (lost, gained) that is likely at all, with its probability."""
    last = [int(stats.binom.ppf(1 - 1e-6, samples, share)) for share in (lost, gained)]
    first = [int(stats.binom.ppf(1e-6, samples, share)) for share in (lost, gained)]
    for b, c in itertools.product(range(first[0], last[0] + 1), range(first[1], last[1] + 1)):
        if b + c <= samples:
            shares = [lost, gained, 1 - lost - gained]
            yield b, c, float(stats.multinomial.pmf([b, c, samples - b - c], samples, shares))


cached = functools.cache(tango)


@pytest.mark.parametrize("samples", [20, 100, 500])
@pytest.mark.parametrize("changes", CHANGES)
def test_the_interval_holds_the_true_drop_in_94_cases_of_100(changes: tuple[float, float], samples: int) -> None:
    """Exactly: the probabilities are summed up of all tables whose interval holds it.

    How often the teacher is right does not enter: the samples on which both agree are counted only.
    """
    lost, gained = changes
    held = 0.0
    for b, c, chance in tables(samples, lost, gained):
        interval = cached(b, c, samples)
        held += chance * (interval.low <= 100 * (lost - gained) <= interval.high)
    assert held >= 0.94


# How wide ours may be beside Newcombe's, for teachers so often right.
@pytest.mark.parametrize(("right", "most"), [(0.99, 1.09), (0.92, 1.09), (0.7, 1.6), (0.5, 1.9)])
@pytest.mark.parametrize("samples", [20, 100, 500])
def test_for_a_good_teacher_the_interval_is_hardly_wider_than_newcombes(
    right: float, most: float, samples: int
) -> None:
    generator = np.random.default_rng(8)
    for lost, gained in CHANGES:
        if gained > 1 - right:
            continue
        drawn = generator.multinomial(samples, [right - lost, lost, gained, 1 - right - gained], 200)
        ours = [cached(int(b), int(c), samples) for _, b, c, _ in drawn]
        theirs = [newcombe(*map(int, table)) for table in drawn]
        assert width(ours) <= most * width(theirs), (lost, gained)


def width(intervals: list[Interval]) -> float:
    return float(np.mean([interval.high - interval.low for interval in intervals]))


@pytest.mark.parametrize(("samples", "lost", "least"), [(20, 0.1, 0.92), (100, 0.02, 0.89), (500, 0.005, 0.92)])
def test_the_narrower_interval_for_a_weak_teacher_would_hold_it_less_often(
    samples: int, lost: float, least: float
) -> None:
    """The reason not to take the narrower of the two: of a teacher that is right on half of the samples, exactly."""
    theirs = ours = 0.0
    for b, _, chance in tables(samples, lost, 0.0):
        for both in range(samples - b + 1):
            # Of those that do not change so many are right.
            weight = chance * float(stats.binom.pmf(both, samples - b, (0.5 - lost) / (1 - lost)))
            if weight > 1e-9:
                narrow, wide = newcombe(both, b, 0, samples - b - both), cached(b, 0, samples)
                theirs += weight * (narrow.low <= 100 * lost <= narrow.high)
                ours += weight * (wide.low <= 100 * lost <= wide.high)
    assert theirs < least < 0.94 < ours


def test_the_uncorrected_score_would_hold_it_less_often() -> None:
    """The reason for the correction, exactly: the probabilities of all tables are summed up."""
    samples, lost, gained = 100, 0.06, 0.005
    z = stats.norm.ppf(0.975)

    def uncorrected(b: int, c: int, difference: float) -> float:
        linear = -b - c + (2 * samples - b + c) * difference
        q = (np.sqrt(linear**2 + 8 * samples * c * difference * (1 - difference)) - linear) / (4 * samples)
        return (b - c - samples * difference) / np.sqrt(samples * (2 * q + difference * (1 - difference)))

    plain = corrected = 0.0
    for b in range(20):
        for c in range(10):
            chance = stats.multinomial.pmf([b, c, samples - b - c], samples, [lost, gained, 1 - lost - gained])
            interval = tango(b, c, samples)
            plain += chance * (abs(uncorrected(b, c, lost - gained)) <= z)
            corrected += chance * (interval.low <= 100 * (lost - gained) <= interval.high)
    assert plain < 0.931 and corrected > 0.945


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


def outputs(samples: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return squared errors, of a true relative error of 0.1, and squared sizes."""
    sizes = 10 * generator.gamma(10, 1, samples)
    return 0.01 * sizes * generator.gamma(4, 0.25, samples), sizes


def test_relative_error_is_the_ratio_of_norms_and_its_interval_studentized() -> None:
    errors, sizes = outputs(40, np.random.default_rng(3))

    found = relative_error(errors, sizes, 0.9, generator=np.random.default_rng(0), draws=4000)

    def log_and_spread(rows: np.ndarray) -> tuple[float, float]:
        """The logarithm of the ratio, and its standard error by the jackknife."""
        e, s = errors[rows], sizes[rows]
        left_out = np.log((e.sum() - e) / (s.sum() - s)) / 2
        return np.log(e.sum() / s.sum()) / 2, np.sqrt((len(e) - 1) * left_out.var())

    generator = np.random.default_rng(1)
    log, spread = log_and_spread(np.arange(40))
    draws = np.array([log_and_spread(generator.integers(0, 40, 40)) for _ in range(4000)])
    above, below = np.quantile((draws[:, 0] - log) / draws[:, 1], [0.05, 0.95])
    assert found.value == pytest.approx(np.sqrt(errors.sum() / sizes.sum()))
    assert (found.low, found.high) == pytest.approx(np.exp([log - below * spread, log - above * spread]), rel=0.02)


@pytest.mark.parametrize("samples", [4, 9, 10, 30])
def test_relative_error_is_never_surer_than_scipys_percentiles(samples: int) -> None:
    errors, sizes = outputs(samples, np.random.default_rng(samples))

    found = relative_error(errors, sizes, 0.9, generator=np.random.default_rng(0), draws=4000)

    expected = stats.bootstrap(
        (errors, sizes),
        lambda e, s, axis=-1: np.sqrt(e.sum(axis) / s.sum(axis)),
        paired=True,
        confidence_level=0.9,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found.low <= expected.low * 1.01 and found.high >= expected.high * 0.99


@pytest.mark.parametrize("samples", [20, 100, 500])
def test_relative_error_holds_the_truth_as_often_as_it_says(samples: int) -> None:
    generator, draws = np.random.default_rng(5), 400

    found = [
        relative_error(*outputs(samples, generator), generator=generator, draws=400 if samples == 500 else 1000)
        for _ in range(draws)
    ]

    held = np.mean([interval.low <= 0.1 <= interval.high for interval in found])
    assert 0.93 <= held <= 0.985
    # Of a normal error the share is 2 x 1.96 standard errors wide; few samples cost at most a third more.
    width = np.mean([interval.high - interval.low for interval in found])
    assert width <= 1.33 * 2 * 1.96 * 0.1 / 2 * np.sqrt((1 / 4) * (1 + 1 / 10) / samples)


@pytest.mark.parametrize("samples", [2, 3, 5, 9])
def test_few_samples_bound_the_error_by_students_t(samples: int) -> None:
    errors, sizes = outputs(samples, np.random.default_rng(samples))

    found = relative_error(errors, sizes, 0.9, generator=np.random.default_rng(0))

    logs = [np.log(np.delete(errors, row).sum() / np.delete(sizes, row).sum()) / 2 for row in range(samples)]
    spread = (samples - 1) / np.sqrt(samples) * np.std(logs, ddof=1)
    away = np.exp(stats.t.ppf(0.95, samples - 1) * spread)
    assert found.high >= found.value * away * (1 - 1e-6) and found.low <= found.value / away * (1 + 1e-6)
    if samples < 9:  # else the percentiles may reach as far
        assert (found.low, found.high) == pytest.approx((found.value / away, found.value * away))


@pytest.mark.parametrize("samples", [2, 3, 5, 9])
def test_the_upper_end_for_few_samples_holds_the_truth_nearly_as_often_as_it_says(samples: int) -> None:
    """Of 97.5 %; the percentiles alone hold 57, 73, 83 and 86 %."""
    generator = np.random.default_rng(6)
    found = [relative_error(*outputs(samples, generator), generator=generator, draws=200) for _ in range(600)]
    assert np.mean([interval.high >= 0.1 for interval in found]) >= 0.945


@pytest.mark.parametrize(("errors", "sizes"), [([1.0], [4.0]), ([0.0, 1.0], [4.0, 4.0]), ([0, 0, 1], [0, 0, 4])])
def test_where_all_rests_on_one_sample_nothing_bounds_the_error(errors: list[float], sizes: list[float]) -> None:
    found = relative_error(errors, sizes, generator=np.random.default_rng(0))
    assert (found.value, found.low, found.high) == (math.sqrt(sum(errors) / sum(sizes)), 0.0, math.inf)


def test_relative_error_of_no_error_is_nothing() -> None:
    found = relative_error(np.zeros(20), np.ones(20), generator=np.random.default_rng(0))
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_relative_error_repeats_with_the_seed_and_not_with_another() -> None:
    errors, sizes = np.arange(1.0, 13.0), np.arange(13.0, 1.0, -1)
    one, same, other = (relative_error(errors, sizes, generator=np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one == same
    assert one != other and one.value == other.value


def test_relative_error_passes_over_resamples_without_a_teacher() -> None:
    blank = np.zeros(10)
    found = relative_error([*blank, 1.0], [*blank, 4.0], generator=np.random.default_rng(0))
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
