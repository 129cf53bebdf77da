"""Only what is drawn is decoded, many samples are not held, and neither changes a number."""

import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import xdonnx.rows
import xdonnx.shots
from xdonnx.errors import ShotsError
from xdonnx.images import Preprocess
from xdonnx.model import Port
from xdonnx.rows import Rows
from xdonnx.shots import list_shots, read_shots, split

PORT = Port("image", "float32", ("N", 3, 8, 8))
HOW = Preprocess("imagenet")


@pytest.fixture
def folder(tmp_path):
    """Return 60 images in three classes."""
    generator = np.random.default_rng(0)
    for k in range(60):
        path = tmp_path / "images" / str(k % 3) / f"{k:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (9, 11, 3), np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def opened(monkeypatch):
    """Return the names of the files that are decoded from here on."""
    names = []
    plain = xdonnx.rows.open_image

    def noted(path, **options):
        names.append(path.name)
        return plain(path, **options)

    monkeypatch.setattr(xdonnx.rows, "open_image", noted)
    return names


def same(left, right):
    assert left.ids == right.ids and left.labels.tolist() == right.labels.tolist()
    for name, values in left.inputs.items():
        np.testing.assert_array_equal(np.asarray(values), np.asarray(right.inputs[name]))


@pytest.mark.parametrize("drawn", [{"per_class": 2}, {"max_shots": 7}, {}])
@pytest.mark.parametrize("holdout", [0.1, 0.0])
def test_drawing_before_decoding_gives_the_very_samples_of_drawing_after(folder, drawn, holdout):
    options = {"per_class": None, "max_shots": None, **drawn, "holdout": holdout, "seed": 3}

    early = split(list_shots([str(folder)], [PORT], HOW), **options)
    late = split(read_shots([str(folder)], [PORT], HOW), **options)

    for one, other in zip(early, late, strict=True):
        same(one, other)


def test_only_what_is_drawn_is_decoded_and_only_once(folder, opened):
    found = list_shots([str(folder)], [PORT], HOW)
    assert opened == []

    fit, held = split(found, per_class=None, max_shots=7, holdout=0.1, seed=0)

    assert sorted(opened) == sorted(name.split("/")[1] for name in (*fit.ids, *held.ids))
    assert len(fit) == 7 and len(held) == 6


def test_a_damaged_file_that_nobody_draws_harms_nobody(folder):
    options = {"per_class": None, "max_shots": 7, "holdout": 0.1, "seed": 0}
    fit, held = split(list_shots([str(folder)], [PORT], HOW), **options)
    idle = next(
        path for path in sorted(folder.rglob("*.png")) if f"{path.parent.name}/{path.name}" not in fit.ids + held.ids
    )
    idle.write_bytes(b"")
    (folder / held.ids[0]).touch()

    again = split(list_shots([str(folder)], [PORT], HOW), **options)
    same(fit, again[0])

    (folder / held.ids[0]).write_bytes(b"")
    with pytest.raises(ShotsError, match=rf"1 of 6 images(.|\n)*'{held.ids[0]}' \(0 bytes\)"):
        split(list_shots([str(folder)], [PORT], HOW), **options)


def test_with_skip_bad_the_draw_is_among_those_that_can_be_read(folder):
    options = {"per_class": None, "max_shots": 7, "holdout": 0.1, "seed": 0}
    (folder / "1" / "01.png").write_bytes(b"")
    early = split(list_shots([str(folder)], [PORT], HOW, skip_bad=True), **options)
    (folder / "1" / "01.png").unlink()
    late = split(list_shots([str(folder)], [PORT], HOW), **options)

    for one, other in zip(early, late, strict=True):
        same(one, other)
        assert one.skipped == ("1/01.png",)


@pytest.mark.parametrize("kept", [0, 10_000, 1 << 29])
def test_samples_that_are_read_when_used_are_the_same_numbers(folder, monkeypatch, kept):
    monkeypatch.setattr(xdonnx.shots, "HELD", 0)
    monkeypatch.setattr(xdonnx.rows, "KEPT", kept)
    found = list_shots([str(folder)], [PORT], HOW)
    whole = found.take(np.arange(len(found)))

    lazy = found.stream(np.arange(len(found)))

    values = lazy.inputs["image"]
    assert isinstance(values, Rows) and values.shape == (60, 3, 8, 8) and values.dtype == np.float32
    assert values.nbytes == whole.inputs["image"].nbytes and len(values) == 60 and values.ndim == 4
    same(lazy, whole)
    np.testing.assert_array_equal(values[5:9], whole.inputs["image"][5:9])
    np.testing.assert_array_equal(values[-1], whole.inputs["image"][-1])
    assert values[60:].shape == (0, 3, 8, 8)
    some = lazy.take([7, 3])
    assert isinstance(some.inputs["image"], Rows)
    same(some, whole.take([7, 3]))


