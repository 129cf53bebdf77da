"""Each indicator against its definition, computed apart; and what they say of digits, noise and flat images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from xdonnx.images import Preprocess
from xdonnx.model import interface, read_proto
from xdonnx.relatedness import (
    LATENT,
    LOGITS,
    NORMS,
    noise_like,
    open_gauge,
    standardised,
    variance_band,
)
from xdonnx.rows import of_array
from xdonnx.runtime import answer, open_session
from xdonnx.sheet import INDICATORS

SAMPLES = Path(__file__).parents[2] / "samples"
Array = NDArray[Any]

BODY = """
  c1 = Conv <pads = [1,1,1,1]> (image, w1)
  n1 = BatchNormalization (c1, g1, b1, m1, v1)
  r1 = Relu (n1)
  c2 = Conv (r1, w2)
  n2 = BatchNormalization (c2, g2, b2, m2, v2)
  p = GlobalAveragePool (n2)
  f = Flatten (p)
"""
HEAD = """g (float[{N},3,8,8] image, float[5,3,3,3] w1, float[5] g1, float[5] b1, float[5] m1, float[5] v1,
   float[6,5,3,3] w2, float[6] g2, float[6] b2, float[6] m2, float[6] v2{more}) => (float[{N},{C}] out) {{"""
GEMM = ", float[4,6] wf, float[4] bf"
CLASSIFIER = HEAD + BODY + "  s = Gemm <transB = 1> (f, wf, bf)\n  out = Softmax <axis = 1> (s)\n}}"
MATMUL = HEAD + BODY + "  m = MatMul (f, wm)\n  s = Add (m, bf)\n  out = Identity (s)\n}}"


def built(text: str, *, rows: str = "N", more: str = GEMM, classes: int = 4) -> onnx.ModelProto:
    return nets.from_text(text.format(N=rows, more=more, C=classes))


def value_of(proto: onnx.ModelProto, name: str, feed: Mapping[str, Array]) -> Array:
    """Return any value of a graph, in onnxruntime without optimizations."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.output.append(onnx.ValueInfoProto(name=name))
    return answer(open_session(copy, optimize=False), feed, [name])[name].astype(np.float64)


def by_hand(proto: onnx.ModelProto, feed: Mapping[str, Array]) -> dict[str, Array]:
    """Return the indicators of a classifier above by loops over images, layers and channels."""
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor).astype(np.float64) for tensor in proto.graph.initializer}
    linear = weights["wf"] if "wf" in weights else weights["wm"].T
    scores, features = value_of(proto, "s", feed), value_of(proto, "f", feed)
    norms = [(value_of(proto, f"n{k}", feed), weights[f"g{k}"], weights[f"b{k}"]) for k in (1, 2)]
    found: dict[str, list[float]] = {name: [] for name in (*LOGITS, *LATENT, *NORMS)}
    for row, logits in enumerate(scores):
        p = torch.softmax(torch.tensor(logits), 0).numpy()
        found["mp"].append(1 - p.max())
        found["h"].append(stats.entropy(p))
        found["t1000"].append(1 - torch.softmax(torch.tensor(logits) / 1000, 0).numpy().max())
        u, w = features[row], linear[logits.argmax()]
        found["norm"].append(-np.sqrt(sum(u**2)))
        found["act"].append(-sum(u * w))
        found["proj"].append(-sum(u * w) / np.sqrt(sum(w**2)))
        found["ang"].append(1 - sum(u * w) / np.sqrt(sum(w**2)) / np.sqrt(sum(u**2)))
        layers: dict[str, list[float]] = {name: [] for name in NORMS}
        for value, scale, shift in norms:
            z = [((value[row, c] - shift[c]) / scale[c]).ravel() for c in range(len(scale))]
            count = len(z[0]) - 1
            low, high = stats.chi2.ppf([0.05, 0.95], count) / count
            layers["dms"].append(np.mean([one.mean() ** 2 for one in z]))
            layers["dss"].append(np.mean([(one.std() - 1) ** 2 for one in z]))
            layers["dss_ext"].append(np.mean([not low <= one.var() <= high for one in z]))
            layers["aos"].append(np.mean([(one**2).mean() for one in z]))
        for name in NORMS:
            found[name].append(np.mean(layers[name]))
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize(("text", "more"), [(CLASSIFIER, GEMM), (MATMUL, ", float[6,4] wm, float[4] bf")])
def test_indicators_are_what_their_definitions_say(text: str, more: str) -> None:
    proto = built(text, more=more)
    feed = nets.samples(proto, 9)

    gauge = open_gauge(proto, feed)

    assert gauge.names == (*LOGITS, *LATENT, *NORMS)
    assert set(INDICATORS) == set(gauge.names), "the report has a word for each"
    for at, (name, values) in enumerate(by_hand(proto, feed).items()):
        np.testing.assert_allclose(gauge(feed)[:, at], values, rtol=2e-3, atol=2e-4, err_msg=name)


