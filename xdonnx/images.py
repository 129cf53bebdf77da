"""Pixels into what a graph input takes: decoding, colour, size, normalization, layout.

Pixels are uint8, red first, channels last: `(h, w, c)` for one image and `(n, h, w, c)` for many, c = 1 or 3.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from xdonnx.errors import JobError, ShotsError
from xdonnx.files import unfetched

if TYPE_CHECKING:
    # For the annotations only: reading images must not cost the import of onnx.
    from xdonnx.model import Port

Array = NDArray[Any]


@dataclass(frozen=True)
class _Recipe:
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    color: str = "rgb"


PRESETS = {
    "imagenet": _Recipe(255.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "unit": _Recipe(255.0, (0.0,), (1.0,)),
    "raw": _Recipe(1.0, (0.0,), (1.0,)),
    "tf": _Recipe(127.5, (1.0,), (1.0,)),
    "caffe": _Recipe(1.0, (103.939, 116.779, 123.68), (1.0,), "bgr"),
}

# Evaluation crops of ImageNet networks: the shorter side to 256, then the central 224.
_MARGIN = 256 / 224


@dataclass(frozen=True)
class Preprocess:
    """How pixels become numbers: `(x / scale - mean) / std`, after resizing and colour.

    Parameters
    ----------
    preset : {'imagenet', 'unit', 'raw', 'tf', 'caffe'}, default='imagenet'
        imagenet: x/255, less (0.485, 0.456, 0.406), by (0.229, 0.224, 0.225). unit: x/255. raw: 0-255. tf:
        x/127.5 - 1. caffe: BGR, 0-255 less (103.939, 116.779, 123.68). On a graph of one channel the preset's
        means and deviations are replaced by their average.
    mean, std : tuple of float, optional
        Replace the preset's; one number, or one for each channel in the order in which the graph takes them.
    scale : float, optional
        What pixels are divided by first; replaces the preset's 255, 1 or 127.5.
    color : {'rgb', 'bgr', 'gray'}, optional
        Order of the channels that the graph takes. 'gray' on three channels repeats the luminance. Default:
        the preset's; always gray on a graph of one channel.
    layout : {'auto', 'nchw', 'nhwc'}, default='auto'
        Where arrays keep their channels; the graph's own layout is read from its shape, and follows this
        option where the shape leaves it open. 'auto' recognizes uint8 images by their 1 or 3 channels and
        takes floating arrays to be as the graph wants them.
    resize : int, optional
        Shorter side before the crop, in pixels; images are then resized even if they have the graph's size.
        Default: 256/224 of the crop, and nothing for images that have the graph's size already.
    crop : int, optional
        Side of the central square, for graphs whose size is free. Default: the graph's size, else `resize`.

    Raises
    ------
    JobError
        An option has a value that makes no sense.
    """

    preset: str = "imagenet"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    color: str | None = None
    layout: str = "auto"
    resize: int | None = None
    crop: int | None = None

    def __post_init__(self) -> None:
        _one_of("preset", self.preset, tuple(PRESETS))
        _one_of("layout", self.layout, ("auto", "nchw", "nhwc"))
        if self.color is not None:
            _one_of("color", self.color, ("rgb", "bgr", "gray"))
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and (not values or not all(map(math.isfinite, values))):
                raise JobError(f"--{name} {values} is not a list of finite numbers.")
        if self.std is not None and 0 in self.std:
            raise JobError(f"--std {self.std} would divide by zero.")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise JobError(f"--scale {self.scale} must be above zero: pixels are divided by it.")
        for name, side in (("resize", self.resize), ("crop", self.crop)):
            if side is not None and side < 1:
                raise JobError(f"--{name} {side} must be at least 1 pixel.")


@dataclass(frozen=True)
class Frame:
    """What a graph input wants of an image.

    Parameters
    ----------
    layout : {'nchw', 'nhwc'}
        Where the graph has its channels.
    channels : {1, 3}
        How many it takes.
    height, width : int or None
        In pixels; None where the graph takes any.
    color : {'rgb', 'bgr', 'gray'}
        What the channels mean.
    """

    layout: str
    channels: int
    height: int | None
    width: int | None
    color: str

    @property
    def gray(self) -> bool:
        """Whether one channel per pixel is all that has to be read."""
        return self.color == "gray"


def frame(port: Port, preprocess: Preprocess) -> Frame | None:
    """Return what the input wants of an image, or None where images cannot fill it.

    Images fill inputs of four axes with 1 or 3 channels, first or last.

    Raises
    ------
    JobError
        The options contradict the input.
    """
    shape: Sequence[int | str | None] = port.shape if port.shape is not None else (None,) * 4
    if len(shape) != 4:
        return None
    layout = _graph_layout(shape, preprocess.layout)
    channels, height, width = shape[1:] if layout == "nchw" else (shape[3], shape[1], shape[2])
    if not isinstance(channels, int):
        channels = 1 if preprocess.color == "gray" else 3
    if channels not in (1, 3):
        return None
    if channels == 1 and preprocess.color in ("rgb", "bgr"):
        raise JobError(
            f"--color {preprocess.color} needs three channels; the graph takes '{port}'.\n"
            "  Leave the option out: one channel is always gray."
        )
    color = "gray" if channels == 1 else preprocess.color or PRESETS[preprocess.preset].color
    height = height if isinstance(height, int) else None
    width = width if isinstance(width, int) else None
    crop = preprocess.crop
    if crop is not None and not {height, width} <= {crop, None}:
        raise JobError(
            f"--crop {crop} is not the size that the graph takes: '{port}'.\n"
            "  Leave the option out: the graph's size is the crop."
        )
    return Frame(layout, channels, height, width, color)


def open_image(path: Path, *, gray: bool = False) -> Array:
    """Return the pixels of an image file, upright, whatever its mode.

    Transparency is dropped, as `convert('RGB')` does; 16-bit samples are scaled to 8 bits; of several frames
    the first is read.

    Parameters
    ----------
    path : Path
        Any file that Pillow can decode.
    gray : bool
        Return the luminance (ITU-R 601) alone.

    Returns
    -------
    (h, w, 3) or, where `gray`, (h, w, 1), uint8

    Raises
    ------
    ShotsError
        The file is missing, empty, damaged, no image, or has too many pixels. The text is a reason to be put
        behind the file's name.
    """
    if not path.is_file():
        raise ShotsError("no such file")
    if path.stat().st_size == 0:
        raise ShotsError("0 bytes")
    try:
        with warnings.catch_warnings():
            # Pillow only warns between one and two times its limit; shots that large are a mistake too.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                found = upright(image)
        pixels = np.array(found.convert("L" if gray else "RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ShotsError(f"more than the {Image.MAX_IMAGE_PIXELS} pixels that are safe to decode") from error
    except UnidentifiedImageError as error:
        pointer = "a Git LFS pointer, not fetched: git lfs pull; in CI lfs: true"
        raise ShotsError(pointer if unfetched(path) else "not an image") from error
    except Exception as error:
        # Decoders let out whatever their parsers trip over: OSError, SyntaxError, struct.error, KeyError, ...
        raise ShotsError(str(error) or type(error).__name__) from error
    return pixels[:, :, None] if gray else pixels


def upright(image: Image.Image) -> Image.Image:
    """Return a picture as its camera was held, in mode 1, L, LA or RGB.

    Raises
    ------
    ShotsError
        Samples whose range is not known. Decoders raise errors of their own.
    """
    # A mode of 32 bits is also what some Pillows open 16-bit PNG and PGM as; elsewhere the range has to be guessed.
    guessed = image.mode == "I" and image.format not in ("PNG", "PPM")
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I"):
        samples = np.asarray(turned).astype(np.int64)
        least, most = samples.min(), samples.max()
        if least < 0 or most > 65535:
            raise ShotsError("samples of more than 16 bits; give arrays instead")
        if guessed and 0 < most <= 255:
            raise ShotsError("samples of 32 bits up to 255, black if 16 bits are meant; save them as 8 or 16 bits")
        # Plain convert() would clip at 255.
        return Image.fromarray(((samples + 128) // 257).astype(np.uint8))
    if turned.mode == "F":
        raise ShotsError("floating-point samples have no range to scale from; give arrays instead")
    if turned.mode == "P":
        # Straight to RGB, Pillow warns of palettes with transparency.
        return turned.convert("RGBA").convert("RGB")
    return turned.convert("RGB") if turned.mode not in ("1", "L", "LA", "RGB") else turned


def fit(pixels: Array, wanted: Frame, preprocess: Preprocess) -> Array:
    """Return the image at the size that the graph takes: shorter side resized, centre cropped.

    Bilinear with antialiasing; on square inputs the very numbers of torchvision's `Resize` and `CenterCrop`.
    On other inputs the image is scaled to cover 256/224 of the input.

    Parameters
    ----------
    pixels : (h, w, c) uint8
        One image.
    wanted : Frame
        What the graph takes; the image is returned as it is where the size is free and no option gives one.
    preprocess : Preprocess
        For `resize` and `crop`.

    Raises
    ------
    ShotsError
        `resize` leaves less than the graph takes, or the image is so narrow that resizing it would not end.
    """
    height, width = wanted.height, wanted.width
    if height is None or width is None:
        side = preprocess.crop or preprocess.resize
        if side is None:
            return pixels
        height, width = height or side, width or side
    h, w = pixels.shape[:2]
    if preprocess.resize is None:
        if (h, w) == (height, width):
            return pixels
        upright = height * w >= width * h
        side = round((height if upright else width) * _MARGIN)
    else:
        upright = h <= w
        side = preprocess.resize
    new_h, new_w = (side, side * w // h) if upright else (side * h // w, side)
    if new_h < height or new_w < width:
        raise ShotsError(
            f"resized to {new_h} x {new_w}, less than the crop of {height} x {width}; pass a larger --resize"
        )
    if new_h * new_w > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ShotsError(f"{h} x {w} is too narrow: resized it would be {new_h} x {new_w}; crop it first")
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    resized = np.asarray(picture.resize((new_w, new_h), Image.Resampling.BILINEAR))
    top, left = round((new_h - height) / 2), round((new_w - width) / 2)
    return resized.reshape(new_h, new_w, -1)[top : top + height, left : left + width]


def as_pixels(array: Array, wanted: Frame, preprocess: Preprocess) -> Array | None:
    """Return a uint8 array as pixels `(n, h, w, c)`, gray if need be; None where no axis can be the channels.

    Parameters
    ----------
    array : (n, h, w), (n, h, w, c) or (n, c, h, w) uint8, c = 1 or 3
        Where both ends could be channels, `wanted.layout` decides.
    """
    if array.ndim == 3:
        return array[:, :, :, None]
    if array.ndim != 4:
        return None
    choices = ("nchw", "nhwc") if wanted.layout == "nchw" else ("nhwc", "nchw")
    for layout in choices if preprocess.layout == "auto" else (preprocess.layout,):
        pixels = np.moveaxis(array, 1, 3) if layout == "nchw" else array
        if pixels.shape[3] in (1, 3):
            # Gray before resizing, as files are read: the other order rounds differently.
            return _luminance(pixels) if wanted.gray and pixels.shape[3] == 3 else pixels
    return None


def normalize(pixels: Array, wanted: Frame, preprocess: Preprocess) -> Array:
    """Return pixels as the numbers that the graph takes, in its layout.

    Parameters
    ----------
    pixels : (n, h, w, c) uint8
        At their final size; c = 1 where the graph wants gray.
    wanted : Frame
        Channels, colour and layout of the graph.

    Returns
    -------
    (n, c, h, w) or (n, h, w, c)
        float32, or uint8 where the preset leaves pixels as they are.

    Raises
    ------
    JobError
        `mean` or `std` has neither one number nor one for each channel.
    """
    if wanted.channels == 3 and pixels.shape[3] == 1:
        pixels = np.repeat(pixels, 3, axis=3)
    if wanted.color == "bgr":
        pixels = pixels[:, :, :, ::-1]
    axis = 1 if wanted.layout == "nchw" else 3
    values = np.ascontiguousarray(np.moveaxis(pixels, 3, axis))
    recipe = PRESETS[preprocess.preset]
    scale = recipe.scale if preprocess.scale is None else preprocess.scale
    mean = _per_channel("mean", preprocess.mean, recipe.mean, wanted.channels)
    std = _per_channel("std", preprocess.std, recipe.std, wanted.channels)
    if scale == 1 and not mean.any() and (std == 1).all():
        return values
    along = tuple(-1 if k == axis else 1 for k in range(4))
    values = values.astype(np.float32)
    values /= np.float32(scale)
    values -= mean.reshape(along)
    values /= std.reshape(along)
    return values


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(value, choices, 1, 0.7)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise JobError(f"unknown --{name} '{value}'.{hint}\n  Choices: {', '.join(choices)}.")


def _graph_layout(shape: Sequence[int | str | None], otherwise: str) -> str:
    first, last = shape[1], shape[3]
    for channels in (3, 1):
        if first == channels:
            return "nchw"
        if last == channels:
            return "nhwc"
    return "nhwc" if otherwise == "nhwc" else "nchw"


def _luminance(pixels: Array) -> Array:
    """Return ITU-R 601 luminance (n, h, w, 1), in 16-bit fixed point: to the bit Pillow's `convert('L')`."""
    weights = np.array([19595, 38470, 7471], np.uint32)
    return ((pixels.astype(np.uint32) @ weights + 0x8000) >> 16).astype(np.uint8)[:, :, :, None]


def _per_channel(name: str, given: tuple[float, ...] | None, preset: tuple[float, ...], channels: int) -> Array:
    if given is None:
        values = preset if len(preset) in (1, channels) else (sum(preset) / len(preset),)
    elif len(given) in (1, channels):
        values = given
    else:
        raise JobError(
            f"--{name} has {len(given)} numbers; channels of the graph's input: {channels}.\n"
            "  Give one number, or one for each channel."
        )
    return np.array(values, np.float32)
