"""The samples on which the student is farthest from the teacher, gathered run by run, each with a small picture."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xdonnx.events import legible
from xdonnx.report import Answer, WorstShot

Array = NDArray[Any]

# Samples that are shown, and the side of a picture in pixels.
MOST, SIDE = 8, 64
# Below this share of the teacher's answer two models differ by rounding only.
_ROUNDING = 1e-5
# A side that is shorter is no picture: a signal laid out as one, most likely.
_SHORTEST = 4


@dataclass(frozen=True, eq=False)
class Case:
    """A sample that the two models answer differently.

    Parameters
    ----------
    lost : bool
        The teacher is right and the student is not; without labels: they disagree.
    error : float
        Relative L2 of the worst output; infinite where the teacher's is zero.
    row : int
        Place among all samples.
    teacher, student : (class, score), optional
    pixels : (height, width[, 3]) uint8, optional
    """

    lost: bool
    error: float
    row: int
    teacher: tuple[int, float] | None
    student: tuple[int, float] | None
    pixels: Array | None

    def rank(self) -> tuple[bool, float, int]:
        """Return what sorts the worst first."""
        return not self.lost, -self.error, self.row


def gather(
    known: Sequence[Case],
    feed: Mapping[str, Array],
    errors: Array,
    scores: tuple[Array, Array] | None,
    labels: Array | None,
    *,
    start: int,
) -> list[Case]:
    """Return the worst of those known and of one run's samples.

    Parameters
    ----------
    known : sequence of Case
        What the runs before left; never more than `MOST`, so that memory does not grow with the samples.
    feed : dict of str to (rows, ...) array
        What was run.
    errors : (rows,)
        Relative L2 of each sample's worst output.
    scores : pair of (rows, classes), optional
        The output that classifies, of teacher and student.
    labels : (rows,), optional
    start : int
        Place of the first row among all samples.
    """
    lost = np.zeros(len(errors), bool)
    if scores is not None:
        ours, theirs = (output.argmax(axis=1) for output in scores)
        lost = ours != theirs if labels is None else (ours == labels) & (theirs != labels)
    rows = np.flatnonzero(lost | (errors > _ROUNDING))
    fresh = [(not lost[row], -float(errors[row]), start + int(row)) for row in rows]
    best = sorted([*(case.rank() for case in known), *fresh])[:MOST]
    before = {case.row: case for case in known}
    return [
        before[row] if row in before else _case(row, start, feed, errors, scores, bool(lost[row - start]))
        for *_, row in best
    ]


def _case(
    row: int, start: int, feed: Mapping[str, Array], errors: Array, scores: tuple[Array, Array] | None, lost: bool
) -> Case:
    at = row - start
    ours = theirs = None
    if scores is not None:
        ours, theirs = ((int(output[at].argmax()), float(output[at].max())) for output in scores)
    picture = _picture(feed, at)
    return Case(lost, float(errors[at]), row, ours, theirs, picture)


def described(
    cases: Sequence[Case], labels: Array | None, ids: Sequence[str] | None, classes: Sequence[str] | None
) -> tuple[WorstShot, ...]:
    """Return the cases as the report holds them; `ids` and `classes` name samples and classes where known."""

    def name(number: int) -> str:
        return legible(classes[number]) if classes and 0 <= number < len(classes) else ""

    def answer(given: tuple[int, float] | None) -> Answer | None:
        if given is None:
            return None
        top, score = given
        return Answer(top=top, name=name(top), score=score if math.isfinite(score) else None)

    found = []
    for case in cases:
        label = None if labels is None else int(labels[case.row])
        found.append(
            WorstShot(
                sample=legible(ids[case.row]) if ids else f"sample {case.row}",
                row=case.row,
                label=label,
                label_name="" if label is None else name(label),
                teacher=answer(case.teacher),
                student=answer(case.student),
                relative_l2=case.error if math.isfinite(case.error) else None,
                thumbnail=None if case.pixels is None else _data_uri(case.pixels),
            )
        )
    return tuple(found)


def thumbnail(feed: Mapping[str, Array], row: int = 0) -> str | None:
    """Return a sample as a small picture, the data URI of a PNG; None where no input holds images."""
    picture = _picture(feed, row)
    return None if picture is None else _data_uri(picture)


def _picture(feed: Mapping[str, Array], row: int) -> Array | None:
    return next((_pixels(values[row]) for values in feed.values() if _is_image(values)), None)


def _is_image(values: Array) -> bool:
    """Whether an input holds images: four axes with 1 or 3 channels, first or last, and two sides of some length."""
    if values.ndim != 4:
        return False
    _, a, b, c = values.shape
    return (a in (1, 3) and min(b, c) >= _SHORTEST) or (c in (1, 3) and min(a, b) >= _SHORTEST)


def _pixels(sample: Array) -> Array:
    """Return an input's sample as a small picture, stretched from its least number (black) to its largest (white)."""
    if not (sample.shape[0] in (1, 3) and min(sample.shape[1:]) >= _SHORTEST):
        sample = np.moveaxis(sample, -1, 0)
    # Of a huge image every so manieth pixel is plenty for what is scaled down anyway.
    step = max(1, max(sample.shape[1:]) // (8 * SIDE))
    values = np.asarray(sample[:, ::step, ::step], np.float64)
    known = np.isfinite(values)
    low, high = (values[known].min(), values[known].max()) if known.any() else (0.0, 0.0)
    scaled = np.where(known, values - low, 0.0) * (255 / (high - low) if high > low else 0.0)
    whole = np.moveaxis(np.round(scaled).astype(np.uint8), 0, -1)
    image = Image.fromarray(whole[:, :, 0] if whole.shape[2] == 1 else whole)
    image.thumbnail((SIDE, SIDE))
    return np.asarray(image)


def _data_uri(pixels: Array) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
