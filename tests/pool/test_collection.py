"""From files to a scored pool: what is read, left out, kept, shown, and refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

import xdonnx.rows
import xdonnx.shots
from xdonnx.collection import BATCH, NOISE, Teacher, collect
from xdonnx.errors import ShotsError
from xdonnx.events import Event, ignore
from xdonnx.images import Preprocess
from xdonnx.model import interface, read_proto
from xdonnx.pool import Pool
from xdonnx.relatedness import Gauge
from xdonnx.rows import Pictures, Rows
from xdonnx.samples import Request
from xdonnx.sheet import PoolSheet
from xdonnx.shots import Shots

SAMPLES = Path(__file__).parents[2] / "samples"
PATH = SAMPLES / "digits_mobile.onnx"
Array = NDArray[Any]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(PATH, read_proto(PATH))


@pytest.fixture
def images(digits: tuple[Array, Array]) -> Array:
    """Return twenty digits, then twenty images of noise."""
    random = np.random.default_rng(0)
    return np.concatenate([digits[0][100:120], random.integers(0, 256, (20, 16, 16), np.uint8)])


def shots_of(teacher: Teacher, images: Array) -> Shots:
    found, _ = Request(images, preprocess=Preprocess("unit")).read(interface(teacher.proto).inputs)
    return found if isinstance(found, Shots) else found.take(np.arange(len(found)))


def collected(
    teacher: Teacher, given: Any, fit: Array, held: Array | None = None, log: Any = ignore, **more: Any
) -> tuple[Pool, PoolSheet]:
    asked = Request(pool=given, preprocess=Preprocess("unit"), **more)
    found = asked.read_pool(interface(teacher.proto).inputs, log)
    assert found is not None
    own = shots_of(teacher, fit)
    return collect(found, teacher, own, own if held is None else shots_of(teacher, held), how="preferential", log=log)


def in_a_folder(folder: Path, images: Array) -> Path:
    folder.mkdir()
    for at, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{at:04}.png")
    return folder


def test_related_images_are_drawn_more_often_and_shown_first(
    teacher: Teacher, images: Array, digits: tuple[Array, Array]
) -> None:
    pool, sheet = collected(teacher, images, digits[0][:10])

    assert pool.chances()[:20].sum() > 0.9
    assert (sheet.images, sheet.used, sheet.twins, sheet.draw) == (40, 40, 0, "preferential")
    assert {int(image.sample.split()[1]) < 20 for image in sheet.most_related} == {True}
    assert {int(image.sample.split()[1]) >= 20 for image in sheet.least_related} == {True}
    assert len(sheet.most_related) == len(sheet.least_related) == 12
    assert pool.scores is not None
    assert sheet.quantiles == pytest.approx(np.quantile(pool.scores, [0, 0.25, 0.5, 0.75, 1]))
    assert sheet.effective == pytest.approx(1 / (pool.chances() ** 2).sum())
    assert all((image.thumbnail or "").startswith("data:image/png;base64,") for image in sheet.most_related)


def test_images_that_fit_or_judge_are_left_out_with_a_note(
    teacher: Teacher, images: Array, digits: tuple[Array, Array]
) -> None:
    events: list[Event] = []
    fit, held = np.concatenate([digits[0][:9], images[3:4]]), np.concatenate([digits[0][20:29], images[[5, 30]]])

    pool, sheet = collected(teacher, images, fit, held, events.append)

    assert (len(pool), sheet.images, sheet.twins) == (37, 40, 3)
    assert set(pool.images.ids) == {f"sample {at}" for at in set(range(40)) - {3, 5, 30}}
    assert any("3 images of the pool are also samples" in event.text for event in events)
    assert {event.stage for event in events} == {"pool"}
    assert (40, 40) in {(event.done, event.total) for event in events}
    with pytest.raises(ShotsError, match="all 40 images are also samples that fit or judge"):
        collected(teacher, images, images)


def test_scores_of_the_same_images_are_measured_once(
    teacher: Teacher, images: Array, digits: tuple[Array, Array], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    run: list[int] = []
    plain = Gauge.__call__

    def counted(gauge: Gauge, feed: Any) -> Array:
        run.append(len(next(iter(feed.values()))))
        return plain(gauge, feed)

    monkeypatch.setattr(Gauge, "__call__", counted)
    first = collected(teacher, images[:30], digits[0][:10])[0]
    noise = [BATCH] * (NOISE // BATCH)
    assert run == [30, *noise] and len(list(cache.iterdir())) == 1

    again = collected(teacher, images[:30], digits[0][:10])[0]
    assert run[3:] == noise
    assert first.scores is not None and again.scores is not None
    np.testing.assert_array_equal(first.scores, again.scores)
    # Ten more are all that is new; with other preprocessing everything is.
    collected(teacher, images, digits[0][:10])
    assert run[5:] == [10, *noise]
    other = Request(pool=images, preprocess=Preprocess("tf")).read_pool(interface(teacher.proto).inputs)
    assert other is not None
    own = shots_of(teacher, digits[0][:10])
    collect(other, teacher, own, own, how="uniform")
    assert run[8:] == [40, *noise]


def test_without_a_place_for_a_cache_the_scores_are_the_same(
    teacher: Teacher, images: Array, digits: tuple[Array, Array], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = collected(teacher, images, digits[0][:10])[0]
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDONNX_CACHE", str(tmp_path / "file" / "below"))
    events: list[Event] = []

    second = collected(teacher, images, digits[0][:10], log=events.append)[0]

    assert first.scores is not None and second.scores is not None
    np.testing.assert_array_equal(first.scores, second.scores)
    assert any("cannot be kept" in event.text for event in events)


def test_one_image_is_a_pool(teacher: Teacher, images: Array, digits: tuple[Array, Array]) -> None:
    pool, sheet = collected(teacher, images[:1], digits[0][:10])

    assert pool.chances().tolist() == [1.0] and len(sheet.most_related) == 1 and not sheet.least_related
    assert next(iter(pool.draw(3, seed=0).values())).shape == (3, 1, 16, 16)


def test_files_arrays_lists_and_folders_in_folders_are_the_same_pool(
    teacher: Teacher, images: Array, digits: tuple[Array, Array], tmp_path: Path
) -> None:
    expected = collected(teacher, images, digits[0][:10])[0]
    folder = in_a_folder(tmp_path / "a", images)
    (tmp_path / "list.txt").write_text("\n".join(str(file) for file in sorted(folder.iterdir())))
    np.savez(tmp_path / "x.npz", images=images)
    np.save(tmp_path / "x.npy", images)
    pictures = [Image.fromarray(image) for image in images]
    batches = (images[at : at + 8] for at in range(0, 40, 8))
    for given in (folder, tmp_path / "list.txt", tmp_path / "x.npz", tmp_path / "x.npy", pictures, batches):
        pool = collected(teacher, given, digits[0][:10])[0]
        np.testing.assert_array_equal(pool.images.inputs["image"], expected.images.inputs["image"])
        np.testing.assert_array_equal(pool.scores, expected.scores)
    # Sub-folders are no classes here: called by numbers and words, beside loose images.
    for name, file in (("7", "0000.png"), ("cats", "0001.png")):
        (folder / name).mkdir()
        (folder / file).rename(folder / name / file)
    assert len(collected(teacher, folder, digits[0][:10])[0]) == 40


def test_images_of_another_size_and_colour_are_brought_to_that_of_the_samples(
    teacher: Teacher, digits: tuple[Array, Array], tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "p").mkdir()
    for at, (mode, shape) in enumerate([("RGB", (40, 30, 3)), ("L", (9, 16)), ("RGBA", (16, 16, 4)), ("1", (50, 50))]):
        pixels = random.integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels).convert(mode).save(tmp_path / "p" / f"{at}.png")

    pool, _ = collected(teacher, tmp_path / "p", digits[0][:10])

    assert next(iter(pool.images.inputs.values())).shape == (4, 1, 16, 16)


def test_broken_files_are_an_error_or_on_request_left_out_and_named(
    teacher: Teacher, images: Array, digits: tuple[Array, Array], tmp_path: Path
) -> None:
    folder = in_a_folder(tmp_path / "p", images)
    (folder / "0004.png").write_bytes(b"")
    (folder / "0005.png").write_text("no image")

    with pytest.raises(ShotsError, match=r"^--pool: 2 of 40 images (.|\n)*'0004.png' \(0 bytes\)(.|\n)*--skip-bad"):
        collected(teacher, folder, digits[0][:10])

    events: list[Event] = []
    pool, sheet = collected(teacher, folder, digits[0][:10], log=events.append, skip_bad=True)
    assert len(pool) == 38 and sheet.unreadable == ("0004.png", "0005.png")
    assert any(event.text.startswith("pool: left out 2 of 40 images") for event in events if event.level == "warning")


@pytest.mark.parametrize("name", ["none", "empty", "texts"])
def test_nothing_to_draw_from_is_one_clear_error(teacher: Teacher, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "readme.md").touch()
    words = {"none": "nothing at", "empty": "is an empty folder", "texts": "no image"}[name]

    with pytest.raises(ShotsError, match=rf"^--pool: (.|\n)*{words}"):
        Request(pool=tmp_path / name).read_pool(interface(teacher.proto).inputs)


def test_a_model_that_tells_nothing_draws_uniformly_and_says_so(digits: tuple[Array, Array], tmp_path: Path) -> None:
    text = "g (float[N,1,16,16] image) => (float[N,1,16,16] y) { y = Relu (image) }"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    onnx.save(proto, tmp_path / "relu.onnx")
    events: list[Event] = []

    pool, sheet = collected(Teacher(tmp_path / "relu.onnx", proto), digits[0][20:30], digits[0][:10], log=events.append)

    assert pool.scores is None and sheet.indicators == () and sheet.draw == "uniform" and not sheet.most_related
    assert any("drawn from uniformly" in event.text for event in events if event.level == "warning")


@pytest.mark.parametrize(("kind", "count"), [("files", 200), ("array", 2000)])
def test_many_images_are_never_held_as_numbers(
    kind: str,
    count: int,
    teacher: Teacher,
    digits: tuple[Array, Array],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(xdonnx.shots, "HELD", 1 << 16)
    monkeypatch.setattr(xdonnx.rows, "KEPT", 1 << 14)
    images = np.random.default_rng(0).integers(0, 256, (count, 16, 16), np.uint8)
    given = in_a_folder(tmp_path / "p", images) if kind == "files" else images
    sizes: Counter[int] = Counter()
    plain = Rows.__getitem__

    def noted(rows: Rows, key: Any) -> Array:
        found = plain(rows, key)
        sizes[len(found)] += 1
        return found

    monkeypatch.setattr(Rows, "__getitem__", noted)
    pool, _ = collected(teacher, given, digits[0][:10])
    batch = pool.draw(16, seed=0)

    values = pool.images.inputs["image"]
    assert isinstance(values, Rows) and len(pool) == count
    assert batch["image"].shape == (16, 1, 16, 16) and max(sizes) <= 64 and sizes.total() >= count // 64
    if isinstance(values.source, Pictures):
        assert 0 < sum(image.nbytes for image in values.source.kept.values()) <= 1 << 14


def test_a_pool_can_be_asked_for_anew(teacher: Teacher, images: Array, digits: tuple[Array, Array]) -> None:
    pool, _ = collected(teacher, images, digits[0][:10])

    first, again, other = pool.draw(50, seed=1), replace(pool).draw(50, seed=1), pool.draw(50, seed=2)
    np.testing.assert_array_equal(first["image"], again["image"])
    assert (first["image"] != other["image"]).any()
