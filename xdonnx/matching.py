"""Which of a teacher's layers each layer of a student is, where another tool made the student; no name has a say.

A layer of the teacher is one layer of the student, or a row of them that a decomposition put in its place; the last of
a row has the layer's output. The search goes through the teacher in graph order and keeps the best few partial
matchings. What a pair of layer and row adds to a matching is

  - structure: whether the row reads what the layer reads, by the pairs found so far, and is read by the same operators;
  - weights: the cosine of its filters (of the one convolution that a row of linear layers comes to) with the teacher's,
    over the channels that both read. After pruning alone these are equal;
  - activations: the correlation of what both put out on a few samples, which survives decomposition and training.

Kernel, stride and spatial sizes have to fit. Which of the teacher's channels a student's channel is comes from the best
assignment of both likenesses together, and goes on along the graph to the layers that read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from xdonnx.errors import ModelError
from xdonnx.graph import Net
from xdonnx.layers import Layer
from xdonnx.likeness import Likeness, alike, outputs_of, whole_weight
from xdonnx.wiring import Wiring, kind, linear, rows, wired

Array = np.ndarray
# Partial matchings that are followed, at most, and how far behind the best.
_BEAM, _BEHIND = 16, 3.0
# What structure is worth, beside likeness, which is at most 1; and what is lost where a layer is left without a pair.
_SAME_SOURCES, _SAME_READERS, _WIDTH, _ALONE, _ABSENT = 0.5, 0.5, 0.5, 1.0, 0.3
# Samples that are looked at, at most.
SAMPLES = 64
# Mean confidence below which a student is taken for another teacher's. The same architecture trained again was found
# at 0.28 to 0.40, pruned and refitted students above 0.95, and the crudest decompositions at 0.78.
ENOUGH = 0.5
# A pair below this may be wrong even where the others are right.
DOUBTFUL = 0.25
# Layers that an error lists.
_LISTED = 12


@dataclass(frozen=True, eq=False)
class Pair:
    """A layer of the teacher and what the student has in its place.

    Parameters
    ----------
    teacher : str
        A layer, by the value that it makes.
    student : tuple of str
        One layer, or several in a row; the last puts out what the teacher's does.
    channels : (outputs of the last,) int
        Which of the teacher's output channels each is.
    inputs : (inputs of the first,) int or None
        Which of the teacher's input channels each is, -1 where that is not known.
    confidence : float
        0 for unrelated layers, 1 for identity.
    by : {'weights', 'activations', 'file'}
        What decided.
    """

    teacher: str
    student: tuple[str, ...]
    channels: Array
    inputs: Array | None
    confidence: float
    by: Literal["weights", "activations", "file"]


@dataclass(frozen=True, eq=False)
class Given:
    """What is known of a layer of the teacher before any search: the student's row, and which channels it puts out.

    Parameters
    ----------
    row : tuple of str
        Empty where the student has nothing in its place.
    channels : (outputs,) int, optional
    """

    row: tuple[str, ...]
    channels: Array | None = None


@dataclass(frozen=True)
class Matching:
    """Pairs in the teacher's order, and the layers of both that have none."""

    pairs: tuple[Pair, ...]
    absent: tuple[str, ...]
    alone: tuple[str, ...]

    @property
    def confidence(self) -> float:
        """Mean over the layers of the student; one without a pair counts as 0."""
        count = len(self.pairs) + len(self.alone)
        return sum(pair.confidence for pair in self.pairs) / count if count else 0.0


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two nets and what is known of its layers."""

    net: Net
    wiring: Wiring
    outputs: Mapping[str, Array]
    weights: dict[tuple[str, ...], Array | None] = field(default_factory=dict)

    def weight(self, row: tuple[str, ...]) -> Array | None:
        """Return the weight that a row comes to, None where operators lie between."""
        if row not in self.weights:
            self.weights[row] = whole_weight(self.net, row) if linear(self.wiring, row) else None
        return self.weights[row]


def side(net: Net, inputs: Mapping[str, Array]) -> Side:
    """Look at a net: its wiring, and what its layers put out on at most `SAMPLES` of the samples."""
    count = len(next(iter(inputs.values())))
    fixed = net.interface.batch
    # Whole batches, where the graph takes no others.
    most = -(-SAMPLES // fixed) * fixed if fixed else SAMPLES
    places = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(np.int64))
    return Side(net, wired(net), outputs_of(net, {name: array[places] for name, array in inputs.items()}))


@dataclass(frozen=True, eq=False)
class _Partial:
    """A matching of the teacher's first layers."""

    score: float
    pairs: tuple[Pair, ...]
    ends: Mapping[str, str]  # teacher's layer -> last of the student's row
    used: frozenset[str]
    labels: Mapping[int, int]  # the student's -> the teacher's


