"""Folding keeps every answer and every name that a user can see."""

from __future__ import annotations

import nets
import onnx_ir as ir
import pytest
from helpers import same_answers, same_interface

from xdonnx.prepare import prepare

TAIL = "n = BatchNormalization <epsilon = 0.01> (c, s, h, m, v)\n  out = Relu (n)\n}"
LAYERS = {
    "conv": "float[6,3,3,3] w, float[6] b, float[6] s, float[6] h, float[6] m, float[6] v) => (float[N,6,a,b] out) {"
    "\n  c = Conv (image, w, b)\n  " + TAIL,
    "grouped transposed": "float[3,2,3,3] w, float[6] s, float[6] h, float[6] m, float[6] v) => (float[N,6,a,b] out) {"
    "\n  c = ConvTranspose <group = 3, strides = [2,2]> (image, w)\n  " + TAIL,
    "transposed": "float[3,6,3,3] w, float[6] b, float[6] s, float[6] h, float[6] m, float[6] v) =>"
    " (float[N,6,a,b] out) {\n  c = ConvTranspose (image, w, b)\n  " + TAIL,
}


@pytest.mark.parametrize("kind", LAYERS)
def test_batch_normalization_disappears_into_the_layer_before_it(kind: str) -> None:
    teacher = nets.from_text("\ng (float[N,3,6,6] image, " + LAYERS[kind])
    model = prepare(teacher)
    assert [node.op_type for node in model.graph] == [teacher.graph.node[0].op_type, "Relu"]
    assert model.graph.node(0).outputs[0].name == "n"
    folded = ir.to_proto(model)
    same_answers(teacher, folded, nets.samples(teacher), tolerance=2e-6)
    same_interface(teacher, folded)


def test_a_bias_of_one_number_is_a_layers_own_and_a_limit_of_one_number_is_none() -> None:
    teacher = nets.from_text("""
g (float[N,3,6,6] image, float[1,3,1,1] w, float[1,3,1,1] v, float[1] b, float low)
  => (float[N,1,6,6] out, float[N,1,6,6] also) {
  c = Conv (image, w, b)
  d = Conv (image, v, b)
  out = Clip (c, low)
  also = Clip (d, low)
}""")
    model = prepare(teacher)
    biases = [node.inputs[2].name for node in model.graph if node.op_type == "Conv"]
    limits = {node.inputs[1].name for node in model.graph if node.op_type == "Clip"}
    assert len(set(biases)) == 2 and biases[0] == "b" and limits == {"low"}
    same_answers(teacher, ir.to_proto(model), nets.samples(teacher), tolerance=2e-6)


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("first", ["layer", "other"])
def test_a_bias_that_another_node_reads_too_is_the_layers_own(first: str, count: int) -> None:
    """A refit of the bias must not change a term of the same value, whichever of the two comes first."""
    nodes = ["out = Conv (image, w, b)", "also = Add (terms, b)"]
    body = "\n  ".join(nodes if first == "layer" else reversed(nodes))
    teacher = nets.from_text(
        f"""
g (float[N,3,6,6] image, float[N,{count}] terms, float[{count},3,1,1] w, float[{count}] b)
  => (float[N,{count},6,6] out, float[N,{count}] also) {{
  {body}
}}""",
        images=("image", "terms"),
    )
    model = prepare(teacher)
    read = {node.op_type: {value.name for value in node.inputs if value} for node in model.graph}
    assert not read["Conv"] & read["Add"]
    same_answers(teacher, ir.to_proto(model), nets.samples(teacher), tolerance=2e-6)


def test_batch_normalization_of_a_value_with_two_readers_stays() -> None:
    teacher = nets.from_text("""
g (float[N,3,6,6] image, float[6,3,3,3] w, float[6] s, float[6] h, float[6] m, float[6] v) => (float[N,6,4,4] out) {
  c = Conv (image, w)
  n = BatchNormalization (c, s, h, m, v)
  out = Add (n, c)
}""")
    model = prepare(teacher)
    assert [node.op_type for node in model.graph] == ["Conv", "BatchNormalization", "Add"]


def test_the_output_of_the_graph_may_be_a_batch_normalization() -> None:
    teacher = nets.from_text("""
g (float[N,3,6,6] image, float[6,3,3,3] w, float[6] s, float[6] h, float[6] m, float[6] v) => (float[N,6,4,4] out) {
  c = Conv (image, w)
  out = BatchNormalization (c, s, h, m, v)
}""")
    folded = ir.to_proto(prepare(teacher))
    assert [node.op_type for node in folded.graph.node] == ["Conv"]
    same_answers(teacher, folded, nets.samples(teacher), tolerance=2e-6)
    same_interface(teacher, folded)


def test_initializers_listed_as_inputs_are_no_inputs_of_the_caller() -> None:
    teacher = nets.build("plain", opset=11)
    for tensor in teacher.graph.initializer:
        value = teacher.graph.input.add(name=tensor.name)
        value.type.tensor_type.elem_type = tensor.data_type
        for size in tensor.dims:
            value.type.tensor_type.shape.dim.add().dim_value = size
    teacher.ir_version = 3
    folded = ir.to_proto(prepare(teacher))
    assert [value.name for value in folded.graph.input] == ["image"]
    same_answers(teacher, folded, nets.samples(nets.build("plain")))
