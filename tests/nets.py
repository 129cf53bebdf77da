"""Small teachers as ONNX text, one per hazard. Parameters are written as inputs; `build` makes them random weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

HEADER = '<ir_version: 8, opset_import: ["" : {opset}], producer_name: "test", metadata_props: ["author": "someone"]>'

TEXTS = {
    "plain": """
g (float[N,3,8,8] image, float[8,3,3,3] w1, float[8] b1, float[6,8,3,3] w2, float[6] b2) => (float[N,6,4,4] out) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1, b1)
  r1 = Relu (c1)
  p1 = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r1)
  out = Conv <pads = [1,1,1,1]> (p1, w2, b2)
}""",
    "batchnorm": """
g (float[N,3,8,8] image, float[8,3,3,3] w1, float[8] s1, float[8] h1, float[8] m1, float[8] v1, float[4,8,1,1] w2)
  => (float[N,4,8,8] out) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1)
  n1 = BatchNormalization (c1, s1, h1, m1, v1)
  r1 = Relu (n1)
  out = Conv (r1, w2)
}""",
    "residual": """
g (float[N,3,8,8] image, float[8,3,3,3] w0, float[8] b0, float[8,8,3,3] w1, float[8] b1, float[8,8,3,3] w2, float[8] b2,
   float[5,8] wf, float[5] bf) => (float[N,5] out) {
  c0 = Conv <pads = [1,1,1,1]> (image, w0, b0)
  r0 = Relu (c0)
  c1 = Conv <pads = [1,1,1,1]> (r0, w1, b1)
  r1 = Relu (c1)
  c2 = Conv <pads = [1,1,1,1]> (r1, w2, b2)
  s = Add (c2, r0)
  r2 = Relu (s)
  g = GlobalAveragePool (r2)
  f = Flatten (g)
  out = Gemm <transB = 1> (f, wf, bf)
}""",
    "concat": """
g (float[N,3,8,8] image, float[6,3,1,1] w1, float[6] b1, float[4,6,1,1] w2, float[4] b2, float[5,6,3,3] w3, float[5] b3,
   float[3,9,1,1] w4, float[3] b4) => (float[N,3,8,8] out) {
  c1 = Conv (image, w1, b1)
  r1 = Relu (c1)
  c2 = Conv (r1, w2, b2)
  c3 = Conv <pads = [1,1,1,1]> (r1, w3, b3)
  k = Concat <axis = 1> (c2, c3)
  r = Relu (k)
  out = Conv (r, w4, b4)
}""",
    "depthwise": """
g (float[N,3,8,8] image, float[8,3,1,1] w1, float[8] b1, float[8,1,3,3] w2, float[8] b2, float[6,8,1,1] w3, float[6] b3)
  => (float[N,6,8,8] out) {
  c1 = Conv (image, w1, b1)
  r1 = Clip (c1)
  c2 = Conv <group = 8, pads = [1,1,1,1]> (r1, w2, b2)
  r2 = Relu (c2)
  out = Conv (r2, w3, b3)
}""",
    "grouped": """
g (float[N,3,8,8] image, float[8,3,1,1] w1, float[8] b1, float[6,4,3,3] w2, float[6] b2, float[4,6,1,1] w3, float[4] b3)
  => (float[N,4,8,8] out) {
  c1 = Conv (image, w1, b1)
  r1 = Relu (c1)
  c2 = Conv <group = 2, pads = [1,1,1,1]> (r1, w2, b2)
  r2 = Relu (c2)
  out = Conv (r2, w3, b3)
}""",
    "flatten": """
g (float[N,3,4,4] image, float[6,3,3,3] w1, float[6] b1, float[5,96] wf, float[5] bf, float[5] slope, float[3,5] wg)
  => (float[N,3] out) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1, b1)
  r1 = LeakyRelu (c1)
  f = Flatten (r1)
  d = Gemm <transB = 1> (f, wf, bf)
  r2 = PRelu (d, slope)
  out = Gemm <transB = 1> (r2, wg)
}""",
    "gate": """
g (float[N,3,8,8] image, float[8,3,3,3] w1, float[8] b1, float[4,8,1,1] ws, float[4] bs, float[8,4,1,1] we, float[8] be,
   float[5,8,1,1] w2, float[5] b2) => (float[N,5,8,8] out) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1, b1)
  r1 = Relu (c1)
  p = GlobalAveragePool (r1)
  q = Conv (p, ws, bs)
  q2 = Relu (q)
  e = Conv (q2, we, be)
  a = Sigmoid (e)
  m = Mul (r1, a)
  out = Conv (m, w2, b2)
}""",
    "asymmetric": """
g (float[N,3,9,9] image, float[6,3,3,3] w1, float[6] b1, float[4,6,2,2] w2) => (float[N,4,h,w] out) {
  c1 = Conv <pads = [0,0,1,1], strides = [2,2]> (image, w1, b1)
  r1 = HardSigmoid (c1)
  out = Conv <auto_pad = "SAME_UPPER", strides = [2,2]> (r1, w2)
}""",
    "transposed": """
g (float[N,3,5,5] image, float[8,3,3,3] w1, float[8] b1, float[8,6,2,2] w2, float[6] b2, float[6,3,3,3] w3)
  => (float[N,3,h,w] out) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1, b1)
  r1 = Relu (c1)
  u = ConvTranspose <strides = [2,2]> (r1, w2, b2)
  r2 = Relu (u)
  out = ConvTranspose <strides = [2,2], pads = [1,1,0,0], output_padding = [1,1]> (r2, w3)
}""",
    "split": """