@pytest.mark.parametrize("shape", [(30, 9, 11, 3), (30, 3, 8, 8), (30, 8, 8, 3)])
def test_uint8_arrays_stay_uint8_until_they_are_used(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(xdonnx.shots, "HELD", 0)
    np.savez(tmp_path / "x.npz", images=np.random.default_rng(0).integers(0, 256, shape, np.uint8), labels=[0, 1] * 15)
    found = list_shots([str(tmp_path / "x.npz")], [PORT], HOW)

    lazy = found.stream(np.arange(30))

    assert isinstance(lazy.inputs["image"], Rows)
    same(lazy, found.take(np.arange(30)))


def test_a_blank_image_alone_is_drawn_where_others_are_not_blank(tmp_path):
    for name, color in {"a": 0, "b": 0, "c": 9}.items():
        Image.new("L", (8, 8), color).save(tmp_path / f"{name}.png")
    found = list_shots([str(tmp_path)], [PORT], Preprocess("unit"))

    assert len(found.take([0])) == 1
    (tmp_path / "c.png").unlink()
    with pytest.raises(ShotsError, match="constant data"):
        list_shots([str(tmp_path)], [PORT], Preprocess("unit")).take([0])


def test_reading_many_files_tells_of_progress_now_and_then(folder, monkeypatch):
    monkeypatch.setattr(xdonnx.rows, "_TICKS", 6)
    events = []

    read_shots([str(folder)], [PORT], HOW, log=events.append)

    ticks = [(event.done, event.total) for event in events if not event.text]
    assert {event.stage for event in events} == {"shots"}
    assert ticks == [(k, 60) for k in range(10, 61, 10)]


def test_the_order_of_the_file_system_decides_nothing(folder, monkeypatch):
    plain = list_shots([str(folder)], [PORT], HOW)
    iterdir, walk = xdonnx.sources.Path.iterdir, xdonnx.sources.os.walk

    monkeypatch.setattr(xdonnx.sources.Path, "iterdir", lambda path: reversed(sorted(iterdir(path))))
    monkeypatch.setattr(xdonnx.sources.os, "walk", lambda top: ((a, b, sorted(c)[::-1]) for a, b, c in walk(top)))

    assert list_shots([str(folder)], [PORT], HOW).ids == plain.ids


_PEAK = """
import resource, sys
import numpy as np
from xdonnx.images import Preprocess
from xdonnx.model import Port
from xdonnx.shots import list_shots, split
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
port = Port("x", "float32", ("N", 3, int(sys.argv[2]), int(sys.argv[2])))
found = list_shots([sys.argv[1]], [port], Preprocess())
found.take(np.arange(4))
before = peak()
if sys.argv[3] == "all":
    shots = found.stream(np.arange(len(found)))
else:
    shots = split(found, per_class=None, max_shots=200, holdout=0.001, seed=0)[0]
total = 0.0
for start in range(0, len(shots), 64):
    total += float(shots.inputs["x"][start : start + 64].sum())
print(len(shots), peak() - before)
"""


def peak(folder, side, which):
    """Return how many samples were read and fed, and by how many MiB the memory of the process grew."""
    command = [sys.executable, "-c", _PEAK, str(folder), str(side), which]
    count, grown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(count), float(grown)


def test_many_samples_cost_their_pixels_and_a_few_cost_next_to_nothing(tmp_path):
    for k in range(1500):
        Image.new("RGB", (96, 96), (k % 256, k // 256, 7)).save(tmp_path / f"{k}.png")

    everything, few = peak(tmp_path, 96, "all"), peak(tmp_path, 96, "few")

    # 1500 images are 40 MiB of pixels and 158 MiB of float32; 200 are 21 MiB of float32.
    assert everything[0] == 1500 and everything[1] < 100
    assert few[0] == 200 and few[1] < 60
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0


@pytest.mark.paper
def test_twenty_thousand_small_images_stay_far_below_a_gigabyte(tmp_path):
    generator = np.random.default_rng(0)
    for k in range(20_000):
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / f"{k}.png", compress_level=0)

    everything, few = peak(tmp_path, 32, "all"), peak(tmp_path, 32, "few")

    assert everything[0] == 20_000 and everything[1] < 300
    assert few[0] == 200 and few[1] < 60
