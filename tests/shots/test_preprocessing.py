"""The check of the preset names the right one, warns of a wrong one, and never of the right one."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from xdonnx.images import PRESETS, Preprocess, fit, frame, open_image
from xdonnx.job import Job, prepared
from xdonnx.model import interface, read_proto
from xdonnx.preprocessing import LEAST, check_preset, check_samples, most_images
from xdonnx.runtime import open_session
from xdonnx.shots import list_shots

SAMPLES = Path(__file__).parents[2] / "samples"
DIGITS = ("digits_vgg", "digits_residual", "digits_mobile")


def checked(path, images, preprocess, labels=None):
    """Return the verdict and the warnings on images (n, h, w, c) for the model of a file."""
    proto = read_proto(path)
    (port,) = interface(proto).inputs
    wanted = frame(port, preprocess)
    pixels = np.stack([fit(image, wanted, preprocess) for image in images])
    events = []
    options = {"labels": labels, "log": events.append}
    verdict = check_preset(proto, open_session(path), port, pixels, preprocess, **options)
    assert all(event.level == "warning" and event.stage == "shots" for event in events)
    return verdict, [event.text for event in events]


@pytest.fixture(scope="module")
def digits():
    """Return 64 digits of all classes and their labels."""
    with np.load(SAMPLES / "held_out.npz") as held:
        rows = np.argsort(held["labels"], kind="stable")[::7][:64]
        return held["images"][rows][:, :, :, None], held["labels"][rows].astype(np.int64)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", DIGITS)
def test_on_digits_every_preset_but_unit_is_warned_of_and_unit_named(digits, name, preset, labelled):
    images, labels = digits

    verdict, warnings = checked(SAMPLES / f"{name}.onnx", images, Preprocess(preset), labels if labelled else None)

    assert verdict.best.recipe.flags() == "--preset unit"
    assert len(warnings) == (preset != "unit")
    if warnings:
        assert f"'--preset {preset}' was used" in warnings[0] and "'--preset unit' fits 64" in warnings[0]


def black_and_white(images):
    return np.where(images > 128, 255, 0).astype(np.uint8)


STRANGE = {
    "dark": lambda images: images // 5,
    "dim": lambda images: images // 2,
    "bright": lambda images: 255 - (255 - images) // 4,
    "pale": lambda images: 90 + images // 4,
    "negative": lambda images: 255 - images,
    "black and white": black_and_white,
    "turned": lambda images: images.transpose(0, 2, 1, 3),
    "noise": lambda images: np.random.default_rng(0).integers(0, 256, images.shape, np.uint8),
}


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("name", DIGITS)
def test_the_right_preset_is_never_warned_of_however_strange_the_images(digits, name, strange):
    images, labels = STRANGE[strange](digits[0]), digits[1]

    for known in (None, np.roll(labels, 5)):
        assert checked(SAMPLES / f"{name}.onnx", images, Preprocess("unit"), known)[1] == []


@pytest.mark.parametrize("name", DIGITS)
def test_images_of_one_class_alone_are_no_evidence(digits, name):
    with np.load(SAMPLES / "held_out.npz") as held:
        sevens = held["images"][held["labels"] == 7][:, :, :, None]

    assert checked(SAMPLES / f"{name}.onnx", sevens, Preprocess("unit"))[1] == []
    assert checked(SAMPLES / f"{name}.onnx", sevens, Preprocess("unit"), np.full(len(sevens), 7))[1] == []


def test_numbers_of_ones_own_that_come_to_the_right_preset_are_not_warned_of(digits):
    images, labels = digits
    own = Preprocess("raw", scale=255.0)
    wrong = Preprocess("unit", mean=(0.9,), std=(0.1,))

    assert checked(SAMPLES / "digits_vgg.onnx", images, own, labels)[1] == []
    (text,) = checked(SAMPLES / "digits_vgg.onnx", images, wrong, labels)[1]
    assert "'--preset unit with --mean, --std' was used" in text and "'--preset unit' fits" in text


def test_the_first_batchnormalization_speaks_where_nothing_classifies(digits, tmp_path):
    proto = onnx.load(SAMPLES / "digits_vgg.onnx")
    conv = next(node for node in proto.graph.node if node.op_type == "Conv")
    norm = next(node for node in proto.graph.node if node.op_type == "BatchNormalization")
    for node in [node for node in proto.graph.node if node is not conv and node is not norm]:
        if node.op_type != "Constant":
            proto.graph.node.remove(node)
    proto.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info(norm.output[0], 1, ["batch", 24, 16, 16]))
    onnx.save(proto, tmp_path / "stem.onnx")

    verdict, warnings = checked(tmp_path / "stem.onnx", digits[0], Preprocess("imagenet"))

    assert verdict.best.recipe.flags() == "--preset unit" and verdict.best.confidence is None
    # The definition, by hand: KL from what arrives to the running statistics, mean over channels.
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    session = open_session(_until(proto, norm.input[0]))
    (seen,) = session.run(None, {"image": digits[0].transpose(0, 3, 1, 2).astype(np.float32) / 255})
    kl = []
    for channel in range(24):
        mean, variance = seen[:, channel].mean(), seen[:, channel].var()
        trained, spread = weights[norm.input[3]][channel], weights[norm.input[4]][channel]
        kl.append(np.log(np.sqrt(spread / variance)) + (variance + (mean - trained) ** 2) / (2 * spread) - 0.5)
    assert verdict.best.mismatch == pytest.approx(np.mean(kl), rel=1e-3)
    assert "BatchNormalization" in warnings[0]


def _until(proto, value):
    cut = onnx.ModelProto()
    cut.CopyFrom(proto)
    del cut.graph.output[:]
    cut.graph.output.append(onnx.ValueInfoProto(name=value))
    return cut


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_a_model_that_wants_blue_first_is_found_by_its_labels_alone(tmp_path, order, labelled):
    # It names the brightest of red, green and blue, once the channels come in the order that it was built for.
    rows = np.eye(3) if order == "rgb" else np.eye(3)[::-1]
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 3, 8, 8] x) => (float[N, 3] y) {
            a = GlobalAveragePool(x)  b = Flatten(a)  y = Gemm(b, w)
        }"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array((40 * rows).astype(np.float32), "w"))
    onnx.save(proto, tmp_path / "colors.onnx")
    labels = np.arange(48) % 3
    images = np.random.default_rng(0).integers(0, 120, (48, 8, 8, 3)).astype(np.uint8)
    images[np.arange(48), :, :, labels] += 120

    right = Preprocess("unit", color=order)
    wrong = Preprocess("unit", color={"rgb": "bgr", "bgr": "rgb"}[order])
    known = labels if labelled else None

    assert checked(tmp_path / "colors.onnx", images, right, known)[1] == []
    warnings = checked(tmp_path / "colors.onnx", images, wrong, known)[1]
    assert len(warnings) == labelled
    if labelled:
        flags = "--preset unit" + (" --color bgr" if order == "bgr" else "")
        assert f"'{flags}' fits 48" in warnings[0] and "right on 100 % instead of 33 %" in warnings[0]


DETECTOR = """<ir_version: 8, opset_import: ["" : 17]>
g (float[{batch},3,8,8] x) => (float[K,4] boxes, float[{batch},M] found, float[{batch},2] y) {{
  c = Conv <pads = [1,1,1,1]> (x, w)  t = Transpose <perm = [0,2,3,1]> (c)
  rows = Constant <value = int64[2] {{-1, 4}}> ()  boxes = Reshape (t, rows)
  axes = Constant <value = int64[2] {{0, 2}}> ()
  p = GlobalAveragePool (x)  f = Flatten (p)  y = Gemm (f, v)
  high = Greater (x, zero)  places = NonZero (high)  one = Constant <value = int64[2] {{1, -1}}> ()
  flat = Cast <to = 1> (places)  all = Reshape (flat, one)  found = Identity (all)
}}"""


@pytest.mark.parametrize("batch", ["N", "1"])
@pytest.mark.parametrize("classifies", [True, False])
def test_outputs_that_do_not_count_images_are_passed_over(tmp_path, batch, classifies):
    """A detector with image shots ended as an internal error."""
    proto = onnx.parser.parse_model(DETECTOR.format(batch=batch))
    generator = np.random.default_rng(0)
    for name, values in {
        "w": generator.normal(size=(4, 3, 3, 3)),
        "v": generator.normal(size=(3, 2)),
        "zero": 0.5,
    }.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values, np.float32), name))
    if not classifies:
        del proto.graph.output[2]
    onnx.save(proto, tmp_path / "detector.onnx")
    images = generator.integers(0, 256, (20, 8, 8, 3), np.uint8)

    verdict, warnings = checked(tmp_path / "detector.onnx", images, Preprocess("unit"))

    assert warnings == []
    # The output that classifies is evidence whatever stands beside it.
    assert (verdict is not None) is classifies
    if classifies:
        assert verdict.used.confidence is not None and verdict.used.mismatch is None


def test_there_is_nothing_to_check_in_numbers_in_several_inputs_or_in_a_few_images(tmp_path, digits):
    proto, session = read_proto(SAMPLES / "digits_vgg.onnx"), open_session(SAMPLES / "digits_vgg.onnx")
    ports = interface(proto).inputs
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((20, 1, 16, 16)).astype(np.float32))
    np.save(tmp_path / "few.npy", digits[0][: LEAST - 1, :, :, 0])

    for name in ("x.npy", "few.npy"):
        found = list_shots([str(tmp_path / name)], ports, Preprocess("raw"))
        assert check_samples(proto, session, ports, found, Preprocess("raw"), pytest.fail) is None
    assert most_images(ports[0], Preprocess()) == 64


def test_a_job_warns_of_the_wrong_preset_and_not_of_the_right_one(tmp_path):
    for preset, times in {"unit": 0, "imagenet": 1}.items():
        events = []
        job = Job(
            model=SAMPLES / "digits_vgg.onnx",
            out=tmp_path / "s.onnx",
            shots=(str(SAMPLES / "shots"),),
            preprocess=Preprocess(preset),
        )

        prepared(job, events.append)

        said = [event.text for event in events if event.level == "warning" and "'--preset unit' fits" in event.text]
        assert len(said) == times


def cifar(data, name):
    with np.load(data / "cifar10" / name) as held:
        rows = np.argsort(held["labels"], kind="stable")
        rows = rows[np.linspace(0, len(rows) - 1, 64).astype(int)]
        return held["images"][rows], held["labels"][rows].astype(np.int64)


@pytest.mark.corpus
@pytest.mark.parametrize(
    ("model", "images", "right"),
    [
        ("teachers/resnet20_cifar10_op17_bn", "cifar10_dev.npz", "imagenet"),
        ("teachers/resnet20_cifar10_op13_folded", "cifar10_dev.npz", "imagenet"),
        ("teachers/resnet20_cifar10_op20_default", "cifar10_dev.npz", "imagenet"),
        ("teachers/resnet56_cifar10_op17_bn", "cifar10_dev.npz", "imagenet"),
        ("teachers/vgg16_half_cifar10_op17_bn", "cifar10_jpeg_dev.npz", "imagenet"),
        ("teachers/resnet8_mlperftiny_op13", "cifar10_dev.npz", "raw"),
        ("models/squeezenet_cifar10", "cifar10_dev.npz", "unit"),
    ],
)
def test_real_models_are_fed_as_they_were_trained(data, model, images, right):
    pixels, labels = cifar(data, images)
    wrong = "unit" if right != "unit" else "imagenet"

    for known in (labels, None):
        verdict, warnings = checked(data / f"{model}.onnx", pixels, Preprocess(right), known)
        assert verdict.best.recipe.flags() == f"--preset {right}" and not warnings
        verdict, warnings = checked(data / f"{model}.onnx", pixels, Preprocess(wrong), known)
        assert verdict.best.recipe.flags() == f"--preset {right}"
        assert warnings or known is None


@pytest.mark.corpus
def test_squeezenet_wants_the_preset_of_imagenet_with_and_without_labels(data):
    files = sorted((data / "imagenet" / "dev").iterdir())[::20]
    images = np.stack([open_image(path) for path in files])[:9]
    labels = np.array([int(path.stem) for path in files])[:9]

    for preset in ("imagenet", "unit", "raw"):
        for known in (labels, None):
            path = data / "teachers" / "squeezenet1_0_op13.onnx"
            verdict, warnings = checked(path, images, Preprocess(preset), known)
            assert verdict.best.recipe.flags() == "--preset imagenet"
            assert len(warnings) == (preset != "imagenet")


def test_images_are_spread_over_what_was_found_and_unreadable_ones_left_out(tmp_path):
    for k in range(20):
        (tmp_path / "x" / str(k // 10)).mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 10 * k).save(tmp_path / "x" / str(k // 10) / f"{k:02}.png")
    (tmp_path / "x" / "0" / "00.png").write_bytes(b"")
    ports = interface(read_proto(SAMPLES / "digits_vgg.onnx")).inputs

    pixels, labels = list_shots([str(tmp_path / "x")], ports, Preprocess()).sample(5)

    assert pixels[:, 0, 0, 0].tolist() == [40, 90, 140, 190] and labels.tolist() == [0, 0, 1, 1]
