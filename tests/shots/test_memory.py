"""Samples that Python holds are those that files would hold, in whatever form they come, and are drawn from alike."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import xdonnx.memory
from xdonnx.errors import ShotsError
from xdonnx.events import Event
from xdonnx.images import Preprocess
from xdonnx.memory import gather
from xdonnx.model import Port
from xdonnx.rows import Pixels
from xdonnx.samples import Request, apart
from xdonnx.shots import Shots, Unread, read_shots

PORT = (Port("image", "float32", (None, 1, 16, 16)),)
FREE = (Port("image", "float32", (None, 3, None, None)),)
UNIT = Preprocess("unit")


def read(held: Any, ports: tuple[Port, ...] = PORT, preprocess: Preprocess = UNIT, **how: Any) -> Shots:
    """Return all that is held, read."""
    found = gather(held, ports, preprocess, **how)
    return found.take(range(len(found)))


def batches(images: np.ndarray, labels: np.ndarray, size: int = 4) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(images), size):
        yield images[start : start + size], labels[start : start + size]


def loader(images: np.ndarray, labels: np.ndarray) -> Any:
    pixels = torch.tensor(images[:, None] / 255.0, dtype=torch.float32, requires_grad=True)
    data = torch.utils.data.TensorDataset(pixels, torch.tensor(labels))
    return torch.utils.data.DataLoader(data, batch_size=4)


def pairs(images: np.ndarray, labels: np.ndarray) -> list[tuple[np.ndarray, int]]:
    return [(image[None], int(label)) for image, label in zip(images, labels, strict=True)]


class Stream(torch.utils.data.IterableDataset):
    """Data without a length, whose loader has one that raises."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.rows = pairs(images / np.float32(255), labels)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


FORMS = {
    "tuple": lambda images, labels: (images, labels),
    "dict": lambda images, labels: {"image": images, "labels": labels},
    "dict of another name": lambda images, labels: {"pixels": images, "label": labels},
    "batches": batches,
    "last batch smaller": lambda images, labels: batches(images, labels, 7),
    "gray batches without labels": lambda images, labels: (part for part, _ in batches(images, labels, 19)),
    "batches as dicts": lambda images, labels: ({"images": i, "labels": n} for i, n in batches(images, labels)),
    "single samples": pairs,
    "pictures": lambda images, labels: [(Image.fromarray(i), int(n)) for i, n in zip(images, labels, strict=True)],
    "coloured pictures": lambda images, labels: [
        (Image.fromarray(i).convert("RGB"), int(n)) for i, n in zip(images, labels, strict=True)
    ],
    "pictures and floats": lambda images, labels: [
        (Image.fromarray(i) if n % 2 else i[None] / np.float32(255), int(n))
        for i, n in zip(images, labels, strict=True)
    ],
    "torch loader": loader,
    "torch dataset": lambda images, labels: loader(images, labels).dataset,
    "torch stream": lambda images, labels: torch.utils.data.DataLoader(Stream(images, labels), batch_size=5),
}


