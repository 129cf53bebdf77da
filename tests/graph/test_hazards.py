"""Graphs that once were cut wrongly, or not read at all: each is cut as it is silenced now, or stays whole."""

from __future__ import annotations

from pathlib import Path

import nets
import numpy as np
import onnx
import pytest
from helpers import same_answers, same_interface
from onnx import numpy_helper

from xdonnx.gate import Gate
from xdonnx.graph import read_net
from xdonnx.job import Job, run
from xdonnx.patch import Patch, cut, masked

STEM = "g (float[N,3,8,8] image, float[8,3,3,3] w1, float[8] b1, float[8,8,1,1] w2"
CONV = "  c = Conv <pads = [1,1,1,1]> (image, w1, b1)\n"
ONE = "g (float[BATCH,3,8,8] image, float[8,3,3,3] w1, float[8] b1"

CASES = {
    "the halves of a split go through depthwise layers": (
        STEM + ", float[4,1,3,3] d1, float[4,1,5,5] d2) => (float[N,8,8,8] out) {\n" + CONV + """
  a, b = Split <axis = 1> (c, sizes)
  x = Conv <group = 4, pads = [1,1,1,1]> (a, d1)
  y = Conv <group = 4, pads = [2,2,2,2]> (b, d2)
  z = Concat <axis = 1> (x, y)
  out = Conv (z, w2)
}""", 17),
    "one channel is expanded to many": (
        STEM + ", float[1,8,1,1] wa) => (float[N,8,8,8] out) {\n" + CONV + """
  a = Conv (c, wa)
  s = Sigmoid (a)
  e = Expand (s, wide)
  z = Mul (c, e)
  out = Conv (z, w2)
}""", 17),
    "a part of the shape is computed with": (
        STEM + ") => (float[N,8,8,8] out) {\n" + CONV + """
  s = Shape <start = 1> (c)
  k = Gather (s, first)
  f = Cast <to = 1> (k)
  q = Div (c, f)
  out = Conv (q, w2)
}""", 17),
    "a weight is shared with a scaled product": (
        STEM + ", float[8,8] w, float[8,4] v1, float[8,4] v2) => (float[N,4] out, float[N,4] out2) {\n" + CONV + """
  d = Conv (c, w2)
  p = GlobalAveragePool (c)
  q = GlobalAveragePool (d)
  pf = Flatten (p)
  qf = Flatten (q)
  g1 = Gemm (pf, w)
  out = MatMul (g1, v1)
  g2 = Gemm <alpha = 0.5, transB = 1> (qf, w)
  out2 = MatMul (g2, v2)
}""", 17),
    "a weight is also added": (
        "g (float[8,3,1,1] image, float[8,3,1,1] w1, float[8,8,1,1] w) => (float[8,8,1,1] out) {"
        "\n  c = Conv (image, w1)\n  a = Add (c, w)\n  r = Relu (a)\n  out = Conv (r, w)\n}", 17),
    "channels are the rows of a product": (
        ONE.replace("BATCH", "1") + ", float[64,64] wg, float[8,1] bg, float[8,8,1,1] w2) => (float[1,8,8,8] out) {\n"
        + CONV + """
  r = Reshape (c, flat)
  q = Gemm (r, wg, bg)
  v = Reshape (q, square)
  out = Conv (v, w2)
}""", 17),
    "axes of size one are squeezed away unnamed": (
        ONE.replace("BATCH", "4") + ", float[8,5] wg) => (float[4,5] out) {\n" + CONV + """
  p = GlobalAveragePool (c)
  r = Squeeze (p)
  out = MatMul (r, wg)
}""", 17),
    "a normalization also puts out its means": (
        STEM + ", float[8] ls) => (float[N,8,8,8] out, float[N,8,8,1] mu) {\n" + CONV + """
  y, mu = LayerNormalization (c, ls)
  out = Conv (y, w2)
}""", 17),
    "a normalization in training puts out its statistics": (
        STEM + ", float[8] s, float[8] b, float[8] m, float[8] v) => (float[N,8,8,8] out, float[8] rm) {\n" + CONV + """
  p, rm, rv = BatchNormalization <training_mode = 1> (c, s, b, m, v)
  out = Conv (p, w2)
}""", 15),
    "a normalization for each position": (
        "g (float[N,3,8,8] image, float[8,3,3,3] w1, float[8,8,8] s, float[8,8,8] b, float[8,8,8] m, float[8,8,8] v,"
        " float[8,8,1,1] w2) => (float[N,8,8,8] out) {\n  c = Conv <pads = [1,1,1,1]> (image, w1)\n"
        "  p = BatchNormalization <spatial = 0> (c, s, b, m, v)\n  out = Conv (p, w2)\n}", 8),
    "a slice counts from the end": (
        STEM[:-len(", float[8,8,1,1] w2")] + ", float[5,6,1,1] w3) => (float[N,5,8,8] out) {\n" + CONV + """
  s = Slice (c, last, past, axis)
  out = Conv (s, w3)
}""", 17),
}  # fmt: skip
MORE = {
    "wide": [1, 8, 8, 8], "first": [0], "flat": [-1, 64], "square": [1, -1, 8, 8],
    "last": [-6], "past": [2**31], "axis": [1],
}  # fmt: skip


