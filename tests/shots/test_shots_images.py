"""Images and uint8 arrays become exactly the numbers that each preset promises."""

import numpy as np
import pytest
from PIL import Image

from xdonnx.errors import JobError, ShotsError
from xdonnx.images import Preprocess, as_pixels, fit, frame, normalize, open_image
from xdonnx.model import Port
from xdonnx.shots import read_shots

RGB = Port("image", "float32", ("N", 3, 8, 8))
GRAY = Port("image", "float32", ("N", 1, 8, 8))


@pytest.fixture
def pixels():
    return np.random.default_rng(3).integers(0, 256, (2, 8, 8, 3), np.uint8)


def read_array(tmp_path, array, port, preprocess):
    np.savez(tmp_path / "x.npz", images=array)
    return read_shots([str(tmp_path / "x.npz")], [port], preprocess).inputs[port.name]


@pytest.mark.parametrize(
    ("preset", "order", "scale", "mean", "std"),
    [
        ("imagenet", (0, 1, 2), 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("unit", (0, 1, 2), 255, (0, 0, 0), (1, 1, 1)),
        ("raw", (0, 1, 2), 1, (0, 0, 0), (1, 1, 1)),
        ("tf", (0, 1, 2), 127.5, (1, 1, 1), (1, 1, 1)),
        ("caffe", (2, 1, 0), 1, (103.939, 116.779, 123.68), (1, 1, 1)),
    ],
)
def test_every_preset_computes_its_formula_pixel_by_pixel(tmp_path, pixels, preset, order, scale, mean, std):
    values = read_array(tmp_path, pixels, RGB, Preprocess(preset))

    assert values.dtype == np.float32 and values.flags.c_contiguous
    for place, channel in enumerate(order):
        expected = (pixels[:, :, :, channel].astype(np.float64) / scale - mean[place]) / std[place]
        np.testing.assert_allclose(values[:, place], expected, rtol=1e-5, atol=1e-5)


def test_the_default_agrees_with_torchvisions_evaluation_transform(tmp_path):
    from torchvision import transforms

    generator = np.random.default_rng(0)
    theirs = transforms.Compose(
        [
            transforms.Resize(64),
            transforms.CenterCrop(56),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    # Larger and smaller than the crop, upright and lying, odd margins.
    for name, size in {"a": (90, 131), "b": (131, 90), "c": (20, 33), "d": (64, 64)}.items():
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"{name}.png")

    shots = read_shots([str(tmp_path)], [Port("x", "float32", (1, 3, 56, 56))], Preprocess())

    assert shots.ids == ("a.png", "b.png", "c.png", "d.png")
    for name, row in zip(shots.ids, shots.inputs["x"], strict=True):
        expected = theirs(Image.open(tmp_path / name)).numpy()
        np.testing.assert_allclose(row, expected, atol=1e-6)


def test_mean_std_scale_and_color_replace_those_of_the_preset(tmp_path, pixels):
    preprocess = Preprocess("imagenet", mean=(1.0, 2.0, 3.0), std=(2.0,), scale=10.0, color="bgr")

    values = read_array(tmp_path, pixels, RGB, preprocess)

    for place, channel in enumerate((2, 1, 0)):
        expected = (pixels[:, :, :, channel] / 10 - (place + 1)) / 2
        np.testing.assert_allclose(values[:, place], expected, rtol=1e-5, atol=1e-5)


def test_a_graph_of_one_channel_gets_luminance_and_the_average_of_the_presets_numbers(tmp_path, pixels):
    values = read_array(tmp_path, pixels, GRAY, Preprocess("imagenet"))

    for row, image in zip(values, pixels, strict=True):
        gray = np.asarray(Image.fromarray(image).convert("L")) / 255
        expected = (gray - (0.485 + 0.456 + 0.406) / 3) / ((0.229 + 0.224 + 0.225) / 3)
        np.testing.assert_allclose(row[0], expected, atol=1e-5)


def test_gray_images_fill_three_channels_alike(tmp_path, pixels):
    one = read_array(tmp_path, pixels[:, :, :, 0], RGB, Preprocess("unit"))
    three = read_array(tmp_path, pixels, RGB, Preprocess("unit", color="gray"))

    for k in range(3):
        np.testing.assert_array_equal(one[:, k], pixels[:, :, :, 0].astype(np.float32) / np.float32(255))
        luminance = [np.asarray(Image.fromarray(image).convert("L")) for image in pixels]
        np.testing.assert_allclose(three[:, k], np.stack(luminance) / 255, atol=1e-6)


def test_images_and_arrays_of_the_same_pixels_give_the_same_numbers(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (3, 20, 13, 3), np.uint8)
    (tmp_path / "folder").mkdir()
    for k, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "folder" / f"{k}.png")
    for port in (RGB, GRAY):
        folder = read_shots([str(tmp_path / "folder")], [port], Preprocess()).inputs["image"]

        for array in (pixels, pixels.transpose(0, 3, 1, 2)):
            np.testing.assert_array_equal(read_array(tmp_path, array, port, Preprocess()), folder)


def test_an_image_of_the_graphs_size_is_not_resampled_unless_resize_says_so(tmp_path, pixels):
    plain = read_array(tmp_path, pixels, RGB, Preprocess("raw"))
    enlarged = read_array(tmp_path, pixels, RGB, Preprocess("raw", resize=16))

    np.testing.assert_array_equal(plain, pixels.transpose(0, 3, 1, 2))
    middle = [np.asarray(Image.fromarray(x).resize((16, 16), Image.Resampling.BILINEAR)) for x in pixels]
    np.testing.assert_array_equal(enlarged, np.stack(middle)[:, 4:12, 4:12].transpose(0, 3, 1, 2))


def test_an_input_that_is_not_square_is_covered_and_cropped_in_the_middle():
    wanted = frame(Port("x", "float32", ("N", 3, 24, 32)), Preprocess())
    columns = np.tile(np.arange(100, dtype=np.uint8)[None, :, None], (100, 1, 3))

    cropped = fit(columns, wanted, Preprocess())

    # The wider side governs: 100 columns become round(32 * 256 / 224) = 37, of which 2 go on the left.
    assert cropped.shape == (24, 32, 3)
    assert abs(cropped[0, 0, 0] - (2 + 0.5) * 100 / 37) < 1.5
    assert abs(cropped[0, 15, 0] - 17.5 * 100 / 37) < 1.5


def test_a_single_pixel_is_enlarged_to_the_whole_input():
    wanted = frame(RGB, Preprocess())

    enlarged = fit(np.full((1, 1, 3), 7, np.uint8), wanted, Preprocess())

    assert enlarged.shape == (8, 8, 3) and (enlarged == 7).all()


def test_an_image_too_narrow_to_resize_is_refused_before_memory_is_spent():
    wanted = frame(Port("x", "float32", ("N", 3, 224, 224)), Preprocess())

    with pytest.raises(ShotsError, match="1 x 50000 is too narrow"):
        fit(np.zeros((1, 50000, 3), np.uint8), wanted, Preprocess())


def test_a_resize_below_the_crop_is_refused():
    with pytest.raises(ShotsError, match=r"resized to 6 x 9, less than the crop of 8 x 8"):
        fit(np.zeros((10, 15, 3), np.uint8), frame(RGB, Preprocess()), Preprocess(resize=6))


def test_graphs_with_channels_last_are_filled_with_channels_last(tmp_path, pixels):
    last = Port("image", "float32", ("N", 8, 8, 3))

    for array in (pixels, pixels.transpose(0, 3, 1, 2)):
        np.testing.assert_array_equal(read_array(tmp_path, array, last, Preprocess("raw")), pixels)


def test_a_graph_that_leaves_its_layout_open_follows_the_option():
    open_shape = Port("x", "float32", ("N", None, None, None))

    assert frame(open_shape, Preprocess()).layout == "nchw"
    assert frame(open_shape, Preprocess(layout="nhwc")).layout == "nhwc"
    assert frame(open_shape, Preprocess(color="gray")).channels == 1
    assert frame(Port("x", "float32", None), Preprocess()).channels == 3
    assert frame(Port("x", "float32", ("N", 8, 8, 1)), Preprocess()).layout == "nhwc"


def test_inputs_that_no_image_fills_have_no_frame():
    for shape in (("N", 16), ("N", 3, 8), ("N", 16, 8, 8), ("N", 3, 8, 8, 8)):
        assert frame(Port("x", "float32", shape), Preprocess()) is None


def test_where_both_ends_could_be_channels_the_graph_decides_unless_told():
    pixels = np.zeros((2, 3, 5, 3), np.uint8)
    first, last = frame(Port("x", "float32", ("N", 3, 5, 3)), Preprocess()), frame(RGB, Preprocess())

    assert as_pixels(pixels, first, Preprocess()).shape == (2, 5, 3, 3)
    assert as_pixels(pixels, last, Preprocess(layout="nhwc")).shape == (2, 3, 5, 3)
    assert as_pixels(np.zeros((2, 4, 5, 6), np.uint8), first, Preprocess()) is None


def test_a_free_size_takes_the_images_as_they_are_or_as_resize_and_crop_say(tmp_path):
    free = Port("image", "float32", ("N", 3, "h", "w"))
    for name, size in {"a": (10, 20), "b": (12, 9)}.items():
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"{name}.png")

    def shape(**options):
        return read_shots([str(tmp_path)], [free], Preprocess(**options)).inputs["image"].shape

    assert shape(resize=6) == (2, 3, 6, 6)
    assert shape(resize=9, crop=8) == (2, 3, 8, 8)
    assert shape(crop=8) == (2, 3, 8, 8)
    with pytest.raises(ShotsError, match=r"'a.png' is 10 x 20, 'b.png' is 12 x 9(.|\n)*--resize or --crop"):
        shape()
    (tmp_path / "b.png").unlink()
    assert shape() == (1, 3, 10, 20)


