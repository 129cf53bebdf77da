"""Every form of samples arrives in order, named, labelled and ready to feed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xdonnx.errors import ShotsError
from xdonnx.images import Preprocess
from xdonnx.model import Port
from xdonnx.shots import read_shots

GRAY = Port("image", "float32", ("N", 1, 4, 4))
UNIT = Preprocess("unit")


def paint(path: Path, value: int) -> None:
    """Write a 4 x 4 gray image whose first pixel is 255 and all others `value`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((4, 4), value, np.uint8)
    pixels[0, 0] = 255
    Image.fromarray(pixels).save(path)


def shades(shots) -> list[int]:
    """Return the value that each image was painted with."""
    return [round(255 * float(row[0, 3, 3])) for row in shots.inputs["image"]]


def read(*sources, port=GRAY, preprocess=UNIT, **options):
    return read_shots([str(source) for source in sources], [port], preprocess, **options)


def test_sub_folders_are_classes_in_sorted_order_and_an_empty_one_keeps_its_place(tmp_path):
    (tmp_path / "bird").mkdir()
    for name, value in {"cat/b.png": 2, "cat/a.png": 1, "dog/deep/er/c.PNG": 3, "ant/d.png": 4}.items():
        paint(tmp_path / name, value)

    shots = read(tmp_path)

    assert shots.ids == ("ant/d.png", "cat/a.png", "cat/b.png", "dog/deep/er/c.PNG")
    assert shots.classes == ("ant", "bird", "cat", "dog")
    assert shots.labels.tolist() == [0, 2, 2, 3] and shots.labels.dtype == np.int64
    assert shades(shots) == [4, 1, 2, 3]
    assert len(shots) == 4


def test_sub_folders_called_by_numbers_are_those_classes(tmp_path):
    for name, value in {"0/a.png": 1, "07/b.png": 2, "12/c.png": 3}.items():
        paint(tmp_path / name, value)

    shots = read(tmp_path)

    assert shots.labels.tolist() == [0, 7, 12]
    assert shots.classes is None


@pytest.mark.parametrize("stray", ["__MACOSX/0/._a.png", "logs/run.txt", "notes/deep/er.md", "empty/", ".cache/x.png"])
def test_a_folder_without_images_renumbers_no_class(tmp_path, stray):
    """Folders 0 to 11 and one that an archive left: 10 became class 2, 2 became 4, and nobody was told."""
    for k in range(12):
        paint(tmp_path / str(k) / "a.png", k)
    (tmp_path / stray).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / stray).mkdir() if stray.endswith("/") else (tmp_path / stray).write_text("no image")

    shots = read(tmp_path)

    assert sorted(shots.labels.tolist()) == list(range(12)) and shots.classes is None
    assert shots.labels.tolist() == shades(shots)


def test_among_words_an_empty_folder_is_a_class_and_is_said_to_be_and_one_of_other_files_is_none(tmp_path):
    for name, value in {"ant/a.png": 1, "cat/a.png": 2, "eel/a.png": 3}.items():
        paint(tmp_path / name, value)
    for name in ("bird", "fox", "dates"):
        (tmp_path / name).mkdir()
    (tmp_path / "dates" / "x.csv").write_text("1")
    (tmp_path / "__MACOSX" / "ant").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "ant" / "._a.png").write_bytes(b"what an archive left")
    events = []

    shots = read(tmp_path, log=events.append)

    assert shots.labels.tolist() == [0, 2, 3] and shots.classes == ("ant", "bird", "cat", "eel", "fox")
    (warning,) = [event.text for event in events if event.level == "warning"]
    assert "'bird' is counted as a class and empty" in warning, "fox decides no other class's number"
    assert any("dates/x.csv" in event.text for event in events)


def test_labels_from_elsewhere_ask_nothing_of_folders(tmp_path):
    for name in ("7/a.png", "cat/b.png"):
        paint(tmp_path / "x" / name, 3)
    (tmp_path / "labels.txt").write_text("a.png 4\nb.png 5")

    assert read(tmp_path / "x", labels=tmp_path / "labels.txt").labels.tolist() == [4, 5]
    assert read(tmp_path / "x", labels=np.array([4, 5])).labels.tolist() == [4, 5]


def test_loose_images_have_no_labels_and_other_files_are_left_aside_aloud(tmp_path):
    for k in (3, 1, 2):
        paint(tmp_path / f"{k}.png", k)
    (tmp_path / "notes.md").write_text("hello")
    (tmp_path / "._1.png").write_bytes(b"left by another system")
    events = []

    shots = read(tmp_path, log=events.append)

    assert shots.ids == ("1.png", "2.png", "3.png") and shades(shots) == [1, 2, 3]
    assert shots.labels is None and shots.classes is None
    assert {event.stage for event in events} == {"shots"}
    assert any("notes.md" in event.text for event in events)
    assert [event.done for event in events if not event.text] == [1, 2, 3]
    assert events[-1].text == "3 shots"


def test_a_single_image_is_one_shot(tmp_path):
    paint(tmp_path / "x.png", 5)

    assert read(tmp_path / "x.png").ids == ("x.png",)


