"""Tiny models and samples for the tests of this folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser

CLASSIFIER = """
<ir_version: 8, opset_import: ["" : 17], metadata_props: ["author": "someone"]>
net (float[N,3,6,6] image) => (float[N,5] logits) {
  c = Conv <pads = [1,1,1,1]> (image, w1, b1)
  r = Relu (c)
  p = GlobalAveragePool (r)
  f = Flatten (p)
  logits = Gemm <transB = 1> (f, w2, b2)
}"""

SHAPES = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (5, 8), "b2": (5,)}


@dataclass(frozen=True, eq=False)
class Shots:
    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


def with_weights(text: str, weights: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    proto = parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in weights.items())
    return proto


def random_weights(seed: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def classifier(seed: int = 0, noise: float = 0.0, text: str = CLASSIFIER) -> onnx.ModelProto:
    """Return five classes of 6x6 images; `noise` damages every weight."""
    weights, generator = random_weights(seed), np.random.default_rng(seed + 100)
    damaged = {
        name: (values + noise * generator.normal(size=values.shape)).astype(np.float32)
        for name, values in weights.items()
    }
    return with_weights(text, damaged)


def images(count: int, seed: int = 0, labels: np.ndarray | None = None) -> Shots:
    """Return images of one colour each, with noise: colours are what survives the pooling."""
    generator = np.random.default_rng(seed)
    image = generator.normal(size=(count, 3, 6, 6)) + 3 * generator.normal(size=(count, 3, 1, 1))
    return Shots({"image": image.astype(np.float32)}, labels)


def saved(proto: onnx.ModelProto, path: Path) -> Path:
    onnx.save(proto, path)
    return path
