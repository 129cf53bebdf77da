"""Samples that cannot be used end with exit code 5 and a text that says what, where and what to do."""

import pickle
import re

import numpy as np
import pytest
from PIL import Image

from xdonnx.errors import ShotsError
from xdonnx.images import Preprocess
from xdonnx.model import Port
from xdonnx.shots import read_shots

RGB = Port("image", "float32", ("N", 3, 8, 8))
ROWS = Port("x", "float32", ("N", 4))


def refused(source, *message, ports=(RGB,), **options):
    """Read and return nothing: assert that it fails with every part of the message."""
    sources = [str(source)] if not isinstance(source, list) else source
    with pytest.raises(ShotsError) as caught:
        read_shots(sources, list(ports), options.pop("preprocess", Preprocess()), **options)
    text = str(caught.value)
    assert caught.value.exit_code == 5
    for part in message:
        assert part in text
    # What and where on the first line, what to do on an indented one.
    assert re.search(r"[.?]\n  [A-Z]", text), text


def noise(path, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(path)


def test_no_source_at_all():
    refused([], "no shots", "--shots PATH")


def test_a_path_that_does_not_exist(tmp_path):
    refused(tmp_path / "shotz", "no shots at", "shotz", "a folder of images", ".npz")


def test_an_empty_folder(tmp_path):
    refused(tmp_path, "is an empty folder")


def test_a_folder_without_an_image(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.csv").write_text("1")
    refused(tmp_path, "holds 1 files and no image, such as 'cat/a.csv'", ".png")


def test_a_folder_of_empty_folders(tmp_path):
    (tmp_path / "cat").mkdir()
    refused(tmp_path, "holds 0 files and no image.")


def test_images_both_in_sub_folders_and_beside_them(tmp_path):
    noise(tmp_path / "cat" / "a.png")
    noise(tmp_path / "b.png")
    refused(tmp_path, "1 images in sub-folders and 1 beside them, such as 'b.png'")


def test_two_sub_folders_for_one_class(tmp_path):
    noise(tmp_path / "7" / "a.png")
    noise(tmp_path / "07" / "a.png")
    refused(tmp_path, "2 sub-folders for class 7", "'07'")


def test_classes_that_are_numbers_beside_some_that_are_words(tmp_path):
    for name in ("0", "1", "10", "2", "other"):
        noise(tmp_path / name / "a.png")
    refused(tmp_path, "by numbers, '0', '1', '10', '2', and by words, 'other'", "--labels")


def test_a_file_of_no_known_kind(tmp_path):
    (tmp_path / "x.csv").write_text("1,2")
    refused(tmp_path / "x.csv", "is nothing that shots are read from")


def test_one_unreadable_image_is_named_and_counted(tmp_path):
    for name in "abc":
        noise(tmp_path / "cat" / f"{name}.png")
    (tmp_path / "cat" / "b.png").write_bytes(b"")
    refused(tmp_path, "1 of 3 images", "'cat/b.png' (0 bytes)", "--skip-bad")


def test_many_unreadable_images_are_counted_and_some_named(tmp_path):
    noise(tmp_path / "good.png")
    for k in range(7):
        (tmp_path / f"{k}.png").write_bytes(b"no")
    refused(tmp_path, "7 of 8 images", "'4.png' (not an image); and 2 more")


@pytest.mark.parametrize("skip_bad", [False, True])
def test_nothing_but_unreadable_images(tmp_path, skip_bad):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"no")
    refused(tmp_path, "2 of 2 images", "not an image", "Mend or remove them.", skip_bad=skip_bad)


def test_a_list_that_names_a_missing_image(tmp_path):
    noise(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png\nb.png\n")
    refused(tmp_path / "list.txt", "1 of 2 images", "'b.png' (no such file)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n\n", "lists nothing"),
        (b"a.png 1\nb.png\n", "a label on 1 of 2 lines"),
        (b"\xff\xfe\x00", "not text in UTF-8"),
    ],
)
def test_lists_that_are_none(tmp_path, content, message):
    (tmp_path / "list.txt").write_bytes(content)
    refused(tmp_path / "list.txt", message)


def test_an_npz_with_the_wrong_keys(tmp_path):
    np.savez(tmp_path / "x.npz", data=np.zeros((2, 3, 8, 8)), labels=[0, 1])
    refused(tmp_path / "x.npz", "has the keys 'labels', 'data'", "'image' or 'images'")


def test_an_npz_that_lacks_one_input(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros((2, 3)))
    ports = (Port("a", "float32", ("N", 3)), Port("b", "float32", ("N", 3)))
    refused(tmp_path / "x.npz", "has the keys 'a'", "wanted and not there: 'b'", ports=ports)


