"""Costs against models that count for themselves: of ones alone, every product adds one to the output."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tiny
from onnx import TensorProto, helper, numpy_helper, parser

from xdonnx.cost import LayerCost, measure_cost
from xdonnx.errors import JobError
from xdonnx.runtime import answer, open_session

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'

# Without pads, so that every multiplication is real. Name: inputs, outputs and node; shape of x and of w.
PRODUCTS = {
    "conv": ("y = Conv (x, w)", (2, 3, 9, 8), (4, 3, 3, 2)),
    "strided dilated conv": ("y = Conv <strides = [2,1], dilations = [1,2]> (x, w)", (1, 3, 9, 8), (4, 3, 3, 2)),
    "grouped conv": ("y = Conv <group = 3> (x, w)", (1, 6, 7, 7), (9, 2, 3, 3)),
    "depthwise conv": ("y = Conv <group = 6> (x, w)", (1, 6, 7, 7), (6, 1, 3, 3)),
    "one axis": ("y = Conv (x, w)", (1, 4, 20), (5, 4, 7)),
    "three axes": ("y = Conv (x, w)", (1, 2, 5, 6, 4), (3, 2, 2, 3, 1)),
    "transposed conv": ("y = ConvTranspose <strides = [2,2]> (x, w)", (2, 3, 4, 5), (3, 6, 3, 3)),
    "grouped transposed conv": ("y = ConvTranspose <group = 2> (x, w)", (1, 4, 4, 5), (4, 3, 2, 2)),
    "gemm": ("y = Gemm (x, w)", (3, 7), (7, 5)),
    "gemm turned": ("y = Gemm <transA = 1, transB = 1> (x, w)", (7, 3), (5, 7)),
    "matmul": ("y = MatMul (x, w)", (2, 4, 3, 7), (7, 5)),
    "wide matmul": ("y = MatMul (x, w)", (3, 40), (40, 60)),
    "vector": ("y = MatMul (x, w)", (7,), (7, 5)),
    "dot": ("y = MatMul (x, w)", (7,), (7,)),
}


def sizes(shape: tuple[int, ...]) -> str:
    return ",".join(str(size) for size in shape)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("name", PRODUCTS)
def test_macs_are_the_sum_over_the_output_of_ones(name: str, constant: bool) -> None:
    node, x, w = PRODUCTS[name]
    rank = {"x": np.ones(x, np.float32), "w": np.ones(w, np.float32)}
    second = "" if constant else f", float[{sizes(w)}] w"
    text = f"{HEAD} g (float[{sizes(x)}] x{second}) => (float[*] y) {{ {node} }}".replace("float[*]", "float")
    proto = tiny.with_weights(text, {"w": rank.pop("w")} if constant else {})

    cost = measure_cost(proto)

    products = int(answer(open_session(proto), rank)["y"].sum())
    assert cost.macs == products
    op = proto.graph.node[0].op_type
    assert cost.layers == {"y": LayerCost(op, products, int(np.prod(w)) if constant else 0)}
    assert cost.unknown == ()


def test_pads_count_like_any_position() -> None:
    proto = tiny.classifier()
    assert measure_cost(proto).layers["c"].macs == 6 * 6 * 8 * 3 * 3 * 3
    assert measure_cost(proto).macs == 6 * 6 * 8 * 3 * 3 * 3 + 8 * 5


def test_a_free_batch_counts_one_sample_and_shapes_say_otherwise() -> None:
    proto = tiny.classifier()
    assert measure_cost(proto, {"image": (7, 3, 6, 6)}).macs == 7 * measure_cost(proto).macs


def test_parameters_are_all_floating_weights_once_wherever_they_stand() -> None:
    text = f"""{HEAD} g (float[N,4] x) => (float[N,4] y) {{
      k = Constant <value = float[4,4] {{1,0,0,0, 0,2,0,0, 0,0,0,0, 0,0,0,3}}> ()
      s = Constant <value_float = 2.0> ()
      i = Constant <value = int64[1] {{0}}> ()
      a = MatMul (x, w)
      b = MatMul (a, w)
      c = MatMul (b, k)
      y = Mul (c, s)
    }}"""
    weight = np.arange(16, dtype=np.float32).reshape(4, 4)
    proto = tiny.with_weights(text, {"w": weight, "axes": np.array([1, 2])})

    cost = measure_cost(proto)

    assert (cost.params, cost.nonzero) == (16 + 16 + 1, 15 + 3 + 1)
    assert {name: layer.params for name, layer in cost.layers.items()} == {"a": 16, "b": 16, "c": 16}


def test_half_precision_weights_count() -> None:
    proto = tiny.with_weights(
        f"{HEAD} g (float16[N,4] x) => (float16[N,2] y) {{ y = MatMul (x, w) }}",
        {"w": np.array([[0, 1]] * 4, np.float16)},
    )
    brain = helper.make_tensor("brain", TensorProto.BFLOAT16, [3], [0.0, 1.5, 2.0])
    proto.graph.initializer.append(brain)
    assert (measure_cost(proto).params, measure_cost(proto).nonzero) == (11, 6)


def test_sparse_weights_count_in_full_as_parameters_and_by_their_values_as_nonzero() -> None:
    proto = parser.parse_model(f"{HEAD} g (float[N,4] x) => (float[N,3] y) {{ y = MatMul (x, w) }}")
    values = numpy_helper.from_array(np.array([5.0, 7.0], np.float32), "w")
    indices = numpy_helper.from_array(np.array([2, 9]), "w_indices")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 3]))
    cost = measure_cost(proto)
    assert (cost.params, cost.nonzero, cost.macs) == (12, 2, 12)


def test_weights_in_subgraphs_count_and_their_products_are_listed_not_guessed() -> None:
    proto = tiny.with_weights(
        f"""{HEAD} g (float[N,4] x, bool flag) => (float[N,2] y) {{
          y = If (flag) <
            then_branch = left () => (float[N,2] a) {{
              m = Constant <value = float[4,2] {{1,1,1,1,1,1,1,0}}> ()
              a = MatMul (x, m)
            }},
            else_branch = right () => (float[N,2] b) {{ b = MatMul (x, w) }}
          >
        }}""",
        {"w": np.ones((4, 2), np.float32)},
    )
    cost = measure_cost(proto)
    assert (cost.params, cost.nonzero) == (16, 15)
    assert cost.macs == 0 and cost.unknown == ("y",)


def test_products_within_functions_count() -> None:
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[N,4] x) => (float[N,3] y) { y = local.double (x, w) }
        <domain: "local", opset_import: ["" : 17]>
        double (a, b) => (c) { m = MatMul (a, b)  c = Add (m, m) }"""
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((4, 3), np.float32), "w"))
    assert measure_cost(proto).macs == 12


