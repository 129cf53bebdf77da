"""Arrays into what a graph input takes: shape, layout, type; and the messages where they do not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xdonnx.errors import ShotsError

if TYPE_CHECKING:
    # For the annotations only: reading shots must not cost the import of onnx.
    from xdonnx.model import Port

Array = NDArray[Any]

_TO_FIRST, _TO_LAST = (0, 3, 1, 2), (0, 2, 3, 1)


def wants(port: Port) -> str:
    """Return the shape that this input takes, for messages: `(N, 3, 224, 224)`."""
    if port.shape is None:
        return "any shape"
    sizes = ["N", *("?" if size is None else str(size) for size in port.shape[1:])]
    return f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"


def conform(array: Array, port: Port, layout: str, where: str) -> Array:
    """Return an array of numbers as the input takes it.

    Parameters
    ----------
    array : (n, ...)
        Taken as it is, but for its type and the place of its channels.
    port : Port
        Axis 0 counts rows and may differ; every size that the graph fixes must be met.
    layout : {'auto', 'nchw', 'nhwc'}
        Where the array has its channels; 'auto': where the graph has them. What fits is never turned.
    where : str
        The file, for messages.

    Raises
    ------
    ShotsError
        Another rank or size, numbers that the type cannot hold, or that are not finite.
    """
    if array.ndim == 4 and not _fits(array.shape, port):
        turned = array.transpose(_TO_FIRST if layout == "nhwc" else _TO_LAST)
        if layout != "auto" and _fits(turned.shape, port):
            array = np.ascontiguousarray(turned)
    check_shape(array.shape, port, where)
    if array.ndim == 4 and array.dtype.kind in "iu" and array.dtype != np.uint8 and "float" in port.dtype:
        # Pixels that lost their type would be fed without preprocessing, and nobody would know.
        raise ShotsError(
            f"input '{port.name}' takes {port.dtype}; '{where}' holds {array.dtype} {array.shape}.\n"
            "  Save images as uint8 to have them preprocessed, or as float32 if they are already."
        )
    return cast(array, port, where)


def check_shape(shape: tuple[int, ...], port: Port, where: str) -> None:
    """Raise `ShotsError`, with a guess at the cause, where the shape is not what the input takes."""
    if _fits(shape, port):
        return
    hint = "Write or resize the samples to that shape."
    if len(shape) == 4 and _fits(tuple(shape[k] for k in _TO_FIRST), port):
        hint = "Channels look last: pass --layout nhwc."
    elif len(shape) == 4 and _fits(tuple(shape[k] for k in _TO_LAST), port):
        hint = "Channels look first: pass --layout nchw."
    elif _fits((1, *shape), port):
        hint = "That looks like one sample: save it with an axis in front, x[None]."
    elif port.shape is not None and len(shape) == len(port.shape) - 1 == 3:
        hint = "The axis of channels looks missing: save x[:, None] or x[..., None]."
    raise ShotsError(f"input '{port.name}' wants {wants(port)}; '{where}' holds {shape}.\n  {hint}")


def cast(array: Array, port: Port, where: str) -> Array:
    """Return the array in the input's type.

    Floating numbers are rounded to it; integers and booleans must come through unchanged.

    Raises
    ------
    ShotsError
        The array holds no numbers, numbers that are not finite, or numbers that the type cannot hold.
    """
    try:
        dtype = np.dtype(port.dtype)
    except TypeError:
        dtype = np.dtype(object)
    if dtype.kind in "OSU":
        raise ShotsError(
            f"input '{port.name}' takes {port.dtype}, and shots are tensors of numbers.\n"
            "  Cut the graph behind that input, or make it a constant."
        )
    if array.dtype.kind not in "biuf":
        raise ShotsError(
            f"'{where}' holds {array.dtype} for input '{port.name}', which takes {port.dtype}.\n  Save plain numbers."
        )
    _check_finite(array, where, "is not finite (NaN or infinity)", "Repair or remove it.")
    if dtype.kind in "biu":
        with np.errstate(invalid="ignore"):
            whole = array.astype(dtype, copy=False)
        if not np.array_equal(whole, array):
            pixels = port.dtype == "uint8"
            cure = "Where the graph normalizes its pixels pass --preset raw." if pixels else "Save integers."
            raise ShotsError(
                f"input '{port.name}' takes {port.dtype}, which cannot hold the numbers of '{where}' "
                f"({array.min():g} to {array.max():g}, {array.dtype}).\n  {cure}"
            )
        return whole
    with np.errstate(over="ignore"):
        rounded = array.astype(dtype, copy=False)
    _check_finite(rounded, where, f"is too large for {port.dtype}", "Scale it, or check --preset.")
    return rounded


def _fits(shape: tuple[int, ...], port: Port) -> bool:
    if port.shape is None:
        return True
    sizes = zip(port.shape[1:], shape[1:], strict=False)
    return len(shape) == len(port.shape) and all(not isinstance(a, int) or a == b for a, b in sizes)


def _check_finite(array: Array, where: str, complaint: str, cure: str) -> None:
    bad = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(1))
    if len(bad):
        raise ShotsError(f"row {bad[0]} of '{where}' {complaint}; {len(bad)} of {len(array)} are.\n  {cure}")