def test_an_npy_for_two_inputs(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    ports = (Port("a", "float32", ("N", 3)), Port("b", "float32", ("N", 3)))
    refused(tmp_path / "x.npy", "holds one array without a name", "'a', 'b'", ports=ports)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".png"])
def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(tmp_path, suffix):
    """An .npz that was not fetched was said to hold pickled Python objects."""
    path = tmp_path / f"shots{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 1234\n")
    refused(path, "Git LFS pointer", "git lfs pull", "lfs: true")


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_pickled_objects_are_never_loaded(tmp_path, suffix):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "went_off"), "w"))

    path = tmp_path / f"x.{suffix}"
    if suffix == "npy":
        np.save(path, np.array([Bomb()], object), allow_pickle=True)
    else:
        np.savez(path, images=np.array([Bomb()], object))
    refused(path, "pickled Python objects", "never loaded")
    path.write_bytes(pickle.dumps(Bomb()))
    refused(path, "pickled Python objects")
    assert not (tmp_path / "went_off").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"\x93NUMPY\x01\x00"])
def test_damaged_array_files(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    refused(tmp_path / "x.npz", "x.npz'", "again")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_name_the_row(tmp_path, value):
    rows = np.arange(20.0).reshape(5, 4)
    rows[3:, 1] = value
    np.save(tmp_path / "x.npy", rows)
    refused(tmp_path / "x.npy", "row 3 of", "not finite", "2 of 5 are", ports=[ROWS])


def test_numbers_beyond_half_precision_name_the_row(tmp_path):
    np.save(tmp_path / "x.npy", np.array([[1.0, 2, 3, 4], [1, 2, 3, 70000]]))
    port = Port("x", "float16", ("N", 4))
    refused(tmp_path / "x.npy", "row 1 of", "too large for float16", ports=[port])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2], "has 3 labels for 2 rows"),
        ([0, -1], "has the label -1"),
        ([0.0, 1.0], "float64 (2,); wanted are integers (2,)"),
        ([[1, 0], [0, 1]], "labels.argmax(1)"),
    ],
)
def test_labels_that_do_not_fit_the_rows(tmp_path, labels, message):
    np.savez(tmp_path / "x.npz", x=np.arange(8.0).reshape(2, 4), labels=labels)
    refused(tmp_path / "x.npz", message, ports=[ROWS])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\n1\n2\n", "has 3 labels for 2 rows"),
        ("", "has 0 labels for 2 rows"),
        ("0\none\n", "line 2 of"),
        ("0\n-1\n", "line 2 of"),
        ("0\na.png 1\n", "line 2 of"),
        ("a.png 0\n", "no label for 1 of 2 rows: 'b.png'"),
        ("a.png 0\na.png 1\nb.png 1\n", "labels 'a.png' both 0 and 1"),
    ],
)
def test_files_of_labels_that_do_not_fit_the_rows(tmp_path, text, message):
    for name in "ab":
        noise(tmp_path / "x" / f"{name}.png")
    (tmp_path / "labels.txt").write_text(text)
    refused(tmp_path / "x", message, labels=tmp_path / "labels.txt")


def test_a_file_name_that_two_rows_share_labels_neither(tmp_path):
    noise(tmp_path / "x" / "cat" / "a.png")
    noise(tmp_path / "x" / "dog" / "a.png")
    (tmp_path / "labels.txt").write_text("a.png 0\n")
    refused(tmp_path / "x", "no label for 2 of 2 rows", labels=tmp_path / "labels.txt")


def test_missing_labels_and_labels_without_their_key(tmp_path):
    noise(tmp_path / "a.png")
    refused(tmp_path / "a.png", "no labels at", labels=tmp_path / "none.txt")
    np.savez(tmp_path / "l.npz", y=[1])
    refused(tmp_path / "a.png", "has the keys 'y'", "'labels'", labels=tmp_path / "l.npz")


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((10, 8, 8, 3), "Channels look last: pass --layout nhwc."),
        ((3, 8, 8), "That looks like one sample"),
        ((10, 3, 9, 9), "Write or resize"),
        ((10, 8, 8), "axis of channels"),
        ((10, 192), "Write or resize"),
    ],
)
def test_arrays_of_another_shape_say_both_shapes_and_guess_the_cause(tmp_path, shape, hint):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal(shape))
    refused(tmp_path / "x.npy", "input 'image' wants (N, 3, 8, 8);", f"holds {shape}.", hint)