def test_a_list_names_images_beside_it_with_labels_behind(tmp_path):
    for k, name in enumerate(("a.png", "sub/b c.png", "shot 7")):
        paint(tmp_path / f"{name}.png", k)
        (tmp_path / f"{name}.png").rename(tmp_path / name)
    lists = tmp_path / "list.txt"

    lists.write_text("sub/b c.png\t3\n\na.png 2\n")
    labelled = read(lists)
    lists.write_text("shot 7\r\na.png\r\n", encoding="utf-8-sig")
    plain = read(lists)

    assert labelled.ids == ("sub/b c.png", "a.png")
    assert labelled.labels.tolist() == [3, 2] and shades(labelled) == [1, 0]
    # A file of that very name wins over a label.
    assert plain.ids == ("shot 7", "a.png") and plain.labels is None and shades(plain) == [2, 0]


def test_an_npz_holds_images_or_an_array_under_the_inputs_name(tmp_path):
    images = np.arange(32, dtype=np.uint8).reshape(2, 4, 4)
    path = tmp_path / "x.npz"

    np.savez(path, images=images, labels=np.array([[1], [0]], np.uint8), names=np.array(["a", "b"], object))
    shots = read(path)
    np.savez(path, image=images[:, None].astype(np.float64))
    ready = read(path)

    assert shots.ids == ("x.npz[0]", "x.npz[1]")
    assert shots.labels.tolist() == [1, 0] and shots.labels.dtype == np.int64
    np.testing.assert_allclose(shots.inputs["image"], images[:, None] / 255, atol=1e-7)
    # Floating numbers are taken as they are, in the graph's type.
    np.testing.assert_array_equal(ready.inputs["image"], images[:, None].astype(np.float32))
    assert ready.inputs["image"].dtype == np.float32 and ready.labels is None


def test_an_npy_fills_inputs_of_any_rank(tmp_path):
    rows = np.random.default_rng(0).standard_normal((5, 16))
    np.save(tmp_path / "x.npy", rows)

    shots = read(tmp_path / "x.npy", port=Port("features", "float16", (1, 16)))

    assert shots.ids[4] == "x.npy[4]"
    np.testing.assert_array_equal(shots.inputs["features"], rows.astype(np.float16))


def test_integers_fill_inputs_of_integers_and_small_ranks(tmp_path):
    np.save(tmp_path / "x.npy", np.array([[1, 2], [3, 4]], np.int32))

    tokens = read(tmp_path / "x.npy", port=Port("ids", "int64", ("N", "length")))
    numbers = read(tmp_path / "x.npy", port=Port("x", "float32", ("N", 2)))

    assert tokens.inputs["ids"].dtype == np.int64 and tokens.inputs["ids"].tolist() == [[1, 2], [3, 4]]
    assert numbers.inputs["x"].dtype == np.float32


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_layout_turns_floating_arrays_to_where_the_graph_has_its_channels(tmp_path, layout):
    rows = np.random.default_rng(0).standard_normal((2, 3, 5, 7)).astype(np.float32)
    graph = ("N", 3, 5, 7) if layout == "nhwc" else ("N", 5, 7, 3)
    first, last = rows, rows.transpose(0, 2, 3, 1)
    np.save(tmp_path / "x.npy", last if layout == "nhwc" else first)

    turned = read(tmp_path / "x.npy", port=Port("x", "float32", graph), preprocess=Preprocess(layout=layout))

    np.testing.assert_array_equal(turned.inputs["x"], first if layout == "nhwc" else last)


def test_a_layout_that_agrees_with_the_graph_turns_nothing(tmp_path):
    rows = np.random.default_rng(0).standard_normal((2, 3, 5, 7)).astype(np.float32)
    np.save(tmp_path / "x.npy", rows)

    same = read(tmp_path / "x.npy", port=Port("x", "float32", ("N", 3, 5, 7)), preprocess=Preprocess(layout="nchw"))

    np.testing.assert_array_equal(same.inputs["x"], rows)


def test_several_inputs_come_from_one_npz_or_from_named_sources(tmp_path):
    left, right = Port("left", "float32", ("N", 1, 4, 4)), Port("right/0", "float32", ("N", 2))
    for k in range(3):
        paint(tmp_path / "a=b" / f"{k}.png", 10 * k)
    numbers = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.savez(tmp_path / "right.npz", **{"right/0": numbers, "labels": [0, 1, 0]})
    images = np.stack([np.asarray(Image.open(tmp_path / "a=b" / f"{k}.png")) for k in range(3)])
    np.savez(tmp_path / "both.npz", **{"left": images, "right/0": numbers, "labels": [0, 1, 0]})

    named = [f"right/0={tmp_path / 'right.npz'}", f"left={tmp_path / 'a=b'}"]
    apart = read_shots(named, [left, right], UNIT)
    together = read_shots([str(tmp_path / "both.npz")], [left, right], UNIT)

    for name in ("left", "right/0"):
        np.testing.assert_array_equal(apart.inputs[name], together.inputs[name])
    assert apart.labels.tolist() == together.labels.tolist() == [0, 1, 0]
    assert together.ids == ("both.npz[0]", "both.npz[1]", "both.npz[2]")


