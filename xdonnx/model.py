"""ONNX files in and out: every check on reading, the interface that users rely on, no half-written files."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import numpy_helper

from xdonnx.errors import JobError, MachineError, ModelError
from xdonnx.events import legible
from xdonnx.files import unfetched

if TYPE_CHECKING:
    # With sympy behind it, it costs a third of a second, which those who only read and compare need not pay.
    import onnx_ir as ir

Dim = int | str | None

# Above this a protobuf message cannot be serialized, so weights must live beside the file.
PROTOBUF_LIMIT = 2 * 1024**3 - 64 * 1024

_TORCH = frozenset((".pt", ".pth", ".ckpt"))
_AGAIN = "  Export or download it again."


@dataclass(frozen=True)
class Port:
    """A graph input or output; a dimension is a name where its size is free, None where nothing is said."""

    name: str
    dtype: str
    shape: tuple[Dim, ...] | None

    def __str__(self) -> str:
        sizes = "?" if self.shape is None else ", ".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name} {self.dtype} [{sizes}]"


@dataclass(frozen=True)
class Interface:
    """What callers of a model rely on and no compression may change."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    opset: Mapping[str, int]
    metadata: Mapping[str, str]
    doc: str

    @property
    def batch(self) -> int | None:
        """The samples that every run takes; None where the graph leaves that free."""
        return next((port.shape[0] for port in self.inputs if port.shape and isinstance(port.shape[0], int)), None)


def read_proto(path: str | Path) -> onnx.ModelProto:
    """Read and check an ONNX file; external data is loaded, sparse initializers are made dense.

    Parameters
    ----------
    path : path-like
        The `.onnx` file.

    Returns
    -------
    onnx.ModelProto

    Raises
    ------
    ModelError
        The file is missing, not ONNX, truncated, invalid, or its external data is missing.
    """
    path = Path(path)
    check_file(path)
    try:
        proto = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read: {error.strerror}.\n  Look at its permissions.") from error
    except (DecodeError, ValueError) as error:
        hint = "  It looks like PyTorch: torch.onnx.export makes ONNX of it." if path.suffix in _TORCH else _AGAIN
        what = f"'{path}' is not an ONNX file, or it is cut short ({path.stat().st_size} bytes)."
        raise ModelError(f"{what}\n{hint}") from error
    if not proto.graph.node:
        raise ModelError(f"'{path}' holds no ONNX graph with nodes.\n  Is it the right file?")
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and not (path.parent / entry.value).is_file():
                raise ModelError(
                    f"'{path}' keeps weights in '{entry.value}', which is not beside it.\n"
                    f"  Copy '{entry.value}' into '{path.parent}'."
                )
            if entry.key == "location" and (pointer := unfetched(path.parent / entry.value)):
                raise ModelError(pointer)
    _check_values(path, proto.graph)
    _check_sizes(path, proto)
    try:
        # By its path, for one of more than 2 GiB; a name that is not UTF-8 onnx does not take.
        by_path = legible(str(path)) == str(path)
        if by_path:
            onnx.checker.check_model(str(path), full_check=False)
        onnx.load_external_data_for_model(proto, str(path.parent))
        if not by_path and not too_large(proto):
            onnx.checker.check_model(proto, full_check=False)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"'{path}' is not a valid ONNX model.\n  {_first_line(error)}") from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"external data of '{path}' cannot be read: {error}.\n  Copy the whole of it beside the file again."
        ) from error
    _densify(proto)
    return proto


def check_file(path: Path) -> None:
    """Raise ModelError where no model can be read from there, without reading it."""
    if path.is_dir():
        raise ModelError(f"'{path}' is a folder, and a model is one .onnx file.\n  Name the file in it.")
    if not path.is_file():
        raise ModelError(f"no model at '{path}'.\n  Check the path; it has to be one .onnx file.")
    if pointer := unfetched(path):
        raise ModelError(pointer)


def _check_values(path: Path, graph: onnx.GraphProto) -> None:
    """Name the node that reads what nothing makes, or what is made after it: the checker's own words name neither."""
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    known |= {tensor.values.name for tensor in graph.sparse_initializer} | {""}
    made = {name for node in graph.node for name in node.output}
    for node in graph.node:
        for name in node.input:
            if name in known:
                continue
            who = f"{node.op_type} '{node.output[0]}'"
            if name in made:
                raise ModelError(
                    f"'{path}' is not a valid ONNX model: {who} reads '{name}' before it is made.\n"
                    "  The graph has a cycle, or its nodes are not in order. Export it again."
                )
            raise ModelError(
                f"'{path}' is not a valid ONNX model: {who} reads '{name}', which nothing makes.\n"
                "  An initializer or an input is missing. Export it again."
            )
        known |= set(node.output)


