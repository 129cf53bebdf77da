"""The worst samples: which they are, in what order, and that their pictures are what was fed."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import Shots, classifier, images, saved

from xdonnx.fidelity import compare
from xdonnx.report import Fidelity, WorstShot
from xdonnx.runtime import answer, open_session
from xdonnx.worst import MOST, described, gather


@dataclass(frozen=True, eq=False)
class Known(Shots):
    """Samples with names."""

    ids: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return saved(classifier(), folder / "t.onnx"), saved(classifier(noise=0.3), folder / "s.onnx")


def measured(pair: tuple[Path, Path], shots: Shots) -> Fidelity:
    return compare(*pair, shots, generator=np.random.default_rng(0))


def answers(pair: tuple[Path, Path], shots: Shots) -> list[np.ndarray]:
    """Return all logits of both models, from one run each."""
    return [answer(open_session(path), shots.inputs)["logits"].astype(float) for path in pair]


def decoded(shot: WorstShot) -> np.ndarray:
    kind, _, data = shot.thumbnail.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def shown(values: np.ndarray) -> WorstShot:
    """Return the one sample of a run as the report shows it."""
    (found,) = described(gather([], {"x": values}, np.array([0.5]), None, None, start=0), None, None, None)
    return found


@pytest.mark.parametrize("labelled", [True, False])
def test_the_worst_come_in_the_order_that_loops_over_all_samples_find(pair, labelled: bool) -> None:
    shots = images(150, seed=3)  # more than one run's worth
    ours, theirs = answers(pair, shots)
    labels = np.random.default_rng(1).integers(0, 5, 150)
    labels[::2] = ours.argmax(1)[::2]
    shots = Shots(shots.inputs, labels if labelled else None)

    rows = []
    for row in range(150):
        a, b = int(ours[row].argmax()), int(theirs[row].argmax())
        lost = (a == labels[row] and b != labels[row]) if labelled else a != b
        rows.append((not lost, -np.linalg.norm(theirs[row] - ours[row]) / np.linalg.norm(ours[row]), row))
    expected = sorted(rows)[:MOST]

    found = measured(pair, shots).worst
    assert [shot.row for shot in found] == [row for *_, row in expected]
    assert sum(not fine for fine, *_ in rows) >= 2, "the models never disagree: nothing is tested"
    for shot, (_, error, row) in zip(found, expected, strict=True):
        assert shot.relative_l2 == pytest.approx(-error, rel=1e-4)
        assert shot.label == (labels[row] if labelled else None)
        assert (shot.teacher.top, shot.student.top) == (ours[row].argmax(), theirs[row].argmax())
        assert shot.student.score == pytest.approx(theirs[row].max(), rel=1e-5)


def test_samples_and_classes_have_their_names_where_they_are_known(pair) -> None:
    plain = images(20, labels=np.arange(20) % 5)
    words = ("ant", "bee", "cat", "dog", "elk")
    named = Known(plain.inputs, plain.labels, tuple(f"{row}.png" for row in range(20)), words)
    for shot in measured(pair, named).worst:
        assert shot.sample == f"{shot.row}.png"
        assert (shot.label_name, shot.teacher.name) == (words[shot.label], words[shot.teacher.top])
    assert {shot.sample for shot in measured(pair, plain).worst} == {
        f"sample {shot.row}" for shot in measured(pair, plain).worst
    }


def test_of_equal_models_no_sample_is_the_worst(pair) -> None:
    assert measured((pair[0], pair[0]), images(30)).worst == ()


def test_the_same_samples_give_the_same_bytes(pair) -> None:
    assert measured(pair, images(40)).model_dump_json() == measured(pair, images(40)).model_dump_json()


def test_only_the_worst_so_far_are_remembered() -> None:
    generator, known = np.random.default_rng(0), []
    errors = generator.random(600)
    for start in range(0, 600, 64):
        part = errors[start : start + 64]
        known = gather(known, {"x": np.zeros((len(part), 3, 200, 200))}, part, None, None, start=start)
        assert len(known) <= MOST and all(case.pixels.nbytes <= 3 * 64 * 64 for case in known)
    assert [case.row for case in known] == list(np.argsort(-errors)[:MOST])


@pytest.mark.parametrize("axes", ["nchw", "nhwc"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_what_was_fed_stretched_to_full_contrast(axes: str, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, channels))
    pixels[0, 0], pixels[1, 1] = 0, 255
    fed = (pixels / 255 - 0.45) / 0.22
    fed = fed.transpose(2, 0, 1) if axes == "nchw" else fed
    picture = decoded(shown(fed[None].astype(np.float32)))
    assert picture.shape == ((12, 9) if channels == 1 else (12, 9, 3))
    assert np.abs(picture.reshape(pixels.shape).astype(int) - pixels).max() <= 1


@pytest.mark.parametrize("shape", [(3, 224, 224), (1, 5000, 7), (3, 64, 65), (300, 1000, 3)])
def test_a_picture_has_at_most_64_pixels_a_side(shape: tuple[int, ...]) -> None:
    picture = decoded(shown(np.random.default_rng(0).normal(size=(1, *shape))))
    assert max(picture.shape[:2]) == 64


@pytest.mark.parametrize("shape", [(16,), (5, 6, 6), (3, 1, 400), (8, 8), (3, 4, 4, 4)])
def test_what_is_no_image_has_no_picture(shape: tuple[int, ...]) -> None:
    assert shown(np.ones((1, *shape))).thumbnail is None


@pytest.mark.parametrize("fill", [0.0, np.nan, 7])
def test_an_image_of_one_colour_or_of_no_numbers_still_has_a_picture(fill: float) -> None:
    assert decoded(shown(np.full((1, 3, 8, 8), fill))).shape == (8, 8, 3)


def test_an_error_without_bound_comes_first_and_is_none_in_the_report() -> None:
    cases = gather([], {"x": np.ones((3, 4))}, np.array([0.5, np.inf, 0.0]), None, None, start=10)
    assert [(shot.row, shot.relative_l2) for shot in described(cases, None, None, None)] == [(11, None), (10, 0.5)]
