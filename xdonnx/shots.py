"""Files into shots: samples ready to feed to the graph, with labels, names, and a part kept back to judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from xdonnx.draw import draw
from xdonnx.errors import ShotsError
from xdonnx.events import Event, Log, ignore
from xdonnx.feeds import conform
from xdonnx.images import Preprocess
from xdonnx.rows import Numbers, Pictures, Rows, Source, image_frame, of_array, rows_of, unreadable
from xdonnx.sources import (
    ARRAY_SUFFIXES,
    FORMATS,
    assign,
    check_labels,
    like_pixels,
    list_images,
    load_arrays,
    read_labels,
    some,
)
from xdonnx.tensors import load_tensors, tensor_folders

if TYPE_CHECKING:
    # For the annotations only: reading shots must not cost the import of onnx.
    from xdonnx.model import Port

Array = NDArray[Any]

# Bytes of numbers up to which judging samples are held; beyond, they are read batch by batch.
HELD = 1 << 27
# Rows that are looked at together.
_BATCH = 64


@dataclass(frozen=True, eq=False)
class Shots:
    """Samples as the graph takes them.

    Parameters
    ----------
    inputs : dict of str to (n, ...) array
        By graph input, in its type. Axis 0 counts shots; a graph of fixed batch is fed in slices of it. Many
        judging samples are `rows.Rows`, which read what is sliced from them and nothing else.
    labels : (n,) int64, optional
        Class of each shot.
    ids : tuple of str
        Where each came from: 'cat/001.png', 'x.npz[17]'.
    classes : tuple of str, optional
        Name of each class, where folders named them.
    skipped : tuple of str
        Files left out because they cannot be read.
    """

    inputs: dict[str, Array]
    labels: Array | None
    ids: tuple[str, ...]
    classes: tuple[str, ...] | None = None
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert all(len(values) == len(self.ids) for values in self.inputs.values())
        assert self.labels is None or len(self.labels) == len(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int] | Array) -> Shots:
        """Return the shots at these places, in this order."""
        rows = np.asarray(indices, np.int64)
        return replace(
            self,
            inputs={name: _picked(values, rows) for name, values in self.inputs.items()},
            labels=None if self.labels is None else self.labels[rows],
            ids=tuple(self.ids[row] for row in rows),
        )


@dataclass(frozen=True, eq=False)
class Part:
    """What one source gave: the rows of the inputs that it fills.

    Parameters
    ----------
    where : str
        The source, for messages.
    sources : dict of str to Source
        By graph input.
    ids, labels, classes
        As of `Shots`, of all rows.
    """

    where: str
    sources: dict[str, Source]
    ids: tuple[str, ...]
    labels: Array | None = None
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class Unread:
    """All samples that were found, before any is decoded.

    Parameters
    ----------
    parts : tuple of Part
        Where they are read from.
    rows : (n,) int64
        Rows of each part that are samples: those that are not left out.
    labels, ids, classes, skipped
        As of `Shots`.
    log : Log
        Told of progress in the stage 'shots'.
    """

    parts: tuple[Part, ...]
    rows: Array
    labels: Array | None
    ids: tuple[str, ...]
    classes: tuple[str, ...] | None
    skipped: tuple[str, ...]
    log: Log = ignore

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int] | Array) -> Shots:
        """Return the samples at these places, read.

        Raises
        ------
        ShotsError
            Files that cannot be read, or numbers that are constant, not finite or of another shape.
        """
        return self._read(np.asarray(indices, np.int64), held=None)

    def stream(self, indices: Sequence[int] | Array) -> Shots:
        """Return the samples at these places, checked; where they are many they are not held, but read when used.

        Raises
        ------
        ShotsError
            As from `take`.
        """
        return self._read(np.asarray(indices, np.int64), held=HELD)

    def sample(self, most: int) -> tuple[Array, Array | None] | None:
        """Return up to `most` samples as pixels, spread evenly, and their labels; None where they are no images."""
        if len(self.parts) != 1 or len(self.parts[0].sources) != 1:
            return None
        (source,) = self.parts[0].sources.values()
        chosen: list[int] = []
        images: list[Array] = []
        for at in np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(np.int64)):
            try:
                image = source.pixels(self.rows[[at]])
            except ShotsError:
                continue  # it may be nobody's shot; where it is drawn, reading it complains
            if image is None:
                return None
            if not images or image.shape == images[0].shape:
                chosen.append(at)
                images.append(image)
        if not images:
            return None
        return np.concatenate(images), None if self.labels is None else self.labels[chosen]

    def _read(self, indices: Array, held: int | None) -> Shots:
        inputs: dict[str, Array] = {}
        for part in self.parts:
            for name, source in part.sources.items():
                values = rows_of(source, self.rows[indices], part.ids, part.where, held, self.log)
                # `Rows` quack like an array for all that judging does: length, shape, type, slices.
                inputs[name] = cast(Array, values)
        shots = Shots(
            inputs=inputs,
            labels=None if self.labels is None else self.labels[indices],
            ids=tuple(self.ids[at] for at in indices),
            classes=self.classes,
            skipped=self.skipped,
        )
        check_varied(shots, self.log, self)
        known = "" if shots.labels is None else f", {len(np.unique(shots.labels))} classes"
        self.log(Event("shots", f"{len(shots)} shots{known}", len(shots), len(shots)))
        return shots

    def beside(self, shots: Shots) -> Iterator[dict[str, Array]]:
        """Yield the samples that are not among these, a batch at a time."""
        taken = set(shots.ids)
        others = self.rows[[at for at, name in enumerate(self.ids) if name not in taken]]
        for start in range(0, len(others), _BATCH):
            rows = others[start : start + _BATCH]
            yield {name: source.read(rows) for part in self.parts for name, source in part.sources.items()}


def read_shots(
    sources: Sequence[str],
    ports: Sequence[Port],
    preprocess: Preprocess,
    *,
    labels: Path | Array | None = None,
    skip_bad: bool = False,
    log: Log = ignore,
) -> Shots:
    """Read samples into what the graph takes.

    Images, and uint8 arrays for an input that takes images, are preprocessed. Other arrays are taken as they
    are: only their type and, where `preprocess.layout` says so, their layout are adapted.

    Parameters
    ----------
    sources : sequence of str
        'PATH' for a graph of one input, or for an `.npz` with an array for each; otherwise 'NAME=PATH' for
        each.
    ports : sequence of Port
        The graph's inputs.
    preprocess : Preprocess
        How pixels become numbers.
    labels : Path or (n,) integers, optional
        A file of labels, or one for each row before any is left out; they win over those that lie with the samples.
    skip_bad : bool
        Leave out images that cannot be read, and name them in `skipped`, instead of raising.
    log : Log
        Told of progress in the stage 'shots'.

    Raises
    ------
    ShotsError
        No samples; or they are unreadable, of another shape, constant, not finite or wrongly labelled.
    JobError
        The preprocessing contradicts the graph.
    """
    found = list_shots(sources, ports, preprocess, labels=labels, skip_bad=skip_bad, log=log)
    return found.take(np.arange(len(found)))


def list_shots(
    sources: Sequence[str],
    ports: Sequence[Port],
    preprocess: Preprocess,
    *,
    labels: Path | Array | None = None,
    labelled: bool = True,
    skip_bad: bool = False,
    log: Log = ignore,
) -> Unread:
    """Find samples and their labels, as `read_shots` does, and decode none yet.

    With `skip_bad` every file is decoded once, to know what to draw from. If `labelled`, sub-folders are classes.

    Raises
    ------
    ShotsError
        No samples; or they are wrongly labelled, or arrays are of another shape or not finite.
    JobError
        The preprocessing contradicts the graph.
    """
    own = labelled and labels is None
    parts = tuple(_find(path, mine, preprocess, log, own=own) for path, mine in assign(sources, ports))
    first = parts[0]
    for part in parts[1:]:
        if len(part.ids) != len(first.ids):
            raise ShotsError(
                f"'{first.where}' holds {len(first.ids)} rows, '{part.where}' {len(part.ids)}.\n"
                "  Row i of every input makes shot i: give as many of each."
            )
    rows, skipped = np.arange(len(first.ids)), list[str]()
    for part in parts if skip_bad else ():
        bad = unreadable(part.sources.values(), part.ids, part.where, log)
        skipped += [part.ids[row] for row in bad]
        rows = np.setdiff1d(rows, list(bad))
    if not len(rows):
        raise ShotsError("no shot can be read in all of its inputs.\n  Mend the files that are named as skipped.")
    known = _labels_of(parts, labels)
    return Unread(
        parts=parts,
        rows=rows,
        labels=None if known is None else known[rows],
        ids=tuple(first.ids[row] for row in rows),
        classes=next((part.classes for part in parts if part.classes), None),
        skipped=tuple(skipped),
        log=log,
    )


def split(
    shots: Shots | Unread,
    *,
    per_class: int | None,
    max_shots: int | None,
    holdout: float | Shots,
    seed: int,
    stream: bool = False,
) -> tuple[Shots, Shots]:
    """Split shots into those that fit and those that judge; of those unread, only these are decoded.

    Parameters
    ----------
    shots : Shots or Unread
        All there are.
    per_class, max_shots, seed
        As of `draw.draw`.
    holdout : float in [0, 1) or Shots
        As of `draw.draw`; or the very shots that judge.
    stream : bool
        Whether those that fit, too, are read when used where they are many; for callers that only look at them.

    Returns
    -------
    fit, held_out : Shots
        Both in the order of the shots.

    Raises
    ------
    ShotsError
        A class, or all together, has fewer shots than asked for; or those drawn cannot be read.
    JobError
        Numbers that make no sense.
    """
    others = holdout if isinstance(holdout, Shots) else None
    fraction = None if isinstance(holdout, Shots) else holdout
    drawn, held = draw(shots, per_class=per_class, max_shots=max_shots, holdout=fraction, seed=seed)
    if others is not None and not len(others):
        raise ShotsError("the shots to hold out are none.\n  Give --holdout a path that holds some.")
    if others is None:
        drawn, held = (drawn, held) if fraction == 0 else (np.setdiff1d(drawn, held), held)
    fit = shots.stream(drawn) if stream and isinstance(shots, Unread) else shots.take(drawn)
    if others is not None or fraction == 0:
        return fit, others or fit
    return fit, shots.stream(held) if isinstance(shots, Unread) else shots.take(held)


def _find(path: Path, ports: tuple[Port, ...], preprocess: Preprocess, log: Log, *, own: bool) -> Part:
    """Return what one source gives; `own`: with the labels that lie there."""
    if not path.exists():
        raise ShotsError(f"no shots at '{path}'.\n  Give {FORMATS}.")
    if path.suffix.lower() in ARRAY_SUFFIXES and path.is_file():
        return _find_arrays(path, ports, preprocess, log)
    if folders := tensor_folders(path):
        arrays, ids = load_tensors(path, folders, [port.name for port in ports])
        sources: dict[str, Source] = {
            port.name: Numbers(_tested(arrays[port.name], port, preprocess, path)) for port in ports
        }
        return Part(str(path), sources, ids)
    if len(ports) > 1:
        names = [port.name for port in ports]
        raise ShotsError(
            f"the graph has {len(ports)} inputs, {some(names)}, and '{path}' fills one.\n"
            f"  Give --shots {names[0]}=PATH and so on for each, or an .npz with an array for each."
        )
    (port,) = ports
    wanted = image_frame(port, preprocess)
    listing = list_images(path, numbered=own)
    if listing.ignored:
        log(Event("shots", f"'{path}': left aside {some(listing.ignored)}, no images by their names"))
    if own and listing.classes and len(listing.classes) == 1:
        inner = path / listing.classes[0]
        text = f"'{path}' holds one sub-folder of images, so all of them are class 0; if it is no class, pass '{inner}'"
        log(Event("shots", text, level="warning"))
    if listing.empty:
        text = f"'{path}': {some(listing.empty)} is counted as a class and empty: remove it if it is none"
        log(Event("shots", text, level="warning"))
    source = Pictures(listing, port, wanted, preprocess, str(path))
    return Part(str(path), {port.name: source}, listing.ids, listing.labels, listing.classes)


def _find_arrays(path: Path, ports: tuple[Port, ...], preprocess: Preprocess, log: Log) -> Part:
    names = [port.name for port in ports]
    arrays, others = load_arrays(path, {*names, "images", "labels"})
    labels = None if "labels" in names else arrays.pop("labels", None)
    if len(ports) == 1 and names[0] not in arrays:
        sole = arrays.pop("", arrays.pop("images", None))
        arrays |= {} if sole is None else {names[0]: sole}
    if missing := [name for name in names if name not in arrays]:
        keys = [*arrays, *(() if labels is None else ("labels",)), *others]
        held = f"has the keys {some(keys)}" if any(keys) else "holds one array without a name"
        also = " or 'images'" if len(ports) == 1 else ""
        raise ShotsError(
            f"'{path}' {held}; wanted and not there: {some(missing)}{also}.\n"
            "  Save an .npz with an array for each graph input under its name, and 'labels' if known."
        )
    if others:
        text = f"'{path}': left aside {some(others)}" + ("" if labels is not None else "; labels belong under 'labels'")
        log(Event("shots", text, level="info" if labels is not None else "warning"))
    if preprocess.preset != "raw" and any(like_pixels(arrays[name]) for name in names):
        text = f"'{path}': floats up to 255 are taken as they are. Save pixels as uint8, and the preset scales them."
        log(Event("shots", text, level="warning"))
    values = {port.name: of_array(arrays[port.name], port, preprocess, str(path)) for port in ports}
    counts = {name: len(rows) for name, rows in values.items()}
    if len(set(counts.values())) > 1:
        raise ShotsError(f"the arrays of '{path}' have different numbers of rows: {counts}.\n  Axis 0 counts shots.")
    count = counts[names[0]]
    if labels is not None:
        labels = check_labels(labels, count, f"'{path}'")
    return Part(str(path), values, tuple(f"{path.name}[{row}]" for row in range(count)), labels)


def _tested(array: Array, port: Port, preprocess: Preprocess, path: Path) -> Array:
    """Return test data as the input takes it. It is what the graph was tested on, so it is never preprocessed."""
    if array.dtype == np.uint8 and array.ndim == 4 and "float" in port.dtype:
        raise ShotsError(
            f"input '{port.name}' takes {port.dtype}; the test data of '{path}' is uint8 {array.shape}.\n"
            "  It is fed as it is: save it as the graph takes it, or pixels as .npz to have them preprocessed."
        )
    return conform(array, port, preprocess.layout, str(path))


def _labels_of(parts: Sequence[Part], given: Path | Array | None) -> Array | None:
    if given is not None:
        ids = parts[0].ids
        return read_labels(given, ids) if isinstance(given, Path) else check_labels(given, len(ids), "labels")
    known = [(part.where, part.labels) for part in parts if part.labels is not None]
    for where, classes in known[1:]:
        if not np.array_equal(classes, known[0][1]):
            raise ShotsError(
                f"'{known[0][0]}' and '{where}' label the same rows differently.\n"
                "  Put the rows in one order, or pass --labels."
            )
    return known[0][1] if known else None


def check_varied(shots: Shots, log: Log, among: Unread | None = None) -> None:
    """Refuse shots in which nothing varies, unless those varies that they were drawn from; warn of equal rows."""
    values = list(shots.inputs.values())
    if all(rows.size > 1 and _all_equal(rows, rows[:1].flat[0]) for rows in values):
        constants = {name: rows[:1].flat[0] for name, rows in shots.inputs.items()}
        others = among.beside(shots) if among else ()
        if all((rows == constants[name]).all() for batch in others for name, rows in batch.items()):
            raise ShotsError(
                f"all values of all {len(shots)} shots are {values[0][:1].flat[0]}: constant data shows nothing.\n"
                "  Check how the samples were written, and the preset."
            )
    if len(shots) > 1 and all(_all_equal(rows, rows[:1]) for rows in values):
        log(Event("shots", f"all {len(shots)} shots are the same one", level="warning"))


def _all_equal(rows: Array, value: Any) -> bool:
    return all((rows[start : start + _BATCH] == value).all() for start in range(0, len(rows), _BATCH))


def _picked(values: Array, rows: Array) -> Array:
    return cast(Array, values.pick(rows)) if isinstance(values, Rows) else values[rows]
