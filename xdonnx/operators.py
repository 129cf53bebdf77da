"""Operators and operator versions that onnx2torch does not have, registered through its own `add_converter`.

onnx2torch registers a converter for an exact schema version, so each bump of a schema loses the operator even where
nothing but the list of types changed. Those versions get the newest converter there is; operators whose attributes
became inputs, or that never had a converter, get one here. Every node is compared with onnxruntime before it is used,
so a version that did change is found and not trusted.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx
import torch
from onnx2torch.node_converters.registry import (
    _CONVERTER_REGISTRY,
    OperationDescription,
    add_converter,
    get_converter,
)
from onnx2torch.onnx_graph import OnnxGraph
from onnx2torch.onnx_node import OnnxNode
from onnx2torch.utils.common import OnnxMapping, OperationConverterResult, get_const_value
from torch import Tensor, nn
from torch.nn import functional

from xdonnx.interpolation import interpolate

# Their later versions say something new; what is here or in onnxruntime runs them.
_CHANGED = {"Pad", "Split", "Resize", "Upsample"} | {
    f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
}


class Apply(nn.Module):
    """A function of tensors as a module, so that it can stand where converters return modules."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: Tensor) -> Any:
        """Call the function."""
        return self.function(*values)


def register() -> None:
    """Teach onnx2torch what it lacks; calling it again changes nothing."""
    # Its Slice and ScatterND index with lists, which torch deprecates on every call.
    warnings.filterwarnings("ignore", message="Using a non-tuple sequence", module="onnx2torch")
    versions: dict[str, set[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            versions.setdefault(schema.name, set()).add(schema.since_version)
    for name, make in _OWN.items():
        _fill(name, versions.get(name, set()), make)
    known: dict[str, dict[int, Any]] = {}
    for key, converter in list(_CONVERTER_REGISTRY.items()):
        if key.domain == "":
            known.setdefault(key.operation_type, {})[key.version] = converter
    for name, converters in known.items():
        if name not in _CHANGED:
            _fill(name, versions.get(name, set()), converters[max(converters)])


def converters(name: str, version: int, domain: str) -> Iterator[Any]:
    """Yield the converters that may serve an operator, ours before onnx2torch's: they know all of its versions."""
    if domain in ("", "ai.onnx") and name in _OWN:
        yield _OWN[name]
    with contextlib.suppress(NotImplementedError):
        yield get_converter(name, version, domain)


def _fill(name: str, versions: set[int], converter: Any) -> None:
    for version in sorted(versions):
        if OperationDescription("", name, version) not in _CONVERTER_REGISTRY:
            add_converter(name, version)(converter)


def _result(node: OnnxNode, function: Callable[..., Any], inputs: int | None = None) -> OperationConverterResult:
    """Wrap a function of the node's first `inputs` values (all of them when None)."""
    names = node.input_values if inputs is None else node.input_values[:inputs]
    return OperationConverterResult(Apply(function), OnnxMapping(inputs=names, outputs=node.output_values))


def _integers(node: OnnxNode, graph: OnnxGraph, at: int, name: str) -> list[int] | None:
    """Read integers that are an attribute in one version and a constant input in another."""
    if name in node.attributes:
        found = node.attributes[name]
        return [int(found)] if isinstance(found, int) else [int(i) for i in found]
    if len(node.input_values) > at and node.input_values[at]:
        return [int(i) for i in torch.as_tensor(get_const_value(node.input_values[at], graph)).reshape(-1)]
    return None


def _elementwise(function: Callable[[Tensor], Tensor]) -> Any:
    def make(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
        return _result(node, function, 1)

    return make


def _gelu(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    kind = node.attributes.get("approximate", "none")
    return _result(node, lambda x: functional.gelu(x, approximate=kind), 1)


def _swish(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    alpha = node.attributes.get("alpha", 1.0)
    return _result(node, lambda x: x * torch.sigmoid(alpha * x), 1)


def _thresholded_relu(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    alpha = node.attributes.get("alpha", 1.0)
    return _result(node, lambda x: torch.where(x > alpha, x, torch.zeros_like(x)), 1)


def _shrink(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    bias, lambd = node.attributes.get("bias", 0.0), node.attributes.get("lambd", 0.5)

    def shrink(x: Tensor) -> Tensor:
        zero = torch.zeros_like(x)
        return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero))

    return _result(node, shrink, 1)


def _pad(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    mode = node.attributes.get("mode", "constant")
    pads = _integers(node, graph, 1, "pads")
    axes = _integers(node, graph, 3, "axes")
    if pads is None:
        raise NotImplementedError("Pad with computed sizes")
    fill = node.attributes.get("value", 0.0)
    if len(node.input_values) > 2 and node.input_values[2]:
        fill = torch.as_tensor(get_const_value(node.input_values[2], graph)).item()

    def run(x: Tensor) -> Tensor:
        where = range(x.ndim) if axes is None else [axis % x.ndim for axis in axes]
        half = len(pads) // 2
        for at, axis in enumerate(where):
            x = pad_axis(x, axis, pads[at], pads[at + half], mode, fill)
        return x

    return _result(node, run, 1)


def pad_axis(x: Tensor, axis: int, before: int, after: int, mode: str, fill: float) -> Tensor:
    """Pad one axis as ONNX's Pad does; negative sizes crop."""
    if before < 0 or after < 0:
        size = x.shape[axis] + min(before, 0) + min(after, 0)
        x = x.narrow(axis, max(-before, 0), size)
        before, after = max(before, 0), max(after, 0)
    if not before and not after:
        return x
    if mode == "constant":
        sizes = [0] * (2 * (x.ndim - axis - 1)) + [before, after]
        return functional.pad(x, sizes, value=fill)
    size = x.shape[axis]
    at = torch.arange(-before, size + after, device=x.device)
    if mode == "edge":
        at = at.clamp(0, size - 1)
    elif mode == "wrap":
        at = at % size
    else:  # reflect
        period = max(2 * (size - 1), 1)
        at = at.abs() % period
        at = torch.where(at >= size, period - at, at)
    return x.index_select(axis, at)


def _split(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    axis = node.attributes.get("axis", 0)
    sizes = _integers(node, graph, 1, "split")
    parts = len(node.output_values)

    def run(x: Tensor) -> Sequence[Tensor]:
        each = -(-x.shape[axis] // parts)
        return torch.split(x, sizes if sizes is not None else each, dim=axis)

    return _result(node, run if parts > 1 else (lambda x: run(x)[0]), 1)


def _upsample(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    scales = node.attributes.get("scales")
    if scales is None:
        scales = torch.as_tensor(get_const_value(node.input_values[1], graph)).tolist()
    mode = node.attributes.get("mode", "nearest")
    # Upsample counted pixels from their corners, and rounded down.
    return _result(
        node,
        lambda x: interpolate(x, list(scales), None, mode=mode, coordinates="asymmetric", nearest="floor"),
        1,
    )


def _resize(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    options = node.attributes
    old = len(node.input_values) == 2  # opset 10: data and scales
    coordinates = options.get("coordinate_transformation_mode", "asymmetric" if old else "half_pixel")
    if coordinates in ("tf_crop_and_resize", "half_pixel_symmetric") or options.get("antialias", 0):
        raise NotImplementedError(f"Resize with {coordinates}")
    if options.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise NotImplementedError("Resize that keeps the aspect ratio")
    given = [name for name in node.input_values[1 if old else 2 :] if name]
    by_size = len(node.input_values) > 3 and bool(node.input_values[3])
    if by_size is False and given and _is_empty(given[0], graph):
        raise NotImplementedError("Resize without scales")
    target = node.input_values[3] if by_size else given[0]
    axes = options.get("axes")

    def run(x: Tensor, target: Tensor) -> Tensor:
        where = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in axes]
        asked = dict(zip(where, target.tolist(), strict=True))
        # Axis 0 is the batch, whatever size the graph was exported at.
        sizes = [int(asked.get(axis, size)) if axis else size for axis, size in enumerate(x.shape)]
        return interpolate(
            x,
            None if by_size else [float(asked.get(axis, 1.0)) for axis in range(x.ndim)],
            sizes if by_size else None,
            mode=options.get("mode", "nearest"),
            coordinates=coordinates,
            nearest=options.get("nearest_mode", "floor" if old else "round_prefer_floor"),
            cubic=options.get("cubic_coeff_a", -0.75),
            exclude_outside=bool(options.get("exclude_outside", 0)),
        )

    return OperationConverterResult(
        Apply(run), OnnxMapping(inputs=(node.input_values[0], target), outputs=node.output_values)
    )


def _is_empty(name: str, graph: OnnxGraph) -> bool:
    return name in graph.initializers and graph.initializers[name].to_torch().numel() == 0


_REDUCE: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt(),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: x.logsumexp(axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
}


def _reduce(reduce: Callable[[Tensor, list[int], bool], Tensor]) -> Any:
    def make(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
        axes = _integers(node, graph, 1, "axes")
        keep = bool(node.attributes.get("keepdims", 1))
        idle = bool(node.attributes.get("noop_with_empty_axes", 0))

        def run(x: Tensor) -> Tensor:
            if not axes and idle:
                return x
            return reduce(x, list(axes) if axes else list(range(x.ndim)), keep)

        return _result(node, run, 1)

    return make


def _global_pool(function: Callable[[Tensor, list[int]], Tensor]) -> Any:
    def make(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
        return _result(node, lambda x: function(x, list(range(2, x.ndim))), 1)

    return make


def _group_norm(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    groups, epsilon = node.attributes["num_groups"], node.attributes.get("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if scale.numel() == x.shape[1]:
            return functional.group_norm(x, groups, scale, bias, epsilon)
        # Opset 18 had one scale a group; 21 corrected it to one a channel.
        each = x.shape[1] // groups
        return functional.group_norm(x, groups, scale.repeat_interleave(each), bias.repeat_interleave(each), epsilon)

    return _result(node, run)


def _slice(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    starts, ends = (_integers(node, graph, at, name) for at, name in ((1, "starts"), (2, "ends")))
    if starts is None or ends is None:
        raise NotImplementedError("Slice without bounds")
    if any(step != 1 for step in _integers(node, graph, 4, "steps") or ()):
        raise NotImplementedError("Slice in steps")
    axes = _integers(node, graph, 3, "axes") or list(range(len(starts)))

    def run(x: Tensor) -> Tensor:
        for axis, start, end in zip(axes, starts, ends, strict=True):
            first, last, _ = slice(start, end).indices(x.shape[axis])
            x = x.narrow(axis, first, max(last - first, 0))
        return x

    return _result(node, run, 1)


def _reshape(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    keep_zero = bool(node.attributes.get("allowzero", 0))

    def run(x: Tensor, target: Tensor | Sequence[int]) -> Tensor:
        sizes = [int(size) for size in target]
        if not keep_zero:
            sizes = [x.shape[at] if size == 0 else size for at, size in enumerate(sizes)]
        return x.reshape(sizes)

    if "shape" in node.attributes:
        fixed = [int(size) for size in node.attributes["shape"]]
        return _result(node, lambda x: run(x, fixed), 1)
    return _result(node, run)


def _trilu(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    upper = bool(node.attributes.get("upper", 1))
    at = 0
    if len(node.input_values) > 1 and node.input_values[1]:
        at = int(torch.as_tensor(get_const_value(node.input_values[1], graph)).item())
    return _result(node, lambda x: torch.triu(x, at) if upper else torch.tril(x, at), 1)


def _space_to_depth(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    block = node.attributes["blocksize"]

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        grid = x.reshape(n, c, h // block, block, w // block, block)
        return grid.permute(0, 3, 5, 1, 2, 4).reshape(n, c * block * block, h // block, w // block)

    return _result(node, run, 1)


def _depth_to_space(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    block, columns_first = node.attributes["blocksize"], node.attributes.get("mode", "DCR") == "CRD"

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if columns_first:
            return functional.pixel_shuffle(x, block)
        grid = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
        return grid.reshape(n, c // block**2, h * block, w * block)

    return _result(node, run, 1)


def _identity(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    return _result(node, lambda x: x, 1)


_OWN: dict[str, Any] = {
    "Mish": _elementwise(functional.mish),
    "Gelu": _gelu,
    "Swish": _swish,
    "Cosh": _elementwise(torch.cosh),
    "Sinh": _elementwise(torch.sinh),
    "Acosh": _elementwise(torch.acosh),
    "Asinh": _elementwise(torch.asinh),
    "Atanh": _elementwise(torch.atanh),
    "ThresholdedRelu": _thresholded_relu,
    "Shrink": _shrink,
    "Pad": _pad,
    "Split": _split,
    "Upsample": _upsample,
    "Resize": _resize,
    "GlobalMaxPool": _global_pool(lambda x, axes: x.amax(axes, keepdim=True)),
    "GlobalAveragePool": _global_pool(lambda x, axes: x.mean(axes, keepdim=True)),
    "GroupNormalization": _group_norm,
    "Slice": _slice,
    "Reshape": _reshape,
    "Trilu": _trilu,
    "SpaceToDepth": _space_to_depth,
    "DepthToSpace": _depth_to_space,
    "Dropout": _identity,
    **{name: _reduce(function) for name, function in _REDUCE.items()},
}