def test_a_graph_of_fixed_batch_gives_the_numbers_of_one_that_leaves_it_free() -> None:
    free, fixed = built(CLASSIFIER), built(CLASSIFIER, rows="4")
    feed = nets.samples(free, 9)

    np.testing.assert_allclose(open_gauge(fixed, feed)(feed), open_gauge(free, feed)(feed), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "more", "names"),
    [
        (HEAD + BODY + "  out = Relu (f)\n}}", "", LOGITS + NORMS),
        (HEAD + "  c1 = Conv (image, w1)\n  p = GlobalAveragePool (c1)\n  out = Flatten (p)\n}}", "", LOGITS),
        (HEAD + BODY + "  z = ReduceMean <axes = [1]> (f)\n  out = Sqrt (z)\n}}", "", NORMS),
        (HEAD + "  c1 = Conv (image, w1)\n  out = ReduceMean <axes = [1,2,3], keepdims = 0> (c1)\n}}", "", ()),
    ],
    ids=["no linear layer", "no normalization", "no classes", "nothing"],
)
def test_what_a_model_lacks_is_left_out(text: str, more: str, names: tuple[str, ...]) -> None:
    classes = {LOGITS + NORMS: 6, LOGITS: 5}.get(names, 1)
    proto = built(text, more=more, classes=classes)
    feed = nets.samples(proto, 3)

    gauge = open_gauge(proto, feed)

    assert gauge.names == names
    assert gauge(feed).shape == (3, len(names))


@pytest.mark.parametrize("count", [16, 64, 1024])
def test_the_band_of_variances_is_that_of_chi_square(count: int) -> None:
    expected = stats.chi2.ppf([0.05, 0.95], count - 1) / (count - 1)

    assert variance_band(count) == pytest.approx(expected, rel=0.01)


def test_scores_have_mean_0_and_deviation_1_and_survive_dead_and_infinite_indicators() -> None:
    random = np.random.default_rng(0)
    found, noise = random.standard_normal((50, 3)), random.standard_normal((20, 3))
    found[:, 1], noise[:, 1] = 4.0, 4.0

    scores = standardised(found, noise)

    alone = standardised(found[:, [0, 2]], noise[:, [0, 2]])
    assert scores == pytest.approx(alone) and scores.mean() == pytest.approx(0) and scores.std() == pytest.approx(1)
    found[7, 0] = np.nan
    assert standardised(found, noise).argmax() == 7
    assert standardised(found[:1], noise).tolist() == [0.0]


def test_noise_has_the_range_of_the_samples_channel_by_channel() -> None:
    values = np.stack([np.linspace(-1, 1, 64), np.linspace(5, 6, 64), np.zeros(64)]).reshape(1, 3, 8, 8)
    noise = noise_like({"x": values.astype(np.float32)}, 40)["x"]

    assert noise.shape == (40, 3, 8, 8) and noise.dtype == np.float32
    assert noise[:, 0].min() == pytest.approx(-1, abs=0.02) and noise[:, 0].max() == pytest.approx(1, abs=0.02)
    assert noise[:, 1].min() >= 5 and noise[:, 1].max() <= 6 and not noise[:, 2].any()
    np.testing.assert_array_equal(noise, noise_like({"x": values.astype(np.float32)}, 40)["x"])


@pytest.mark.parametrize("teacher", ["digits_mobile", "digits_vgg"])
def test_digits_look_related_to_a_teacher_of_digits_and_noise_and_flat_images_do_not(
    teacher: str, digits: tuple[Array, Array]
) -> None:
    proto = read_proto(SAMPLES / f"{teacher}.onnx")
    random = np.random.default_rng(0)
    flat = np.stack([np.full((16, 16), value, np.uint8) for value in range(0, 250, 5)])
    images = np.concatenate([digits[0][:60], random.integers(0, 256, (60, 16, 16), np.uint8), flat])
    (port,) = interface(proto).inputs
    values = of_array(images, port, Preprocess("unit"), "").read(np.arange(len(images)))
    gauge = open_gauge(proto, {port.name: values[:20]})

    scores = standardised(gauge({port.name: values}), gauge(noise_like({port.name: values[:20]}, 64)))

    digit, noise, blank = scores[:60], scores[60:120], scores[120:]
    assert digit.mean() < noise.mean() - 0.8 and digit.mean() < blank.mean() - 2
    # Of a digit and a noise image the digit is the more related one, nearly always.
    assert (digit[:, None] < noise[None]).mean() > 0.97
