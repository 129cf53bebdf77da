"""Whether images reach the teacher as they did in training: which of the common presets suits it best.

The wrong preset is the commonest mistake of all, and no error tells of it: the teacher answers, only badly. Three
things do tell. With labels, how often the teacher is right. Where a BatchNormalization stands near the input, how far
the values that reach it are from those it has seen in training. And the answers themselves: on images prepared as in
training they are sure, and differ from image to image.

A false alarm is worse than none, so a warning needs one of these to speak clearly and none to speak against it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from xdonnx.errors import ModelError
from xdonnx.events import Event, Log
from xdonnx.images import PRESETS, Frame, Preprocess, frame, normalize
from xdonnx.model import Port
from xdonnx.stem import log_probabilities, stem_of

Array = NDArray[Any]

# Images looked at: that many, fewer where they are large (9 of 224 x 224), never fewer than the least.
MOST, LEAST, _AREA = 64, 8, 500_000
# Numbers of this mean size are 0-255, not scaled. They make a network that was trained on scaled ones sure of all that
# it answers, so its answers are no evidence for them; scaled numbers leave one that was trained on 0-255 mute.
_LARGE = 8.0
# Of the most that answers can tell: below the first they tell nothing, above the second they tell enough.
_MUTE, _TELLING, _SURE = 0.02, 0.4, 0.7
# Deviation of pixels (of 255) beyond which images are all black and white, which no photograph is.
_HARD = 0.42
# Natural logarithm of the least probability that an answer is blamed for.
_FLOOR = -10.0


@dataclass(frozen=True)
class Recipe:
    """One way to prepare images.

    Parameters
    ----------
    preprocess : Preprocess
    color : {'rgb', 'bgr', 'gray'}
        Order of the channels.
    """

    preprocess: Preprocess
    color: str

    def flags(self) -> str:
        """Return what to pass for it."""
        usual = PRESETS[self.preprocess.preset].color
        order = "" if self.color in (usual, "gray") else f" --color {self.color}"
        own = [f"--{name}" for name in ("mean", "std", "scale") if getattr(self.preprocess, name) is not None]
        return f"--preset {self.preprocess.preset}{order}{' with ' if own else ''}{', '.join(own)}"


@dataclass(frozen=True)
class Fit:
    """How the teacher takes images that were prepared by one recipe.

    Parameters
    ----------
    recipe : Recipe
    correct : (n,) bool, optional
        Which answers are the labels.
    likelihood : float, optional
        Mean log-probability of the labels.
    confidence : float, optional
        Mean probability of the winning class; None where the model does not classify.
    spread : float, optional
        Mutual information of image and class: entropy of the mean answer less the mean entropy of the answers, nats.
        It is high where answers are sure and differ.
    most : float
        What `spread` would be were every answer sure and no class commoner than another.
    large : bool
        Whether the numbers are 0-255 rather than scaled.
    mismatch : float, optional
        Kullback-Leibler divergence, mean over channels, from a normal distribution with the mean and variance that
        reach the first BatchNormalization to that of its running statistics, nats.
    """

    recipe: Recipe
    correct: Array | None = None
    likelihood: float | None = None
    confidence: float | None = None
    spread: float | None = None
    most: float = 0.0
    large: bool = False
    mismatch: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Parameters
    ----------
    used, best : Fit
        Of what the user passed, and of the recipe that fits best.
    reasons : tuple of str
        Clear figures for the best against the used one; empty where there is nothing to warn of.
    samples : int
    """

    used: Fit
    best: Fit
    reasons: tuple[str, ...]
    samples: int

    def text(self) -> str:
        """Return the warning."""
        return (
            f"the images may not reach the teacher as they did in training: '{self.used.recipe.flags()}' was used, and "
            f"'{self.best.recipe.flags()}' fits {self.samples} of them better ({'; '.join(self.reasons)}). "
            "Pass that, unless the model was trained otherwise"
        )


class Sampled(Protocol):
    """Samples that give some of themselves as images."""

    def sample(self, most: int) -> tuple[Array, Array | None] | None:
        """Return images (n, h, w, c) uint8 and their labels; None where there are none."""


