"""A `Net` as a program in torch: one step a node, in graph order, each known to answer as onnxruntime does.

onnx2torch converts node by node; this module asks its registry for each node and keys the results by the names of the
values they make. A node that it cannot convert, or whose torch module answers otherwise than onnxruntime, is run in
onnxruntime itself: it has no gradient then, which layer-wise methods do not need.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional

from xdonnx.columns import Geometry
from xdonnx.errors import MachineError, ModelError
from xdonnx.events import Event, Log, ignore
from xdonnx.graph import Net
from xdonnx.layers import Layer
from xdonnx.prepare import constant
from xdonnx.runtime import answer, open_session

# Relative to the largest value of the node's answer; float32 kernels differ by about 1e-6 of it.
PARITY = 1e-4
# float16 kernels round at different places; each step costs 5e-4.
_COARSE = 50
# Answers smaller than this count as this large: onnxruntime's Sigmoid is only good to 1e-7 absolute near zero.
_SMALLEST_SCALE = 1e-2


@dataclass(frozen=True)
class Step:
    """One node.

    Parameters
    ----------
    name, op : str
        Its first output and its operator.
    inputs, outputs : tuple of str
        Values it reads (as its module wants them; '' where one is left out) and makes.
    module : nn.Module or None
        None for a layer, which the caller runs with weights of its own choice.
    layer : Layer or None
    native : bool
        False where onnxruntime runs the node.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    module: nn.Module | None
    layer: Layer | None
    native: bool = True


@dataclass(frozen=True)
class Program:
    """All steps in order, the constants they read, and when each value was read last."""

    steps: tuple[Step, ...]
    constants: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last_read: Mapping[str, int]
    device: torch.device

    @property
    def foreign(self) -> tuple[str, ...]:
        """Names of the steps that onnxruntime runs."""
        return tuple(step.name for step in self.steps if not step.native)


def geometry(layer: Layer) -> Geometry:
    """Return how a layer reads its input."""
    op = {"Conv": "conv", "ConvTranspose": "conv_transpose"}.get(layer.op, "linear")
    return Geometry(
        op=op,
        groups=layer.groups,
        kernel=layer.kernel,
        strides=layer.strides,
        dilations=layer.dilations,
        pads=layer.pads,
        output_padding=layer.output_padding,
    )


