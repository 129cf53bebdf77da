"""Refit a given student: nothing more is removed, and its structure stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from xdonnx.agreement import keep_sparse
from xdonnx.augment import VIEWS, widened
from xdonnx.convert import Program, checked, convert
from xdonnx.crossval import Candidate
from xdonnx.errors import JobError
from xdonnx.given import GivenStudent, nonzero, size
from xdonnx.graph import Net
from xdonnx.matching import doubtful
from xdonnx.methods.bench import Bench, Trace
from xdonnx.methods.cross import ALTERNATIVES, Cross
from xdonnx.methods.crossing import Crossing
from xdonnx.methods.layerwise import FOLDS
from xdonnx.methods.mixing import Mixing
from xdonnx.methods.pairwalk import meet
from xdonnx.patch import Patch, cut
from xdonnx.report import LayerResult
from xdonnx.shots import Shots
from xdonnx.walk import affordable, chunked
from xdonnx.wiring import before_relu

# A share of zeros above which a student was thinned out weight by weight.
MANY_ZEROS = 0.05

# Rows that a student is refitted on, samples and views of them: more than a walk through one net looks at, for both
# methods fit 1x1 layers. On ResNet-56 halved by an l1 norm, 100 samples and so many rows in place of the samples alone
# made of the relative error of cross 0.376 for 0.395 (mean of two draws).
REFIT_VIEWS = 256


def refitted(
    methods: Sequence[Any], teacher: Net, given: GivenStudent, shots: Shots, bench: Bench
) -> tuple[onnx.ModelProto, list[LayerResult]]:
    """Refit a student by one method after another.

    Parameters
    ----------
    methods : sequence of Cross and FSKD
    teacher : Net
    given : GivenStudent
    shots : Shots
        Those that fit.
    bench : Bench
        With the teacher's program.

    Returns
    -------
    student : onnx.ModelProto
        With the teacher's metadata and doc string, since callers of the teacher may read them.
    layers : list of LayerResult
        By the teacher's layers.
    """
    net = given.net
    pairs = {pair.student[-1]: pair for pair in given.matching.pairs if not doubtful(pair)}
    zeros = _zeros(net)
    if zeros > MANY_ZEROS and any(not isinstance(method, Cross) for method in methods):
        raise JobError(
            f"--method fskd mixes filters, which fills zeros, and {zeros:.0%} of the student's weights are zero.\n"
            "  Pass --method cross, which leaves them zero."
        )
    program = own_program(net, shots, bench)
    tensors: dict[str, np.ndarray] = {}
    traces: dict[str, Trace] = {}
    for method in methods:
        rows = _views(method)
        inputs = widened(shots.inputs, affordable(teacher, rows), bench.generator, FOLDS)
        count = sum(len(next(iter(batch.values()))) for batch in chunked(teacher, inputs))
        visitor = _visitor(method, teacher, net, count, len(shots))
        meet((teacher, bench.program), (net, program), pairs, inputs, visitor, tensors, bench.log)
        tensors.update(visitor.tensors)
        for trace in visitor.traces:
            before = traces[trace.layer].objective_before if trace.layer in traces else trace.objective_before
            traces[trace.layer] = Trace(trace.layer, before, trace.objective_after, trace.seconds)
    student = cut(net, Patch(tensors))
    if zeros > MANY_ZEROS:
        keep_sparse(student, chunked(net, shots.inputs, most=4)[0], bench.log)
    del student.metadata_props[:]
    student.metadata_props.extend(teacher.source.metadata_props)
    student.doc_string = teacher.source.doc_string
    student.graph.doc_string = teacher.source.graph.doc_string
    return student, layer_rows(teacher, given, traces)


def _zeros(net: Net) -> float:
    """Return the share of a net's weights that are zero."""
    return 1 - nonzero(net) / max(1, size(net))


def own_program(net: Net, shots: Shots, bench: Bench) -> Program:
    """Return the student in torch, every step checked against onnxruntime."""
    return checked(net, convert(net, bench.program.device), chunked(net, shots.inputs, most=4)[0], bench.log)


def _views(method: Any) -> int:
    if not isinstance(method, Cross):
        return REFIT_VIEWS
    if method.views is not None:
        return method.views
    return VIEWS if method.effort == "fast" else REFIT_VIEWS


def _visitor(method: Any, teacher: Net, net: Net, rows: int, samples: int) -> Mixing | Crossing:
    rectified = frozenset(name for name, summed in before_relu(net).items() if not summed)
    if not isinstance(method, Cross):
        return Mixing(net, rows, samples, rectified, method.ridge)
    ridge = 0.01 if method.ridge is None else method.ridge
    chosen: tuple[Candidate, ...] = ((method.connected(teacher), ridge),)
    fixed = (method.connection != "auto", method.alpha, method.beta, method.ridge)
    if fixed == (False, None, None, None) and method.effort != "fast":
        chosen += ALTERNATIVES
    return Crossing(net, teacher, rows, samples, chosen, rectified)


def layer_rows(teacher: Net, given: GivenStudent, traces: Mapping[str, Trace]) -> list[LayerResult]:
    """Return a row for each matched layer of the teacher, in graph order."""
    rows = []
    for pair in given.matching.pairs:
        layer, parts = teacher.layers[pair.teacher], [given.net.layers[name] for name in pair.student]
        trace = traces.get(pair.student[-1])
        row = " → ".join(f"'{name}'" for name in pair.student)
        note = f"{pair.confidence:.2f} sure by {pair.by}: {row} of the student"
        rows.append(
            LayerResult(
                layer=pair.teacher,
                op=layer.op,
                kept=len(pair.channels),
                units=len(layer.out_ids),
                params_before=layer.params,
                params_after=sum(part.params for part in parts),
                macs_before=layer.macs * teacher.batch,
                macs_after=sum(part.macs for part in parts) * given.net.batch,
                objective_before=trace.objective_before if trace else None,
                objective_after=trace.objective_after if trace else None,
                seconds=round(trace.seconds, 4) if trace else None,
                note=note if len(note) <= 200 else f"{note[:199]}…",
            )
        )
    return rows
