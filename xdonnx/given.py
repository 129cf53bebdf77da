"""A student that another tool made: read, held against the teacher's interface, and matched with it. Without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from xdonnx.errors import ModelError
from xdonnx.events import Event, Log, ignore
from xdonnx.graph import Net, read_net
from xdonnx.matches import MatchResult
from xdonnx.matchfile import given_by
from xdonnx.matching import ENOUGH, Matching, check_alike, doubtful, match, side
from xdonnx.model import differences, interface, model_fingerprint, read_proto
from xdonnx.runtime import open_session


@dataclass(frozen=True, eq=False)
class GivenStudent:
    """A student of another tool.

    Parameters
    ----------
    net : Net
    matching : Matching
    """

    net: Net
    matching: Matching


def read_student(path: Path, teacher: Net, sizes: Mapping[str, Sequence[int]]) -> Net:
    """Return a student's net.

    Raises
    ------
    ModelError
        The file cannot be read or run, holds no layer, or has other inputs or outputs than the teacher.
    """
    proto = read_proto(path)
    open_session(path)
    # Opset and metadata are the exporter's choice.
    theirs = interface(proto)
    alike = replace(teacher.interface, inputs=theirs.inputs, outputs=theirs.outputs)
    found = differences(teacher.interface, alike)
    if found:
        raise ModelError(
            f"'{path}' cannot stand in for the teacher:\n  " + "\n  ".join(found) + "\n  Export it with the teacher's "
            "names, types and shapes of inputs and outputs."
        )
    try:
        return read_net(proto, sizes)
    except ModelError as error:
        raise ModelError(f"'{path}': {error}") from error


def matched(
    files: tuple[Path, Path],
    teacher: Net,
    inputs: Mapping[str, np.ndarray],
    sizes: Mapping[str, Sequence[int]],
    *,
    by: Path | None = None,
    log: Log = ignore,
) -> GivenStudent:
    """Read a student and match its layers with the teacher's.

    Parameters
    ----------
    files : (teacher, student)
    teacher : Net
    inputs : {graph input: (n, ...)}
        Samples on which activations are compared.
    sizes : {graph input: shape}
        For inputs whose sizes the graphs leave free.
    by : Path, optional
        A file of the matching; what it says is taken as it is.
    log : Log
        Warned of layers that are matched with none, of those that are too little alike to be refitted, and of those
        that a file matches which are hardly alike.

    Raises
    ------
    ModelError, JobError
        As of :func:`read_student`, :func:`xdonnx.matchfile.given_by`.
    """
    log(Event("match", f"Read {files[1].name}"))
    net = read_student(files[1], teacher, sizes)
    given = None
    if by is not None:
        given = given_by(by, (teacher, net), (model_fingerprint(files[0]), model_fingerprint(files[1])))
    log(Event("match", "Match its layers with the teacher's"))
    sides = []
    for file, one in zip(files, (teacher, net), strict=True):
        try:
            sides.append(side(one, inputs))
        except ModelError as error:
            raise ModelError(f"'{file}': {error}") from error
    found = match(sides[0], sides[1], given)
    why = "is like no layer of the teacher" if by is None else f"is matched with none in '{by}'"
    for name in found.alone:
        log(Event("match", f"'{name}' of the student {why}: left as it is.", level="warning"))
    how = "was matched" if by is None else f"stands in '{by}'"
    for pair in found.pairs:
        text = f"'{pair.student[-1]}' {how} with '{pair.teacher}' at a confidence of {pair.confidence:.2f} only"
        if doubtful(pair):
            log(Event("match", f"{text}: left as it is.", level="warning"))
        elif pair.confidence < ENOUGH and by is not None:
            log(Event("match", f"{text}.", level="warning"))
    return GivenStudent(net, found)


def size(net: Net) -> int:
    """Return how many weights a net's layers have."""
    return sum(int(net.array(layer.weight).size) for layer in net.layers.values())


def nonzero(net: Net) -> int:
    """Return how many weights of a net's layers are not zero."""
    return sum(int(np.count_nonzero(net.array(layer.weight))) for layer in net.layers.values())


def check_matching(found: GivenStudent, teacher: Net, files: tuple[Path, Path]) -> None:
    """Raise ModelError where the student is another teacher's; see :func:`xdonnx.matching.check_alike`."""
    again = f"xdonnx match {files[0]} {files[1]} --shots … -o match.toml, then --match match.toml"
    swapped = nonzero(found.net) > nonzero(teacher)
    check_alike(found.matching, (str(files[0]), str(files[1])), again, swapped=swapped)


def match_results(matching: Matching, teacher: Net) -> tuple[MatchResult, ...]:
    """Return what a report says of a matching."""
    return tuple(
        MatchResult(
            teacher=pair.teacher,
            student=pair.student,
            kept=len(pair.channels),
            units=len(teacher.layers[pair.teacher].out_ids),
            confidence=round(pair.confidence, 4),
            by=pair.by,
        )
        for pair in matching.pairs
    )
