"""Samples that Python holds: an array, a dictionary of them, or what yields batches, ready to be drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from xdonnx.errors import ShotsError
from xdonnx.events import Event, Log, ignore
from xdonnx.feeds import conform, wants
from xdonnx.images import Preprocess, upright
from xdonnx.rows import Numbers, Pixels, Source, of_array
from xdonnx.shots import Part, Shots, Unread, check_varied
from xdonnx.sources import check_labels, some

if TYPE_CHECKING:
    # For the annotations only: reading shots must not cost the import of onnx.
    from xdonnx.model import Port

Array = NDArray[Any]
Held: TypeAlias = Shots | Mapping[str, Any] | Iterable[Any]

# An endless loader has to end somewhere, and 50,000 photographs must not fill the memory.
MOST_ROWS, MOST_BYTES = 50_000, 1 << 30
# Progress is told so often in one pass.
_TICKS = 200
_LABELS = ("labels", "label")


@dataclass(frozen=True)
class _Batch:
    """Rows of every input as they were given, and their classes where they came along."""

    arrays: dict[str, Array]
    labels: Array | None

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def first(self, count: int) -> _Batch:
        labels = None if self.labels is None else self.labels[:count]
        return _Batch({name: array[:count] for name, array in self.arrays.items()}, labels)


@dataclass(frozen=True)
class _Piece:
    """What one item gave: its place among the items, its rows as they will be read, and their classes."""

    place: int
    sources: dict[str, Source]
    labels: Array | None

    def __len__(self) -> int:
        return len(next(iter(self.sources.values())))


def gather(
    held: Held,
    ports: Sequence[Port],
    preprocess: Preprocess,
    *,
    labels: Any = None,
    most: int | None = None,
    seed: int = 0,
    log: Log = ignore,
) -> Shots | Unread:
    """Return samples that Python holds, to be drawn from and read as the graph takes them.

    uint8 arrays and Pillow images, for an input that takes images, are preprocessed; floating arrays are taken as
    they are, so a loader's transforms stay in force. Pixels stay uint8 until they are used.

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
        Win over those that come with the samples, in the order in which these come.
    most : int, optional
        How many samples to take of an iterable without a length, which is not asked for more. One that has a length
        is read whole, so that the draw has all to choose from. Either ends with 50,000 samples or one GiB, with a
        warning where that is not all.
    seed : int
        Of the choice of those that are taken, where that is not all and they can be asked for by place.
    log : Log
        Told of progress in the stage 'shots'.

    Returns
    -------
    Shots or Unread
        The shots that were given, or what is still to be drawn from.

    Raises
    ------
    ShotsError
        No samples; or they are of another shape, not finite or wrongly labelled.
    """
    what = described(held)
    given = None if labels is None else as_array(labels)
    if isinstance(held, Shots):
        found = _conformed(held, ports, preprocess, what)
        if given is not None:
            found = replace(found, labels=check_labels(given, len(found), "labels"), classes=None)
        check_varied(found, log)
        return found
    # Labels that come apart are in the order of the samples, so that then is the order of reading too.
    generator = np.random.default_rng(seed) if given is None else None
    pieces, whole, names = _pieces(held, ports, preprocess, most, generator, log)
    if not pieces:
        raise ShotsError(f"{what} yields no samples.\n  A generator that was read before is empty: make it anew.")
    count = sum(map(len, pieces))
    if given is not None:
        known: Array | None = check_labels(given if whole else given[:count], count, "labels")
    else:
        known = _labels_of(pieces, what)
    joined = {port.name: _joined([piece.sources[port.name] for piece in pieces], what) for port in ports}
    ids = names(pieces)
    return Unread((Part(what, joined, ids, known),), np.arange(count), known, ids, None, (), log)


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


def _pieces(
    held: Any, ports: Sequence[Port], preprocess: Preprocess, most: int | None, generator: Any, log: Log
) -> tuple[list[_Piece], bool, Callable[[Sequence[_Piece]], tuple[str, ...]]]:
    """Read until that is enough; return what there was, whether that is all, and what names the rows."""
    what, count = described(held), _length(held)
    if isinstance(held, (Mapping, tuple)) or hasattr(held, "__array__"):
        batch = _batch(held, ports, what, whole=True)
        arrays = {port.name: of_array(batch.arrays[port.name], port, preprocess, what) for port in ports}
        return [_Piece(0, arrays, batch.labels)], True, _numbered
    placed = count is not None and (isinstance(held, Sequence) or not isinstance(held, Iterable))
    shuffled = placed and generator is not None
    if placed:
        # Torch's datasets can be indexed and no more. In random order those that are taken stand for all.
        places = generator.permutation(count) if shuffled else range(count or 0)
        items: Iterable[tuple[int, Any]] = ((int(at), held[int(at)]) for at in places)
    elif isinstance(held, Iterable):
        items = enumerate(held)
    else:
        raise ShotsError(f"{what} holds no samples.\n  Give arrays, a dictionary of them, a loader, or a path.")
    limit = max(most or 0, MOST_ROWS) if count is not None else most or MOST_ROWS
    found: list[_Piece] = []
    rows = size = 0
    step = max(1, (count or 0) // _TICKS)
    for place, item in items:
        batch = _batch(item, ports, what, whole=False).first(limit - rows)
        sources = {port.name: _fitted(batch.arrays[port.name], port, preprocess, what) for port in ports}
        found.append(_Piece(place, sources, batch.labels))
        rows += len(batch)
        size += sum(_bytes(source) for source in sources.values())
        if len(found) % step == 0:
            log(Event("shots", "", *((rows, most or 0) if count is None else (len(found), count))))
        if rows >= limit or size >= MOST_BYTES:
            break
    # Of what has no length nobody knows whether more would have come.
    whole = len(found) == count if count is not None else rows < limit and size < MOST_BYTES
    if not whole and (most is None or rows < most or count is not None):
        taken = f"{rows} of its samples, drawn at random," if shuffled else f"its first {rows} samples"
        hint = "; max_shots says how many to take instead" if most is None else ""
        log(Event("shots", f"{what}: {taken} are taken{hint}", level="warning"))
    found.sort(key=lambda piece: piece.place)
    return found, whole, _placed if shuffled and not whole else _numbered


def _length(held: Any) -> int | None:
    """Return how many items there are, None where nobody knows: a loader of a stream has a length that raises."""
    try:
        return len(held)
    except TypeError:
        return None


def _numbered(pieces: Sequence[_Piece]) -> tuple[str, ...]:
    return tuple(f"sample {row}" for row in range(sum(map(len, pieces))))


def _placed(pieces: Sequence[_Piece]) -> tuple[str, ...]:
    """Return names by the places of items, of which some were left out."""
    found: list[str] = []
    for piece in pieces:
        single = len(piece) == 1
        found += [f"sample {piece.place}" if single else f"item {piece.place}[{row}]" for row in range(len(piece))]
    return tuple(found)


def _batch(item: Any, ports: Sequence[Port], what: str, *, whole: bool) -> _Batch:
    """Return one thing that was yielded, by input, each with the axis that counts samples."""
    parts, labels = _named(item, ports, what)
    alone = not whole and labels is not None and np.ndim(labels) == 0
    arrays: dict[str, Array] = {}
    for port in ports:
        value = parts[port.name]
        picture = hasattr(value, "getbands")
        array = _pixels(value, what) if picture else as_array(value)
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


def _pixels(image: Any, what: str) -> Array:
    """Return the pixels of a Pillow image, upright, (h, w) or (h, w, 3)."""
    try:
        found = upright(image)
    except Exception as error:  # decoders let out whatever they trip over
        raise ShotsError(f"an image of {what} cannot be used: {error}.\n  Mend it or leave it out.") from error
    return np.asarray(found.convert("L" if found.mode in ("1", "L", "LA") else "RGB"))


def _fitted(array: Array, port: Port, preprocess: Preprocess, what: str) -> Source:
    """Return the rows of one item, pixels at their final size: photographs of all items are never held at once."""
    source = of_array(array, port, preprocess, what)
    if not isinstance(source, Pixels):
        return source
    return replace(source, images=source.pixels(np.arange(len(source))), preprocess=_unsized(preprocess))


def _unsized(preprocess: Preprocess) -> Preprocess:
    return replace(preprocess, resize=None, crop=None)


def _bytes(source: Source) -> int:
    values = source.images if isinstance(source, Pixels) else source.values if isinstance(source, Numbers) else None
    return 0 if values is None else values.nbytes


def _joined(sources: Sequence[Source], what: str) -> Source:
    """Return the rows of all items as one source."""
    first = sources[0]
    if len(sources) == 1:
        return first
    pixels = [source.images for source in sources if isinstance(source, Pixels)]
    if isinstance(first, Pixels) and len(pixels) == len(sources):
        if len({array.shape[3] for array in pixels}) > 1:
            pixels = [np.broadcast_to(array, (*array.shape[:3], 3)) for array in pixels]
        return replace(first, images=_concatenated(pixels, what))
    return Numbers(_concatenated([source.read(np.arange(len(source))) for source in sources], what))


def _concatenated(arrays: Sequence[Array], what: str) -> Array:
    sizes = sorted({array.shape[1:] for array in arrays})
    if len(sizes) > 1:
        shapes = " and ".join(map(str, sizes[:2]))
        raise ShotsError(
            f"the samples of {what} differ in size: {shapes}.\n  Give preset options resize and crop, or one size."
        )
    return np.concatenate(arrays)


def _labels_of(pieces: Sequence[_Piece], what: str) -> Array | None:
    labels = [piece.labels for piece in pieces if piece.labels is not None]
    if labels and len(labels) < len(pieces):
        raise ShotsError(f"{what} labels some of its batches and not others.\n  Give labels to all or to none.")
    return np.concatenate(labels) if labels else None


def _conformed(shots: Shots, ports: Sequence[Port], preprocess: Preprocess, what: str) -> Shots:
    """Return shots that were read before, for this graph: its inputs, in its types."""
    if set(shots.inputs) != {port.name for port in ports}:
        wanted = ", ".join(f"'{port.name}' {wants(port)}" for port in ports)
        raise ShotsError(f"{what} fill {some(shots.inputs)}; the graph takes {wanted}.\n  Read them for this graph.")
    if not len(shots):
        raise ShotsError(f"{what} are none.\n  Give at least one sample.")
    fitting = {port.name: conform(shots.inputs[port.name], port, preprocess.layout, what) for port in ports}
    return replace(shots, inputs=fitting)