def match(teacher: Side, student: Side, given: Mapping[str, Given] | None = None) -> Matching:
    """Find for each layer of the student the teacher's.

    Parameters
    ----------
    teacher, student : Side
    given : {teacher's layer: Given}, optional
        What is known already; it is taken as it is.
    """
    given = given or {}
    search = _Search(teacher, student, given)
    beam = [_Partial(0.0, (), {}, frozenset(), {})]
    for name in teacher.net.layers:
        beam = sorted((wider for one in beam for wider in search.extended(one, name)), key=lambda one: -one.score)
        beam = [one for one in beam[:_BEAM] if one.score > beam[0].score - _BEHIND]
    best = max(beam, key=lambda one: one.score - _ALONE * (len(student.net.layers) - len(one.used)))
    return Matching(
        best.pairs,
        tuple(name for name in teacher.net.layers if name not in best.ends),
        tuple(name for name in student.net.layers if name not in best.used),
    )


class _Search:
    """What a pair adds to a matching."""

    def __init__(self, teacher: Side, student: Side, given: Mapping[str, Given]) -> None:
        self.teacher, self.student, self.given = teacher, student, given
        self.rows = [row for name in student.net.layers for row in rows(student.net, student.wiring, name)]
        self.known: dict[tuple[object, ...], tuple[Likeness, Array | None]] = {}
        self.fits: dict[tuple[str, tuple[str, ...]], bool] = {}
        self.reserved = {name for one in given.values() for name in one.row}

    def extended(self, partial: _Partial, name: str) -> Iterator[_Partial]:
        """Yield the matchings that this one becomes with one more of the teacher's layers."""
        if name in self.given:
            row = self.given[name].row
            yield self._with(partial, name, row, 0.0) if row else partial
            return
        yield replace(partial, score=partial.score - _ABSENT)
        sources = self.teacher.wiring.inputs[name].sources
        reads = frozenset(
            partial.ends.get(s, s) for s in sources if s in partial.ends or s not in self.teacher.net.layers
        )
        fitting = [row for row in self.rows if not partial.used & set(row) and self._fits(name, row)]
        shares = [_share(reads, self.student.wiring.inputs[row[0]].sources) for row in fitting]
        # Where a row reads exactly what the layer reads, others have no chance.
        least = 0.5 if max(shares, default=0.0) >= 0.5 else 0.0
        for row, share in zip(fitting, shares, strict=True):
            if share >= least and not self.reserved & set(row):
                yield self._with(partial, name, row, share)

    def _fits(self, name: str, row: tuple[str, ...]) -> bool:
        if (name, row) not in self.fits:
            why = misfit(self.teacher.net, name, self.student.net, self.student.wiring, row)
            self.fits[name, row] = not why
        return self.fits[name, row]

    def _with(self, partial: _Partial, name: str, row: tuple[str, ...], share: float) -> _Partial:
        layer, last = self.teacher.net.layers[name], self.student.net.layers[row[-1]]
        likeness, inputs = self._likeness(partial, name, row)
        same_readers = self.teacher.wiring.after[name] == self.student.wiring.after[row[-1]]
        labels = dict(partial.labels)
        for ours, theirs in zip(last.out_ids, layer.out_ids[likeness.channels], strict=True):
            labels.setdefault(int(ours), int(theirs))
        width = len(last.out_ids) / len(layer.out_ids)
        by: Literal["weights", "activations", "file"] = "file" if name in self.given else likeness.by
        pair = Pair(name, row, likeness.channels, inputs, likeness.confidence, by)
        return _Partial(
            partial.score + likeness.confidence + _SAME_SOURCES * share + _SAME_READERS * same_readers + _WIDTH * width,
            (*partial.pairs, pair),
            {**partial.ends, name: row[-1]},
            partial.used | set(row),
            labels,
        )

    def _likeness(self, partial: _Partial, name: str, row: tuple[str, ...]) -> tuple[Likeness, Array | None]:
        """Return how alike layer and row are; it depends on a matching by what it says of their inputs alone."""
        teacher, student = self.teacher, self.student
        parents = tuple((s, partial.ends.get(s)) for s in sorted(teacher.wiring.inputs[name].sources))
        layer, first, last = teacher.net.layers[name], student.net.layers[row[0]], student.net.layers[row[-1]]
        known = _translated(last.out_ids, layer.out_ids, partial.labels)
        whole = known is not None and (known >= 0).all() and len(set(known.tolist())) == len(known)
        key = (name, row, parents, whole)
        if key not in self.known:
            alone = any(end is None for source, end in parents if source in teacher.net.layers)
            inputs = _inputs(student.net, first, teacher.net, layer, partial.labels, alone=alone)
            own = self.given[name].channels if name in self.given else None
            found = alike(
                (teacher.weight((name,)), teacher.outputs[name]),
                (student.weight(row), student.outputs[row[-1]]),
                inputs,
                own if own is not None else known if whole else None,
            )
            self.known[key] = found, inputs
        return self.known[key]


