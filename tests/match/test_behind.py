"""What constants do right behind a layer counts as part of it, channel by channel, and nothing else does."""

from __future__ import annotations

from collections.abc import Mapping

import nets
import numpy as np
import pytest
import torch
from onnx import numpy_helper

from xdonnx.convert import convert
from xdonnx.graph import read_net
from xdonnx.methods.pairwalk import _behind, _relation

BEHIND = {
    # what stands behind z, its parameters and their shapes, and the factor and the constant that this is
    "a number a channel": ("out = Add (z, k)", "float[4,1,1] k", "1", "k"),
    "the constant first": ("out = Add (k, z)", "float[1,4,1,1] k", "1", "k"),
    "one number": ("out = Mul (z, k)", "float[1] k", "k", "0"),
    "taken off": ("out = Sub (z, k)", "float[1,4,1,1] k", "1", "-k"),
    "taken from it": ("out = Sub (k, z)", "float[1,4,1,1] k", "-1", "k"),
    "divided": ("out = Div (z, k)", "float[1,4,1,1] k", "1 / k", "0"),
    "divided by it": ("out = Div (k, z)", "float[1,4,1,1] k", "1", "0"),
    "two in turn": ("y = Add (z, k)\n  out = Mul (y, l)", "float[4,1,1] k, float[4,1,1] l", "l", "k * l"),
    "to the square": ("out = Mul (z, z)", "", "1", "0"),
    "for each position": ("out = Add (z, k)", "float[1,1,6,6] k", "1", "0"),
    "for each column": ("out = Add (z, k)", "float[6] k", "1", "0"),
    "read twice": ("y = Add (z, k)\n  x = Relu (z)\n  out = Add (x, y)", "float[4,1,1] k", "1", "0"),
    "behind a ReLU": ("y = Relu (z)\n  out = Add (y, k)", "float[4,1,1] k", "1", "0"),
}
PRODUCTS = {
    "of a product": ("out = Add (z, k)", "float[5] k", "1", "k"),
    "of rows": ("out = Add (z, k)", "float[5,5] k", "1", "0"),
    "of one row": ("out = Add (z, k)", "float[1,5,1] k", "1", "0"),
}


def meant(text: str, values: Mapping[str, np.ndarray], outputs: int) -> np.ndarray:
    found = eval(text, {}, {name: array.flatten().astype(np.float64) for name, array in values.items()})
    return np.broadcast_to(found, outputs)


@pytest.mark.parametrize("case", [*BEHIND, *PRODUCTS])
def test_what_constants_do_right_behind_a_layer_is_known_by_channel(case: str) -> None:
    product = case in PRODUCTS
    rest, constants, by, plus = {**BEHIND, **PRODUCTS}[case]
    given = ["float[N,3,6,6] image", "float[4,3,3,3] w", *filter(None, [constants])]
    layer = "z = Conv <pads = [1,1,1,1]> (image, w)"
    if product:  # beside a convolution, without which there is nothing to do
        given += ["float[N,5,7] words", "float[7,5] q"]
        layer = "c = Conv (image, w)\n  z = MatMul (words, q)"
    outputs = "float[N,4,4,4] c, float[N,5,5] out" if product else "float[N,4,6,6] out"
    text = f"\ng ({', '.join(given)}) => ({outputs}) {{\n  {layer}\n  {rest}\n}}"
    model = nets.from_text(text, images=("image", "words") if product else ("image",))
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    net = read_net(model)
    layer_of = net.layers["z"]
    found = _behind(net, convert(net, torch.device("cpu")), layer_of)
    for one, text in zip(found, (by, plus), strict=True):
        assert np.allclose(one, meant(text, values, len(layer_of.out_ids)), rtol=1e-5, atol=1e-6), text


def test_a_normalisation_behind_a_product_is_followed() -> None:
    text = """
g (float[N,3,6,6] image, float[5,3,6,6] w, float[5,7] u, float[7] s, float[7] h, float[7] m, float[7] v)
  => (float[N,7] out) {
  c = Conv (image, w)
  f = Flatten (c)
  z = MatMul (f, u)
  out = BatchNormalization (z, s, h, m, v)
}"""
    model = nets.from_text(text)
    values = {tensor.name: numpy_helper.to_array(tensor).astype(np.float64) for tensor in model.graph.initializer}
    net = read_net(model)
    by, plus = _behind(net, convert(net, torch.device("cpu")), net.layers["z"])
    factor = values["s"] / np.sqrt(values["v"] + 1e-5)
    assert np.allclose(by, factor, rtol=1e-4, atol=1e-5)
    assert np.allclose(plus, values["h"] - values["m"] * factor, rtol=1e-4, atol=1e-5)


def test_channels_that_are_multiplied_by_zero_are_left_as_they_are() -> None:
    two = torch.tensor([2.0, 2.0]).double()
    off = torch.tensor([0.0, 4.0]).double()
    none = torch.zeros(2).double()
    scale, shift = _relation((two, none + 1), (off, none), torch.tensor([0, 1]))
    assert scale.tolist() == [1.0, 0.5] and torch.isfinite(shift).all() and shift[1] == 0.25