def _check_sizes(path: Path, proto: onnx.ModelProto) -> None:
    newest = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > newest:
            raise ModelError(
                f"'{path}' is written for opset {entry.version}; this onnx knows {newest} at most.\n"
                "  Update onnx and onnxruntime, or export for an older opset."
            )
    sizes = {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        weight = sizes.get(node.input[1], [1]) if len(node.input) > 1 else [1]
        if node.op_type in ("Conv", "ConvTranspose") and 0 in weight:
            raise ModelError(
                f"'{path}': {node.op_type} '{node.output[0]}' has a weight of shape {weight}, with nothing in it.\n"
                "  Export the model again."
            )
    for value in proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in sizes and any(dim.HasField("dim_value") and dim.dim_value == 0 for dim in dims[1:]):
            raise ModelError(f"'{path}': input '{value.name}' has an axis of size 0.\n  Export the model again.")


def read_model(path: str | Path) -> ir.Model:
    """Read and check an ONNX file as an editable graph; raises as :func:`read_proto` does."""
    import onnx_ir as ir

    return ir.from_proto(read_proto(path))


def interface(model: onnx.ModelProto | ir.Model) -> Interface:
    """Return what callers rely on: ports, opset, metadata, doc string."""
    if isinstance(model, onnx.ModelProto):
        proto = model
    else:
        import onnx_ir as ir

        proto = ir.to_proto(model)
    graph = proto.graph
    # Before IR version 4 initializers had to be listed among the inputs; those are not the caller's to feed.
    held = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    return Interface(
        inputs=tuple(_port(v) for v in graph.input if v.name not in held),
        outputs=tuple(_port(v) for v in graph.output),
        opset={entry.domain: entry.version for entry in proto.opset_import},
        metadata={entry.key: entry.value for entry in proto.metadata_props},
        doc=proto.doc_string,
    )


def sized(ports: Sequence[Port], sizes: Mapping[str, Sequence[int]]) -> tuple[Port, ...]:
    """Return the ports with free sizes filled in; the batch, axis 0, stays as the graph has it.

    Parameters
    ----------
    ports : sequence of Port
    sizes : dict
        {port: full shape}.

    Raises
    ------
    JobError
        No port has that name, or its shape is another one.
    """
    names = [port.name for port in ports]
    for name in sizes:
        if name not in names:
            raise JobError(f"--input-shape: the model has no input '{name}'.\n  Inputs: {', '.join(names)}.")
    return tuple(_filled(port, sizes[port.name]) if port.name in sizes else port for port in ports)


def _filled(port: Port, sizes: Sequence[int]) -> Port:
    if port.shape is None:
        return replace(port, shape=(None, *sizes[1:]))
    pairs = list(zip(port.shape, sizes, strict=False))
    fixed = [(has, asked) for has, asked in pairs[1:] if isinstance(has, int)]
    if len(port.shape) != len(sizes) or any(has != asked for has, asked in fixed):
        raise JobError(
            f"--input-shape {port.name}:{'x'.join(map(str, sizes))} is not what the graph takes: '{port}'.\n"
            "  Only free sizes can be chosen; the batch may be anything."
        )
    return replace(port, shape=(port.shape[0], *sizes[1:]))


def differences(teacher: Interface, student: Interface) -> list[str]:
    """Say, a line each, where the student's interface differs; metadata keys `xdonnx.*` are ours to add."""
    found = []
    for side, ours, theirs in (
        ("input", teacher.inputs, student.inputs),
        ("output", teacher.outputs, student.outputs),
    ):
        if len(ours) != len(theirs):
            found.append(f"{len(theirs)} {side}s, the teacher has {len(ours)}")
        found += [f"{side} '{b}', the teacher has '{a}'" for a, b in zip(ours, theirs, strict=False) if a != b]
    if dict(teacher.opset) != dict(student.opset):
        found.append(f"opset {dict(student.opset)}, the teacher has {dict(teacher.opset)}")
    for key, value in teacher.metadata.items():
        if not key.startswith("xdonnx.") and student.metadata.get(key) != value:
            found.append(f"metadata '{key}' is {student.metadata.get(key)!r}, the teacher has {value!r}")
    extra = [k for k in student.metadata if k not in teacher.metadata and not k.startswith("xdonnx.")]
    found += [f"metadata '{key}' is not the teacher's" for key in extra]
    if teacher.doc != student.doc:
        found.append("the doc string differs")
    return found


def add_metadata(proto: onnx.ModelProto, facts: Mapping[str, str]) -> None:
    """Write into the model where it comes from, as entries `xdonnx.*` that replace older ones of the same name."""
    names = {f"xdonnx.{key}" for key in facts}
    others = [entry for entry in proto.metadata_props if entry.key not in names]
    del proto.metadata_props[:]
    proto.metadata_props.extend(others)
    for key, value in facts.items():
        proto.metadata_props.add(key=f"xdonnx.{key}", value=value)


def write_proto(proto: onnx.ModelProto, path: str | Path, *, external: str = "auto") -> None:
    """Write the model so that `path` either holds all of it or is untouched.

    Parameters
    ----------
    proto : onnx.ModelProto
        Not changed.
    path : path-like
        Written beside itself first, then renamed.
    external : {'auto', 'always', 'never'}
        Whether weights go to `<name>.data` beside the file; 'auto': when it would pass protobuf's 2 GiB.

    Raises
    ------
    MachineError
        The disk is full or the folder cannot be written.
    JobError
        The weights were to stay inside, but the file would pass the limit; or they cannot lie outside.
    """
    path = Path(path)
    large = too_large(proto)
    if external == "never" and large:
        raise JobError(
            f"'{path}' would pass protobuf's limit of 2 GiB.\n  Let the weights lie beside it: --external-data auto."
        )
    outside = external == "always" or (external == "auto" and large)
    if outside:
        check_beside(path)
    # Of a name that is not UTF-8 onnx makes no weights, and no folder of it.
    name = legible(path.name)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{name}.") as folder:
            draft = Path(folder) / name
            if outside:
                copy = onnx.ModelProto()
                copy.CopyFrom(proto)
                onnx.save(
                    copy,
                    draft,
                    save_as_external_data=True,
                    location=data_path(path).name,
                    size_threshold=1024,
                )
                data = data_path(draft)
                if data.exists():
                    # onnx makes this file readable by its owner alone, unlike the model.
                    data.chmod(draft.stat().st_mode)
                    os.replace(data, data_path(path))
            else:
                onnx.save(proto, draft)
            os.replace(draft, path)
    except OSError as error:
        raise MachineError(f"cannot write '{path}': {error}.\n  Free space or choose another folder.") from error


def check_beside(path: str | Path) -> None:
    """Raise JobError where weights cannot lie beside a file: onnx writes only into folders whose names are UTF-8."""
    folder = str(Path(path).parent)
    if legible(folder) != folder:
        raise JobError(f"weights cannot lie beside '{path}': its folder's name is not UTF-8.\n  Name another folder.")


def data_path(path: str | Path) -> Path:
    """Return where the weights of a file lie that lie beside it; named in the file, and so in UTF-8."""
    path = Path(path)
    return path.with_name(f"{legible(path.name)}.data")


def fingerprint(path: str | Path) -> str:
    """Return the file's SHA-256 in hex."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_fingerprint(path: str | Path) -> str:
    """Return the SHA-256 of a model in hex: of its file, and of the weights that it keeps outside where it does.

    Files that are missing are left out: who reads the model tells of them.
    """
    parts = [fingerprint(file) for file in model_files(path) if file.is_file()]
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def model_files(path: str | Path) -> list[Path]:
    """Return the file and the external data that it names; the file alone where it cannot be read."""
    path = Path(path)
    try:
        proto = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError, OSError):
        return [path]
    beside = {e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"}
    return [path, *(path.parent / name for name in sorted(beside))]


def file_bytes(path: str | Path) -> int:
    """Return the bytes that shipping the model costs: the file and its external data."""
    return sum(file.stat().st_size for file in model_files(path))


def _port(value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        return Port(value.name, value.type.WhichOneof("value") or "unknown", None)
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name if tensor.elem_type else "unknown"
    if not tensor.HasField("shape"):
        return Port(value.name, dtype, None)
    sizes: list[Dim] = []
    for dim in tensor.shape.dim:
        if dim.HasField("dim_value"):
            # Some exporters write a free batch as 0 or -1.
            sizes.append(dim.dim_value if dim.dim_value > 0 else None)
        else:
            sizes.append(dim.dim_param or None)
    return Port(value.name, dtype, tuple(sizes))


def _densify(proto: onnx.ModelProto) -> None:
    """Replace sparse initializers by dense ones: onnx-ir would drop them without a word."""
    for sparse in proto.graph.sparse_initializer:
        values = numpy_helper.to_array(sparse.values)
        where = numpy_helper.to_array(sparse.indices)
        dense = np.zeros(tuple(sparse.dims), values.dtype)
        if where.ndim == 1:
            dense.reshape(-1)[where] = values
        else:
            dense[tuple(where.T)] = values
        proto.graph.initializer.append(numpy_helper.from_array(dense, sparse.values.name))
    del proto.graph.sparse_initializer[:]


def too_large(proto: onnx.ModelProto) -> bool:
    """Whether a model passes protobuf's limit, so that its weights have to lie beside it."""
    try:
        return bool(proto.ByteSize() > PROTOBUF_LIMIT)
    except EncodeError:  # past the limit even the size cannot be asked for
        return True


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
