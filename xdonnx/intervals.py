"""How far a figure measured on few samples can be from the truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


# In samples. One half is the full correction, and too wide.
_CONTINUITY = 0.125
# Below so many samples resampling says nothing about the spread of a resample.
FEW = 10
# An error that may be so many times as large as measured is not bounded at all.
_ENDLESS = 1e6
# Numbers that the bootstrap holds at once.
_NUMBERS = 1_000_000
# Rounds of timing are cut into so many spans; the ratio of each is one vote on the true one.
_SPANS = 10


@dataclass(frozen=True)
class Interval:
    """A measured value and the two-sided confidence interval around it.

    Parameters
    ----------
    value, low, high : float
        All in one unit: points (percent of the samples) for drops and shares, none for relative errors.
    confidence : float
        Coverage that the interval aims at, in (0, 1).
    method : {'tango', 'newcombe', 'wilson', 'bootstrap', 'jackknife', 'spans'}
    """

    value: float
    low: float
    high: float
    confidence: float
    method: str


def paired_drop(teacher_right: ArrayLike, student_right: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return by how many points the student's accuracy lies below the teacher's, with Tango's interval.

    Parameters
    ----------
    teacher_right, student_right : array-like of bool, shape (n,)
        Whether each network classified the sample correctly; the same samples in the same order.
    confidence : float, default=0.95

    Returns
    -------
    Interval
        In points; negative where the student is the better one.
    """
    teacher, student = np.asarray(teacher_right, bool), np.asarray(student_right, bool)
    assert teacher.shape == student.shape and teacher.ndim == 1
    lost, gained = int(np.sum(teacher & ~student)), int(np.sum(~teacher & student))
    return tango(lost, gained, len(teacher), confidence)


def tango(lost: int, gained: int, samples: int, confidence: float = 0.95) -> Interval:
    """Return Tango's score interval for the difference of two proportions measured on the same samples.

    The interval holds every difference that the score test does not reject, and stays sensible where one or both
    counts are zero, as is usual with a good student and few samples. As it stands in [1]_ it falls short with few
    changes: of 95 % it holds 93.0 % at 100 samples of which the student loses 6 % and gains 0.5 %. So the score
    carries an eighth of a sample of the continuity correction of [2]_, the least that leaves 94 % at 20, at 100 and at
    500 samples whatever is lost and gained (94.9, 94.05 and 94.5 % at the worst; 93.8 % at 50; 95 to 97 % on average).

    Parameters
    ----------
    lost, gained : int
        Samples that only the teacher, and that only the student, has right.
    samples : int
        All samples, those where both agree included.
    confidence : float, default=0.95

    Returns
    -------
    Interval
        Of 100 (lost - gained) / samples, in points.

    Notes
    -----
    The samples on which both agree say nothing about the difference, and are counted only. Newcombe's method 10 also
    asks in how many of these both are right. For a teacher of 92 % or better ours is at most 8 % wider; for one of 50
    to 70 % Newcombe's is narrower, by nearly half where few answers change, and pays for that: at 50
    % it holds 91.5 % (20 samples, 10 % lost), 88.5 % (100, 2 %) and 91.7 % (500, 0.5 %). Where none of 20 samples
    changes it ends at 9.0 points, though a student that loses 13 in 100 leaves 20 samples unchanged in 6 % of all
    cases: no interval of that width holds 94 %.

    References
    ----------
    .. [1] T. Tango, "Equivalence test and confidence interval for the difference in proportions for the
       paired-sample design", Statistics in Medicine 17:891-908, 1998.
    .. [2] P. Chang, R. Liu and T. Hou, "Continuity corrected score confidence interval for the difference in
       proportions in paired data", Journal of Applied Statistics 51:139-152, 2024.
    """
    assert samples > 0 and lost >= 0 and gained >= 0 and lost + gained <= samples
    z = _quantile(confidence)
    value = (lost - gained) / samples

    def excess(difference: float, sign: int) -> float:
        """Score of `difference`, multiplied out so that a variance of zero does no harm."""
        spread = math.sqrt(max(0.0, samples * _variance(lost, gained, samples, difference)))
        return lost - gained - samples * difference - sign * (z * spread + _CONTINUITY)

    low = _crossing(lambda d: excess(d, 1), -1.0, value)
    high = _crossing(lambda d: excess(d, -1), value, 1.0)
    return Interval(100 * value, 100 * low, 100 * high, confidence, "tango")


