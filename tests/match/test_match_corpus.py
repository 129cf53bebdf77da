"""All convolutions of students of real teachers are found: cut by us, pruned by Torch-Pruning, decomposed."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import foreign
import numpy as np
import onnx
import pytest
import torch

from xdonnx.budget import Budget, make_plan
from xdonnx.graph import Net, read_net
from xdonnx.matching import Matching, match, side
from xdonnx.methods.joint import producer_norms
from xdonnx.model import read_proto
from xdonnx.patch import Patch, cut

pytestmark = pytest.mark.corpus

TEACHERS = [
    "resnet20_cifar10_op17_bn", "resnet56_cifar10_op17_bn", "vgg16_half_cifar10_op17_bn", "squeezenet1_0_op13",
]  # fmt: skip


def images(net: Net, data: Path) -> dict[str, np.ndarray]:
    """Return CIFAR-10 images in roughly the teacher's range, enlarged by repetition where it wants larger ones."""
    (port,) = net.interface.inputs
    side_of = int((port.shape or (0, 0, 224))[2]) if isinstance((port.shape or (0, 0, ""))[2], int) else 224
    with np.load(data / "cifar10" / "cifar10_jpeg_fit.npz") as held:
        pixels = held["images"][: 64 if side_of < 100 else 8].astype(np.float32)
    pixels = pixels.transpose(0, 3, 1, 2) if pixels.shape[-1] == 3 else pixels
    times = -(-side_of // pixels.shape[2])
    larger = pixels.repeat(times, 2).repeat(times, 3)[:, :, :side_of, :side_of]
    return {port.name: (larger / 255 - 0.45) / 0.22}


def halved(net: Net) -> onnx.ModelProto:
    drop: list[int] = []
    for at, keep in make_plan(net, Budget("keep", 0.5)).channels.items():
        order = np.argsort(-producer_norms(net, net.groups[at]), kind="stable")
        drop += [int(net.groups[at].ids[unit]) for unit in order[keep:]]
    return cut(net, Patch({}, frozenset(drop)))


def found(net: Net, student: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> Matching:
    return match(side(net, inputs), side(read_net(student, {k: v.shape for k, v in inputs.items()}), inputs))


# Minutes alone.
SLOW = {("vgg16_half_cifar10_op17_bn", "tucker")}
CASES = [
    pytest.param(name, make, marks=[pytest.mark.paper] if (name, make) in SLOW else [])
    for name in TEACHERS
    for make in ("l1-norm", "spatial", "tucker", "separable")
]


@pytest.mark.parametrize(("name", "make"), CASES)
def test_every_layer_of_a_student_is_found_without_its_name(name: str, make: str, data: Path) -> None:
    proto = read_proto(data / "teachers" / f"{name}.onnx")
    inputs = images(read_net(proto), data)
    net = read_net(proto, {key: array.shape for key, array in inputs.items()})
    plain = cut(net, Patch())
    rows: dict[str, list[str]] = {}
    if make == "l1-norm":
        student = halved(net)
    else:
        factor: Callable[..., foreign.Factors] = getattr(foreign, make)
        student, rows = foreign.decomposed(plain, factor, 0.6)
    hidden, renamed = foreign.disguised(student)

    matching = found(net, hidden, inputs)

    wrong = [
        (pair.teacher, pair.student)
        for pair in matching.pairs
        if list(pair.student) != [renamed[part] for part in rows.get(pair.teacher, [pair.teacher])]
    ]
    print(f"\n{name} {make}: confidence {matching.confidence:.3f}, {len(net.layers)} layers, {len(wrong)} wrong")
    assert not wrong and not matching.alone and len(matching.pairs) == len(net.layers)


# Torch-Pruning does not know the padded shortcuts of these ResNets.
@pytest.mark.parametrize("name", TEACHERS[2:3])
def test_every_layer_of_a_student_of_torch_pruning_is_found(name: str, data: Path) -> None:
    pruning = pytest.importorskip("torch_pruning")
    onnx2torch = pytest.importorskip("onnx2torch")
    net = read_net(read_proto(data / "teachers" / f"{name}.onnx"))
    inputs = images(net, data)
    (key,) = inputs
    # Folded, so that every convolution has a bias to know it by: pruning keeps a part of it.
    module = onnx2torch.convert(cut(net, Patch())).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about how it is traced
        example = torch.tensor(inputs[key][:1])
        last = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)][-1:]
        importance = pruning.importance.MagnitudeImportance(p=1)
        pruner = pruning.pruner.MagnitudePruner(module, example, importance, pruning_ratio=0.3, ignored_layers=last)
        pruner.step()
        stream = io.BytesIO()
        torch.onnx.export(module, (example,), stream, dynamo=False, opset_version=17, input_names=[key])
    student = onnx.load_from_string(stream.getvalue())

    matching = found(net, student, inputs)

    # Torch keeps the order of execution: the layers of both files stand in the same order, and their shapes fit.
    theirs = list(read_net(student).layers)
    assert [pair.student for pair in matching.pairs] == [(name,) for name in theirs]
    assert len(matching.pairs) == len(net.layers) and not matching.alone
    print(f"\n{name} by Torch-Pruning: confidence {matching.confidence:.3f}, {len(theirs)} layers")
    assert min(pair.confidence for pair in matching.pairs) > 0.9
    assert any(len(pair.channels) < len(net.layers[pair.teacher].out_ids) for pair in matching.pairs)