def test_channels_first_for_a_graph_that_has_them_last(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((10, 3, 8, 8)))
    port = Port("image", "float32", ("N", 8, 8, 3))
    refused(tmp_path / "x.npy", "Channels look first: pass --layout nchw.", ports=[port])


def test_pixels_without_an_axis_of_channels(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8, 5), np.uint8))
    refused(tmp_path / "x.npy", "holds uint8 (2, 8, 8, 5)", "c = 1 or 3")


def test_pixels_whose_size_the_graph_does_not_take(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 9, 3), np.uint8))
    refused(tmp_path / "x.npy", "holds (2, 3, 8, 9)", ports=[Port("x", "float32", ("N", 3, 48, None))])


def test_images_for_an_input_that_they_cannot_fill(tmp_path):
    noise(tmp_path / "a.png")
    refused(tmp_path, "input 'x' wants (N, 4), which images cannot fill", "array 'x'", ports=[ROWS])


def test_integers_that_were_pixels_once(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(192, dtype=np.int64).reshape(1, 3, 8, 8))
    refused(tmp_path / "x.npy", "int64 (1, 3, 8, 8)", "Save images as uint8")


def test_fractions_for_an_input_of_integers(tmp_path):
    np.save(tmp_path / "x.npy", np.full((1, 4), 0.5))
    refused(tmp_path / "x.npy", "takes int64, which cannot hold", "0.5", ports=[Port("x", "int64", ("N", 4))])


def test_arrays_of_text(tmp_path):
    np.save(tmp_path / "x.npy", np.array([["a", "b", "c", "d"]]))
    refused(tmp_path / "x.npy", "holds <U1", ports=[ROWS])


@pytest.mark.parametrize("dtype", ["object", "sequence_type", "unknown"])
def test_inputs_that_are_no_tensors_of_numbers(tmp_path, dtype):
    np.save(tmp_path / "x.npy", np.arange(4.0)[None])
    refused(tmp_path / "x.npy", f"takes {dtype}", ports=[Port("x", dtype, ("N", 4))])


def test_constant_data(tmp_path):
    np.save(tmp_path / "x.npy", np.full((3, 4), 0.25))
    refused(tmp_path / "x.npy", "all values of all 3 shots are 0.25", ports=[ROWS])


@pytest.mark.parametrize("array", [np.zeros((0, 4)), np.float64(1)])
def test_arrays_without_rows(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    refused(tmp_path / "x.npy", "holds no rows for input 'x'", ports=[ROWS])


def test_arrays_with_different_numbers_of_rows(tmp_path):
    ports = (Port("a", "float32", ("N", 3)), Port("b", "float32", ("N", 3)))
    np.savez(tmp_path / "x.npz", a=np.zeros((2, 3)), b=np.zeros((4, 3)))
    refused(tmp_path / "x.npz", "different numbers of rows: {'a': 2, 'b': 4}", ports=ports)
    np.save(tmp_path / "a.npy", np.zeros((2, 3)))
    np.save(tmp_path / "b.npy", np.zeros((4, 3)))
    refused([f"{k}={tmp_path / k}.npy" for k in "ab"], "holds 2 rows", "4.", ports=ports)


def test_a_name_that_is_no_input(tmp_path):
    noise(tmp_path / "a.png")
    refused(f"imgae={tmp_path}", "'imgae' is no input of the graph. Did you mean 'image'?", "Inputs: 'image'")


def test_one_folder_for_several_inputs(tmp_path):
    noise(tmp_path / "a.png")
    refused(tmp_path, "the graph has 2 inputs, 'image', 'x'", "--shots image=PATH", ports=(RGB, ROWS))


def test_two_sources_that_do_not_say_what_they_fill(tmp_path):
    noise(tmp_path / "a.png")
    refused([str(tmp_path), str(tmp_path)], "does not say which input it fills")


def test_an_input_with_two_sources_or_none(tmp_path):
    noise(tmp_path / "a.png")
    source = f"image={tmp_path}"
    refused([source, source], "input 'image' has two sources")
    refused([source], "no shots for input 'x'", ports=(RGB, ROWS))


def test_bad_rows_of_two_inputs_that_leave_nothing(tmp_path):
    ports = (RGB, Port("other", "float32", ("N", 3, 8, 8)))
    for folder, bad in (("a", "1.png"), ("b", "2.png")):
        for name in ("1.png", "2.png"):
            noise(tmp_path / folder / name)
        (tmp_path / folder / bad).write_bytes(b"")
    sources = [f"image={tmp_path / 'a'}", f"other={tmp_path / 'b'}"]
    refused(sources, "no shot can be read in all of its inputs", ports=ports, skip_bad=True)
