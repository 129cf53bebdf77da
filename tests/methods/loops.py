"""Small nets, their samples and their training: what the tests of the loop and of `tune` share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import nets
import numpy as np
import torch
from torch import Tensor

from xdonnx.convert import convert
from xdonnx.events import Event
from xdonnx.graph import Net, read_net
from xdonnx.methods.bench import Bench
from xdonnx.methods.training import Batch, Schedule, train
from xdonnx.methods.tune import matching
from xdonnx.patch import Patch, cut
from xdonnx.runtime import answer, open_session
from xdonnx.shots import Shots
from xdonnx.student import Taps

SAMPLES = Path(__file__).parents[2] / "samples"
FIXED = """
g (float[1,4,4,4] image, float[6,4,3,3] w1, float[6] b1, float[5,96] wf, float[5] bf) => (float[1,5] out) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1, b1)
  r1 = Relu (c1)
  f = Reshape (r1, flat)
  out = Gemm <transB = 1> (f, wf, bf)
}"""
TWO_INPUTS = """
g (float[N,2,8,8] image, float[N,4,8,8] other, float[8,2,3,3] w1, float[8] b1, float[8,4,3,3] w2, float[8] b2,
   float[4,16,1,1] w3, float[4] b3) => (float[N,4,8,8] out) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1, b1)
  r1 = Relu (c1)
  c2 = Conv <pads = [1,1,1,1]> (other, w2, b2)
  r2 = Relu (c2)
  k = Concat <axis = 1> (r1, r2)
  out = Conv (k, w3, b3)
}"""
TWO_ANSWERS = """
g (float[N,3,8,8] image, float[12,3,3,3] w1, float[12] b1, float[12,12,3,3] w2, float[12] b2, float[1,12] w3,
   float[1] b3, float[4,12] w4, float[4] b4) => (float[N,1] price, float[N,4] shares, int64[N] winner) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1, b1)
  r1 = Relu (c1)
  c2 = Conv <pads = [1,1,1,1]> (r1, w2, b2)
  r2 = Relu (c2)
  p = GlobalAveragePool (r2)
  f = Flatten (p)
  price = Gemm <transB = 1> (f, w3, b3)
  scores = Gemm <transB = 1> (f, w4, b4)
  shares = Softmax <axis = 1> (scores)
  winner = ArgMax <axis = 1, keepdims = 0> (scores)
}"""
LONG = """
g (float[N,4,8,8] image, float[8,4,3,3] w1, float[8] b1, float[8,8,3,3] w2, float[8] b2, float[8,8,3,3] w3,
   float[8] b3, float[8,8,3,3] w4, float[8] b4, float[8,8,3,3] w5, float[8] b5) => (float[N,8,8,8] out) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1, b1)
  r1 = Relu (c1)
  c2 = Conv <pads = [1,1,1,1]> (r1, w2, b2)
  r2 = Relu (c2)
  c3 = Conv <pads = [1,1,1,1]> (r2, w3, b3)
  r3 = Relu (c3)
  c4 = Conv <pads = [1,1,1,1]> (r3, w4, b4)
  r4 = Relu (c4)
  out = Conv <pads = [1,1,1,1]> (r4, w5, b5)
}"""
# Four channels are no image: samples come to the loss as they are.
NUMBERED = """
g (float[N,4,6,6] image, float[8,4,3,3] w1, float[8] b1, float[6,8,3,3] w2, float[6] b2) => (float[N,6,6,6] out) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1, b1)
  r1 = Relu (c1)
  out = Conv <pads = [1,1,1,1]> (r1, w2, b2)
}"""


@cache
def net_of(text: str) -> Net:
    if text in nets.TEXTS:
        return read_net(nets.build(text))
    images = ("image", "other") if text == TWO_INPUTS else ("image",)
    return read_net(nets.from_text(text, images=images, integers={"flat": [1, 96]}))


def shots_of(net: Net, rows: int = 20, *, labels: bool = False, seed: int = 1) -> Shots:
    """Return random samples, the first number of each being its row."""
    inputs = nets.samples(net.source, rows, seed)
    first = net.interface.inputs[0].name
    inputs[first].reshape(rows, -1)[:, 0] = np.arange(rows) / 10
    return Shots(inputs, np.arange(rows) % 3 if labels else None, tuple(map(str, range(rows))))


def halved(net: Net) -> Patch:
    return Patch({}, frozenset(int(label) for group in net.groups for label in group.ids[::2]))


def trained(
    net: Net,
    patch: Patch,
    shots: Shots | None = None,
    loss: Callable[[Batch], Tensor] = matching,
    *,
    seed: int = 0,
    log: Callable[[Event], None] = lambda event: None,
    taps: Taps | None = None,
    judge: Callable[[Batch], Tensor] | None = None,
    **plan: Any,
) -> Patch:
    wanted = Schedule(**({"steps": 20, "batch": 8, "mix": False, "rates": (0.01,)} | plan))
    bench = Bench(convert(net, torch.device("cpu")), torch.Generator().manual_seed(seed), log)
    return train(net, patch, shots or shots_of(net), loss, wanted, bench, taps, judge=judge).patch


def gap(net: Net, patch: Patch, seed: int = 99) -> float:
    """Return the error of the written student's answers on samples that nobody trained on, in onnxruntime."""
    sessions = [open_session(model) for model in (net.source, cut(net, patch))]
    parts = []
    for at in range(30):
        inputs = nets.samples(net.source, 1, seed + at)
        teacher, student = (answer(session, inputs) for session in sessions)
        names = [name for name in teacher if teacher[name].dtype.kind == "f"]
        parts.append([(np.square(student[n] - teacher[n]).sum(), np.square(teacher[n]).sum()) for n in names])
    errors = np.array(parts).sum(0)
    return float((errors[:, 0] / errors[:, 1]).mean())


def same(first: Patch, second: Patch) -> bool:
    return first.drop == second.drop and {n: a.tobytes() for n, a in first.tensors.items()} == {
        n: a.tobytes() for n, a in second.tensors.items()
    }


class Spy:
    """A loss that remembers what it was shown, in training and in judging."""

    def __init__(self, loss: Callable[[Batch], Tensor] = matching) -> None:
        self.loss, self.training, self.judging = loss, [], []

    def __call__(self, batch: Batch) -> Tensor:
        (self.training if torch.is_grad_enabled() else self.judging).append(batch)
        return self.loss(batch)


def rows_of(batches: list[Batch]) -> set[int]:
    """Return which samples were shown, by the number that each begins with."""
    return {round(10 * float(x)) for batch in batches for x in batch.teacher["image"].flatten(1)[:, 0]}


SEEN = Taps(("image",), ("out",))