def most_images(port: Port, preprocess: Preprocess) -> int:
    """Return how many images are worth looking at; 0 where this input has no preprocessing to choose."""
    wanted = frame(port, preprocess)
    if wanted is None or "float" not in port.dtype:
        return 0
    return max(LEAST, min(MOST, _AREA // ((wanted.height or 224) * (wanted.width or 224))))


def check_samples(
    proto: onnx.ModelProto,
    session: ort.InferenceSession,
    ports: Sequence[Port],
    found: Sampled,
    preprocess: Preprocess,
    log: Log,
) -> Verdict | None:
    """Check the preset on some of the samples that were found, where they are images for the only input."""
    most = most_images(ports[0], preprocess) if len(ports) == 1 else 0
    sample = found.sample(most) if most else None
    if sample is None:
        return None
    pixels, labels = sample
    return check_preset(proto, session, ports[0], pixels, preprocess, labels=labels, log=log)


def check_preset(
    proto: onnx.ModelProto,
    session: ort.InferenceSession,
    port: Port,
    pixels: Array,
    preprocess: Preprocess,
    *,
    labels: Array | None = None,
    log: Log,
) -> Verdict | None:
    """Measure which preset fits and warn, in the stage 'shots', where another is clearly better than the one used.

    Parameters
    ----------
    proto, session
        The teacher, and the same in onnxruntime.
    port : Port
        Its only input.
    pixels : (n, h, w, c) uint8
        Images at their final size, at least `LEAST`.
    preprocess : Preprocess
        What the user passed.
    labels : (n,) int64, optional
    log : Log

    Returns
    -------
    Verdict or None
        None where there is nothing to go by.
    """
    wanted = frame(port, preprocess)
    if wanted is None or "float" not in port.dtype or len(pixels) < LEAST:
        return None
    stem = stem_of(proto, port)
    used = Recipe(preprocess, wanted.color)

    def measured(recipe: Recipe) -> Fit:
        values = normalize(pixels, replace(wanted, color=recipe.color), recipe.preprocess).astype(port.dtype)
        large = bool(np.abs(values).mean() > _LARGE)
        found = Fit(recipe, large=large, mismatch=None if stem is None else stem.mismatch(values))
        logs = log_probabilities(session, port, values)
        return found if logs is None else _classified(found, logs, labels)

    try:
        fits = [measured(used)]
        if _well(fits[0]):
            return Verdict(fits[0], fits[0], (), len(pixels))
        fits += [measured(recipe) for recipe in _others(used, wanted)]
        # A swap of colours changes little, so it is looked for only where the rest is right.
        around = _best(fits)
        fits += [measured(recipe) for recipe in _swapped((around.recipe, used), fits)]
    except ModelError:
        return None  # the job says why, where it runs the model for its own ends
    if all(fit.confidence is None and fit.mismatch is None for fit in fits):
        return None
    best = _best(fits)
    reasons: tuple[str, ...] = ()
    if best is not fits[0]:
        hard = pixels.std() > 255 * _HARD
        mute = all(fit.spread is None or fit.spread < _MUTE * fit.most for fit in fits if not fit.large)
        reasons = _reasons(fits[0], best, informative=_informative(fits, labels), hard=bool(hard), mute=mute)
    verdict = Verdict(fits[0], best, reasons, len(pixels))
    if reasons:
        log(Event("shots", verdict.text(), level="warning"))
    return verdict


def _well(used: Fit) -> bool:
    """Whether what was used is right beyond doubt, so that nothing else need be tried."""
    right = used.correct is not None and used.correct.mean() >= 0.9
    return right if used.mismatch is None else used.mismatch < 0.1


def _others(used: Recipe, wanted: Frame) -> Iterator[Recipe]:
    """Yield every preset but the one that was used."""
    plain = all(getattr(used.preprocess, name) is None for name in ("mean", "std", "scale"))
    for name, preset in PRESETS.items():
        color = "gray" if wanted.color == "gray" else preset.color
        if not (plain and used.preprocess.preset == name and used.color == color):
            yield Recipe(Preprocess(preset=name), color)


def _swapped(recipes: tuple[Recipe, ...], known: list[Fit]) -> list[Recipe]:
    """Return these recipes with red and blue exchanged, those that were measured already left out."""
    seen = {fit.recipe for fit in known}
    other = {"rgb": "bgr", "bgr": "rgb"}
    found = [replace(recipe, color=other[recipe.color]) for recipe in recipes if recipe.color in other]
    return [recipe for recipe in dict.fromkeys(found) if recipe not in seen]


def _classified(fit: Fit, logs: Array, labels: Array | None) -> Fit:
    """Add what the answers say, from their log-probabilities (n, classes)."""
    chances = np.exp(logs)
    entropy = -(chances * np.maximum(logs, -700)).sum(1).mean()
    mean = chances.mean(0)
    overall = -(mean * np.log(np.maximum(mean, 1e-300))).sum()
    found = replace(
        fit,
        confidence=float(chances.max(1).mean()),
        spread=float(max(0.0, overall - entropy)),
        most=math.log(min(logs.shape)),
    )
    if labels is None or labels.max() >= logs.shape[1]:
        return found
    of_label = np.maximum(logs[np.arange(len(logs)), labels], _FLOOR)
    return replace(found, correct=logs.argmax(1) == labels, likelihood=float(of_label.mean()))


def _informative(fits: list[Fit], labels: Array | None) -> bool:
    """Whether the labels are this model's: under some recipe the teacher is right far more often than by chance."""
    shares = [fit.correct.mean() for fit in fits if fit.correct is not None]
    if labels is None or not shares:
        return False
    chance = np.bincount(labels).max() / len(labels)
    return bool(max(shares) >= chance + 0.3 * (1 - chance))


def _best(fits: list[Fit]) -> Fit:
    """Return the recipe that fits best by the most telling evidence there is; the one used wins ties."""
    shares = [0.0 if fit.correct is None else float(fit.correct.mean()) for fit in fits]
    if max(shares) >= 0.3 and fits[0].correct is not None:
        least = max(shares) - max(0.05, 1.5 / len(fits[0].correct))
        right = [fit for fit, share in zip(fits, shares, strict=True) if share >= least]
        return _likeliest([fit for fit in right if not fit.large] or right, fits[0])
    if all(fit.mismatch is not None for fit in fits):
        least = min(fit.mismatch or 0.0 for fit in fits)
        # The order of colours hardly shows in means and variances: among equals the answers decide.
        fits = [fit for fit in fits if (fit.mismatch or 0.0) <= 2 * least + 0.05]
    if any(fit.spread is None for fit in fits):
        return min(fits, key=lambda fit: math.inf if fit.mismatch is None else fit.mismatch)
    scaled = [fit for fit in fits if not fit.large]
    if any((fit.spread or 0.0) >= _TELLING * fit.most for fit in scaled):
        fits = scaled
    return max(fits, key=lambda fit: fit.spread or 0.0)


def _likeliest(fits: list[Fit], used: Fit) -> Fit:
    """Return the recipe under which the labels are likeliest; of equals the one that changes least."""
    chances = [_FLOOR if fit.likelihood is None else fit.likelihood for fit in fits]
    near = [at for at, chance in enumerate(chances) if chance >= max(chances) - 0.02]
    same = [at for at in near if fits[at].recipe.preprocess == used.recipe.preprocess]
    return fits[max(same or near, key=lambda at: chances[at])]


def _reasons(used: Fit, best: Fit, *, informative: bool, hard: bool, mute: bool) -> tuple[str, ...]:
    """Return the figures that speak clearly for `best`; none where one speaks against it.

    Parameters
    ----------
    informative : bool
        Whether the labels are the model's.
    hard : bool
        Whether the images are black and white, which looks to the statistics like another scale.
    mute : bool
        Whether the answers tell nothing under every recipe of scaled numbers.
    """
    by_labels = _by_labels(used, best) if informative else ""
    voices = [by_labels, _by_statistics(used, best, hard=hard), _by_answers(used, best, mute=mute)]
    return () if None in voices else tuple(voice for voice in voices if voice)


def _by_labels(used: Fit, best: Fit) -> str | None:
    """Return what the labels say for `best`: nothing where that is not clear, None where they are against it."""
    if used.correct is None or best.correct is None:
        return ""
    before, after = used.correct.mean(), best.correct.mean()
    gained, lost = int((best.correct & ~used.correct).sum()), int((used.correct & ~best.correct).sum())
    if after < before:
        return None
    clear = after >= before + 0.1 and _tail(lost, gained + lost) <= 0.01
    return f"right on {100 * after:.0f} % instead of {100 * before:.0f} %" if clear else ""


def _by_statistics(used: Fit, best: Fit, *, hard: bool) -> str | None:
    """Return what the first BatchNormalization says, as `_by_labels` does."""
    if used.mismatch is None or best.mismatch is None:
        return ""
    if best.mismatch > 1.5 * used.mismatch + 0.1:
        return None
    clear = used.mismatch >= (5 if hard else 0.3) and best.mismatch <= min(0.25, used.mismatch / 4)
    figures = f"{best.mismatch:.2g} nats from its training instead of {used.mismatch:.2g}"
    return f"the first BatchNormalization is {figures}" if clear else ""


def _by_answers(used: Fit, best: Fit, *, mute: bool) -> str | None:
    """Return what the answers say, as `_by_labels` does."""
    if used.spread is None or best.spread is None or used.confidence is None or best.confidence is None:
        return ""
    much = best.spread >= _SURE * best.most
    figures = f"mean confidence {best.confidence:.2f} instead of {used.confidence:.2f}"
    if used.large and not best.large:
        return f"answers that differ without numbers up to 255; {figures}" if much else ""
    if best.large and not used.large:
        return figures if much and mute else ""
    if best.spread < 0.9 * used.spread:
        return None
    clear = much and best.spread >= 1.5 * used.spread and best.confidence >= used.confidence + 0.2
    return figures if clear else ""


def _tail(successes: int, trials: int) -> float:
    """Return the chance of at most so many heads in that many throws of a fair coin (McNemar's exact test)."""
    return float(sum(math.comb(trials, k) for k in range(successes + 1)) / 2**trials)
