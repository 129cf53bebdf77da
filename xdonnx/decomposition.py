"""A student of low rank, from the weights alone: chosen, taken apart, checked in onnxruntime, written."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from xdonnx.agreement import check_same
from xdonnx.cost import Cost, measure_cost
from xdonnx.errors import JobError, ModelError, VerifyError
from xdonnx.events import Event, Log, ignore, legible
from xdonnx.graph import Net, read_net
from xdonnx.lowrank import composed, pair_ranks
from xdonnx.model import (
    add_metadata,
    check_file,
    file_bytes,
    fingerprint,
    interface,
    read_proto,
    sized,
    write_proto,
)
from xdonnx.paths import check_student
from xdonnx.ranks import DEFAULT_TARGET, KINDS, Choice, LowRank, check_wanted, choose, weight_of
from xdonnx.report import tool
from xdonnx.runtime import open_session
from xdonnx.splitting import Parts, pieces_of, rebuilt, taken_apart
from xdonnx.verification import check_interface

# Kinds of inputs that noise can stand for.
_FED = frozenset({"float16", "float32", "float64", "uint8", "int8"})


@dataclass(frozen=True)
class LayerRanks:
    """What became of a layer that was taken apart.

    Parameters
    ----------
    layer, op : str
        The value that it makes, 'Conv' | 'Gemm' | 'MatMul'.
    scheme : {'spatial', 'channel', 'svd'}
    ranks, of : tuple of int
        In each group of channels, and where they would be full: one rank of a pair, those in and out of Tucker's core.
    kept : float
        Share of the weight's energy, its sum of squares, that the pieces hold.
    macs_before, macs_after, params_before, params_after : int
        Of one sample; biases are not counted.
    """

    layer: str
    op: str
    scheme: str
    ranks: tuple[int, ...]
    of: tuple[int, ...]
    kept: float
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int


@dataclass(frozen=True)
class Size:
    """What a model costs: bytes on disk, weights, MACs of one sample."""

    bytes: int
    params: int
    macs: int


@dataclass(frozen=True)
class Decomposition:
    """What was done, and what it comes to.

    Parameters
    ----------
    target : str
        The scheme and the target in a few words.
    teacher, student : Size
    layers : tuple of LayerRanks
    whole : dict of str to str
        {layer that stayed whole: why}.
    warnings : tuple of str
        What was assumed or could not be told.
    """

    target: str
    teacher: Size
    student: Size
    layers: tuple[LayerRanks, ...]
    whole: Mapping[str, str]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON takes it."""
        return asdict(self)


def wanted(
    *,
    scheme: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    round_to: int | None = None,
    **targets: float | None,
) -> LowRank:
    """Return what is wanted; raises JobError where that makes no sense, or several targets are given.

    Parameters
    ----------
    scheme, include, exclude, round_to
        As in `LowRank`.
    **targets
        Of `KINDS`, None where not given. Default: macs=0.5.
    """
    given = {kind: targets[kind] for kind in KINDS if targets.get(kind) is not None}
    if len(given) > 1:
        raise JobError(f"{' and '.join(f'--{kind}' for kind in given)} are both given.\n  Give one target.")
    kind, amount = next(iter(given.items())) if given else DEFAULT_TARGET
    made = LowRank(kind, amount or 0.0, scheme, tuple(include), tuple(exclude), round_to)
    check_wanted(made)
    return made


