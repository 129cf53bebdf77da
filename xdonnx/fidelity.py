"""How far the student's answers are from the teacher's: both run in onnxruntime on the same samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from xdonnx.errors import ModelError, ShotsError, VerifyError
from xdonnx.events import Event, Log, ignore
from xdonnx.intervals import drop_interval, relative_error, smallest_drop
from xdonnx.report import Drop, Fidelity, OutputError
from xdonnx.runtime import answer, open_session
from xdonnx.worst import Case, described, gather

Array = NDArray[Any]

# Rows of one run where the batch axis is free, and the numbers fed at most, lest wide images fill the memory.
_ROWS, _NUMBERS = 64, 10_000_000


class Samples(Protocol):
    """What both models are fed: axis 0 of every input, and of the labels, counts samples."""

    @property
    def inputs(self) -> Mapping[str, Array]:
        """Arrays by graph input."""

    @property
    def labels(self) -> Array | None:
        """Class of each sample, where known."""

    def __len__(self) -> int: ...


@runtime_checkable
class Named(Protocol):
    """Samples that know where they came from; `Samples` need not."""

    @property
    def ids(self) -> Sequence[str]:
        """Where each came from: 'cat/001.png'."""

    @property
    def classes(self) -> Sequence[str] | None:
        """Name of each class, where known."""


@dataclass(frozen=True, eq=False)
class _Piece:
    """What one run says of one output; `errors` and `sizes` are squared norms by sample, `student` in all."""

    errors: Array
    sizes: Array
    student: float
    product: float
    max_abs: float
    equal: int
    elements: int
    ignored: int
    floating: bool


def compare(
    teacher: str | Path,
    student: str | Path,
    shots: Samples,
    *,
    generator: np.random.Generator,
    device: str = "cpu",
    confidence: float = 0.95,
    held_out: bool = True,
    log: Log = ignore,
) -> Fidelity:
    """Run both files on all samples and measure how their answers differ.

    Parameters
    ----------
    teacher, student : path-like
    shots : Samples
    generator : numpy.random.Generator
        Of the bootstrap.
    device : str, default='cpu'
        'cpu' or 'cuda[:n]'.
    confidence : float, default=0.95
        Of the intervals.
    held_out : bool, default=True
        Whether the student was fitted without these samples.
    log : Log
        Told of progress and warned, in the stage 'verify'.

    Returns
    -------
    Fidelity
        Top-1 figures where some output classifies: the first of floating-point numbers that is (N, C) or (N,
        C, 1, 1) with at least two classes. The worst samples are gathered on the way.

    Raises
    ------
    VerifyError
        The student's answers are not finite where the teacher's are, or have another shape.
    ShotsError
        Inputs that the graph has not, too few samples for its batch, or labels beyond its classes.
    ModelError, MachineError
        A file cannot be run.
    """
    left, right = open_session(teacher, device=device), open_session(student, device=device)
    fixed = fixed_batch(left.get_inputs(), shots)
    batch = fixed or _free_batch(left, shots)
    samples = len(shots) // batch * batch if fixed else len(shots)
    if samples < len(shots):
        text = f"{len(shots) - samples} of {len(shots)} samples are left out: too few for a batch of {batch}"
        log(Event("verify", text, level="warning"))
    labels = None if shots.labels is None else np.asarray(shots.labels)[:samples]
    names = [output.name for output in left.get_outputs()]
    pieces: dict[str, list[_Piece | None]] = {name: [] for name in names}
    classes, count, top, cases = None, 0, list[Array](), list[Case]()
    for start in range(0, samples, batch):
        feed = {name: values[start : start + batch] for name, values in shots.inputs.items()}
        rows = len(next(iter(feed.values())))
        ours, theirs = answer(left, feed, names), answer(right, feed, names)
        if start == 0:
            classes = next((name for name in names if _classifies(ours[name], rows)), None)
        for name in names:
            pieces[name].append(_piece(name, ours[name], theirs[name], rows))
        scores = None
        if classes is not None:
            scores = ours[classes].reshape(rows, -1), theirs[classes].reshape(rows, -1)
            count = scores[0].shape[1]
            top.append(np.stack([output.argmax(axis=1) for output in scores]))
        errors = _sample_errors([known[-1] for known in pieces.values()], rows)
        cases = gather(cases, feed, errors, scores, None if labels is None else labels[start:][:rows], start=start)
        log(Event("verify", done=start + rows, total=samples))
    outputs = [_output(name, pieces[name], confidence, generator, log) for name in names]
    found = _classified(np.concatenate(top, axis=1), labels, count, confidence) if top else {}
    ids, words = (shots.ids, shots.classes) if isinstance(shots, Named) else (None, None)
    worst = described(cases, labels, ids, words)
    return Fidelity(samples=samples, held_out=held_out, outputs=tuple(outputs), worst=worst, **found)


def fixed_batch(ports: Iterable[Any], shots: Samples) -> int | None:
    """Return how many samples every run takes; None where the graph leaves that free.

    Parameters
    ----------
    ports : iterable
        The graph's inputs, each with `name` and `shape`: onnxruntime's, or those of `model.interface`.
    shots : Samples

    Raises
    ------
    ShotsError
        The inputs are not the graph's, or the samples do not fill one batch.
    ModelError
        The inputs disagree, so their first axis is no batch.
    """
    shapes = {port.name: port.shape for port in ports}
    if set(shapes) != set(shots.inputs):
        raise ShotsError(f"the graph takes {sorted(shapes)}, the shots hold {sorted(shots.inputs)}.")
    sizes = {name: shape[0] for name, shape in shapes.items() if shape and isinstance(shape[0], int) and shape[0] > 0}
    if len(set(sizes.values())) > 1:
        raise ModelError(f"the inputs' first axes are of different sizes, so they are no batch: {sizes}.")
    fixed = next(iter(sizes.values()), None)
    if len(shots) < (fixed or 1):
        raise ShotsError(
            f"the graph takes {fixed or 1} samples at once, there are {len(shots)}.\n"
            "  Give more samples, or export the model with a free batch axis."
        )
    return fixed


def _free_batch(session: ort.InferenceSession, shots: Samples) -> int:
    """Return how many samples to feed at once where the graph lets us choose."""
    numbers = sum(math.prod(values.shape[1:]) for values in shots.inputs.values())
    batch = min(_ROWS, len(shots), max(1, _NUMBERS // max(1, numbers)))
    return batch if batch == 1 or _batches(session, shots) else 1


def _batches(session: ort.InferenceSession, shots: Samples) -> bool:
    """Whether two samples make twice the output; some exports declare the batch free but reshape to one."""
    one = answer(session, {name: values[:1] for name, values in shots.inputs.items()})
    try:
        two = answer(session, {name: values[:2] for name, values in shots.inputs.items()})
    except ModelError:
        return False
    return all(
        isinstance(two[name], np.ndarray) and two[name].ndim > 0 and len(two[name]) == 2 * len(single)
        for name, single in one.items()
    )


def _classifies(output: object, rows: int) -> bool:
    return (
        isinstance(output, np.ndarray)
        and output.dtype.kind == "f"
        and output.ndim in (2, 4)
        and output.shape[0] == rows
        and output.shape[1] > 1
        and output.shape[2:] in ((), (1, 1))
    )


def _sample_errors(pieces: Iterable[_Piece | None], rows: int) -> Array:
    """Return the relative L2 of each sample's worst output, (rows,); infinite where the teacher's is zero."""
    worst = np.zeros(rows)
    for piece in pieces:
        if piece is not None and len(piece.errors) == rows:
            zero = np.where(piece.errors > 0, np.inf, 0.0)
            share = np.divide(piece.errors, piece.sizes, out=zero, where=piece.sizes > 0)
            worst = np.maximum(worst, np.sqrt(share))
    return worst


def _classified(top: Array, labels: Array | None, classes: int, confidence: float) -> dict[str, Any]:
    """Return the top-1 figures from the winning classes, (2, n): the teacher's and the student's."""
    count = top.shape[1]
    ours, theirs = top
    found: dict[str, Any] = {"top1_agreement": 100 * float(np.mean(ours == theirs))}
    kind: Literal["accuracy", "agreement"] = "agreement" if labels is None else "accuracy"
    if labels is None:
        lost, gained = int(np.sum(ours != theirs)), 0
    else:
        if labels.min() < 0 or labels.max() >= classes:
            raise ShotsError(
                f"labels run from {labels.min()} to {labels.max()}, the model's classes to {classes - 1}.\n"
                "  Check which labels belong to this model."
            )
        right, kept = ours == labels, theirs == labels
        lost, gained = int(np.sum(right & ~kept)), int(np.sum(~right & kept))
        found["accuracy_teacher"] = 100 * float(np.mean(right))
        found["accuracy_student"] = 100 * float(np.mean(kept))
    interval = drop_interval(kind, lost, gained, count, confidence)
    found["drop"] = Drop(**vars(interval), of=kind, lost=lost, gained=gained)
    found["smallest_drop"] = smallest_drop(count, confidence)
    return found


def _piece(name: str, ours: Any, theirs: Any, rows: int) -> _Piece | None:
    """Compare one run's answers; None where they are no tensors, or of a length that depends on the data."""
    if not isinstance(ours, np.ndarray) or not isinstance(theirs, np.ndarray):
        return None
    if ours.ndim != theirs.ndim or ours.shape[1:] != theirs.shape[1:]:
        raise VerifyError(f"output '{name}' has shape {theirs.shape}, the teacher's has {ours.shape}.")
    if ours.shape != theirs.shape:
        return None
    count = rows if ours.ndim and len(ours) == rows else 1
    if ours.dtype.kind != "f":
        nothing, equal = np.zeros(count), int(np.sum(ours == theirs))
        return _Piece(nothing, nothing, 0.0, 0.0, 0.0, equal, ours.size, 0, False)
    a = ours.astype(np.float64).reshape(count, -1)
    b = theirs.astype(np.float64).reshape(count, -1)
    known = np.isfinite(a)
    broken = int(np.sum(known & ~np.isfinite(b)))
    if broken:
        raise VerifyError(f"output '{name}' has {broken} numbers that are not finite, unlike the teacher's.")
    a, b = np.where(known, a, 0.0), np.where(known, b, 0.0)
    return _Piece(
        errors=np.sum((b - a) ** 2, axis=1),
        sizes=np.sum(a**2, axis=1),
        student=float(np.sum(b**2)),
        product=float(np.sum(a * b)),
        max_abs=float(np.max(np.abs(b - a), initial=0.0)),
        equal=int(np.sum(a == b)),
        elements=a.size,
        ignored=int(np.sum(~known)),
        floating=True,
    )


