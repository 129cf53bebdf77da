"""Where a walk keeps the values between two steps: in memory as long as they fit, the others in temporary files.

A value of all samples is a row of chunks. What is read last is written first, as Belady's rule has it, which for a walk
is no guess: when each value is read is known beforehand. A chunk that comes back from its file is the same to the bit,
strides included, so a job gives the same bytes however little memory it had.
"""

from __future__ import annotations

import errno
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xdonnx.errors import MachineError

Chunks = Sequence[Tensor]


@dataclass
class Room:
    """What walks may hold in memory, and what they wrote instead.

    Parameters
    ----------
    limit : int, optional
        Bytes of values between two steps of a walk; None: no limit.
    spilled : int
        Bytes written to files so far.
    """

    limit: int | None = None
    spilled: int = 0


class Place:
    """One chunk of one value: a tensor, or the file that it was written to."""

    def __init__(self, tensor: Tensor, shelf: Shelf, name: str, chunk: int) -> None:
        self.name, self.chunk, self.rows = name, chunk, len(tensor) if tensor.ndim else 0
        self.bytes = tensor.numel() * tensor.element_size()
        self._tensor: Tensor | None = tensor
        self._shelf = shelf
        self._load: Callable[[], Tensor] | None = None
        self._seen: weakref.ref[Tensor] | None = None
        self._file: Path | None = None

    def get(self) -> Tensor:
        """Return the tensor: the same object as before while anyone still holds it."""
        found = self._tensor if self._tensor is not None else self._seen() if self._seen is not None else None
        if found is None:
            assert self._load is not None
            found = self._load()
            self._seen = weakref.ref(found)
        return found

    def spill(self, path: Path) -> None:
        """Write the tensor to a file and let go of it."""
        assert self._tensor is not None
        self._load, self._file = _written(self._tensor, path), path
        self._seen = weakref.ref(self._tensor)
        self._tensor = None

    def __del__(self) -> None:
        if self._tensor is not None:
            self._shelf.resident -= self.bytes
        if self._file is not None:
            self._file.unlink(missing_ok=True)


class Kept(Sequence[Tensor]):
    """A value, chunk by chunk: a sequence of tensors, each read from its file when it is asked for."""

    def __init__(self, places: Sequence[Place | None]) -> None:
        self.places = list(places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, at):  # type: ignore[no-untyped-def]  # Sequence overloads it with slices
        """Return a chunk, or for a slice those in it as another sequence."""
        if isinstance(at, slice):
            return Kept(self.places[at])
        place = self.places[at]
        assert place is not None, "the value was read for the last time"
        return place.get()

    def __iter__(self) -> Iterator[Tensor]:
        return (self[at] for at in range(len(self)))


def alike(one: Chunks, other: Chunks) -> bool:
    """Return whether two values are the same objects, chunk by chunk; reads none of them."""
    if one is other:
        return True
    if isinstance(one, Kept) and isinstance(other, Kept):
        return all(a is b for a, b in zip(one.places, other.places, strict=True))
    return all(a is b for a, b in zip(one, other, strict=True))


def lengths(chunks: Chunks) -> list[int]:
    """Return the rows of each chunk; reads none of them."""
    if isinstance(chunks, Kept):
        return [0 if place is None else place.rows for place in chunks.places]
    return [len(chunk) for chunk in chunks]


class Shelf:
    """Keeps values for a walk, at most `limit` bytes of them in memory.

    Parameters
    ----------
    limit : int, optional
        None: all stay in memory.
    reads : {value: ascending steps that read it}, optional
        What no step reads any more is written first.

    Attributes
    ----------
    resident : int
        Bytes in memory now.
    now : int
        The step that runs.
    spilled : int
        Bytes that were written so far.
    """

    def __init__(self, limit: int | None = None, reads: Mapping[str, Sequence[int]] | None = None) -> None:
        self.limit, self.reads = limit, dict(reads or {})
        self.now = self.resident = self.spilled = self._files = 0
        self._inside: dict[int, weakref.ref[Place]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def put(self, tensor: Tensor, name: str, chunk: int) -> Place:
        """Keep a chunk of a value; others, or this one, go to files where that takes more than is allowed.

        Raises
        ------
        MachineError
            The disk is full, or cannot be written to.
        """
        place = Place(_dense(tensor), self, name, chunk)
        self.resident += place.bytes
        self._inside[id(place)] = weakref.ref(place)
        if self.limit is not None and self.resident > self.limit:
            self._relieve(self.limit)
        return place

    def close(self) -> None:
        """Remove the files."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _relieve(self, limit: int) -> None:
        held = [place for ref in self._inside.values() if (place := ref()) is not None]
        self._inside = {id(place): self._inside[id(place)] for place in held}
        for place in sorted(held, key=self._next, reverse=True):
            if self.resident <= limit:
                return
            self._spill(place)

    def _next(self, place: Place) -> tuple[int, int]:
        steps = self.reads.get(place.name, ())
        at = bisect_right(steps, self.now)
        return (steps[at] if at < len(steps) else self.now), place.chunk

    def _spill(self, place: Place) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="xdonnx-spill-", ignore_cleanup_errors=True)
        path = Path(self._folder.name) / f"{self._files}.raw"
        self._files += 1
        try:
            place.spill(path)
        except OSError as error:
            path.unlink(missing_ok=True)
            full = "the disk is full" if error.errno == errno.ENOSPC else f"cannot write '{path}': {error.strerror}"
            raise MachineError(
                f"{full}: {self.spilled / 1e9:.1f} GB of activations lie in '{path.parent}' already.\n"
                "  Set TMPDIR to a folder with more space, pass more --memory, or use fewer samples: --max-shots."
            ) from error
        self._inside.pop(id(place), None)
        self.resident -= place.bytes
        self.spilled += place.bytes


def _order(tensor: Tensor) -> list[int]:
    """Return the axes from the one of the largest stride to that of the smallest."""
    strides = tensor.stride()
    return sorted(range(tensor.ndim), key=lambda axis: -strides[axis])


def _dense(tensor: Tensor) -> Tensor:
    """Return a tensor whose strides leave no gaps, which a file could not keep: sums run in the order of strides."""
    return tensor if tensor.permute(_order(tensor)).is_contiguous() else tensor.contiguous()


def _written(tensor: Tensor, path: Path) -> Callable[[], Tensor]:
    """Write a dense tensor and return what reads it again, with the same strides."""
    order = _order(tensor)
    dense = tensor.permute(order)
    shape, kind, device = tuple(dense.shape), tensor.dtype, tensor.device
    raw = dense.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    with path.open("wb") as file:
        # Written, not mapped for writing: a full disk is then an error and not a signal that ends the program.
        raw.tofile(file)
    back = [order.index(axis) for axis in range(len(order))]

    def load() -> Tensor:
        bits = torch.from_numpy(np.fromfile(path, np.uint8))
        # No byte can be viewed as nothing of another kind.
        found = (bits.view(kind) if len(bits) else torch.empty(0, dtype=kind)).reshape(shape)
        return found.to(device).permute(back)

    return load