def test_free_sizes_leave_a_node_unknown_until_they_are_given() -> None:
    text = tiny.CLASSIFIER.replace("[N,3,6,6]", "[N,3,H,W]")
    proto = tiny.classifier(text=text)

    cost = measure_cost(proto)

    assert cost.unknown == ("c",) and cost.layers["c"].macs is None and cost.macs == 40
    given = measure_cost(proto, {"image": (1, 3, 5, 9)})
    assert given.unknown == () and given.layers["c"].macs == 5 * 9 * 8 * 27


def test_a_batch_that_an_exporter_wrote_as_minus_one_is_free() -> None:
    proto = tiny.classifier()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = -1
    assert measure_cost(proto).unknown == ("c",)


@pytest.mark.parametrize(("ir", "opset"), [(8, 17), (3, 9)])
def test_sizes_that_the_graph_computes_are_followed(ir: int, opset: int) -> None:
    # As exported: the pads of a shortcut are concatenated, and a Reshape takes its size from the input's.
    axes, one = ("", ", zero") if opset >= 13 else (" <axes = [0]>", "")
    pad = "p = Pad (x, pads)" if opset >= 11 else "p = Identity (x)"
    text = f"""<ir_version: {ir}, opset_import: ["" : {opset}]>
    g (float[N,4,6] x) => (float[N,K] y) {{
      zero = Constant <value = int64[1] {{0}}> ()
      half = Constant <value = int64[2] {{1, 2}}> ()
      count = Constant <value = int64[1] {{2}}> ()
      rest = ConstantOfShape <value = int64[1] {{0}}> (count)
      twice = Concat <axis = 0> (rest, zero)
      pads = Concat <axis = 0> (twice, zero, half)
      {pad}
      s = Shape (p)
      first = Constant <value = int64 {{0}}> ()
      n = Gather (s, first)
      row = Unsqueeze{axes} (n{one})
      minus = Constant <value = int64[1] {{-1}}> ()
      shape = Concat <axis = 0> (row, minus)
      f = Reshape (p, shape)
      y = MatMul (f, w)
    }}"""
    width = (4 + 1) * (6 + 2) if opset >= 11 else 4 * 6
    proto = tiny.with_weights(text, {"w": np.ones((width, 3), np.float32)})
    if ir < 4:
        proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [width, 3]))
    run = answer(open_session(proto), {"x": np.ones((1, 4, 6), np.float32)})
    assert run["y"].shape == (1, 3)

    cost = measure_cost(proto)

    assert cost.unknown == () and cost.macs == width * 3


