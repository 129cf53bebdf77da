"""The rows of one graph input, read when they are asked for: decoding waits for the draw, and need not be kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from xdonnx.errors import ShotsError
from xdonnx.events import Event, Log, ignore
from xdonnx.feeds import cast, check_shape, conform, wants
from xdonnx.images import Frame, Preprocess, as_pixels, fit, frame, normalize, open_image
from xdonnx.sources import Listing

if TYPE_CHECKING:
    # For the annotations only: reading shots must not cost the import of onnx.
    from xdonnx.model import Port

Array = NDArray[Any]

# Bytes of decoded pixels that are kept for the next reading; files beyond are decoded anew each time.
KEPT = 1 << 29
# Images that are normalized at once: the numbers of a batch are held twice over.
_BATCH = 64
# Progress is told so often in one pass: a bar needs no more, and a call for each of 50,000 files costs seconds.
_TICKS = 200
# Unreadable files that one message names.
_NAMED = 5


class Source(Protocol):
    """All rows of one input, none of them read yet."""

    def __len__(self) -> int: ...

    def check(self, rows: Array, log: Log) -> dict[int, str]:
        """Return {row: reason} of those that cannot be read."""

    def read(self, rows: Array) -> Array:
        """Return these rows as the graph takes them."""

    def pixels(self, rows: Array) -> Array | None:
        """Return these rows as images (n, h, w, c) uint8 at their final size; None where they are no images."""

    def forget(self) -> None:
        """Keep nothing of what was decoded."""


@dataclass(frozen=True, eq=False)
class Numbers:
    """Rows of an array that are taken as they are."""

    values: Array

    def __len__(self) -> int:
        return len(self.values)

    def check(self, rows: Array, log: Log) -> dict[int, str]:
        """Return nothing: the array was checked as a whole."""
        return {}

    def read(self, rows: Array) -> Array:
        """Return these rows."""
        return np.asarray(self.values[rows])

    def pixels(self, rows: Array) -> Array | None:
        """Return None: numbers that are taken as they are have no preprocessing."""
        return None

    def forget(self) -> None:
        """Keep the array: it is the only copy."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """Images that lie in one uint8 array, (n, h, w, c)."""

    images: Array
    port: Port
    wanted: Frame
    preprocess: Preprocess
    where: str

    def __len__(self) -> int:
        return len(self.images)

    def check(self, rows: Array, log: Log) -> dict[int, str]:
        """Return nothing: all images of an array are alike."""
        return {}

    def read(self, rows: Array) -> Array:
        """Return these rows as the graph takes them."""
        return _normalized(self, rows)

    def pixels(self, rows: Array) -> Array:
        """Return these images at their final size."""
        try:
            if fit(self.images[0], self.wanted, self.preprocess) is self.images[0]:
                return np.asarray(self.images[rows])
            return np.stack([fit(self.images[row], self.wanted, self.preprocess) for row in rows])
        except ShotsError as error:
            raise ShotsError(f"the images of '{self.where}' cannot be used: {error}.") from error

    def forget(self) -> None:
        """Keep the array: it is the only copy."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Image files.

    Parameters
    ----------
    kept : dict of int to (h, w, c) uint8
        What was decoded lately, up to `KEPT` bytes of it.
    """

    listing: Listing
    port: Port
    wanted: Frame
    preprocess: Preprocess
    where: str
    kept: dict[int, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.listing.paths)

    def check(self, rows: Array, log: Log) -> dict[int, str]:
        """Decode all of these rows once, keep what there is room for, and return why those that fail do.

        Raises
        ------
        ShotsError
            The images differ in size and the graph gives none.
        """
        bad: dict[int, str] = {}
        held = sum(image.nbytes for image in self.kept.values())
        first: tuple[int, tuple[int, ...]] | None = None
        step = max(1, len(rows) // _TICKS)
        for done, row in enumerate(map(int, rows), 1):
            try:
                image = self._image(row)
            except ShotsError as error:
                bad[row] = str(error)
            else:
                first = first or (row, image.shape)
                if image.shape != first[1]:
                    raise ShotsError(self._odd(first, (row, image.shape)))
                if row not in self.kept and held + image.nbytes <= KEPT:
                    # A crop would keep the whole image alive.
                    self.kept[row] = np.ascontiguousarray(image)
                    held += image.nbytes
            if done % step == 0 or done == len(rows):
                log(Event("shots", "", done, len(rows)))
        return bad

    def read(self, rows: Array) -> Array:
        """Return these rows as the graph takes them."""
        return _normalized(self, rows)

    def pixels(self, rows: Array) -> Array:
        """Return these images at their final size; raises ShotsError, with the name, for one that is unreadable."""
        images = []
        for row in map(int, rows):
            try:
                images.append(self._image(row))
            except ShotsError as error:
                text = f"'{self.listing.ids[row]}' of '{self.where}' cannot be used: {error}"
                raise ShotsError(f"{text}.\n  Mend or remove it.") from error
        return np.stack(images)

    def forget(self) -> None:
        """Keep nothing of what was decoded."""
        self.kept.clear()

    def _image(self, row: int) -> Array:
        known = self.kept.get(row)
        if known is not None:
            return known
        return fit(open_image(self.listing.paths[row], gray=self.wanted.gray), self.wanted, self.preprocess)

    def _odd(self, *two: tuple[int, tuple[int, ...]]) -> str:
        sizes = [f"'{self.listing.ids[row]}' is {shape[0]} x {shape[1]}" for row, shape in two]
        return (
            f"the images of '{self.where}' differ in size: {', '.join(sizes)}.\n"
            f"  Input '{self.port.name}' wants {wants(self.port)}, so give the size: --resize or --crop."
        )


@dataclass(frozen=True, eq=False)
class Rows:
    """An array of samples too large to hold: reads and normalizes what is asked of it, whenever it is asked.

    Parameters
    ----------
    source : Source
    places : (n,) int64
        Rows of the source.
    shape : tuple of int
        Of the whole, (n, ...).
    dtype : numpy.dtype
    """

    source: Source
    places: Array
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: Any) -> Array:
        """Read one sample, a slice of them, or those at an array of places."""
        rows = self.places[key]
        if np.ndim(rows) == 0:
            return np.asarray(self.source.read(np.array([rows]))[0])
        return self.source.read(rows) if len(rows) else np.empty((0, *self.shape[1:]), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """Read everything."""
        return np.asarray(self[:], dtype)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Numbers in all."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the whole would take."""
        return self.size * self.dtype.itemsize

    def pick(self, rows: Array) -> Rows:
        """Return the samples at these places, none of them read."""
        return Rows(self.source, self.places[rows], (len(rows), *self.shape[1:]), self.dtype)


