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

# A teacher that is this little better than chance was most likely fed otherwise than it was trained, or is of other
# classes than the labels.
_CLUELESS = 0.15
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


@dataclass(frozen=True)
class Kinds:
    """What the outputs of a model are.

    Parameters
    ----------
    classes : int, optional
        Of the output that classifies; None where none does.
    floating, odd : tuple of str
        Outputs of floating-point numbers, and those that are no tensors.
    """

    classes: int | None
    floating: tuple[str, ...]
    odd: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Piece:
    """What one run says of one output; `errors` and `sizes` are squared norms by sample, `student` in all.

    `alike` is false where the student's answer has another length than the teacher's: then nothing bounds its error.
    """

    errors: Array
    sizes: Array
    student: float
    product: float
    max_abs: float
    equal: int
    elements: int
    ignored: int
    floating: bool
    alike: bool = True


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
        C, 1, 1) with at least two classes, with labels the first that has all of theirs. With labels the drop is that
        of the accuracy, unless the teacher is hardly better than chance and so has no accuracy to lose: then it is
        that of the agreement. The worst samples are gathered on the way.

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
    probable = True
    for start in range(0, samples, batch):
        feed = {name: values[start : start + batch] for name, values in shots.inputs.items()}
        rows = len(next(iter(feed.values())))
        ours, theirs = answer(left, feed, names), answer(right, feed, names)
        if start == 0:
            classes = _classifier(ours, rows, labels)
        for name in names:
            pieces[name].append(_piece(name, ours[name], theirs[name], rows))
        scores = None
        if classes is not None:
            scores = ours[classes].reshape(rows, -1), theirs[classes].reshape(rows, -1)
            count = scores[0].shape[1]
            probable = probable and _probable(scores[0])
            top.append(np.stack([output.argmax(axis=1) for output in scores]))
        errors = _sample_errors([known[-1] for known in pieces.values()], rows)
        cases = gather(cases, feed, errors, scores, None if labels is None else labels[start:][:rows], start=start)
        log(Event("verify", done=start + rows, total=samples))
    outputs = [_output(name, pieces[name], confidence, generator, log) for name in names]
    found = _classified(np.concatenate(top, axis=1), labels, count, confidence, log) if top else {}
    ids, words = (shots.ids, shots.classes) if isinstance(shots, Named) else (None, None)
    if top:
        found |= {"classifier": classes, "classes": count, "probable": probable}
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
    """Whether two samples make twice the output of each one.

    Some exports declare the batch free but reshape to one, and what a detector finds depends on the sample.
    """

    def lengths(start: int, rows: int) -> list[float]:
        found = answer(session, {name: values[start : start + rows] for name, values in shots.inputs.items()})
        # Not a number is never equal: such outputs are compared sample by sample.
        return [len(one) if isinstance(one, np.ndarray) and one.ndim else math.nan for one in found.values()]

    single = lengths(0, 1)
    try:
        twice = lengths(0, 2) == [2 * length for length in single]
    except ModelError:
        return False
    return twice and all(lengths(row, 1) == single for row in (len(shots) // 2, len(shots) - 1))


def classifies(output: object, rows: int) -> bool:
    """Whether an output of so many samples is a row of scores for each."""
    return (
        isinstance(output, np.ndarray)
        and output.dtype.kind == "f"
        and output.ndim in (2, 4)
        and output.shape[0] == rows
        and output.shape[1] > 1
        and output.shape[2:] in ((), (1, 1))
    )


def _classifier(found: Mapping[str, Any], rows: int, labels: Array | None) -> str | None:
    """Return the output whose top-1 is compared: with labels the first that has a score for each of them."""
    names = [name for name, output in found.items() if classifies(output, rows)]
    enough = [name for name in names if labels is not None and found[name].shape[1] > labels.max()]
    return next(iter(enough or names), None)


def _probable(scores: Array) -> bool:
    """Whether each row of scores is of probabilities, or of their logarithms."""
    values = scores.astype(np.float64)
    if (values <= 0).all():
        values = np.exp(values)
    # Of half precision, which keeps three digits.
    return bool((values >= 0).all() and np.allclose(values.sum(axis=1), 1, rtol=0, atol=0.01))


def _sample_errors(pieces: Iterable[_Piece | None], rows: int) -> Array:
    """Return the relative L2 of each sample's worst output, (rows,); infinite where the teacher's is zero."""
    worst = np.zeros(rows)
    for piece in pieces:
        if piece is not None and len(piece.errors) == rows:
            zero = np.where(piece.errors > 0, np.inf, 0.0)
            share = np.divide(piece.errors, piece.sizes, out=zero, where=piece.sizes > 0)
            worst = np.maximum(worst, np.sqrt(share))
    return worst


def _classified(top: Array, labels: Array | None, classes: int, confidence: float, log: Log) -> dict[str, Any]:
    """Return the top-1 figures from the winning classes, (2, n): the teacher's and the student's."""
    count = top.shape[1]
    ours, theirs = top
    found: dict[str, Any] = {"top1_agreement": 100 * float(np.mean(ours == theirs))}
    kind: Literal["accuracy", "agreement"] = "agreement"
    lost, gained = int(np.sum(ours != theirs)), 0
    if labels is not None:
        check_classes(labels, classes)
        right, kept = ours == labels, theirs == labels
        found["accuracy_teacher"] = 100 * float(np.mean(right))
        found["accuracy_student"] = 100 * float(np.mean(kept))
        if not _clueless(found["accuracy_teacher"], labels, classes, log):
            kind = "accuracy"
            lost, gained = int(np.sum(right & ~kept)), int(np.sum(~right & kept))
    interval = drop_interval(kind, lost, gained, count, confidence)
    found["drop"] = Drop(**vars(interval), of=kind, lost=lost, gained=gained)
    found["smallest_drop"] = smallest_drop(count, confidence)
    return found


def _clueless(accuracy: float, labels: Array, classes: int, log: Log) -> bool:
    """Whether the teacher is hardly better than chance on these labels, so that it has no accuracy to lose; warn then.

    By chance one guesses among the classes that the labels hold, or among the model's where they hold a single one.
    """
    several = len(np.unique(labels))
    choices = several if several > 1 else classes
    chance = 100 / choices
    clueless = accuracy < chance + _CLUELESS * (100 - chance)
    if clueless:
        text = (
            f"the teacher is right on only {accuracy:.2f} % of {len(labels)} samples, near chance for {choices} "
            "classes, so its agreement with the student is judged, not the accuracy; check --preset, --color and how "
            "labels are numbered"
        )
        log(Event("verify", text, level="warning"))
    return clueless


def check_classes(labels: Array, classes: int) -> None:
    """Raise ShotsError where a label is no class of a model that has so many."""
    if labels.min() < 0 or labels.max() >= classes:
        raise ShotsError(
            f"labels run from {labels.min()} to {labels.max()}, the model's classes to {classes - 1}.\n"
            "  Check which labels belong to this model, or give the samples without labels."
        )


def kinds(session: ort.InferenceSession, shots: Samples) -> Kinds:
    """Return what the outputs are, from the answers to a few samples.

    Raises
    ------
    ShotsError
        As from `fixed_batch`.
    ModelError, MachineError
        The model cannot be run.
    """
    rows = fixed_batch(session.get_inputs(), shots) or min(2, _free_batch(session, shots))
    found = answer(session, {name: values[:rows] for name, values in shots.inputs.items()})
    name = _classifier(found, rows, None if shots.labels is None else np.asarray(shots.labels))
    tensors = {name: output for name, output in found.items() if isinstance(output, np.ndarray)}
    return Kinds(
        classes=None if name is None else found[name].shape[1],
        floating=tuple(name for name, output in tensors.items() if output.dtype.kind == "f"),
        odd=tuple(name for name in found if name not in tensors),
    )


def _piece(name: str, ours: Any, theirs: Any, rows: int) -> _Piece | None:
    """Compare one run's answers; None where they are no tensors."""
    if not isinstance(ours, np.ndarray) or not isinstance(theirs, np.ndarray):
        return None
    if ours.ndim != theirs.ndim or ours.shape[1:] != theirs.shape[1:]:
        raise VerifyError(f"output '{name}' has shape {theirs.shape}, the teacher's has {ours.shape}.")
    if ours.shape != theirs.shape:
        # How many there are depends on the data, as with detections, and the student finds more or fewer.
        most, endless = max(ours.size, theirs.size), np.full(1, np.inf)
        return _Piece(endless, np.ones(1), 0.0, 0.0, np.inf, 0, most, 0, ours.dtype.kind == "f", alike=False)
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
    unlike = sum(not piece.alike for piece in known)
    if unlike:
        text = f"output '{name}': the student's has another length than the teacher's in {unlike} of {len(pieces)} runs"
        log(Event("verify", text, level="warning"))
    if len(known) < len(pieces):
        log(Event("verify", f"output '{name}' is not compared: it is no tensor", level="warning"))
    elements = sum(piece.elements for piece in known)
    if known and not known[0].floating:
        share = 100 * sum(piece.equal for piece in known) / elements if elements else None
        return OutputError(name=name, relative_l2=None, max_abs=None, cosine=None, agreement=share)
    if unlike or len(known) < len(pieces):
        return OutputError(name=name, relative_l2=None, max_abs=None, cosine=None, compared=False)
    ignored = sum(piece.ignored for piece in known)
    if ignored:
        text = f"output '{name}': {ignored} of {elements} numbers left out, not finite in the teacher itself"
        log(Event("verify", text, level="warning"))
    errors = np.concatenate([piece.errors for piece in known])
    sizes = np.concatenate([piece.sizes for piece in known])
    found: dict[str, Any] = {"relative_l2": None}
    if sizes.sum() > 0:
        interval = relative_error(errors, sizes, confidence, generator=generator)
        found = {"relative_l2": interval.value}
        if math.isfinite(interval.high):
            found |= {"low": interval.low, "high": interval.high}
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