def _output(
    name: str,
    pieces: Sequence[_Piece | None],
    confidence: float,
    generator: np.random.Generator,
    log: Log,
) -> OutputError:
    """Join the runs of one output."""
    known = [piece for piece in pieces if piece is not None]
    if len(known) < len(pieces):
        text = f"output '{name}' is not compared: it is no tensor, or its length depends on the data"
        log(Event("verify", text, level="warning"))
        return OutputError(name=name, relative_l2=None, max_abs=None, cosine=None)
    elements = sum(piece.elements for piece in known)
    if not known[0].floating:
        share = 100 * sum(piece.equal for piece in known) / elements if elements else None
        return OutputError(name=name, relative_l2=None, max_abs=None, cosine=None, agreement=share)
    ignored = sum(piece.ignored for piece in known)
    if ignored:
        text = f"output '{name}': {ignored} of {elements} numbers left out, not finite in the teacher itself"
        log(Event("verify", text, level="warning"))
    errors = np.concatenate([piece.errors for piece in known])
    sizes = np.concatenate([piece.sizes for piece in known])
    found: dict[str, Any] = {"relative_l2": None}
    if sizes.sum() > 0:
        interval = relative_error(errors, sizes, confidence, generator=generator)
        found = {"relative_l2": interval.value, "low": interval.low, "high": interval.high}
    elif errors.sum() == 0:
        found = {"relative_l2": 0.0, "low": 0.0, "high": 0.0}
    lengths = math.sqrt(sizes.sum() * sum(piece.student for piece in known))
    return OutputError(
        name=name,
        confidence=confidence,
        max_abs=max(piece.max_abs for piece in known),
        cosine=min(1.0, sum(piece.product for piece in known) / lengths) if lengths else None,
        **found,
    )
