"""Which rows fit and which judge: the draw needs labels alone, so it comes before anything is decoded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from xdonnx.errors import JobError, ShotsError

Array = NDArray[Any]

# NumPy takes no seed below zero, torch none above this.
LARGEST_SEED = 2**64 - 1
# Rows that are looked at together.
_BATCH = 64


class Labelled(Protocol):
    """What rows are drawn from."""

    @property
    def labels(self) -> Array | None:
        """Class of each row, where known."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Name of each class, where known."""

    def __len__(self) -> int: ...


class Numbered(Protocol):
    """Rows whose numbers can be looked at."""

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Rows by graph input."""

    def take(self, rows: Any) -> Self:
        """Return some of the rows."""

    def __len__(self) -> int: ...


Rows = TypeVar("Rows", bound=Numbered)


def check_seed(seed: int) -> int:
    """Return a seed that both generators take; raises JobError for another."""
    if not 0 <= seed <= LARGEST_SEED:
        raise JobError(f"--seed is {seed}.\n  It is a whole number from 0 to {LARGEST_SEED}.")
    return seed


def draw(
    rows: Labelled, *, per_class: int | None, max_shots: int | None, holdout: float | None, seed: int
) -> tuple[Array, Array]:
    """Draw the rows that fit, then those that judge.

    The hold-out is a fraction of all rows; it is taken from those not drawn (at most all of them) or, where every
    row was drawn, from the drawn ones. Labelled rows are held out in proportion to the classes.

    Parameters
    ----------
    rows : Labelled
        All there are.
    per_class, max_shots : int, optional
        How many to draw for fitting, of each class or in all; not both.
    holdout : float in [0, 1), optional
        Fraction held out; at least one row is held out and one left. 0: judge on the fitting rows. None: on others
        altogether, so that none is held out here.
    seed : int
        Of every draw.

    Returns
    -------
    fit, held_out : (n,) int64
        In rising order.

    Raises
    ------
    ShotsError
        A class, or all together, has fewer rows than asked for.
    JobError
        Numbers that make no sense.
    """
    if per_class is not None and max_shots is not None:
        raise JobError("--per-class and --max-shots both say how many shots to draw.\n  Give one of them.")
    for name, number in (("per-class", per_class), ("max-shots", max_shots)):
        if number is not None and number < 1:
            raise JobError(f"--{name} {number} draws nothing.\n  Give at least 1.")
    generator = np.random.default_rng(seed)
    everything = np.arange(len(rows))
    drawn = everything
    if per_class is not None:
        drawn = _draw_per_class(rows, per_class, generator)
    elif max_shots is not None and max_shots < len(rows):
        drawn = np.sort(generator.choice(everything, max_shots, replace=False))
    if holdout is None:
        return drawn, everything[:0]
    if not 0 <= holdout < 1:
        raise JobError(f"--holdout {holdout} is not a fraction in [0, 1).\n  0.2 holds out a fifth.")
    if holdout == 0:
        return drawn, drawn
    rest = np.setdiff1d(everything, drawn)
    if not len(rest) and len(drawn) < 2:
        raise ShotsError(
            f"fewer shots than the hold-out needs: {len(drawn)}, and at least 1 must fit and 1 must judge.\n"
            "  Give more shots, --holdout PATH, or --holdout 0 to judge on the shots that fit."
        )
    count = max(1, round(holdout * len(rows)))
    pool = rest if len(rest) else drawn
    held = _stratified(rows.labels, pool, min(count, len(rest) or len(drawn) - 1), generator)
    return np.setdiff1d(drawn, held), held


def unseen(held_out: Rows, fit: Rows) -> Rows:
    """Return the held-out shots that are not, to the byte, among those that fit."""
    known = set(digests(fit))
    return held_out.take([row for row, digest in enumerate(digests(held_out)) if digest not in known])


def digests(shots: Numbered) -> Iterator[bytes]:
    """Yield what tells the rows apart: equal where the bytes of all inputs are."""
    # Batch by batch: the samples that judge may be read from files as they are asked for.
    for start in range(0, len(shots), _BATCH):
        yield from of_batch({name: values[start : start + _BATCH] for name, values in shots.inputs.items()})


def of_batch(feed: Mapping[str, Array]) -> list[bytes]:
    """Return the digests of some rows that are at hand."""
    return [
        hashlib.sha256(b"".join(hashlib.sha256(value.tobytes()).digest() for value in row)).digest()
        for row in zip(*feed.values(), strict=True)
    ]


def _draw_per_class(rows: Labelled, per_class: int, generator: np.random.Generator) -> Array:
    if rows.labels is None:
        raise ShotsError(
            "--per-class needs labels, and the shots have none.\n"
            "  Put images into a sub-folder for each class, pass --labels FILE, or draw with --max-shots."
        )
    drawn = []
    for label in np.unique(rows.labels):
        of_class = np.flatnonzero(rows.labels == label)
        if len(of_class) < per_class:
            name = f" '{rows.classes[label]}'" if rows.classes and label < len(rows.classes) else ""
            raise ShotsError(
                f"class {label}{name} has {len(of_class)} shots, --per-class asks for {per_class}.\n"
                "  Ask for fewer, or add shots."
            )
        drawn.append(generator.choice(of_class, per_class, replace=False))
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
