"""Samples that Python holds, an array, a dictionary of them, or what yields batches, into shots."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from xdonnx.errors import ShotsError
from xdonnx.events import Event, Log, ignore
from xdonnx.feeds import conform, wants
from xdonnx.images import Preprocess
from xdonnx.shots import Shots, check_varied, fill
from xdonnx.sources import check_labels, some

if TYPE_CHECKING:
    # For the annotations only: reading shots must not cost the import of onnx.
    from xdonnx.model import Port

Array = NDArray[Any]
Held: TypeAlias = Shots | Mapping[str, Any] | Iterable[Any]

# An endless loader has to end somewhere, and 50,000 photographs must not fill the memory.
MOST_ROWS, MOST_BYTES = 50_000, 1 << 30
_LABELS = ("labels", "label")


@dataclass(frozen=True)
class _Batch:
    """Rows of every input as they were given, and their classes where they came along."""

    arrays: dict[str, Array]
    labels: Array | None


def gather(
    held: Held,
    ports: Sequence[Port],
    preprocess: Preprocess,
    *,
    labels: Any = None,
    most: int | None = None,
    log: Log = ignore,
) -> Shots:
    """Return samples that Python holds as the graph takes them.

    uint8 arrays and Pillow images, for an input that takes images, are preprocessed; floating arrays are taken as
    they are, so a loader's transforms stay in force.

    Parameters
    ----------
    held : Shots, array, dict, tuple or iterable
        A whole array of shape (n, ...); a dictionary of one for each input, and of 'labels'; a tuple of one for each
        input, with the labels last; or an iterable of batches, or of single samples, in any of these forms.
    ports : sequence of Port
        The graph's inputs.
    preprocess : Preprocess
        How pixels become numbers.
    labels : (n,) integers, optional
        Win over those that come with the samples.
    most : int, optional
        How many samples to take of an iterable, which is not asked for more. Default: 50,000 or one GiB, with a
        warning where that is not all.
    log : Log
        Told of progress in the stage 'shots'.

    Raises
    ------
    ShotsError
        No samples; or they are of another shape, constant, not finite or wrongly labelled.
    """
    what = described(held)
    if isinstance(held, Shots):
        found = _conformed(held, ports, preprocess, what)
    else:
        batches = _batches(held, ports, most, what, log)
        pieces = [_filled(batch, ports, preprocess, what) for batch in batches]
        if not pieces:
            raise ShotsError(f"{what} yields no samples.\n  A generator that was read before is empty: make it anew.")
        found = _joined(pieces, what)
    if labels is not None:
        found = replace(found, labels=check_labels(as_array(labels), len(found), "labels"), classes=None)
    check_varied(found, log)
    known = "" if found.labels is None else f", {len(np.unique(found.labels))} classes"
    log(Event("shots", f"{len(found)} shots{known}", len(found), len(found)))
    return found


def described(held: object) -> str:
    """Return what samples are called in messages and reports: 'DataLoader in memory'."""
    return f"{type(held).__name__} in memory"


def as_array(value: Any) -> Array:
    """Return the numbers of an array, a tensor on any device, or a list."""
    # Torch's tensors, without importing torch: numpy cannot see those that have a gradient or lie on a GPU.
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if "bfloat16" in str(value.dtype):
            value = value.float()
    try:
        found = np.asarray(value)
    except ValueError as error:
        raise ShotsError(f"{type(value).__name__} is no array: {error}.\n  Give samples of one shape.") from error
    if found.dtype.kind not in "biuf":
        what = f"{type(value).__name__} of {found.dtype}"
        raise ShotsError(f"{what} holds no numbers.\n  Give arrays, tensors or images, or a path as text.")
    return found


def _batches(held: Any, ports: Sequence[Port], most: int | None, what: str, log: Log) -> Iterator[_Batch]:
    """Yield what an iterable gives until that is enough; whole arrays are one batch."""
    if isinstance(held, (Mapping, tuple)) or hasattr(held, "__array__"):
        yield _batch(held, ports, what, whole=True)
        return
    if not isinstance(held, Iterable) and hasattr(held, "__getitem__") and hasattr(held, "__len__"):
        # Torch's datasets can be indexed and no more.
        held = map(held.__getitem__, range(len(held)))
    if not isinstance(held, Iterable):
        raise ShotsError(f"{what} holds no samples.\n  Give arrays, a dictionary of them, a loader, or a path.")
    rows = size = 0
    for item in held:
        batch = _batch(item, ports, what, whole=False)
        count = len(next(iter(batch.arrays.values())))
        room = (most or MOST_ROWS) - rows
        yield batch if count <= room else _first(batch, room)
        rows += min(count, room)
        size += sum(array.nbytes for array in batch.arrays.values())
        log(Event("shots", "", rows, most or 0))
        if rows >= (most or MOST_ROWS):
            break
        if size >= MOST_BYTES:
            break
    else:
        return
    if most is None or rows < most:
        text = f"{what}: its first {rows} samples are taken; max_shots says how many to take instead"
        log(Event("shots", text, level="warning"))


def _batch(item: Any, ports: Sequence[Port], what: str, *, whole: bool) -> _Batch:
    """Return one thing that was yielded, by input, each with the axis that counts samples."""
    parts, labels = _named(item, ports, what)
    alone = not whole and labels is not None and np.ndim(labels) == 0
    arrays: dict[str, Array] = {}
    for port in ports:
        value = parts[port.name]
        picture = hasattr(value, "getbands")
        array = _pixels(value) if picture else as_array(value)
        if not array.ndim:
            raise ShotsError(f"{what} gives single numbers for input '{port.name}'.\n  Give arrays of samples.")
        # Without a label to tell, a sample of one axis less than the input is a single one.
        single = picture or alone or (labels is None and _lacks_an_axis(array, port, whole=whole))
        arrays[port.name] = array[None] if single else array
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise ShotsError(f"the inputs of {what} have different numbers of rows: {counts}.\n  Axis 0 counts shots.")
    if labels is None:
        return _Batch(arrays, None)
    return _Batch(arrays, check_labels(np.atleast_1d(as_array(labels)), next(iter(counts.values())), what))


def _named(item: Any, ports: Sequence[Port], what: str) -> tuple[dict[str, Any], Any]:
    """Return {input: value} and the labels, whichever of the forms an item has."""
    names = [port.name for port in ports]
    if isinstance(item, Mapping):
        parts = dict(item)
        keys = [key for key in _LABELS if key in parts and key not in names]
        found = [parts.pop(key) for key in keys]
        if len(names) == 1 and names[0] not in parts and ("images" in parts or len(parts) == 1):
            parts = {names[0]: parts.get("images", next(iter(parts.values())))}
        if missing := [name for name in names if name not in parts]:
            held = some(tuple(map(str, item)))
            raise ShotsError(f"{what} has the keys {held}; wanted and not there: {some(missing)}.")
        return parts, found[0] if found else None
    if not isinstance(item, (tuple, list)) or (isinstance(item, list) and len(names) == 1 and _numbers(item)):
        item = (item,)
    if len(item) not in (len(names), len(names) + 1):
        raise ShotsError(
            f"{what} gives {len(item)} things at once; the graph has the inputs {some(names)}.\n"
            "  Give one for each, and the labels last where they are known."
        )
    labels = item[len(names)] if len(item) > len(names) else None
    return dict(zip(names, item, strict=False)), labels


def _numbers(item: list[Any]) -> bool:
    """Whether a list is one array written out, rather than what a loader made of (x, y)."""
    return not any(hasattr(part, "__array__") or hasattr(part, "getbands") for part in item)


def _lacks_an_axis(array: Array, port: Port, *, whole: bool) -> bool:
    if whole or port.shape is None or array.ndim != len(port.shape) - 1:
        return False
    if array.ndim != 3 or array.dtype != np.uint8:
        return True
    # Pixels (n, h, w) are several gray images, even three of them where the graph takes one channel.
    first = (1,) if 1 in (port.shape[1], port.shape[3]) else (1, 3)
    return array.shape[0] in first or array.shape[2] in (1, 3)


def _pixels(image: Any) -> Array:
    """Return the pixels of a Pillow image, (h, w) or (h, w, 3)."""
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        raise ShotsError(f"an image of mode '{image.mode}' has no 8 bits a channel.\n  Convert it: .convert('RGB').")
    # Straight to RGB, Pillow warns of palettes with transparency.
    upright = image.convert("RGBA") if image.mode == "P" else image
    return np.asarray(upright.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))


def _first(batch: _Batch, count: int) -> _Batch:
    labels = None if batch.labels is None else batch.labels[:count]
    return _Batch({name: array[:count] for name, array in batch.arrays.items()}, labels)


def _filled(batch: _Batch, ports: Sequence[Port], preprocess: Preprocess, what: str) -> _Batch:
    """Preprocess batch by batch, so that the pixels of all are never held at once."""
    return replace(batch, arrays={port.name: fill(batch.arrays[port.name], port, preprocess, what) for port in ports})


def _joined(pieces: Sequence[_Batch], what: str) -> Shots:
    labels = [piece.labels for piece in pieces if piece.labels is not None]
    if labels and len(labels) < len(pieces):
        raise ShotsError(f"{what} labels some of its batches and not others.\n  Give labels to all or to none.")
    inputs: dict[str, Array] = {}
    for name in pieces[0].arrays:
        arrays = [piece.arrays[name] for piece in pieces]
        sizes = {array.shape[1:] for array in arrays}
        if len(sizes) > 1:
            shapes = " and ".join(str(size) for size in itertools.islice(sizes, 2))
            raise ShotsError(
                f"the samples of {what} differ in size: {shapes}.\n  Give preset options resize and crop, or one size."
            )
        inputs[name] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    count = len(next(iter(inputs.values())))
    return Shots(inputs, np.concatenate(labels) if labels else None, tuple(f"sample {row}" for row in range(count)))


def _conformed(shots: Shots, ports: Sequence[Port], preprocess: Preprocess, what: str) -> Shots:
    """Return shots that were read before, for this graph: its inputs, in its types."""
    if set(shots.inputs) != {port.name for port in ports}:
        wanted = ", ".join(f"'{port.name}' {wants(port)}" for port in ports)
        raise ShotsError(f"{what} fill {some(shots.inputs)}; the graph takes {wanted}.\n  Read them for this graph.")
    if not len(shots):
        raise ShotsError(f"{what} are none.\n  Give at least one sample.")
    fitting = {port.name: conform(shots.inputs[port.name], port, preprocess.layout, what) for port in ports}
    return replace(shots, inputs=fitting)