@pytest.mark.parametrize(("size", "macs"), [(6, 4 * 4 * 8 * 27), (-1, None)])
def test_behind_a_foreign_operator_the_file_says_the_shape_or_nobody_does(size: int, macs: int | None) -> None:
    proto = tiny.with_weights(
        """<ir_version: 8, opset_import: ["" : 17, "custom" : 1]>
        g (float[N,3,6,6] x) => (float[N,8,4,4] y) { m = custom.Mystery (x)  y = Conv (m, w) }""",
        {"w": np.ones((8, 3, 3, 3), np.float32)},
    )
    proto.graph.value_info.append(helper.make_tensor_value_info("m", TensorProto.FLOAT, [1, 3, 6, size]))
    assert measure_cost(proto).layers["y"].macs == macs


def test_large_weights_do_not_travel_through_shape_inference(monkeypatch) -> None:
    infer, sizes = onnx.shape_inference.infer_shapes, []

    def watched(proto, **how):
        sizes.append(proto.ByteSize())
        return infer(proto, **how)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", watched)
    text = f"{HEAD} g (float[N,200] x) => (float[N,300] y) {{ y = MatMul (x, w) }}"
    proto = tiny.with_weights(text, {"w": np.ones((200, 300), np.float32)})
    assert measure_cost(proto).macs == 60_000
    assert max(sizes) < 1000 < proto.ByteSize()


def test_shapes_must_name_inputs_and_agree_with_them() -> None:
    proto = tiny.classifier()
    with pytest.raises(JobError, match="no input 'picture'"):
        measure_cost(proto, {"picture": (1, 3, 6, 6)})
    with pytest.raises(JobError, match="cannot have the shape"):
        measure_cost(proto, {"image": (1, 4, 6, 6)})
    with pytest.raises(JobError, match="cannot have the shape"):
        measure_cost(proto, {"image": (1, 3, 6)})


def test_bytes_are_those_of_the_file(tmp_path) -> None:
    proto = tiny.classifier()
    assert measure_cost(proto).bytes == tiny.saved(proto, tmp_path / "a.onnx").stat().st_size


def test_measuring_changes_nothing() -> None:
    proto = tiny.classifier()
    before = proto.SerializeToString()
    measure_cost(proto, {"image": (2, 3, 6, 6)})
    assert proto.SerializeToString() == before
    assert isinstance(proto, onnx.ModelProto)
