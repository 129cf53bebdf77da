"""Files into shots: samples ready to feed to the graph, with labels, names, and a part kept back to judge."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xdonnx.errors import JobError, ShotsError
from xdonnx.events import Event, Log, ignore
from xdonnx.feeds import cast, check_shape, conform, wants
from xdonnx.images import Frame, Preprocess, as_pixels, fit, frame, normalize, open_image
from xdonnx.sources import (
    ARRAY_SUFFIXES,
    FORMATS,
    Listing,
    assign,
    check_labels,
    list_images,
    load_arrays,
    read_labels,
    some,
)

if TYPE_CHECKING:
    # For the annotations only: reading shots must not cost the import of onnx.
    from xdonnx.model import Port

Array = NDArray[Any]

_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, eq=False)
class Shots:
    """Samples as the graph takes them.

    Parameters
    ----------
    inputs : dict of str to (n, ...) array
        By graph input, in its type. Axis 0 counts shots; a graph of fixed batch is fed in slices of it.
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
            inputs={name: values[rows] for name, values in self.inputs.items()},
            labels=None if self.labels is None else self.labels[rows],
            ids=tuple(self.ids[row] for row in rows),
        )


@dataclass(frozen=True, eq=False)
class _Part:
    """What one source gave: `kept` are the rows that could be read, of which alone `inputs` has values."""

    where: str
    inputs: dict[str, Array]
    ids: tuple[str, ...]
    kept: Array
    labels: Array | None = None
    classes: tuple[str, ...] | None = None
    skipped: tuple[str, ...] = ()