def misfit(teacher: Net, name: str, student: Net, wiring: Wiring, row: Sequence[str]) -> str:
    """Return why a row of the student's layers cannot stand for a layer of the teacher; nothing where it can."""
    layer, first, last = teacher.layers[name], student.layers[row[0]], student.layers[row[-1]]
    if tuple(row) not in rows(student, wiring, row[-1]):
        return f"{_listed(row)} do not stand in a row: each has to read the one before it, and nothing else to."
    if kind(layer) != kind(last) or len(layer.kernel) != len(last.kernel):
        return f"'{row[-1]}' is a {last.op}, and the teacher's layer a {layer.op} of another kind."
    if len(last.out_ids) > len(layer.out_ids):
        return f"'{row[-1]}' puts out {len(last.out_ids)} channels, and the teacher's layer {len(layer.out_ids)}."
    theirs = teacher.shapes.get(layer.input, ())[2:], teacher.shapes.get(layer.name, ())[2:]
    ours = student.shapes.get(first.input, ())[2:], student.shapes.get(last.name, ())[2:]
    if (theirs != ours) if layer.kernel else (layer.positions != last.positions):
        return f"{_listed(row)} turns {ours[0]} into {ours[1]}, the teacher's layer {theirs[0]} into {theirs[1]}."
    if not layer.kernel:
        return ""
    strides = tuple(int(step) for step in np.prod([student.layers[part].strides for part in row], axis=0))
    window = [(k - 1) * d + 1 for k, d in zip(layer.kernel, layer.dilations, strict=True)]
    if strides != layer.strides or _reach(student, row) != window:
        seen = f"sees a window of {_reach(student, row)} in steps of {list(strides)}"
        return f"{_listed(row)} {seen}, the teacher's layer one of {window} in steps of {list(layer.strides)}."
    return ""


def _listed(row: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in row)


def doubtful(pair: Pair) -> bool:
    """Whether a pair that nobody vouches for is too little alike to be refitted."""
    return pair.by != "file" and pair.confidence < DOUBTFUL