def decomposed(
    model: Path,
    out: Path,
    wish: LowRank,
    *,
    sizes: Mapping[str, Sequence[int]] | None = None,
    force: bool = False,
    external_data: str = "auto",
    writes: bool = True,
    log: Log = ignore,
) -> Decomposition:
    """Take a model's layers apart and write the student, checked in onnxruntime.

    Parameters
    ----------
    model, out : Path
    wish : LowRank
    sizes : dict, optional
        {graph input: shape} where the graph leaves it free.
    force : bool
        Replace an `out` that exists.
    external_data : {'auto', 'always', 'never'}
    writes : bool
        Whether `out` is written; without it everything else is done.
    log : Log

    Raises
    ------
    XdonnxError
        Of the kind whose exit code fits; nothing was written.
    """
    check_wanted(wish)
    check_file(model)
    if writes:
        check_student(out, model, force=force, external=external_data)
    log(Event("read", f"Read {model.name}"))
    proto = read_proto(model)
    open_session(model)
    sized(interface(proto).inputs, dict(sizes or {}))
    net = read_net(proto, sizes)
    choice = choose(net, wish, log)
    parts = {}
    for at, (name, split) in enumerate(choice.splits.items()):
        log(Event("split", name, done=at, total=len(choice.splits)))
        parts[name] = pieces_of(net, net.layers[name], split)
    student = taken_apart(net, parts)
    add_metadata(
        student,
        {
            "version": tool().version,
            "teacher_sha256": fingerprint(model),
            "method": "decompose",
            "target": str(wish),
        },
    )
    log(Event("verify", "Compare with whole layers in onnxruntime"))
    check_interface(net.source, student)
    with tempfile.TemporaryDirectory(dir=out.parent if writes else None, prefix=f".{legible(out.name)}.") as folder:
        draft = Path(folder) / "student.onnx"
        write_proto(student, draft, external=external_data)
        _check_file(draft)
        size = file_bytes(draft)
    doubts = _check_answers(net, parts, student)
    if writes:
        write_proto(student, out, external=external_data)
    found = _told(net, wish, choice, parts, student, file_bytes(model), file_bytes(out) if writes else size)
    return replace(found, warnings=(*found.warnings, *doubts))


def _check_answers(net: Net, parts: Parts, student: onnx.ModelProto) -> list[str]:
    """Raise VerifyError unless the student computes what its pieces come to; return what could not be compared."""
    ports = net.interface.inputs
    if not all(port.dtype in _FED and port.name in net.shapes for port in ports):
        return [
            "the student was not run: an input is neither of floating point nor of bytes, for which noise could stand"
        ]
    noise = np.random.default_rng(0)
    feeds = {}
    for port in ports:
        shape = net.shapes[port.name]
        made = noise.integers(0, 128, shape) if port.dtype.endswith("int8") else noise.standard_normal(shape)
        feeds[port.name] = made.astype(port.dtype)
    what = "the student differs from the teacher with the weights that its pieces come to"
    check_same(rebuilt(net, parts), student, feeds, what=what)
    return []


def _check_file(draft: Path) -> None:
    try:
        onnx.checker.check_model(str(draft))
        open_session(draft)
    except (onnx.checker.ValidationError, ModelError) as error:
        raise VerifyError(
            f"the student is not a model that runs: {error}\n"
            "  This is a defect of xdonnx: please report it with the model's operators (xdonnx inspect)."
        ) from error


def _told(
    net: Net,
    wish: LowRank,
    choice: Choice,
    parts: Parts,
    student: onnx.ModelProto,
    bytes_before: int,
    bytes_after: int,
) -> Decomposition:
    shapes = {port.name: net.shapes[port.name] for port in net.interface.inputs if port.name in net.shapes}
    before, after = measure_cost(net.source, shapes), measure_cost(student, shapes)
    layers = []
    for name, split in choice.splits.items():
        layer, weight = net.layers[name], weight_of(net, net.layers[name]).astype(np.float64)
        lost = np.square(weight - composed([piece.array for piece in parts[name]])).sum()
        layers.append(
            LayerRanks(
                layer=name,
                op=layer.op,
                scheme=split.scheme,
                ranks=split.ranks,
                of=weight.shape[2:0:-1] if split.scheme == "channel" else (pair_ranks(weight.shape),),
                kept=float(1 - lost / (np.square(weight).sum() or 1.0)),
                macs_before=layer.macs,
                macs_after=split.macs,
                params_before=weight.size,
                params_after=split.params,
            )
        )
    warnings = [f"assumed: {', '.join(net.assumed)} (choose with --input-shape)"] if net.assumed else []
    if before.unknown:
        warnings.append(
            f"MACs of {len(before.unknown)} nodes are not known and not counted, as of '{before.unknown[0]}'"
        )

    def size(cost: Cost, on_disk: int) -> Size:
        return Size(on_disk, cost.params, cost.macs // net.batch)

    return Decomposition(
        target=str(wish),
        teacher=size(before, bytes_before),
        student=size(after, bytes_after),
        layers=tuple(layers),
        whole=choice.whole,
        warnings=tuple(warnings),
    )