@pytest.mark.parametrize("form", FORMS)
def test_samples_are_the_same_in_whatever_form_they_come(form: str, digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits[0][:22], digits[1][:22]

    found = read(FORMS[form](images, labels), labels=labels if "without" in form else None)

    expected = images[:, None].astype(np.float32) / 255
    assert found.inputs["image"].dtype == np.float32
    assert np.allclose(found.inputs["image"], expected, rtol=0, atol=1e-7)
    assert found.labels is not None and np.array_equal(found.labels, labels)
    assert found.ids == tuple(f"sample {row}" for row in range(22))


@pytest.mark.parametrize(
    "give",
    [lambda x: x, list, iter, lambda x: {"image": x}, torch.tensor],
    ids=["array", "list", "iterator", "named", "tensor"],
)
def test_samples_need_no_labels(give: Any, digits: tuple[np.ndarray, np.ndarray]) -> None:
    values = digits[0][:6, None].astype(np.float32)

    found = read(give(values))

    assert found.labels is None and np.array_equal(found.inputs["image"], values)


def test_several_inputs_come_as_tuples_or_dicts() -> None:
    ports = (Port("a", "float32", (None, 3)), Port("b", "int64", (None, 2)))
    generator = np.random.default_rng(0)
    a, b, labels = generator.random((6, 3), np.float32), generator.integers(0, 9, (6, 2)), np.arange(6)

    forms = [(a, b, labels), {"a": a, "b": b, "labels": labels}, list(zip(a, b, labels, strict=True))]
    for form in forms:
        found = read(form, ports)
        assert np.array_equal(found.inputs["a"], a) and np.array_equal(found.inputs["b"], b)
        assert found.labels is not None and np.array_equal(found.labels, labels)


def test_photographs_are_held_as_the_pixels_that_the_graph_takes() -> None:
    """Of a list of photographs only the crops stay, in 8 bits: 48 times less here than the photographs."""
    generator = np.random.default_rng(0)
    photos = [Image.fromarray(generator.integers(0, 256, (96, 128, 3), np.uint8)) for _ in range(5)]

    found = gather(photos, PORT, Preprocess("unit", resize=20))

    assert isinstance(found, Unread)
    source = found.parts[0].sources["image"]
    assert isinstance(source, Pixels) and source.images.nbytes == 5 * 16 * 16
    whole = read((np.stack([np.asarray(photo) for photo in photos]),), PORT, Preprocess("unit", resize=20))
    assert np.array_equal(found.take(range(5)).inputs["image"], whole.inputs["image"])


def test_gray_and_coloured_pictures_stand_side_by_side() -> None:
    gray, colour = Image.new("L", (8, 8), 100), Image.new("RGB", (8, 8), (10, 20, 30))

    found = read([gray, colour], FREE, Preprocess("raw")).inputs["image"]

    assert found.shape == (2, 3, 8, 8) and (found[0] == 100).all()
    assert (found[1] == np.array([10, 20, 30])[:, None, None]).all()
    with pytest.raises(ShotsError, match="differ in size"):
        read([gray, Image.new("L", (9, 8))], FREE, Preprocess("raw"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_in_memory_is_turned_as_its_file_would_be(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    file = read_shots([str(tmp_path / "x.png")], FREE, UNIT).inputs["image"]

    held = read([Image.open(tmp_path / "x.png")], FREE).inputs["image"]

    assert np.array_equal(held, file) and held.shape == ((1, 3, 9, 6) if orientation > 4 else (1, 3, 6, 9))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "I"])
def test_a_picture_in_memory_is_read_in_any_mode_that_a_file_may_have(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x.tif"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    wide = {"I;16": np.uint16, "I": np.int32}.get(mode)
    image = Image.fromarray(pixels) if wide is None else Image.fromarray(pixels[:, :, 0].astype(wide) * 257)
    (image.convert(mode) if wide is None else image).save(path)
    file = read_shots([str(path)], FREE, UNIT).inputs["image"]

    assert np.array_equal(read([Image.open(path)], FREE).inputs["image"], file)


def test_a_picture_that_is_cut_short_is_an_error_of_ours(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:1000])

    message = r"an image of list in memory cannot be used: .*truncated"
    with Image.open(tmp_path / "x.png") as image, pytest.raises(ShotsError, match=message):
        gather([image], PORT, UNIT)


# How many are taken


@pytest.mark.parametrize("form", ["single samples", "pictures", "batches as a list", "torch loader", "torch dataset"])
@pytest.mark.parametrize("drawn", [{"max_shots": 9}, {"per_class": 2}, {"max_shots": 9, "holdout": 0.1}])
def test_what_has_a_length_is_drawn_from_as_arrays_are(
    form: str, drawn: dict[str, Any], digits: tuple[np.ndarray, np.ndarray]
) -> None:
    """The first of a list that is sorted by class are of one class, and so were all that fitted."""
    order = np.argsort(digits[1], kind="stable")
    images, labels = digits[0][order], digits[1][order]
    held = list(batches(images, labels)) if form == "batches as a list" else FORMS[form](images, labels)
    drawn = {"preprocess": UNIT, "seed": 5, **drawn}

    asked, arrays = Request(held, **drawn), Request((images, labels), **drawn)
    found, expected = (apart(*request.read(PORT), request) for request in (asked, arrays))

    for part, same in zip(found, expected, strict=True):
        assert part.labels is not None and len(np.unique(part.labels)) > 4
        assert part.ids == same.ids and np.array_equal(part.labels, same.labels)
        assert np.allclose(part.inputs["image"], same.inputs["image"], rtol=0, atol=1e-7)


def test_an_endless_loader_ends_with_a_warning_where_nobody_says_how_many(
    monkeypatch: pytest.MonkeyPatch, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    heard: list[Event] = []
    forever = ((digits[0][at % 450][None], digits[1][at % 450][None]) for at in itertools.count())

    monkeypatch.setattr(xdonnx.memory, "MOST_ROWS", 50)
    rows = gather(forever, PORT, UNIT, log=heard.append)
    monkeypatch.setattr(xdonnx.memory, "MOST_BYTES", 10 * 256)
    bytes_ = gather(forever, PORT, UNIT, log=heard.append)

    assert len(rows) == 50 and len(bytes_) == 10
    warned = [event.text for event in heard if event.level == "warning"]
    assert ["its first 50 samples" in warned[0], "its first 10 samples" in warned[1]] == [True, True]


def test_of_more_than_can_be_held_a_seeded_choice_is_held(
    monkeypatch: pytest.MonkeyPatch, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    monkeypatch.setattr(xdonnx.memory, "MOST_ROWS", 40)
    order = np.argsort(digits[1], kind="stable")
    held = pairs(digits[0][order], digits[1][order])
    heard: list[Event] = []

    found, again, other = (gather(held, PORT, UNIT, seed=seed, log=heard.append) for seed in (1, 1, 2))

    assert len(found) == 40 and found.ids == again.ids != other.ids
    assert found.labels is not None and len(np.unique(found.labels)) > 6
    # Each is named by its place in the list.
    assert [held[int(name.removeprefix("sample "))][1] for name in found.ids] == found.labels.tolist()
    assert "40 of its samples, drawn at random, are taken" in heard[-1].text and heard[-1].level == "warning"


def test_labels_that_come_apart_may_be_more_than_an_iterable_is_asked_for(
    digits: tuple[np.ndarray, np.ndarray],
) -> None:
    images, labels = digits[0][:50, None], digits[1][:50]
    asked = Request((row for row in images), labels=labels, max_shots=30, preprocess=UNIT)

    found, _ = apart(*asked.read(PORT), asked)

    assert found.labels is not None and np.array_equal(found.labels, labels[:30])
    for few in (29, 49):
        with pytest.raises(ShotsError, match=f"{few} labels for"):
            Request((row for row in images), labels=labels[:few], max_shots=30 if few < 30 else None).read(PORT)


def test_labels_that_come_apart_go_with_the_samples_in_their_order(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits[0][:50, None], digits[1][:50]

    for held in (list(images), (row for row in images), images):
        found = read(held, labels=labels)
        assert found.labels is not None and np.array_equal(found.labels, labels)
        assert np.allclose(found.inputs["image"], images / np.float32(255), rtol=0, atol=1e-7)