def check_alike(matching: Matching, names: tuple[str, str], again: str, *, swapped: bool = False) -> None:
    """Raise ModelError for a student that is another teacher's, as far as can be seen.

    Parameters
    ----------
    matching : Matching
    names : (teacher, student)
        Their files.
    again : str
        The command that writes the matching to a file, for the message.
    swapped : bool
        Whether the student is the larger of the two.
    """
    if matching.pairs and matching.confidence >= ENOUGH:
        return
    best = sorted(matching.pairs, key=lambda pair: -pair.confidence)
    lines = [f"'{pair.student[-1]}' as '{pair.teacher}': {pair.confidence:.2f}" for pair in best[:_LISTED]]
    if len(best) > _LISTED:
        lines.append(f"and {len(best) - _LISTED} more, down to {best[-1].confidence:.2f}")
    if matching.alone:
        lines.append(f"{len(matching.alone)} of its layers are like none, such as '{matching.alone[0]}'")
    raise ModelError(
        f"'{names[1]}' does not look like a student of '{names[0]}': their layers match with a confidence of "
        f"{_down(matching.confidence)}, and {ENOUGH} is the least.\n  "
        + "\n  ".join(lines)
        + ("\n  It is the larger of the two: is it the teacher?" if swapped else "")
        + f"\n  If it is one, correct the matching and pass it: {again}"
    )


def _down(confidence: float) -> str:
    """Return a confidence that is too low with as many decimals as show that it is."""
    return next(text for digits in range(2, 18) if float(text := f"{confidence:.{digits}f}") < ENOUGH)


def _reach(net: Net, row: Sequence[str]) -> list[int]:
    """Return how many positions of a row's input its output sees, along each axis."""
    layers = [net.layers[name] for name in row]
    reach, stride = [1] * len(layers[0].kernel), [1] * len(layers[0].kernel)
    for layer in layers:
        reach = [r + (k - 1) * d * s for r, k, d, s in zip(reach, layer.kernel, layer.dilations, stride, strict=True)]
        stride = [a * b for a, b in zip(stride, layer.strides, strict=True)]
    return reach


def _share(wanted: frozenset[str], found: frozenset[str]) -> float:
    both = wanted | found
    return len(wanted & found) / len(both) if both else 1.0


def _inputs(
    student: Net, first: Layer, teacher: Net, layer: Layer, labels: Mapping[int, int], *, alone: bool
) -> Array | None:
    """Return which of the teacher's input channels each of the student's is; None where their numbers say nothing.

    Parameters
    ----------
    alone : bool
        Whether the teacher's layer reads one that was matched with none.
    """
    ours, theirs = _read(student, first), _read(teacher, layer)
    if ours is None or theirs is None:
        return None
    found = _translated(ours, theirs, labels)
    if found is None:
        # Nothing is known of any, as of the channels of an image: as many of both are the same. Those that come from a
        # layer without a pair may be in any order.
        return np.arange(len(ours)) if len(ours) == len(theirs) and not alone else None
    return found


def _read(net: Net, layer: Layer) -> Array | None:
    track = net.tracks.get(layer.input)
    axis = 1 if layer.kernel else len(net.shapes.get(layer.input, ())) - 1
    if track is not None and track.axis == axis:
        return track.ids
    shape = net.shapes.get(layer.input)
    # Channels without labels are no one's: labels below zero are translated to nothing.
    return None if shape is None else np.full(shape[axis], -1)


def _translated(ours: Array, theirs: Array, labels: Mapping[int, int]) -> Array | None:
    """Return where each of the student's labels stands among the teacher's, -1 where unknown; None if all are.

    A label may stand in several places, as after flattening: its first place is the teacher's first, and so on.
    """
    places: dict[int, list[int]] = {}
    for at, label in enumerate(theirs.tolist()):
        places.setdefault(label, []).append(at)
    taken: dict[int, int] = {}
    found = np.full(len(ours), -1)
    for at, label in enumerate(ours.tolist()):
        known = labels.get(label)
        standing = places.get(known, []) if known is not None else []
        number = taken.get(label, 0)
        if number < len(standing):
            found[at] = standing[number]
        taken[label] = number + 1
    return found if (found >= 0).any() else None
