"""All convolutions of students of real teachers are found: cut by us, pruned by Torch-Pruning, decomposed."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import foreign
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from xdonnx.budget import Budget, make_plan
from xdonnx.decomposition import decomposed, wanted
from xdonnx.errors import ModelError
from xdonnx.graph import Net, read_net
from xdonnx.matching import Matching, check_alike, match, side
from xdonnx.methods.joint import producer_norms
from xdonnx.model import read_proto
from xdonnx.patch import Patch, cut, kept

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


def halved(net: Net) -> tuple[onnx.ModelProto, Patch]:
    drop: list[int] = []
    for at, keep in make_plan(net, Budget("keep", 0.5)).channels.items():
        order = np.argsort(-producer_norms(net, net.groups[at]), kind="stable")
        drop += [int(net.groups[at].ids[unit]) for unit in order[keep:]]
    patch = Patch({}, frozenset(drop))
    return cut(net, patch), patch


def thinned(net: Net, inputs: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Return the student that Torch-Pruning makes: three tenths of the channels go, by the l1 norm."""
    pruning = pytest.importorskip("torch_pruning")
    onnx2torch = pytest.importorskip("onnx2torch")
    (key,) = inputs
    # Folded, so that every convolution has a bias to know it by: pruning keeps a part of it.
    module = onnx2torch.convert(cut(net, Patch())).eval()
    layers = [one for one in module.modules() if isinstance(one, (torch.nn.Conv2d, torch.nn.Linear))]
    # It does not know the padded shortcuts of these ResNets: what is added to them stays, every other layer.
    stays = [*layers[::2], layers[-1]] if any(node.op_type == "Pad" for node in net.source.graph.node) else layers[-1:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about how it is traced
        example = torch.tensor(inputs[key][:1])
        importance = pruning.importance.MagnitudeImportance(p=1)
        pruning.pruner.MagnitudePruner(module, example, importance, pruning_ratio=0.3, ignored_layers=stays).step()
        stream = io.BytesIO()
        port = net.interface.outputs[0].name
        torch.onnx.export(
            module, (example,), stream, dynamo=False, opset_version=17, input_names=[key], output_names=[port],
            dynamic_axes={key: {0: "n"}, port: {0: "n"}},
        )  # fmt: skip
    return onnx.load_from_string(stream.getvalue())


def taken_apart(teacher: Path, net: Net, folder: Path, scheme: str) -> tuple[onnx.ModelProto, dict[str, list[str]]]:
    """Return the student that `xdonnx decompose` makes, and {layer: its row} of the layers that it took apart."""
    sizes = {port.name: net.shapes[port.name] for port in net.interface.inputs}
    made = decomposed(teacher, folder / "low.onnx", wanted(scheme=scheme, macs=0.7), sizes=sizes)
    student = read_proto(folder / "low.onnx")
    layers, rows = read_net(student, sizes).layers, {}
    for one in made.layers:
        row = [one.layer]
        # The last piece has the layer's name, and those before it names that the teacher has not.
        while layers[row[0]].input not in net.layers and layers[row[0]].input in layers:
            row.insert(0, layers[row[0]].input)
        assert len(row) > 1
        rows[one.layer] = row
    return student, rows


def found(net: Net, student: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> Matching:
    return match(side(net, inputs), side(read_net(student, {k: v.shape for k, v in inputs.items()}), inputs))


def teacher_of(name: str, data: Path) -> tuple[Net, dict[str, np.ndarray]]:
    proto = read_proto(data / "teachers" / f"{name}.onnx")
    inputs = images(read_net(proto), data)
    return read_net(proto, {key: array.shape for key, array in inputs.items()}), inputs


# Half a minute and more, or nothing new.
SLOW = {
    ("vgg16_half_cifar10_op17_bn", "tucker"),
    *itertools.product(TEACHERS[1:], ("decompose spatial", "decompose channel")),
}
OURS = ("l1-norm", "decompose", "decompose spatial", "decompose channel")
CASES = [
    pytest.param(name, make, marks=[pytest.mark.paper] if (name, make) in SLOW else [])
    for name in TEACHERS
    for make in (*OURS, "Torch-Pruning", "spatial", "tucker", "separable")
]


@pytest.mark.parametrize(("name", "make"), CASES)
def test_every_layer_of_a_student_is_found_with_its_name_and_without(
    name: str, make: str, data: Path, tmp_path: Path
) -> None:
    net, inputs = teacher_of(name, data)
    rows, patch = {layer: [layer] for layer in net.layers}, None
    if make == "l1-norm":
        student, patch = halved(net)
    elif make == "Torch-Pruning":
        student = thinned(net, inputs)
        # Torch keeps the order of execution: the layers of both files stand in the same order, and their shapes fit.
        theirs = read_net(student, {key: array.shape for key, array in inputs.items()}).layers
        rows = {layer: [one] for layer, one in zip(net.layers, theirs, strict=True)}
    elif make in OURS:
        scheme = make.partition(" ")[2] or "auto"
        student, made = taken_apart(data / "teachers" / f"{name}.onnx", net, tmp_path, scheme)
        rows |= made
    else:
        factor: Callable[..., foreign.Factors] = getattr(foreign, make)
        student, made = foreign.decomposed(cut(net, Patch()), factor, 0.6)
        rows |= made
    hidden, renamed = foreign.disguised(student)
    disguises = [(hidden, {layer: [renamed[part] for part in row] for layer, row in rows.items()})]
    if make in OURS or make == "Torch-Pruning":
        disguises.append((student, rows))

    for file, truth in disguises:
        matching = found(net, file, inputs)

        wrong = [pair for pair in matching.pairs if list(pair.student) != truth[pair.teacher]]
        how = "as it is" if file is student else "renamed, shuffled"
        several = sum(len(pair.student) > 1 for pair in matching.pairs)
        print(
            f"\n{name} {make}, {how}: confidence {matching.confidence:.3f}, least "
            f"{min(pair.confidence for pair in matching.pairs):.3f}, {len(net.layers)} layers, {several} as rows, "
            f"{len(net.layers) - len(matching.pairs) + len(wrong)} wrong"
        )
        assert not wrong and not matching.alone and len(matching.pairs) == len(net.layers)
        check_alike(matching, ("teacher", "student"), "")
        if patch is not None:
            keep = kept(net, patch)
            for pair in matching.pairs:
                assert pair.channels.tolist() == np.flatnonzero(keep[net.layers[pair.teacher].out_ids]).tolist()
        if make == "Torch-Pruning":
            assert min(pair.confidence for pair in matching.pairs) > 0.9
            assert any(len(pair.channels) < len(net.layers[pair.teacher].out_ids) for pair in matching.pairs)


@pytest.mark.parametrize(("name", "other"), list(itertools.permutations(TEACHERS[:3], 2)))
def test_a_student_of_another_teacher_is_refused(name: str, other: str, data: Path) -> None:
    net, inputs = teacher_of(name, data)
    stranger, theirs = teacher_of(other, data)
    student, _ = halved(stranger)
    # Under the teacher's own name of the input, or it would be refused for that.
    old, new = next(iter(theirs)), next(iter(inputs))
    student.graph.input[0].name = new
    for node in student.graph.node:
        for at, read in enumerate(node.input):
            node.input[at] = new if read == old else read

    refused(net, student, inputs, f"{other}, halved")


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_of_the_same_architecture_with_other_weights_is_refused(name: str, data: Path) -> None:
    net, inputs = teacher_of(name, data)
    student, _ = halved(net)
    random = np.random.default_rng(0)
    for tensor in student.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim > 1:
            drawn = random.permutation(array.ravel()).reshape(array.shape)
            tensor.CopyFrom(numpy_helper.from_array(drawn, tensor.name))

    refused(net, student, inputs, "the same, its weights shuffled")


def refused(net: Net, student: onnx.ModelProto, inputs: dict[str, np.ndarray], what: str) -> None:
    matching = found(net, student, inputs)
    print(f"\n{what}, against {len(net.layers)} layers: confidence {matching.confidence:.3f}")
    with pytest.raises(ModelError, match="does not look like a student of"):
        check_alike(matching, ("teacher", "student"), "")