def test_raw_pixels_stay_uint8_for_a_graph_that_takes_them(tmp_path, pixels):
    port = Port("image", "uint8", ("N", 3, 8, 8))

    values = read_array(tmp_path, pixels, port, Preprocess("raw"))

    assert values.dtype == np.uint8
    np.testing.assert_array_equal(values, pixels.transpose(0, 3, 1, 2))
    with pytest.raises(ShotsError, match=r"takes uint8, which cannot hold(.|\n)*--preset raw"):
        read_array(tmp_path, pixels, port, Preprocess("imagenet"))


def test_half_precision_graphs_get_half_precision_numbers(tmp_path, pixels):
    values = read_array(tmp_path, pixels, Port("image", "float16", ("N", 3, 8, 8)), Preprocess("unit"))

    assert values.dtype == np.float16
    np.testing.assert_allclose(values, pixels.transpose(0, 3, 1, 2) / 255, atol=1e-3)


@pytest.mark.parametrize(
    ("mode", "ink", "rgb", "gray"),
    [
        ("RGB", (200, 100, 50), (200, 100, 50), 124),
        ("RGBA", (200, 100, 50, 0), (200, 100, 50), 124),
        ("L", 77, (77, 77, 77), 77),
        ("LA", (77, 0), (77, 77, 77), 77),
        ("1", 1, (255, 255, 255), 255),
        ("CMYK", (0, 255, 0, 0), (255, 0, 255), 105),
        ("I;16", 25700, (100, 100, 100), 100),
        ("I;16", 65535, (255, 255, 255), 255),
        ("I", 25700, (100, 100, 100), 100),
    ],
)
def test_every_mode_of_image_is_read_as_rgb_or_gray(tmp_path, mode, ink, rgb, gray):
    suffix = "tif" if mode in ("CMYK", "I") else "png"
    path = tmp_path / f"x.{suffix}"
    Image.new(mode, (5, 4), ink).save(path)

    color, luminance = open_image(path), open_image(path, gray=True)

    assert color.shape == (4, 5, 3) and luminance.shape == (4, 5, 1)
    assert color.dtype == luminance.dtype == np.uint8
    assert (color == rgb).all() and (luminance == gray).all()