g (float[N,3,8,8] image, float[8,3,1,1] w1, float[8] b1, float[4,4,3,3] w2, float[4] b2, float[5,8,1,1] w3, float[5] b3)
  => (float[N,5,8,8] out) {
  c1 = Conv (image, w1, b1)
  r1 = Relu (c1)
  left, right = Split <axis = 1> (r1, sizes)
  c2 = Conv <pads = [1,1,1,1]> (right, w2, b2)
  k = Concat <axis = 1> (left, c2)
  out = Conv (k, w3, b3)
}""",
    "shuffle": """
g (float[N,3,8,8] image, float[8,3,1,1] w1, float[8] b1, float[8,4,1,1] w2, float[8] b2, float[5,8,1,1] w3)
  => (float[N,5,8,8] out) {
  c1 = Conv (image, w1, b1)
  r1 = Relu (c1)
  a = Reshape (r1, apart)
  t = Transpose <perm = [0,2,1,3,4]> (a)
  b = Reshape (t, together)
  c2 = Conv <group = 2> (b, w2, b2)
  r2 = Relu (c2)
  out = Conv (r2, w3)
}""",
    "padded": """
g (float[N,3,8,8] image, float[4,3,3,3] w0, float[4] b0, float[8,4,3,3] w1, float[8] b1, float[8,8,3,3] w2, float[8] b2,
   float[5,8] wf, float[5] bf) => (float[N,5] out) {
  c0 = Conv <pads = [1,1,1,1]> (image, w0, b0)
  r0 = Relu (c0)
  c1 = Conv <pads = [1,1,1,1], strides = [2,2]> (r0, w1, b1)
  r1 = Relu (c1)
  c2 = Conv <pads = [1,1,1,1]> (r1, w2, b2)
  half = Slice (r0, starts, ends, axes, steps)
  wide = Pad (half, pads)
  s = Add (c2, wide)
  r2 = Relu (s)
  g = GlobalAveragePool (r2)
  f = Flatten (g)
  out = Gemm <transB = 1> (f, wf, bf)
}""",
    "product": """
g (float[N,1,6,6] image, float[6,1,3,3] w1, float[6] b1, float[6,7] wm, float[7] bm, float[7,4] wn)
  => (float[N,16,4] out) {
  c1 = Conv (image, w1, b1)
  r1 = Relu (c1)
  flat = Reshape (r1, rows)
  t = Transpose <perm = [0,2,1]> (flat)
  m = MatMul (t, wm)
  a = Add (m, bm)
  r2 = Relu (a)
  out = MatMul (r2, wn)
}""",
}
TEXTS["signal"] = """
g (float[N,3,16] image, float[8,3,5] w1, float[8] b1, float[6,8,3] w2, float[6] b2, float[5,6] wf) => (float[N,5] out) {
  c1 = Conv <pads = [2,2]> (image, w1, b1)
  r1 = Relu (c1)
  c2 = Conv <dilations = [2], strides = [2]> (r1, w2, b2)
  r2 = Relu (c2)
  p = GlobalAveragePool (r2)
  f = Flatten (p)
  out = Gemm <transB = 1> (f, wf)
}"""
TEXTS["volume"] = """
g (float[N,2,5,6,7] image, float[8,2,3,3,3] w1, float[8] b1, float[6,8,1,2,2] w2, float[4,6,1,1,1] w3)
  => (float[N,4,a,b,c] out) {
  c1 = Conv <pads = [1,1,1,1,1,1]> (image, w1, b1)
  r1 = Relu (c1)
  c2 = Conv (r1, w2)
  r2 = Elu (c2)
  out = Conv (r2, w3)
}"""
INTEGERS = {
    "sizes": [4, 4],
    "apart": [0, 2, 4, 8, 8],
    "together": [0, 8, 8, 8],
    "starts": [0, 0],
    "ends": [2**31 - 1, 2**31 - 1],
    "axes": [2, 3],
    "steps": [2, 2],
    "pads": [0, 2, 0, 0, 0, 2, 0, 0],
    "rows": [0, 6, -1],
}
ALL = sorted(TEXTS)


def build(name: str, *, opset: int = 13, seed: int = 0) -> onnx.ModelProto:
    """Return a teacher with random weights."""
    return from_text(TEXTS[name], opset=opset, seed=seed)


def from_text(
    text: str,
    *,
    opset: int = 13,
    seed: int = 0,
    images: tuple[str, ...] = ("image",),
    integers: Mapping[str, list[int]] | None = None,
) -> onnx.ModelProto:
    """Parse ONNX text and turn every input but the images into a random initializer, names in `integers` into those."""
    model = onnx.parser.parse_model(HEADER.replace("{opset}", str(opset)) + text)
    random = np.random.default_rng(seed)
    ports = {value.name: value for value in model.graph.input}
    kept = [onnx.ValueInfoProto.FromString(ports[name].SerializeToString()) for name in images]
    for value in ports.values():
        if value.name in images:
            continue
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        fan_in = max(int(np.prod(shape[1:])), 1)
        array = random.standard_normal(shape) / (np.sqrt(fan_in) if len(shape) > 1 else 2)
        if value.name.startswith("v"):
            array = np.abs(array) + 0.5  # a variance
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), value.name))
    used = {name for node in model.graph.node for name in node.input}
    for name, numbers in {**INTEGERS, **(integers or {})}.items():
        if name in used:
            model.graph.initializer.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
    del model.graph.input[:]
    model.graph.input.extend(kept)
    onnx.checker.check_model(model)
    return model


def samples(model: onnx.ModelProto, rows: int = 5, seed: int = 1) -> dict[str, np.ndarray]:
    """Return random rows for every graph input."""
    random = np.random.default_rng(seed)
    return {
        value.name: random.standard_normal(
            [rows] + [dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]]
        ).astype(np.float32)
        for value in model.graph.input
    }
