"""Models that cannot be right: one message that names node and reason, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nets
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from xdonnx.errors import ModelError
from xdonnx.graph import read_net
from xdonnx.model import read_proto


def _set(model: onnx.ModelProto, name: str, *shape: int) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(shape, np.float32), name))


def cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "p1"


def missing_initializer(model: onnx.ModelProto) -> None:
    del model.graph.initializer[0]


def unknown_domain(model: onnx.ModelProto) -> None:
    model.graph.node[1].domain, model.graph.node[1].op_type = "acme.ops", "Magic"
    model.opset_import.add(domain="acme.ops", version=1)


def shape_mismatch(model: onnx.ModelProto) -> None:
    _set(model, "w2", 6, 7, 3, 3)


def opset_from_the_future(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 99


def empty_weight(model: onnx.ModelProto) -> None:
    _set(model, "w1", 0, 3, 3, 3)


def empty_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 0


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (cycle, "Conv 'c1' reads 'p1' before it is made"),
        (missing_initializer, "Conv 'c1' reads 'w1', which nothing makes"),
        (unknown_domain, "Magic 'r1' cannot be computed"),
        (shape_mismatch, "Conv 'out' reads 8 channels, and its weight is made for 7"),
        (opset_from_the_future, "opset 99"),
        (empty_weight, "Conv 'c1' has a weight of shape \\[0, 3, 3, 3\\]"),
        (empty_input, "input 'image' has an axis of size 0"),
    ],
)
def test_a_broken_model_is_named_with_its_reason(
    damage: Callable[[onnx.ModelProto], None], text: str, tmp_path: Path
) -> None:
    model = nets.build("plain")
    damage(model)
    (tmp_path / "broken.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=text):
        read_net(read_proto(tmp_path / "broken.onnx"))
