"""Seventeen idioms of CNNs through both exporters of PyTorch, at every opset that they write."""

from __future__ import annotations

import io
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import same_answers, same_interface
from torch import Tensor, nn
from torch.nn import functional

from xdonnx.convert import call, checked, convert, layer_tensors, run_layer
from xdonnx.graph import read_net
from xdonnx.model import read_proto
from xdonnx.patch import Patch, cut, masked
from xdonnx.runtime import answer, open_session
from xdonnx.walk import walk


class Idiom(nn.Module):
    """A stem, the idiom between two convolutions, and a classifier."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8) if name == "group norm" else nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.part = nn.Conv2d(4, 4, 3, padding=1)
        self.wide = nn.Conv2d(8, 16, 1)
        self.narrow = nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        """Run the idiom."""
        x = functional.relu(self.norm(self.stem(image)))
        y = self.middle(x)
        if self.name == "global max pool":
            return self.head(functional.adaptive_max_pool2d(y, 1).flatten(1))
        if self.name == "average pool":
            return self.head(functional.adaptive_avg_pool2d(functional.avg_pool2d(y, 2), 1).flatten(1))
        return self.head(y.mean((2, 3)))

    def middle(self, x: Tensor) -> Tensor:
        """Apply what the idiom is about."""
        name = self.name
        if name == "residual":
            return functional.relu(self.body(x) + x)
        if name == "squeeze and excitation by pooling":
            gate = self.excite(functional.relu(self.squeeze(functional.adaptive_avg_pool2d(x, 1))))
            return self.body(x * torch.sigmoid(gate))
        if name == "squeeze and excitation by mean":
            gate = self.excite(functional.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
            return self.body(x * functional.hardsigmoid(gate))
        if name == "nearest resize":
            return self.body(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        if name == "bilinear resize":
            return self.body(functional.interpolate(x, size=(12, 12), mode="bilinear", align_corners=False))
        if name == "pad":
            return self.body(functional.pad(x, (1, 2, 0, 1)))
        if name == "chunk":
            left, right = x.chunk(2, 1)
            return self.body(torch.cat([left, self.part(right)], 1))
        if name == "pixel shuffle":
            return self.narrow(functional.pixel_shuffle(self.wide(x), 2))
        activations = {
            "hard-swish": functional.hardswish,
            "mish": functional.mish,
            "silu": functional.silu,
            "gelu": functional.gelu,
            "relu6": functional.relu6,
        }
        return self.body(activations.get(name, functional.relu)(self.body(x)))


IDIOMS = [
    "plain", "residual", "squeeze and excitation by pooling", "squeeze and excitation by mean", "nearest resize",
    "bilinear resize", "pad", "chunk", "hard-swish", "mish", "silu", "gelu", "average pool", "group norm",
    "pixel shuffle", "global max pool", "relu6",
]  # fmt: skip


def network(name: str) -> Idiom:
    torch.manual_seed(0)
    net = Idiom(name)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean)
    return net.eval()


def check(model: onnx.ModelProto) -> None:
    """Assert that a file converts whole, agrees, has gradients everywhere, and is cut without harm."""
    net = read_net(model)
    inputs = {"image": np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)}
    program = checked(net, convert(net, torch.device("cpu")), inputs)
    assert program.foreign == ()
    made, _ = walk(net, program, inputs, lambda stop: None)
    (expected,) = answer(open_session(model), inputs).values()
    assert np.abs(torch.cat(made[program.outputs[0]]).numpy() - expected).max() <= 1e-4

    values = {"image": torch.tensor(inputs["image"]), **program.constants}
    weights = []
    for step in program.steps:
        if step.layer is not None:
            weight, bias = layer_tensors(net, step.layer, torch.device("cpu"))
            if step.layer.kernel:
                weights.append(weight.requires_grad_())
            outputs: tuple[Tensor, ...] = (run_layer(step.layer, values[step.layer.input], weight, bias),)
        else:
            outputs = call(step, [values[name] if name else None for name in step.inputs])
        values.update(zip(step.outputs, outputs, strict=False))
    values[program.outputs[0]].square().sum().backward()
    assert weights and all(w.grad is not None and float(w.grad.abs().max()) > 0 for w in weights)

    drop = frozenset(int(group.ids[0]) for group in net.groups)
    silenced, student = masked(net, Patch({}, drop)), cut(net, Patch({}, drop))
    same_answers(silenced, student, inputs)
    same_interface(model, student)


@pytest.mark.parametrize("opset", [9, 11, 13, 17])
@pytest.mark.parametrize("name", IDIOMS)
def test_the_legacy_exporter(name: str, opset: int) -> None:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces its end
        try:
            torch.onnx.export(
                network(name),
                (torch.randn(2, 3, 8, 8),),
                stream,
                dynamo=False,
                opset_version=opset,
                input_names=["image"],
                output_names=["out"],
                dynamic_axes={"image": {0: "n"}, "out": {0: "n"}},
            )
        except (torch.onnx.errors.UnsupportedOperatorError, TypeError):
            pytest.skip(f"not written at opset {opset}")
    check(onnx.load_from_string(stream.getvalue()))


@cache
def traced(name: str) -> torch.export.ExportedProgram:
    """Trace a network once for all opsets: that is most of what the default exporter takes its time for."""
    free = {"image": {0: torch.export.Dim("n")}}
    return torch.export.export(network(name), (torch.randn(2, 3, 8, 8),), dynamic_shapes=free)


@pytest.mark.parametrize("opset", [18, 20, 22, 23])
@pytest.mark.parametrize("name", IDIOMS)
def test_the_default_exporter(name: str, opset: int, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch's own exporter
        torch.onnx.export(
            traced(name),
            f=tmp_path / "net.onnx",
            dynamo=True,
            opset_version=opset,
            input_names=["image"],
            output_names=["out"],
            verbose=False,
        )
    check(read_proto(tmp_path / "net.onnx"))