def of_array(array: Array, port: Port, preprocess: Preprocess, where: str) -> Source:
    """Return the rows of an array for an input: uint8 images to be preprocessed, anything else checked and cast.

    Raises
    ------
    ShotsError
        No rows, or of another shape or type than the input takes.
    """
    if array.ndim == 0 or not len(array):
        raise ShotsError(f"'{where}' holds no rows for input '{port.name}'.\n  Axis 0 counts shots.")
    wanted = frame(port, preprocess) if array.dtype == np.uint8 else None
    if wanted is None:
        return Numbers(conform(array, port, preprocess.layout, where))
    pixels = as_pixels(array, wanted, preprocess)
    if pixels is None:
        raise ShotsError(
            f"input '{port.name}' wants {wants(port)}; '{where}' holds uint8 {array.shape}.\n"
            "  Images are (n, h, w), (n, h, w, c) or (n, c, h, w) with c = 1 or 3."
        )
    source = Pixels(pixels, port, wanted, preprocess, where)
    source.read(np.arange(1))  # so that what contradicts the graph shows now
    return source


def image_frame(port: Port, preprocess: Preprocess) -> Frame:
    """Return what an input wants of images; raises ShotsError where images cannot fill it."""
    wanted = frame(port, preprocess)
    if wanted is None:
        raise ShotsError(
            f"input '{port.name}' wants {wants(port)}, which images cannot fill.\n"
            f"  Give an .npz with an array '{port.name}' of that shape, or an .npy."
        )
    return wanted


def rows_of(
    source: Source, rows: Array, ids: Sequence[str], where: str, held: int | None = None, log: Log = ignore
) -> Array | Rows:
    """Return these rows of a source, each of them checked.

    Parameters
    ----------
    ids : sequence of str
        Names of all rows of the source.
    where : str
        The source, for messages.
    held : int, optional
        Bytes beyond which the rows are not held but read when used. Default: always held.

    Raises
    ------
    ShotsError
        Rows that cannot be read or that the graph does not take.
    """
    if bad := source.check(rows, log):
        raise _unusable(bad, ids, len(rows), where)
    one = source.read(rows[:1])
    lazy = Rows(source, rows, (len(rows), *one.shape[1:]), one.dtype)
    if held is not None and lazy.nbytes > held:
        return lazy
    values = source.read(rows)
    source.forget()
    return values


def unreadable(sources: Iterable[Source], ids: Sequence[str], where: str, log: Log) -> dict[int, str]:
    """Return {row: reason} of all rows that cannot be read, and warn of each; raises ShotsError where none can."""
    bad: dict[int, str] = {}
    for source in sources:
        bad |= source.check(np.arange(len(source)), log)
    if len(bad) == len(ids):
        raise _unusable(bad, ids, len(ids), where)
    if bad:
        text = f"left out {len(bad)} of {len(ids)} images: {_reasons(bad, ids)}"
        log(Event("shots", text, len(ids), len(ids), "warning"))
        for row in list(bad)[_NAMED:]:
            log(Event("shots", f"left out, unreadable: '{ids[row]}' ({bad[row]})", level="warning"))
    return bad


def _reasons(bad: Mapping[int, str], ids: Sequence[str]) -> str:
    named = [f"'{ids[row]}' ({reason})" for row, reason in list(bad.items())[:_NAMED]]
    return f"{'; '.join(named)}{f'; and {len(bad) - _NAMED} more' if len(bad) > _NAMED else ''}"


def _unusable(bad: Mapping[int, str], ids: Sequence[str], total: int, where: str) -> ShotsError:
    way = "Mend or remove them" + (", or pass --skip-bad to leave them out." if len(bad) < total else ".")
    return ShotsError(f"{len(bad)} of {total} images of '{where}' cannot be used: {_reasons(bad, ids)}.\n  {way}")


def _normalized(source: Pixels | Pictures, rows: Array) -> Array:
    """Return images as numbers, a batch at a time: only the result is held as a whole."""
    found: Array | None = None
    for start in range(0, len(rows), _BATCH):
        pixels = source.pixels(rows[start : start + _BATCH])
        values = cast(normalize(pixels, source.wanted, source.preprocess), source.port, source.where)
        if found is None:
            check_shape((len(source), *values.shape[1:]), source.port, source.where)
            if len(values) == len(rows):
                return values
            found = np.empty((len(rows), *values.shape[1:]), values.dtype)
        found[start : start + len(values)] = values
    assert found is not None, "no rows were asked for"
    return found