def run_layer(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run a layer with the given weight and bias, laid out as `layer_tensors` returns them."""
    if not layer.kernel:
        return functional.linear(x, weight, bias)
    rank = len(layer.kernel)
    begins, ends = layer.pads[:rank], layer.pads[rank:]
    if layer.op == "Conv":
        conv = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
        padding: Sequence[int] = begins
        if begins != ends:
            x = functional.pad(x, [p for pair in zip(begins[::-1], ends[::-1], strict=True) for p in pair])
            padding = [0] * rank
        return conv(x, weight, bias, layer.strides, tuple(padding), layer.dilations, layer.groups)
    conv_transpose = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
    # Made whole, then cropped, so that pads may differ from side to side; extra rows come at the end.
    made = conv_transpose[rank - 1](x, weight, bias, layer.strides, 0, 0, layer.groups, layer.dilations)
    extra = layer.output_padding or (0,) * rank
    for axis, (begin, end, more) in enumerate(zip(begins, ends, extra, strict=True), start=2):
        size = made.shape[axis]
        made = made.narrow(axis, begin, min(size - begin, size - begin - end + more))
        short = more - end
        if short > 0:
            # Rows past the last kernel hold the bias alone.
            shape = list(made.shape)
            shape[axis] = short
            fill = made.new_zeros(shape)
            if bias is not None:
                fill = fill + bias.reshape([1, -1] + [1] * rank)
            made = torch.cat([made, fill], axis)
    return made


def convert(net: Net, device: torch.device, foreign: Collection[str] = ()) -> Program:
    """Return the net as torch steps, constants on the device; those that `foreign` names run in onnxruntime.

    Raises
    ------
    MachineError
        onnx2torch does not import, as when torchvision was built for another torch.
    ModelError
        Neither torch nor onnxruntime can run a node.
    """
    try:
        from onnx2torch.onnx_graph import OnnxGraph

        from xdonnx.operators import converters, register
    except (ImportError, RuntimeError, AttributeError) as error:
        # A torchvision built for another torch raises any of these while onnx2torch imports it.
        raise MachineError(
            f"onnx2torch does not import: {str(error).splitlines()[0] if str(error) else type(error).__name__}\n"
            "  Most often torchvision does not fit torch: python -m pip install --upgrade torch torchvision\n"
            "  For a torch of another index, such as a CPU build, xdonnx doctor has the line."
        ) from error
    register()
    proto = _with_shapes(net)
    graph = OnnxGraph(proto.graph)
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    steps = []
    for node, onnx_node in zip(proto.graph.node, graph.nodes.values(), strict=True):
        name = node.output[0]
        if name in net.layers:
            layer = net.layers[name]
            steps.append(Step(name, node.op_type, (layer.input,), (name,), None, layer))
            continue
        found = None
        for converter in () if name in foreign else converters(node.op_type, opsets.get(node.domain, 1), node.domain):
            with contextlib.suppress(Exception):  # a converter may fail in any way on a node it does not expect
                found = converter(onnx_node, graph)
                break
        if found is None:
            steps.append(_foreign(node, opsets))
            continue
        module, mapping = found
        steps.append(
            Step(
                name,
                node.op_type,
                tuple(mapping.inputs),
                tuple(node.output),
                module.to(device).eval().requires_grad_(False),
                None,
            )
        )
    read = {name for step in steps for name in step.inputs}
    constants = {
        name: torch.tensor(array, device=device)
        for name, value in net.model.graph.initializers.items()
        if name in read and (array := constant(value)) is not None
    }
    outputs = tuple(str(value.name) for value in net.model.graph.outputs)
    last_read = {name: at for at, step in enumerate(steps) for name in (*step.inputs, *step.outputs)}
    last_read.update(dict.fromkeys(outputs, len(steps)))
    ports = tuple(port.name for port in net.interface.inputs)
    return Program(tuple(steps), constants, ports, outputs, last_read, device)


def checked(net: Net, program: Program, inputs: Mapping[str, np.ndarray], log: Log = ignore) -> Program:
    """Compare every node with onnxruntime on these samples; nodes that differ go over to onnxruntime.

    Each node is given onnxruntime's own inputs, so one that differs does not accuse those after it.

    Parameters
    ----------
    inputs : {graph input: (n, ...)}
        A few samples; one batch.

    Returns
    -------
    Program
        In which every step answers as onnxruntime does, to `PARITY` of its largest value.

    Raises
    ------
    ModelError
        A layer differs: it has no other way to be run, and its fit would be wrong.
    """
    truth = node_answers(net, inputs)
    proto_nodes = {node.output[0]: node for node in ir.to_proto(net.model).graph.node}
    opsets = dict(net.model.opset_imports)
    steps = []
    for at, step in enumerate(program.steps):
        log(Event("parity", done=at + 1, total=len(program.steps)))
        gap = _gap(net, program, step, truth)
        if gap <= PARITY or not step.native:
            steps.append(step)
        elif step.layer is not None:
            raise ModelError(
                f"{step.op} '{step.name}' differs from onnxruntime by {gap:.1e} of its largest value in torch.\n"
                "  This is a defect of xdonnx: please report it with the node's attributes."
            )
        else:
            log(
                Event(
                    "parity",
                    f"{step.op} '{step.name}' answers otherwise in torch ({gap:.1e}); onnxruntime runs it.",
                    level="warning",
                )
            )
            steps.append(_foreign(proto_nodes[step.name], opsets))
    changed = replace(program, steps=tuple(steps))
    read = {name for step in steps for name in step.inputs} - set(program.constants)
    extra = {
        name: torch.tensor(array, device=program.device)
        for name, value in net.model.graph.initializers.items()
        if name in read and (array := constant(value)) is not None
    }
    return replace(changed, constants={**program.constants, **extra}) if extra else changed


def node_answers(net: Net, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return what onnxruntime makes of every value of the net on one batch."""
    copy = onnx.ModelProto()
    copy.CopyFrom(ir.to_proto(net.model))
    declared = {value.name for value in copy.graph.output}
    names = [name for node in copy.graph.node for name in node.output if name]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in declared)
    found: dict[str, Any] = answer(open_session(copy, optimize=False), inputs, names)
    return {**inputs, **found}


def call(step: Step, values: Sequence[Any]) -> tuple[Any, ...]:
    """Run a step that is no layer on its inputs, in the order of `step.inputs`; None stands for one left out."""
    assert step.module is not None
    if None in values:
        # Skipped in the middle: what follows goes by keyword, as onnx2torch's own driver does it.
        first = list(values).index(None)
        wanted = list(inspect.signature(step.module.forward).parameters)[first : len(values)]
        given = {n: v for n, v in zip(wanted, values[first:], strict=True) if v is not None}
        made = step.module(*values[:first], **given)
    else:
        made = step.module(*values)
    return tuple(made) if isinstance(made, (tuple, list)) else (made,)