def build(name: str) -> onnx.ModelProto:
    text, opset = CASES[name]
    return nets.from_text("\n" + text, opset=opset, integers=MORE)


@pytest.mark.parametrize("name", CASES)
def test_what_is_cut_answers_as_what_is_silenced(name: str) -> None:
    model = build(name)
    net = read_net(model)
    rows = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 3
    inputs = nets.samples(model, rows)
    same_answers(model, cut(net, Patch()), inputs)
    for seed in range(4):
        random = np.random.default_rng(seed)
        drop: set[int] = set()
        for group in net.groups:
            count = len(group.ids) - 1 if seed == 0 else int(random.integers(0, len(group.ids)))
            drop |= {int(label) for label in random.choice(group.ids, count, replace=False)}
        patch = Patch({}, frozenset(drop))
        same_answers(masked(net, patch), cut(net, patch), inputs)
        same_interface(model, cut(net, patch))


def test_a_weight_behind_a_dequantize_stays_whole_and_says_so() -> None:
    text = """
g (float[N,3,8,8] image, float[8,3,3,3] w1, float[8] b1, float[6,8,1,1] w3) => (float[N,6,8,8] out) {
  c = Conv <pads = [1,1,1,1]> (image, w1, b1)
  q = Constant <value = int8[8,8,1,1] {QUANTIZED}> ()
  scale = Constant <value = float {0.1}> ()
  w2 = DequantizeLinear (q, scale)
  d = Conv (c, w2)
  out = Conv (d, w3)
}""".replace("QUANTIZED", ", ".join(str(i % 100 - 50) for i in range(64)))
    net = read_net(nets.from_text(text))
    assert net.reasons(net.layers["c"]) == ["'d' cannot be cut: its weight is computed by the graph"]
    assert any(node.op_type == "DequantizeLinear" for node in net.model.graph)


def test_a_float16_model_is_compressed(tmp_path: Path) -> None:
    model = nets.build("plain")
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(model, tmp_path / "half.onnx")
    job = Job(model=tmp_path / "half.onnx", out=tmp_path / "student.onnx", synthetic_shots=12, keep=0.5)
    report = run(job)
    assert report.status == "passed"
    assert onnx.load(tmp_path / "student.onnx").graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_a_shared_weight_is_not_changed_for_one_of_its_readers(tmp_path: Path) -> None:
    text = """
g (float[N,3,8,8] image, float[8,3,3,3] w1, float[8] b1, float[8,8,3,3] wm, float[8] bm, float[6,8,1,1] wh)
  => (float[N,6,8,8] o1, float[N,6,8,8] o2) {
  a = Conv <pads = [1,1,1,1]> (image, w1, b1)
  r = Relu (a)
  m = Conv <pads = [1,1,1,1]> (r, wm, bm)
  o1 = Conv (m, wh)
  o2 = Conv (r, wh)
}"""
    onnx.save(nets.from_text(text), tmp_path / "t.onnx")
    gate = Gate(warn_only=("smaller", "not_slower"))
    run(
        Job(
            model=tmp_path / "t.onnx",
            out=tmp_path / "s.onnx",
            synthetic_shots=20,
            structure="element",
            keep=0.5,
            gate=gate,
        )
    )
    before, after = (onnx.load(tmp_path / name) for name in ("t.onnx", "s.onnx"))
    head = [next(numpy_helper.to_array(t) for t in m.graph.initializer if t.name == "wh") for m in (before, after)]
    assert np.array_equal(*head)