def test_palettes_are_read_with_and_without_transparency(tmp_path):
    image = Image.new("P", (5, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=b"\x00\x80")

    for name in ("plain.png", "clear.png"):
        assert (open_image(tmp_path / name) == (10, 20, 30)).all()


def test_samples_without_an_eight_bit_range_are_refused(tmp_path):
    Image.new("F", (5, 4), 0.5).save(tmp_path / "f.tif")
    Image.new("I", (5, 4), 70000).save(tmp_path / "i.tif")

    with pytest.raises(ShotsError, match="floating-point samples"):
        open_image(tmp_path / "f.tif")
    with pytest.raises(ShotsError, match="more than 16 bits"):
        open_image(tmp_path / "i.tif")


def test_32_bit_samples_up_to_255_are_refused_and_dark_16_bit_ones_are_not(tmp_path):
    """Taken for 16 bits, a TIFF of 32 with values up to 255 was black."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4))
    Image.fromarray(pixels.astype(np.int32)).save(tmp_path / "i.tif")
    Image.fromarray(np.zeros((5, 4), np.int32)).save(tmp_path / "black.tif")
    Image.fromarray(pixels.astype(np.uint16)).save(tmp_path / "dark.png")
    (tmp_path / "dark.pgm").write_bytes(b"P5 4 5 65535 " + pixels.astype(">u2").tobytes())

    with pytest.raises(ShotsError, match="32 bits up to 255"):
        open_image(tmp_path / "i.tif")
    for name in ("black.tif", "dark.png", "dark.pgm"):
        assert open_image(tmp_path / name).max() <= 1


def test_images_are_turned_upright_as_their_exif_says(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)

    upright = open_image(tmp_path / "x.png")

    assert upright.shape == (6, 4, 3)
    assert (upright[0] == 255).all() and (upright[1:] == 0).all()


@pytest.mark.parametrize("limit", [15, 8])
def test_images_beyond_pillows_limit_are_refused(tmp_path, monkeypatch, limit):
    Image.new("L", (5, 4)).save(tmp_path / "x.png")
    # 20 pixels: between one and two times the limit Pillow only warns, beyond it raises.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)

    with pytest.raises(ShotsError, match=f"more than the {limit} pixels"):
        open_image(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "no such file"), (b"", "0 bytes"), (b"hello", "not an image"), ("cut", "truncated")],
)
def test_files_that_are_no_image_give_their_reason(tmp_path, content, reason):
    path = tmp_path / "x.png"
    if content == "cut":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(path)
        content = path.read_bytes()[:900]
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ShotsError, match=reason):
        open_image(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "imagnet"}, "Did you mean 'imagenet'"),
        ({"layout": "chw"}, "unknown --layout 'chw'"),
        ({"color": "red"}, "unknown --color 'red'"),
        ({"std": (1.0, 0.0, 1.0)}, "divide by zero"),
        ({"mean": (float("nan"),)}, "finite"),
        ({"mean": ()}, "finite"),
        ({"scale": 0.0}, "above zero"),
        ({"resize": 0}, "at least 1 pixel"),
        ({"crop": -3}, "at least 1 pixel"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(options, message):
    with pytest.raises(JobError, match=message):
        Preprocess(**options)


@pytest.mark.parametrize(
    ("options", "port", "message"),
    [
        ({"color": "bgr"}, GRAY, "--color bgr needs three channels"),
        ({"crop": 7}, RGB, "--crop 7 is not the size"),
        ({"mean": (1.0, 2.0)}, RGB, "--mean has 2 numbers"),
        ({"std": (1.0, 2.0, 3.0)}, GRAY, "--std has 3 numbers"),
    ],
)
def test_options_that_contradict_the_graph_are_refused(options, port, message):
    preprocess = Preprocess(**options)

    with pytest.raises(JobError, match=message):
        normalize(np.zeros((1, 8, 8, 3), np.uint8), frame(port, preprocess), preprocess)