def _gap(net: Net, program: Program, step: Step, truth: Mapping[str, Any]) -> float:
    def value(name: str) -> Any:
        if not name:
            return None
        if name in program.constants:
            return program.constants[name]
        found = truth[name]
        return torch.tensor(found, device=program.device) if isinstance(found, np.ndarray) else found

    try:
        if step.layer is not None:
            weight, bias = layer_tensors(net, step.layer, program.device)
            made: tuple[Any, ...] = (run_layer(step.layer, value(step.layer.input), weight, bias),)
        else:
            made = call(step, [value(name) for name in step.inputs])
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, NotImplementedError, AttributeError):
        return float("inf")
    worst = 0.0
    for name, ours in zip(step.outputs, made, strict=False):
        theirs = truth.get(name)
        if not name or not isinstance(theirs, np.ndarray):
            continue
        mine = ours.detach().cpu().numpy() if isinstance(ours, Tensor) else np.asarray(ours)
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return float("inf")
        if theirs.dtype.kind == "f":
            scale = max(float(np.abs(theirs).max(initial=0.0, where=np.isfinite(theirs))), _SMALLEST_SCALE)
            same = (mine == theirs) | (np.isnan(mine) & np.isnan(theirs))
            off = np.abs(np.where(same, 0.0, mine.astype(np.float64) - theirs))
            gap = float(np.nan_to_num(off, nan=np.inf).max(initial=0.0)) / scale
            worst = max(worst, gap / _COARSE if theirs.dtype == np.float16 else gap)
        elif not np.array_equal(mine, theirs):
            return float("inf")
    return worst


def layer_tensors(net: Net, layer: Layer, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return the teacher's weight and bias of a layer: as ONNX stores them, but a product's outputs always first."""
    weight = stored(layer, torch.tensor(net.array(layer.weight), device=device))
    bias = None if layer.bias is None else torch.tensor(net.array(layer.bias), device=device)
    return weight, bias


def stored(layer: Layer, weight: Tensor) -> Tensor:
    """Turn a weight from the layout that layers run in to the one that the file has, and back."""
    return weight.T.contiguous() if layer.transposed else weight


def _with_shapes(net: Net) -> onnx.ModelProto:
    """Give converters the shapes they look up; onnx2torch itself would infer them again."""
    proto = ir.to_proto(net.model)
    try:
        return onnx.shape_inference.infer_shapes(proto)
    except onnx.shape_inference.InferenceError:
        # What the exporter wrote contradicts what is inferred. Converters that need a shape fail, and their nodes run
        # in onnxruntime, which goes by the values themselves.
        return proto


def _foreign(node: onnx.NodeProto, opsets: Mapping[str, int]) -> Step:
    """Return a step that runs one node in onnxruntime."""
    inputs = list(dict.fromkeys(name for name in node.input if name))
    module = InOnnxruntime(node, dict(opsets), inputs)
    return Step(node.output[0], node.op_type, tuple(inputs), tuple(node.output), module, None, native=False)


class InOnnxruntime(nn.Module):
    """One ONNX node as a module that onnxruntime runs: exact, frozen, without a gradient."""

    def __init__(self, node: onnx.NodeProto, opsets: dict[str, int], inputs: list[str]) -> None:
        super().__init__()
        self.node, self.opsets, self.names = node, opsets, inputs
        self._opened: dict[tuple[Any, ...], Any] = {}  # by the inputs' types and known shapes

    def _open(self, values: Sequence[np.ndarray]) -> Any:
        kinds = [onnx.helper.np_dtype_to_tensor_dtype(value.dtype) for value in values]
        graph = onnx.helper.make_graph(
            [self.node],
            "node",
            [
                onnx.helper.make_tensor_value_info(name, kind, _known_shape(value))
                for name, kind, value in zip(self.names, kinds, values, strict=True)
            ],
            [onnx.ValueInfoProto(name=name) for name in self.node.output if name],
        )
        imports = [onnx.helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
        try:
            return open_session(model)
        except ModelError as error:
            raise ModelError(
                f"{self.node.op_type} '{self.node.output[0]}' runs neither in torch nor alone in onnxruntime.\n"
                f"  {error}"
            ) from error

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Run the node on the CPU and bring the answers back."""
        # Training computes in bfloat16, which neither numpy nor most kernels of onnxruntime know.
        exact = [value.float() if value.dtype == torch.bfloat16 else value for value in values]
        arrays = [value.detach().cpu().numpy() for value in exact]
        key = tuple((array.dtype.str, _known_shape(array)) for array in arrays)
        if key not in self._opened:
            self._opened[key] = self._open(arrays)
        names = [name for name in self.node.output if name]
        found = answer(self._opened[key], dict(zip(self.names, arrays, strict=True)), names)
        device = values[0].device if values else torch.device("cpu")
        made = iter(torch.tensor(found[name], device=device) for name in names)
        empty = torch.empty(0, device=device)
        return tuple(next(made) if name else empty for name in self.node.output)


def _known_shape(array: np.ndarray) -> tuple[int | None, ...]:
    # Shapes and sizes come as vectors whose length onnxruntime must know; rows of samples may be any number.
    return tuple(array.shape) if array.ndim < 2 else (None,) * array.ndim