def newcombe(both: int, lost: int, gained: int, neither: int, confidence: float = 0.95) -> Interval:
    """Return Newcombe's hybrid score interval for the same difference: a closed formula, to check Tango's by.

    Two Wilson intervals are joined, with the correlation of the two networks' answers taken into account.

    Parameters
    ----------
    both, lost, gained, neither : int
        Samples that both, only the teacher, only the student, and neither have right.
    confidence : float, default=0.95

    Returns
    -------
    Interval
        In points.

    References
    ----------
    .. [1] R. G. Newcombe, "Improved confidence intervals for the difference between binomial proportions
       based on paired data", Statistics in Medicine 17:2635-2650, 1998; method 10.
    """
    samples = both + lost + gained + neither
    first, second = wilson(both + lost, samples, confidence), wilson(both + gained, samples, confidence)
    cross: float = both * neither - lost * gained
    if cross > 0:  # the correction of [1]_, against too large a correlation
        cross = max(cross - samples / 2, 0)
    margins = (both + lost) * (gained + neither) * (both + gained) * (lost + neither)
    phi = cross / math.sqrt(margins) if margins else 0.0

    def reach(ours: float, theirs: float) -> float:
        return math.sqrt(max(0.0, ours**2 - 2 * phi * ours * theirs + theirs**2))

    value = first.value - second.value
    low = value - reach(first.value - first.low, second.high - second.value)
    high = value + reach(first.high - first.value, second.value - second.low)
    return Interval(value, low, high, confidence, "newcombe")


def wilson(hits: int, samples: int, confidence: float = 0.95) -> Interval:
    """Return Wilson's score interval for one share, such as top-1 agreement.

    Parameters
    ----------
    hits, samples : int
    confidence : float, default=0.95

    Returns
    -------
    Interval
        Of 100 hits / samples, in points.

    References
    ----------
    .. [1] E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal of
       the American Statistical Association 22:209-212, 1927.
    """
    assert samples > 0 and 0 <= hits <= samples
    z, share = _quantile(confidence), hits / samples
    scale = 1 + z**2 / samples
    middle = (share + z**2 / (2 * samples)) / scale
    half = z * math.sqrt(share * (1 - share) / samples + z**2 / (4 * samples**2)) / scale
    # The ends meet 0 and 1 exactly at no and all hits; floating point may miss them by 1e-17.
    low = 0.0 if hits == 0 else max(0.0, middle - half)
    high = 1.0 if hits == samples else min(1.0, middle + half)
    return Interval(100 * share, 100 * low, 100 * high, confidence, "wilson")


def drop_interval(of: str, lost: int, gained: int, samples: int, confidence: float = 0.95) -> Interval:
    """Return the interval of a drop of 'accuracy', Tango's, or of 'agreement', Wilson's of the disagreement."""
    if of == "accuracy":
        return tango(lost, gained, samples, confidence)
    return wilson(lost, samples, confidence)