def read_shots(
    sources: Sequence[str],
    ports: Sequence[Port],
    preprocess: Preprocess,
    *,
    labels: Path | None = None,
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
    labels : Path, optional
        A file of labels, which wins over those that lie with the samples.
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
    parts = [_read(path, mine, preprocess, skip_bad=skip_bad, log=log) for path, mine in assign(sources, ports)]
    first = parts[0]
    for part in parts[1:]:
        if len(part.ids) != len(first.ids):
            raise ShotsError(
                f"'{first.where}' holds {len(first.ids)} rows, '{part.where}' {len(part.ids)}.\n"
                "  Row i of every input makes shot i: give as many of each."
            )
    kept = first.kept
    for part in parts[1:]:
        kept = np.intersect1d(kept, part.kept)
    if not len(kept):
        raise ShotsError("no shot can be read in all of its inputs.\n  Mend the files that are named as skipped.")
    whole = Shots(
        inputs={name: values[np.isin(part.kept, kept)] for part in parts for name, values in part.inputs.items()},
        labels=_labels_of(parts, labels, kept),
        ids=tuple(first.ids[row] for row in kept),
        classes=next((part.classes for part in parts if part.classes and labels is None), None),
        skipped=tuple(name for part in parts for name in part.skipped),
    )
    _check_varied(whole, log)
    known = "" if whole.labels is None else f", {len(np.unique(whole.labels))} classes"
    log(Event("shots", f"{len(whole)} shots{known}", len(whole), len(whole)))
    return whole


def split(
    shots: Shots, *, per_class: int | None, max_shots: int | None, holdout: float | Shots, seed: int
) -> tuple[Shots, Shots]:
    """Split shots into those that fit and those that judge.

    The fitting ones are drawn first. The hold-out is a fraction of all shots; it is taken from those not
    drawn (at most all of them) or, where every shot was drawn, from the drawn ones. Labelled shots are held
    out in proportion to the classes. Both parts keep the order of the shots.

    Parameters
    ----------
    shots : Shots
        All there are.
    per_class, max_shots : int, optional
        How many to draw for fitting, of each class or in all; not both.
    holdout : float in [0, 1) or Shots
        Fraction held out; at least one shot is held out and one left. 0: judge on the fitting shots. Shots:
        judge on these.
    seed : int
        Of every draw.

    Returns
    -------
    fit, held_out : Shots

    Raises
    ------
    ShotsError
        A class, or all together, has fewer shots than asked for.
    JobError
        Numbers that make no sense.
    """
    if per_class is not None and max_shots is not None:
        raise JobError("--per-class and --max-shots both say how many shots to draw.\n  Give one of them.")
    for name, number in (("per-class", per_class), ("max-shots", max_shots)):
        if number is not None and number < 1:
            raise JobError(f"--{name} {number} draws nothing.\n  Give at least 1.")
    generator = np.random.default_rng(seed)
    everything = np.arange(len(shots))
    drawn = everything
    if per_class is not None:
        drawn = _draw_per_class(shots, per_class, generator)
    elif max_shots is not None and max_shots < len(shots):
        drawn = np.sort(generator.choice(everything, max_shots, replace=False))
    if isinstance(holdout, Shots):
        if not len(holdout):
            raise ShotsError("the shots to hold out are none.\n  Give --holdout a path that holds some.")
        return shots.take(drawn), holdout
    if not 0 <= holdout < 1:
        raise JobError(f"--holdout {holdout} is not a fraction in [0, 1).\n  0.2 holds out a fifth.")
    if holdout == 0:
        return shots.take(drawn), shots.take(drawn)
    rest = np.setdiff1d(everything, drawn)
    if not len(rest) and len(drawn) < 2:
        raise ShotsError(
            f"fewer shots than the hold-out needs: {len(drawn)}, and at least 1 must fit and 1 must judge.\n"
            "  Give more shots, --holdout PATH, or --holdout 0 to judge on the shots that fit."
        )
    count = max(1, round(holdout * len(shots)))
    pool = rest if len(rest) else drawn
    held = _stratified(shots.labels, pool, min(count, len(rest) or len(drawn) - 1), generator)
    return shots.take(np.setdiff1d(drawn, held)), shots.take(held)


def unseen(held_out: Shots, fit: Shots) -> Shots:
    """Return the held-out shots that are not, to the byte, among those that fit."""

    def digests(shots: Shots) -> list[bytes]:
        rows = range(len(shots))
        return [
            b"".join(hashlib.sha256(values[row].tobytes()).digest() for values in shots.inputs.values()) for row in rows
        ]

    known = set(digests(fit))
    return held_out.take([row for row, digest in enumerate(digests(held_out)) if digest not in known])


def synthetic(ports: Sequence[Port], count: int, generator: np.random.Generator) -> Shots:
    """Invent shots: standard normal numbers, and uniform ones for an input of uint8 pixels.

    Raises
    ------
    ShotsError
        A size beyond the batch is free, or the type is neither floating nor uint8.
    JobError
        `count` is below 1.
    """
    if count < 1:
        raise JobError(f"{count} synthetic shots are none.\n  Ask for at least 1.")
    inputs: dict[str, Array] = {}
    for port in ports:
        sizes = [size for size in port.shape[1:] if isinstance(size, int)] if port.shape else []
        if port.shape is None or len(sizes) < len(port.shape) - 1:
            raise ShotsError(
                f"input '{port.name}' wants {wants(port)}, which leaves the size of synthetic shots open.\n"
                f"  Pass --input-shape {port.name}:1x3x224x224, with the sizes you need."
            )
        if port.dtype == "uint8":
            inputs[port.name] = generator.integers(0, 256, (count, *sizes), np.uint8)
        elif port.dtype in _FLOATS:
            inputs[port.name] = generator.standard_normal((count, *sizes)).astype(port.dtype)
        else:
            raise ShotsError(
                f"input '{port.name}' takes {port.dtype}, which cannot be invented.\n  Give real samples: --shots PATH."
            )
    return Shots(inputs, None, tuple(f"synthetic[{row}]" for row in range(count)))


def _read(path: Path, ports: tuple[Port, ...], preprocess: Preprocess, *, skip_bad: bool, log: Log) -> _Part:
    if not path.exists():
        raise ShotsError(f"no shots at '{path}'.\n  Give {FORMATS}.")
    if path.suffix.lower() in ARRAY_SUFFIXES and path.is_file():
        return _read_arrays(path, ports, preprocess, log)
    if len(ports) > 1:
        names = [port.name for port in ports]
        raise ShotsError(
            f"the graph has {len(ports)} inputs, {some(names)}, and '{path}' fills one.\n"
            f"  Give --shots {names[0]}=PATH and so on for each, or an .npz with an array for each."
        )
    (port,) = ports
    wanted = frame(port, preprocess)
    if wanted is None:
        raise ShotsError(
            f"input '{port.name}' wants {wants(port)}, which images cannot fill.\n"
            f"  Give an .npz with an array '{port.name}' of that shape, or an .npy."
        )
    listing = list_images(path)
    if listing.ignored:
        log(Event("shots", f"'{path}': left aside {some(listing.ignored)}, no images by their names"))
    pixels, bad = _decode(listing, port, wanted, preprocess, where=str(path), skip_bad=skip_bad, log=log)
    values = cast(normalize(pixels, wanted, preprocess), port, str(path))
    check_shape(values, port, str(path))
    return _Part(
        where=str(path),
        inputs={port.name: values},
        ids=listing.ids,
        kept=np.setdiff1d(np.arange(len(listing.ids)), bad),
        labels=listing.labels,
        classes=listing.classes,
        skipped=tuple(listing.ids[row] for row in bad),
    )


def _decode(
    listing: Listing,
    port: Port,
    wanted: Frame,
    preprocess: Preprocess,
    *,
    where: str,
    skip_bad: bool,
    log: Log,
) -> tuple[Array, list[int]]:
    """Return the pixels of the images that can be read, at one size, and the places of those that cannot."""
    pixels: list[Array] = []
    names: list[str] = []
    bad: dict[int, str] = {}
    total = len(listing.paths)
    for row, (path, name) in enumerate(zip(listing.paths, listing.ids, strict=True)):
        try:
            pixels.append(fit(open_image(path, gray=wanted.gray), wanted, preprocess))
            names.append(name)
        except ShotsError as error:
            bad[row] = f"'{name}' ({error})"
        log(Event("shots", "", row + 1, total))
    reasons = f"{'; '.join(list(bad.values())[:5])}{f'; and {len(bad) - 5} more' if len(bad) > 5 else ''}"
    if bad and (not skip_bad or not pixels):
        way = "Mend or remove them" + (", or pass --skip-bad to leave them out." if pixels else ".")
        raise ShotsError(f"{len(bad)} of {total} images of '{where}' cannot be used: {reasons}.\n  {way}")
    if bad:
        log(Event("shots", f"left out {len(bad)} of {total} images: {reasons}", total, total, "warning"))
    odd = next((k for k, image in enumerate(pixels) if image.shape != pixels[0].shape), None)
    if odd is not None:
        sizes = [f"'{names[k]}' is {pixels[k].shape[0]} x {pixels[k].shape[1]}" for k in (0, odd)]
        raise ShotsError(
            f"the images of '{where}' differ in size: {', '.join(sizes)}.\n"
            f"  Input '{port.name}' wants {wants(port)}, so give the size: --resize or --crop."
        )
    return np.stack(pixels), list(bad)


def _read_arrays(path: Path, ports: tuple[Port, ...], preprocess: Preprocess, log: Log) -> _Part:
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
        log(Event("shots", f"'{path}': left aside the keys {some(others)}"))
    values = {port.name: _fill(arrays[port.name], port, preprocess, str(path)) for port in ports}
    counts = {name: len(rows) for name, rows in values.items()}
    if len(set(counts.values())) > 1:
        raise ShotsError(f"the arrays of '{path}' have different numbers of rows: {counts}.\n  Axis 0 counts shots.")
    count = counts[names[0]]
    if labels is not None:
        labels = check_labels(labels, count, f"'{path}'")
    ids = tuple(f"{path.name}[{row}]" for row in range(count))
    return _Part(str(path), values, ids, np.arange(count), labels)


def _fill(array: Array, port: Port, preprocess: Preprocess, where: str) -> Array:
    """Return an array as the input takes it: uint8 images preprocessed, anything else checked and cast."""
    if array.ndim == 0 or not len(array):
        raise ShotsError(f"'{where}' holds no rows for input '{port.name}'.\n  Axis 0 counts shots.")
    wanted = frame(port, preprocess) if array.dtype == np.uint8 else None
    if wanted is None:
        return conform(array, port, preprocess.layout, where)
    pixels = as_pixels(array, wanted, preprocess)
    if pixels is None:
        raise ShotsError(
            f"input '{port.name}' wants {wants(port)}; '{where}' holds uint8 {array.shape}.\n"
            "  Images are (n, h, w), (n, h, w, c) or (n, c, h, w) with c = 1 or 3."
        )
    try:
        image = pixels[0]
        if fit(image, wanted, preprocess) is not image:
            pixels = np.stack([fit(image, wanted, preprocess) for image in pixels])
    except ShotsError as error:
        raise ShotsError(f"the images of '{where}' cannot be used: {error}.") from error
    values = cast(normalize(pixels, wanted, preprocess), port, where)
    check_shape(values, port, where)
    return values


def _labels_of(parts: list[_Part], path: Path | None, kept: Array) -> Array | None:
    if path is not None:
        return read_labels(path, parts[0].ids)[kept]
    known = [(part.where, part.labels) for part in parts if part.labels is not None]
    for where, classes in known[1:]:
        if not np.array_equal(classes, known[0][1]):
            raise ShotsError(
                f"'{known[0][0]}' and '{where}' label the same rows differently.\n"
                "  Put the rows in one order, or pass --labels."
            )
    return known[0][1][kept] if known else None


def _check_varied(shots: Shots, log: Log) -> None:
    """Refuse shots in which nothing varies; warn where only the rows do not."""
    values = list(shots.inputs.values())
    if all(rows.size > 1 and (rows == rows.flat[0]).all() for rows in values):
        raise ShotsError(
            f"all values of all {len(shots)} shots are {values[0].flat[0]}: constant data shows nothing.\n"
            "  Check how the samples were written, and the preset."
        )
    if len(shots) > 1 and all((rows == rows[:1]).all() for rows in values):
        log(Event("shots", f"all {len(shots)} shots are the same one", level="warning"))


def _draw_per_class(shots: Shots, per_class: int, generator: np.random.Generator) -> Array:
    if shots.labels is None:
        raise ShotsError(
            "--per-class needs labels, and the shots have none.\n"
            "  Put images into a sub-folder for each class, pass --labels FILE, or draw with --max-shots."
        )
    drawn = []
    for label in np.unique(shots.labels):
        rows = np.flatnonzero(shots.labels == label)
        if len(rows) < per_class:
            name = f" '{shots.classes[label]}'" if shots.classes and label < len(shots.classes) else ""
            raise ShotsError(
                f"class {label}{name} has {len(rows)} shots, --per-class asks for {per_class}.\n"
                "  Ask for fewer, or add shots."
            )
        drawn.append(generator.choice(rows, per_class, replace=False))
    return np.sort(np.concatenate(drawn))


def _stratified(labels: Array | None, pool: Array, count: int, generator: np.random.Generator) -> Array:
    """Draw `count` places from `pool`, each class in proportion: largest remainders, ties at random."""
    if labels is None:
        return np.sort(generator.choice(pool, count, replace=False))
    classes, sizes = np.unique(labels[pool], return_counts=True)
    quota = sizes * count / len(pool)
    take = np.floor(quota).astype(np.int64)
    order = generator.permutation(len(classes))
    order = order[np.argsort(-(quota - take)[order], kind="stable")]
    take[order[: count - take.sum()]] += 1
    drawn = [
        generator.choice(pool[labels[pool] == label], number, replace=False)
        for label, number in zip(classes, take, strict=True)
    ]
    return np.sort(np.concatenate(drawn))