def test_a_path_with_an_equals_sign_is_a_path(tmp_path):
    paint(tmp_path / "run=3" / "a.png", 9)

    assert shades(read(tmp_path / "run=3")) == [9]
    assert shades(read(f"image={tmp_path / 'run=3'}")) == [9]


@pytest.mark.parametrize("form", ["lines", "names", "csv", "npy", "npz"])
def test_a_file_of_labels_wins_over_folders(tmp_path, form):
    for k, name in enumerate(("cat/a.png", "cat/b.png", "dog/c 1.png")):
        paint(tmp_path / "x" / name, k)
    path = tmp_path / f"labels.{form if form.startswith('np') else 'txt'}"
    if form == "npy":
        np.save(path, np.array([5, 6, 7]))
    elif form == "npz":
        np.savez(path, labels=np.array([5, 6, 7]), more=np.zeros(2))
    else:
        text = {
            "lines": "5\n6\n7\n",
            "names": "dog/c 1.png 7\nb.png\t6\nother.png 1\ncat/a.png 5",
            "csv": "a.png,5\nb.png, 6\nc 1.png,7",
        }
        path.write_text(text[form])

    shots = read(tmp_path / "x", labels=path)

    assert shots.labels.tolist() == [5, 6, 7] and shots.classes is None


def test_bad_images_are_left_out_on_request_with_their_labels_and_named(tmp_path):
    for k in range(4):
        paint(tmp_path / "x" / f"{k}.png", k)
    (tmp_path / "x" / "1.png").write_bytes(b"")
    (tmp_path / "labels.txt").write_text("5\n6\n7\n8\n")
    events = []

    shots = read(tmp_path / "x", labels=tmp_path / "labels.txt", skip_bad=True, log=events.append)
    array = read(tmp_path / "x", labels=np.array([5, 6, 7, 8]), skip_bad=True)

    assert shots.skipped == ("1.png",)
    assert shots.ids == ("0.png", "2.png", "3.png") and shades(shots) == [0, 2, 3]
    assert shots.labels.tolist() == array.labels.tolist() == [5, 7, 8]
    warning = next(event for event in events if event.level == "warning")
    assert "left out 1 of 4" in warning.text and "'1.png' (0 bytes)" in warning.text


def test_a_row_left_out_of_one_input_leaves_all(tmp_path):
    ports = [Port("a", "float32", ("N", 1, 4, 4)), Port("b", "float32", ("N", 2))]
    for k in range(3):
        paint(tmp_path / "a" / f"{k}.png", k)
    (tmp_path / "a" / "0.png").write_bytes(b"x")
    np.save(tmp_path / "b.npy", np.arange(6.0).reshape(3, 2))

    shots = read_shots([f"b={tmp_path / 'b.npy'}", f"a={tmp_path / 'a'}"], ports, UNIT, skip_bad=True)

    assert shots.inputs["b"].tolist() == [[2, 3], [4, 5]]
    assert shots.inputs["a"].shape == (2, 1, 4, 4)
    assert shots.ids == ("b.npy[1]", "b.npy[2]") and shots.skipped == ("0.png",)


def test_taking_shots_takes_all_that_belongs_to_them(tmp_path):
    for k in range(3):
        paint(tmp_path / str(k) / "a.png", k)

    taken = read(tmp_path).take([2, 0])

    assert taken.ids == ("2/a.png", "0/a.png")
    assert taken.labels.tolist() == [2, 0] and shades(taken) == [2, 0]


def test_one_input_may_stay_constant_while_another_varies(tmp_path):
    ports = [Port("x", "float32", ("N", 2)), Port("state", "float32", ("N", 4))]
    np.savez(tmp_path / "x.npz", x=np.arange(6.0).reshape(3, 2), state=np.zeros((3, 4)))

    assert len(read_shots([str(tmp_path / "x.npz")], ports, UNIT)) == 3


def test_rows_that_are_all_the_same_are_warned_of(tmp_path):
    np.save(tmp_path / "x.npy", np.tile(np.arange(4.0), (3, 1)))
    events = []

    read(tmp_path / "x.npy", port=Port("x", "float32", ("N", 4)), log=events.append)

    assert [event.text for event in events if event.level == "warning"] == ["all 3 shots are the same one"]


def test_reading_shots_imports_neither_torch_nor_onnx():
    code = "import sys, xdonnx.shots; sys.exit(any(m in sys.modules for m in ('torch', 'onnx', 'onnxruntime')))"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_labels_that_disagree_between_inputs_are_refused(tmp_path):
    ports = [Port("a", "float32", ("N", 2)), Port("b", "float32", ("N", 2))]
    for name, labels in {"a": [0, 1], "b": [1, 0]}.items():
        np.savez(tmp_path / f"{name}.npz", **{name: np.arange(4.0).reshape(2, 2), "labels": labels})

    with pytest.raises(ShotsError, match="label the same rows differently"):
        read_shots([f"{name}={tmp_path / name}.npz" for name in "ab"], ports, UNIT)
