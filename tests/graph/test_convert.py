"""Torch answers as onnxruntime does, node by node, or onnxruntime runs the node."""

from __future__ import annotations

import sys

import nets
import numpy as np
import onnx
import pytest
import torch

from xdonnx.convert import Step, call, checked, convert
from xdonnx.errors import MachineError
from xdonnx.events import Event
from xdonnx.graph import read_net
from xdonnx.runtime import answer, open_session
from xdonnx.walk import chunked, walk

CPU = torch.device("cpu")


def through_torch(model: onnx.ModelProto, rows: int = 5) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Run a model through the walk; return its outputs and the steps that onnxruntime ran."""
    net = read_net(model)
    inputs = nets.samples(model, rows)
    program = checked(net, convert(net, CPU), chunked(net, inputs, most=3)[0])
    made, _ = walk(net, program, inputs, lambda stop: None)
    return {name: torch.cat(chunks).numpy() for name, chunks in made.items()}, program.foreign


def agrees(model: onnx.ModelProto, tolerance: float = 1e-4) -> tuple[str, ...]:
    made, foreign = through_torch(model)
    truth = answer(open_session(model), nets.samples(model, 5))
    for name, expected in truth.items():
        assert made[name].shape == expected.shape
        assert np.abs(made[name] - expected).max() <= tolerance * max(1.0, np.abs(expected).max())
    return foreign


@pytest.mark.parametrize("opset", [11, 13, 18, 22])
@pytest.mark.parametrize("name", nets.ALL)
def test_the_walk_answers_as_onnxruntime(name: str, opset: int) -> None:
    if name == "split" and opset < 13:
        pytest.skip("Split took its sizes as an attribute then")
    assert agrees(nets.build(name, opset=opset)) == ()


def after_conv(body: str, shape: str = "N,4,h,w", opset: int = 18, **integers: list[int]) -> onnx.ModelProto:
    """Wrap operators that read `x` and make `out`, so that a convolution stands before them."""
    text = f"g (float[N,3,6,6] image, float[4,3,3,3] w) => (float[{shape}] out) {{\n x = Conv (image, w)\n {body} }}"
    return nets.from_text("\n" + text, opset=opset, integers=integers)


@pytest.mark.parametrize("coordinates", ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"])
@pytest.mark.parametrize(
    ("mode", "more"),
    [
        ("nearest", 'nearest_mode = "floor"'),
        ("nearest", 'nearest_mode = "ceil"'),
        ("nearest", 'nearest_mode = "round_prefer_floor"'),
        ("nearest", 'nearest_mode = "round_prefer_ceil"'),
        ("linear", "exclude_outside = 0"),
        ("cubic", "cubic_coeff_a = -0.5"),
        ("cubic", "exclude_outside = 1"),
    ],
)
@pytest.mark.parametrize("sizes", [[1, 4, 7, 9], [1, 4, 3, 2]])
def test_resize_in_every_mode(coordinates: str, mode: str, more: str, sizes: list[int]) -> None:
    attributes = f'mode = "{mode}", coordinate_transformation_mode = "{coordinates}", {more}, axes = [2,3]'
    model = after_conv(f"out = Resize <{attributes}> (x, , , sizes)", sizes=sizes[2:])
    assert agrees(model) == ()


def test_resize_by_scales() -> None:
    text = """
g (float[N,3,6,6] image, float[4,3,3,3] w) => (float[N,4,h,w2] out) {
  x = Conv (image, w)
  scales = Constant <value = float[4] {1.0, 1.0, 2.0, 1.5}> ()
  out = Resize <mode = "linear"> (x, , scales)
}"""
    assert agrees(nets.from_text(text, opset=18)) == ()


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pad_in_every_mode(mode: str) -> None:
    model = after_conv(f'out = Pad <mode = "{mode}"> (x, pads, , axes)', opset=19, pads=[1, 2, 3, 0], axes=[2, 3])
    assert agrees(model) == ()


@pytest.mark.parametrize(
    "operator",
    [
        "Mish (x)", "Gelu (x)", 'Gelu <approximate = "tanh"> (x)', "HardSwish (x)",
        "ThresholdedRelu <alpha = 0.3> (x)", "Shrink <bias = 0.1, lambd = 0.2> (x)", "Softplus (x)", "Asinh (x)",
        "GlobalMaxPool (x)", "GlobalAveragePool (x)", "ReduceMean <keepdims = 1> (x, axes)",
        "ReduceL2 <keepdims = 1> (x, axes)", "ReduceSumSquare (x, axes)",
        "ReduceLogSumExp (x, axes)", "ReduceMax (x, axes)", "ReduceMin (x, axes)", "ReduceL1 (x, axes)",
        "SpaceToDepth <blocksize = 2> (x)", "DepthToSpace <blocksize = 2> (x)",
        'DepthToSpace <blocksize = 2, mode = "CRD"> (x)', "Trilu (x)",
        "AveragePool <kernel_shape = [2,2], ceil_mode = 1> (x)", "LRN <size = 3> (x)",
    ],
)  # fmt: skip
def test_operators_that_onnx2torch_lacks_or_has_in_other_versions(operator: str) -> None:
    assert agrees(after_conv(f"out = {operator}", opset=20, axes=[2, 3])) == ()


def test_a_node_that_torch_cannot_run_is_run_in_onnxruntime() -> None:
    assert agrees(after_conv("out = Hardmax <axis = 1> (x)")) == ("out",)


def test_a_node_that_answers_otherwise_in_torch_goes_to_onnxruntime_and_says_so() -> None:
    model = after_conv("y = Relu (x)\n out = Sigmoid (y)")
    net = read_net(model)
    program = convert(net, CPU)
    wrong = [
        s if s.name != "y" else Step(s.name, s.op, s.inputs, s.outputs, torch.nn.Tanh(), None) for s in program.steps
    ]
    object.__setattr__(program, "steps", tuple(wrong))
    events: list[Event] = []

    mended = checked(net, program, nets.samples(model, 2), events.append)

    assert mended.foreign == ("y",)
    assert ["Relu 'y' answers otherwise" in e.text for e in events if e.level == "warning"] == [True]
    step = next(s for s in mended.steps if s.name == "y")
    (made,) = call(step, [torch.tensor([[[[-1.0, 2.0]]]])])
    assert made.tolist() == [[[[0.0, 2.0]]]]


def test_a_torchvision_that_does_not_fit_torch_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    net = read_net(nets.build("plain"))
    monkeypatch.setitem(sys.modules, "onnx2torch.onnx_graph", None)
    with pytest.raises(MachineError, match="pip install --upgrade torch torchvision"):
        convert(net, CPU)


def test_gradients_reach_every_convolution_through_converted_nodes() -> None:
    model = after_conv("y = Mish (x)\n z = GlobalMaxPool (y)\n out = Flatten (z)", shape="N,4")
    net = read_net(model)
    program = checked(net, convert(net, CPU), nets.samples(model, 2))
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    made = x
    for step in program.steps[1:]:
        (made,) = call(step, [made])
    made.sum().backward()
    assert x.grad is not None
    assert int((x.grad != 0).sum()) == 8  # the largest of each channel


def test_fixed_batches_are_walked_in_their_own_size() -> None:
    model = nets.build("flatten")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    net = read_net(model)
    sizes = [len(batch["image"]) for batch in chunked(net, nets.samples(nets.build("flatten"), 5))]
    assert sizes == [2, 2]  # the fifth row fills no batch
