"""Every kind of file that people keep samples in: ONNX test data, odd images, odd frames."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from xdonnx.errors import ShotsError
from xdonnx.images import Preprocess, open_image
from xdonnx.model import Port
from xdonnx.shots import read_shots

LEFT, RIGHT = Port("left", "float32", ("N", 2)), Port("right", "int64", ("N", 3))


def tensor(path, array, name=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(numpy_helper.from_array(np.asarray(array), name).SerializeToString())


def read(path, *ports, **options):
    return read_shots([str(path)], ports, Preprocess(**options))


def test_test_data_belongs_to_the_inputs_it_is_named_for(tmp_path):
    tensor(tmp_path / "input_0.pb", np.array([[1, 2, 3]]), "right")
    tensor(tmp_path / "input_1.pb", np.array([[0.5, -1]], np.float32), "left")
    tensor(tmp_path / "output_0.pb", np.zeros(7, np.float32))

    shots = read(tmp_path, LEFT, RIGHT)

    assert shots.inputs["left"].tolist() == [[0.5, -1]] and shots.inputs["right"].tolist() == [[1, 2, 3]]
    assert shots.ids == (f"{tmp_path.name}[0]",) and shots.labels is None


def test_test_data_without_names_is_in_the_order_of_the_inputs(tmp_path):
    tensor(tmp_path / "input_0.pb", np.array([[0.5, -1]], np.float32))
    tensor(tmp_path / "input_1.pb", np.array([[1, 2, 3]]), "what the exporter called it")

    shots = read(tmp_path, LEFT, RIGHT)

    assert shots.inputs["left"].tolist() == [[0.5, -1]] and shots.inputs["right"].tolist() == [[1, 2, 3]]


def test_folders_of_test_data_are_joined_by_number_and_other_files_left_aside(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not looked at")
    (tmp_path / "notes").mkdir()
    for number in (10, 9, 0):
        tensor(tmp_path / f"test_data_set_{number}" / "input_0.pb", np.array([[number, 1], [number, 2]], np.float32))

    shots = read(tmp_path, LEFT)

    assert shots.inputs["left"].tolist() == [[0, 1], [0, 2], [9, 1], [9, 2], [10, 1], [10, 2]]
    assert shots.ids[2] == "test_data_set_9[0]" and len(shots) == 6


def test_test_data_is_what_the_graph_takes_and_never_preprocessed(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 4, 4), np.uint8)
    tensor(tmp_path / "input_0.pb", pixels)

    shots = read(tmp_path, Port("image", "uint8", (1, 3, 4, 4)), preset="imagenet")

    np.testing.assert_array_equal(shots.inputs["image"], pixels)


def test_pixels_as_test_data_of_a_graph_that_takes_floats_are_refused(tmp_path):
    """They were fed as 0-255, whatever the preset, while the same array as .npz was preprocessed."""
    tensor(tmp_path / "input_0.pb", np.random.default_rng(0).integers(0, 256, (1, 3, 4, 4), np.uint8))

    with pytest.raises(ShotsError, match=r"takes float32; the test data of (.|\n)*uint8 \(1, 3, 4, 4\)(.|\n)*as .npz"):
        read(tmp_path, Port("image", "float32", (1, 3, 4, 4)))


def test_one_input_of_several_comes_from_test_data_and_the_other_from_an_array(tmp_path):
    tensor(tmp_path / "data" / "input_0.pb", np.array([[1, 2, 3]]))
    np.save(tmp_path / "left.npy", np.array([[4.0, 5.0]]))

    shots = read_shots([f"right={tmp_path / 'data'}", f"left={tmp_path / 'left.npy'}"], [LEFT, RIGHT], Preprocess())

    assert shots.inputs["right"].tolist() == [[1, 2, 3]] and shots.inputs["left"].tolist() == [[4, 5]]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a/input_0.pb": b"\x00\xff damaged"}, "is no ONNX tensor"),
        ({"a/input_0.pb": np.zeros((1, 2), np.float32)}, "wanted and not there: 'right'"),
        ({"input_0.pb": ("left", 2), "input_1.pb": ("left", 2)}, "two tensors for input 'left'"),
        ({"a/input_0.pb": ("left", 2), "a/input_1.pb": ("right", 3), "b/input_0.pb": ("left", 2),
          "b/input_1.pb": ("right", 4)}, r"input 'right' has \(3,\) and \(4,\)"),
    ],
)  # fmt: skip
def test_test_data_that_fills_no_graph_is_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif isinstance(content, tuple):
            dtype = np.float32 if content[0] == "left" else np.int64
            tensor(tmp_path / name, np.zeros((1, content[1]), dtype), content[0])
        else:
            tensor(tmp_path / name, content, "left")

    with pytest.raises(ShotsError, match=message):
        read(tmp_path, LEFT, RIGHT)


def test_a_sequence_is_no_tensor(tmp_path):
    sequence = numpy_helper.from_list([np.zeros(2, np.float32)], "left")
    (tmp_path / "input_0.pb").write_bytes(sequence.SerializeToString())
    assert isinstance(sequence, onnx.SequenceProto)

    with pytest.raises(ShotsError):
        read(tmp_path, LEFT)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations_of_a_camera_are_undone(tmp_path, orientation):
    upright = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    # What the camera stores so that the tag, as its standard says, leads back to the upright picture.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "x.png", exif=exif)

    np.testing.assert_array_equal(open_image(tmp_path / "x.png"), upright)


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_of_several_frames_the_first_is_read(tmp_path, suffix):
    frames = [Image.new("RGB", (6, 4), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:], **options)

    pixels = open_image(tmp_path / f"x.{suffix}")

    assert pixels.shape == (4, 6, 3) and (pixels == (255, 0, 0)).all()


@pytest.mark.parametrize(("mode", "suffix"), [("PA", "tif"), ("YCbCr", "jpg"), ("I;16B", "tif"), ("RGBX", "tif")])
def test_rare_modes_are_read_too(tmp_path, mode, suffix):
    gray = Image.new("L", (8, 8), 100)
    image = Image.new("I;16B", (8, 8), 25700) if mode == "I;16B" else gray.convert("RGB").convert(mode)
    try:
        image.save(tmp_path / f"x.{suffix}")
    except OSError:
        pytest.skip(f"this Pillow writes no {mode}")

    # A palette of the web has 102 nearest.
    assert abs(open_image(tmp_path / f"x.{suffix}").astype(int) - 100).max() <= 2


def test_a_picture_of_one_pixel_is_a_shot(tmp_path):
    for name, color in {"a": 10, "b": 200}.items():
        Image.new("RGB", (1, 1), (color, 0, 0)).save(tmp_path / f"{name}.png")

    shots = read(tmp_path, Port("x", "float32", ("N", 3, 8, 8)), preset="raw")

    assert shots.inputs["x"].shape == (2, 3, 8, 8)
    assert (shots.inputs["x"][:, 0] == np.array([10, 200])[:, None, None]).all() and not shots.inputs["x"][:, 1:].any()


def test_a_file_cut_short_is_named_or_left_out(tmp_path):
    for name in "abc":
        Image.fromarray(np.random.default_rng(ord(name)).integers(0, 256, (64, 64, 3), np.uint8)).save(
            tmp_path / f"{name}.jpg"
        )
    whole = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) // 2])
    port = Port("x", "float32", ("N", 3, 64, 64))

    with pytest.raises(ShotsError, match=r"1 of 3 images(.|\n)*'b.jpg' \(.*truncated"):
        read(tmp_path, port)
    shots = read_shots([str(tmp_path)], [port], Preprocess(), skip_bad=True)
    assert shots.ids == ("a.jpg", "c.jpg") and shots.skipped == ("b.jpg",)


def heard(path, *ports, **options):
    events = []
    read_shots([str(path)], ports, Preprocess(**options), log=events.append)
    return [event.text for event in events if event.level == "warning"]


@pytest.mark.parametrize("key", ["label", "y"])
def test_labels_under_another_key_are_spoken_of(tmp_path, key):
    np.savez(tmp_path / "x.npz", images=np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3), **{key: np.zeros(1, int)})
    (text,) = heard(tmp_path / "x.npz", Port("image", "float32", ("N", 3, 4, 4)))
    assert f"left aside '{key}'" in text and "'labels'" in text


def test_other_keys_beside_labels_are_no_warning(tmp_path):
    images, labels = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3), np.zeros(1, int)
    np.savez(tmp_path / "x.npz", images=images, labels=labels, names=labels)
    assert heard(tmp_path / "x.npz", Port("image", "float32", ("N", 3, 4, 4))) == []


@pytest.mark.parametrize(
    ("scale", "preset", "warned"), [(255, "unit", True), (255, "raw", False), (1, "unit", False), (300, "unit", False)]
)
def test_floating_images_that_look_like_pixels_are_warned_of(tmp_path, scale, preset, warned):
    images = np.linspace(0, scale, 48, dtype=np.float32).reshape(1, 3, 4, 4)
    np.savez(tmp_path / "x.npz", images=images if scale == 1 else images.round(), labels=np.zeros(1, int))
    texts = heard(tmp_path / "x.npz", Port("image", "float32", ("N", 3, 4, 4)), preset=preset)
    assert bool(texts) is warned and all("Save pixels as uint8" in text for text in texts)
