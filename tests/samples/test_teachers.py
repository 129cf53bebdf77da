"""The teachers that ship with the samples are good, and what judges them was seen by nobody."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from xdonnx.images import Preprocess
from xdonnx.model import interface, read_proto
from xdonnx.shots import read_shots

SAMPLES = Path(__file__).parents[2] / "samples"
TEACHERS = ["digits_vgg", "digits_residual", "digits_mobile"]


@pytest.fixture(scope="module")
def held_out():
    with np.load(SAMPLES / "held_out.npz") as arrays:
        return arrays["images"], arrays["labels"]


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_classify_the_held_out_digits(name, held_out):
    images, labels = held_out
    session = onnxruntime.InferenceSession(SAMPLES / f"{name}.onnx", providers=["CPUExecutionProvider"])

    (logits,) = session.run(["logits"], {"image": images[:, None].astype(np.float32) / 255})

    assert (logits.argmax(1) == labels).mean() >= 0.97


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_take_both_the_shots_and_the_held_out_images_by_the_unit_preset(name, held_out):
    path = SAMPLES / f"{name}.onnx"
    ports = interface(read_proto(path)).inputs
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    shots = read_shots([str(SAMPLES / "shots")], ports, Preprocess("unit"))
    judges = read_shots([str(SAMPLES / "held_out.npz")], ports, Preprocess("unit"))

    for read in (shots, judges):
        (logits,) = session.run(None, read.inputs)
        assert (logits.argmax(1) == read.labels).mean() >= 0.97
    np.testing.assert_array_equal(judges.labels, held_out[1])


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_leave_the_batch_free_and_name_their_ports(name):
    ports = interface(read_proto(SAMPLES / f"{name}.onnx"))

    assert [str(port) for port in ports.inputs] == ["image float32 [batch, 1, 16, 16]"]
    assert [str(port) for port in ports.outputs] == ["logits float32 [batch, 10]"]


def test_each_teacher_has_the_hazards_it_is_there_for():
    kinds = {name: [node.op_type for node in onnx.load(SAMPLES / f"{name}.onnx").graph.node] for name in TEACHERS}

    assert kinds["digits_vgg"].count("BatchNormalization") == kinds["digits_vgg"].count("Conv") == 6
    assert "Flatten" in kinds["digits_vgg"]
    # Six additions: two of them with a projection, four with the identity.
    assert kinds["digits_residual"].count("Add") == 6 and kinds["digits_residual"].count("Conv") == 1 + 12 + 2
    assert {"Concat", "Sigmoid", "Mul", "GlobalAveragePool"} <= set(kinds["digits_mobile"])
    groups = [
        attribute.i
        for node in onnx.load(SAMPLES / "digits_mobile.onnx").graph.node
        for attribute in node.attribute
        if attribute.name == "group"
    ]
    assert max(groups) == 128


def test_there_are_ten_shots_of_each_digit_and_none_is_held_out(held_out):
    images, labels = held_out
    paths = sorted((SAMPLES / "shots").rglob("*.png"))

    assert sorted(path.parent.name for path in paths) == sorted(10 * "0123456789")
    assert images.shape == (450, 16, 16) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [45] * 10
    shots = {np.asarray(Image.open(path)).tobytes() for path in paths}
    judges = {image.tobytes() for image in images}
    assert len(shots) == 100 and len(judges) == 450 and not shots & judges


def test_the_samples_are_small_and_tell_nothing_of_the_machine_that_made_them():
    files = [path for path in SAMPLES.rglob("*") if path.is_file() and path.suffix in (".onnx", ".npz", ".png")]

    assert sum(path.stat().st_size for path in files) < 3_000_000
    assert max(path.stat().st_size for path in files) < 2_000_000
    for name in TEACHERS:
        assert b"make_samples.py" not in (SAMPLES / f"{name}.onnx").read_bytes()