def relative_error(
    errors: ArrayLike,
    sizes: ArrayLike,
    confidence: float = 0.95,
    *,
    generator: np.random.Generator,
    draws: int = 1000,
) -> Interval:
    """Return the relative L2 error over all samples with an interval of its logarithm.

    Parameters
    ----------
    errors, sizes : array-like of float, shape (n,)
        For each sample the squared norm of student - teacher, and of the teacher.
    confidence : float, default=0.95
    generator : numpy.random.Generator
        Draws the resamples; the same seed gives the same interval.
    draws : int, default=1000
        Resamples, each of n samples with replacement.

    Returns
    -------
    Interval
        Of sqrt(sum(errors) / sum(sizes)), without unit. From 0 to infinity where all rests on one sample.

    Notes
    -----
    Errors are skewed, a few samples make most of the sum, and plain percentiles then fall short: of 95 % they hold
    91 % with 20 samples of moderate skew, where a studentized bootstrap holds 94 %. With fewer than 10 samples, whose
    resamples never see an error worse than the worst, Student's t takes its place, on the standard error of the
    jackknife: of 97.5 % its upper end holds 96 to 97 % at 2 to 9 samples of moderate skew, where percentiles hold 57 to
    86 %. The interval is never narrower than that of the percentiles. Resamples whose teacher is zero throughout say
    nothing about a ratio and are left out.

    References
    ----------
    .. [1] B. Efron and R. J. Tibshirani, "An Introduction to the Bootstrap", chapters 11 to 13, 1993.
    """
    error, size = np.asarray(errors, np.float64), np.asarray(sizes, np.float64)
    assert error.shape == size.shape and error.ndim == 1 and size.sum() > 0
    value = math.sqrt(error.sum() / size.sum())
    log, spread = _log_ratio(error[None], size[None])
    if not np.isfinite(log[0]):  # no error at all
        return Interval(value, value, value, confidence, "bootstrap")
    if len(error) < FEW:
        # Away from the value by so many standard errors, or by all that can be where one sample bears the whole.
        away = _student(confidence, len(error) - 1) * _jackknife(error, size) if len(error) > 1 else math.inf
        if not away < math.log(_ENDLESS):
            return Interval(value, 0.0, math.inf, confidence, "jackknife")
    step, parts = max(1, _NUMBERS // len(error)), list[Array]()
    for start in range(0, draws, step):
        rows = generator.integers(0, len(error), (min(step, draws - start), len(error)))
        parts.append(np.stack(_log_ratio(error[rows], size[rows])))
    logs, spreads = np.concatenate(parts, axis=1)
    ends = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    some = ~np.isnan(logs)
    low, high = np.quantile(np.exp(logs[some]), ends) if some.any() else (value, value)
    if len(error) < FEW:
        low, high = min(low, value * math.exp(-away)), max(high, value * math.exp(away))
        return Interval(value, float(low), float(high), confidence, "jackknife")
    sure = np.isfinite(logs) & (spreads > 0)
    if sure.any():
        above, below = np.quantile((logs[sure] - log[0]) / spreads[sure], ends)
        low = min(low, math.exp(log[0] - below * spread[0]))
        high = max(high, math.exp(log[0] - above * spread[0]))
    return Interval(value, float(min(low, value)), float(max(high, value)), confidence, "bootstrap")


def smallest_drop(samples: int, confidence: float = 0.95) -> float | None:
    """Return the smallest drop, in points, that this many samples can tell from none at all.

    That is the fewest samples that only the teacher has right, with none that only the student has, for which
    Tango's interval excludes zero: (lost - 1/8)**2 > z**2 lost, hence 5 samples at 95 %. Without labels as many
    disagreements are asked for, since either of the two may be right.

    Parameters
    ----------
    samples : int
    confidence : float, default=0.95

    Returns
    -------
    float or None
        None where even losing every sample would prove nothing.
    """
    z = _quantile(confidence)
    edge = _CONTINUITY + z**2 / 2 + z * math.sqrt(_CONTINUITY + z**2 / 4)
    fewest = math.floor(edge) + 1
    return 100 * fewest / samples if fewest <= samples else None


def ratio_band(first: Array, second: Array) -> Interval:
    """Return the ratio of two medians of times that were measured in turns, with the band that noise leaves.

    The rounds are cut into ten spans of time, each with a ratio of its own medians. The true one lies between the
    second smallest and the second largest of ten with 97.9 % confidence, whatever the noise is like; between the
    smallest and the largest of six with 96.9 %, of three with 75 %.

    Parameters
    ----------
    first, second : ndarray, shape (rounds,)
        Milliseconds of the one and of the other in the same rounds.

    Returns
    -------
    Interval
        Of second over first.
    """
    pairs = np.array_split(np.stack([first, second]), min(_SPANS, len(first)), axis=1)
    ratios = sorted(float(np.median(span[1]) / np.median(span[0])) for span in pairs)
    trim = 1 if len(ratios) == _SPANS else 0
    value = float(np.median(second) / np.median(first))
    # The ratio of all may fall just outside of that of the parts.
    low, high = min(value, ratios[trim]), max(value, ratios[-1 - trim])
    # Outside lie the chances of as many heads or fewer, and of as many tails, in so many throws of a coin.
    missed = 2 * sum(math.comb(len(ratios), heads) for heads in range(trim + 1)) / 2 ** len(ratios)
    return Interval(value, low, high, max(0.0, 1 - missed), "spans")


def _log_ratio(errors: Array, sizes: Array) -> tuple[Array, Array]:
    """Return for each row the logarithm of the relative error, and its standard error by the delta method.

    Nan where the teacher is zero, minus infinity where the error is.
    """
    total, whole = errors.sum(axis=1), sizes.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(whole > 0, total / whole, np.nan)
        gap = np.sqrt(np.sum((errors - ratio[:, None] * sizes) ** 2, axis=1))
        return np.log(ratio) / 2, gap / (2 * total)


def _jackknife(errors: Array, sizes: Array) -> float:
    """Return the standard error of the logarithm, from what is left without each sample; inf where nothing is."""
    others = 1 - np.eye(len(errors))
    error, size = others @ errors, others @ sizes
    if not (error > 0).all() or not (size > 0).all():
        return math.inf
    logs = np.log(error / size) / 2
    return math.sqrt((len(logs) - 1) * float(logs.var()))


def _student(confidence: float, freedom: int) -> float:
    """Return how many standard errors hold the confidence on both sides, for so many degrees of freedom.

    By the finite sums of Student's distribution (Abramowitz and Stegun, 26.7.3 and 26.7.4), in the angle whose tangent
    is t / sqrt(freedom).
    """

    def missing(angle: float) -> float:
        odd, cosine = freedom % 2, math.cos(angle)
        term = cosine if odd else 1.0
        total = 0.0
        for step in range(freedom // 2):
            total += term
            term *= cosine**2 * (2 * step + 1 + odd) / (2 * step + 2 + odd)
        total *= math.sin(angle)
        return confidence - (2 / math.pi * (angle + total) if odd else total)

    return math.sqrt(freedom) * math.tan(_crossing(missing, 0.0, math.pi / 2))


def _variance(lost: int, gained: int, samples: int, difference: float) -> float:
    """Variance of one sample's share in the score, at the likeliest probability of `gained`."""
    linear = -lost - gained + (2 * samples - lost + gained) * difference
    constant = -gained * difference * (1 - difference)
    root = math.sqrt(max(0.0, linear**2 - 8 * samples * constant))
    # The likeliest q solves 2 n q^2 + linear q + constant = 0. Of the root's two forms take the one that does
    # not subtract nearly equal numbers.
    q = -2 * constant / (linear + root) if linear > 0 else (root - linear) / (4 * samples)
    return 2 * q + difference * (1 - difference)


def _crossing(function: Callable[[float], float], low: float, high: float) -> float:
    """Bisect for the zero of a falling function; an end of the range where it has no zero inside."""
    for _ in range(80):
        middle = (low + high) / 2
        if function(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _quantile(confidence: float) -> float:
    assert 0 < confidence < 1
    return NormalDist().inv_cdf((1 + confidence) / 2)
