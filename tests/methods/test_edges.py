"""Graphs and chains that methods meet rarely: choices among boxes, 16 bits, answers that cannot be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
import torch
from loops import LONG, gap, net_of, same, shots_of, trained
from onnx import TensorProto, numpy_helper

import xdonnx.methods.layerwise as driver
from xdonnx.budget import Plan
from xdonnx.convert import convert
from xdonnx.errors import JobError
from xdonnx.events import Event
from xdonnx.graph import read_net
from xdonnx.methods import make, training
from xdonnx.methods.bench import Bench
from xdonnx.methods.training import Schedule, train
from xdonnx.methods.tune import matching
from xdonnx.patch import Patch, cut
from xdonnx.runtime import answer, open_session
from xdonnx.shots import Shots
from xdonnx.student import find_taps
from xdonnx.walk import MOST_BYTES, affordable
from xdonnx.wanted import Job

DETECTOR = """
g (float[1,3,8,8] image, float[16,3,3,3] w1, float[16] b1, float[16,16,3,3] w2, float[16] b2, float[4,16,1,1] wb,
   float[4] bb, float[2,16,1,1] ws, float[2] bs) => (float[k,4] boxes) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1, b1)
  r1 = Relu (c1)
  c2 = Conv <pads = [1,1,1,1]> (r1, w2, b2)
  r2 = Relu (c2)
  b = Conv (r2, wb, bb)
  s = Conv (r2, ws, bs)
  bf = Reshape (b, four)
  sf = Reshape (s, pair)
  where = Transpose <perm = [0,2,1]> (bf)
  score = Sigmoid (sf)
  chosen = NonMaxSuppression (where, score, most)
  at = Gather <axis = 1> (chosen, second)
  flat = Squeeze (where, first)
  boxes = Gather <axis = 0> (flat, at)
}"""
NUMBERS = {"four": [1, 4, 64], "pair": [1, 2, 64], "most": [20], "second": 2, "first": [0]}
WINNER = """
g (float[N,3,8,8] image, float[8,3,8,8] w1, float[8] b1, float[8,8,1,1] w2, float[8] b2, float[5,8] wf, float[5] bf)
  => (int64[N] out) {
  c1 = Conv (image, w1, b1)
  r1 = Relu (c1)
  c2 = Conv (r1, w2, b2)
  r2 = Relu (c2)
  f = Flatten (r2)
  d = Gemm <transB = 1> (f, wf, bf)
  out = ArgMax <axis = 1, keepdims = 0> (d)
}"""


def bench_of(net: Any, log: Any = lambda event: None) -> Bench:
    return Bench(convert(net, torch.device("cpu")), torch.Generator().manual_seed(0), log)


def test_a_detector_is_compared_at_what_it_picks_from_and_tuned() -> None:
    net = read_net(nets.from_text(DETECTOR, integers=NUMBERS))
    taps = find_taps(net, convert(net, torch.device("cpu")))
    assert taps.answers == ("where", "score")
    patch = Patch({"w2": np.where(np.arange(16)[:, None, None, None] % 4, net.array("w2"), 0)})
    shots = shots_of(net, 12)
    losses = []

    def told(event: Event) -> None:
        losses.append(event.text)

    made = train(net, patch, shots, matching, Schedule(60, 8, False, (0.01,)), bench_of(net, told)).patch

    assert not same(made, patch)
    before, after = (float(part) for part in losses[-1].split("loss ")[1].split(" at")[0].split(" -> "))
    assert after < before


@pytest.mark.parametrize("method", ["tune", "fitnet"])
def test_where_nothing_can_be_compared_nothing_is_trained(method: str) -> None:
    net, heard = net_of(WINNER), []
    patch = Patch({"w2": 0.5 * net.array("w2")})

    found = make(method, {"steps": 5})(net, patch, shots_of(net), Plan("channel"), bench_of(net, heard.append)).patch

    assert found is patch
    if method == "tune":
        assert [event.text for event in heard if event.level == "warning"] == [
            "no value of floating point can be compared: nothing was trained."
        ]


def in_16_bits(model: onnx.ModelProto) -> onnx.ModelProto:
    half = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in half.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*half.graph.input, *half.graph.output, *half.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return half


@pytest.mark.parametrize("fast", [False, True], ids=["exact", "bfloat16"])
def test_a_model_of_16_bits_is_tuned_and_stays_one(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_cpu_has_bfloat16", lambda: fast)
    whole = nets.build("residual")
    net = read_net(in_16_bits(whole))
    inputs = {name: array.astype(np.float16) for name, array in nets.samples(whole, 40).items()}
    patch = Patch({"w1": net.array("w1") * np.float16(0.5)})

    shots = Shots(inputs, None, tuple(map(str, range(40))))
    made = train(net, patch, shots, matching, Schedule(60, 8, False, (0.01,)), bench_of(net)).patch

    assert all(tensor.dtype == np.float16 for tensor in made.tensors.values())
    fresh = {name: array.astype(np.float16) for name, array in nets.samples(whole, 20, 7).items()}
    truth, before, after = (
        answer(open_session(model), fresh)["out"].astype(float)
        for model in (net.source, cut(net, patch), cut(net, made))
    )
    assert np.square(after - truth).sum() < 0.9 * np.square(before - truth).sum()


@pytest.mark.parametrize("name", ["residual", "plain"])
def test_a_student_that_errs_less_than_bfloat16_does_is_not_made_worse(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_cpu_has_bfloat16", lambda: True)
    net, random = net_of(name), np.random.default_rng(0)
    weights = {layer.weight: net.array(layer.weight) for layer in net.layers.values()}
    patch = Patch(
        {n: (w * (1 + 3e-4 * random.standard_normal(w.shape))).astype(np.float32) for n, w in weights.items()}
    )

    made = trained(net, patch, shots_of(net, 60), steps=40)

    assert gap(net, made) < 1.5 * gap(net, patch)


def test_a_second_walk_sees_the_student_that_the_first_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the walk computes at the output is what the written file answers."""
    net = net_of(LONG)
    shots, plan, bench, seen = shots_of(net, 20), Plan("channel", channels={0: 4, 2: 4}), bench_of(net), []
    patch = make("cross", {})(net, Patch(), shots, plan, bench).patch
    walk = driver.walk

    def spied(*arguments: Any, **_: Any) -> Any:
        seen.append(walk(*arguments))
        return seen[-1]

    monkeypatch.setattr(driver, "walk", spied)
    patch = make("thinet", {})(net, patch, shots, plan, bench).patch

    walked = torch.cat(seen[-1][1]["out"])[:20].numpy()
    np.testing.assert_allclose(walked, answer(open_session(cut(net, patch)), shots.inputs)["out"], rtol=1e-3, atol=1e-5)


def test_a_weight_that_another_node_reads_too_is_not_trained() -> None:
    """Otherwise the written file would move it there as well, and answer otherwise than the student that was judged."""
    text = """
g (float[N,3,8,8] image, float[5,3,3,3] w1, float[5] b1, float[4,5] head) => (float[N,4] out) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1, b1)
  r1 = Relu (c1)
  p = GlobalAveragePool (r1)
  f = Flatten (p)
  s = Gemm <transB = 1> (f, head)
  n = ReduceMean <axes = [1], keepdims = 0> (head)
  out = Add (s, n)
}"""
    net = net_of(text)

    made = trained(net, Patch({"w1": 0.5 * net.array("w1")}), shots_of(net, 30), steps=30)

    assert not np.array_equal(made.tensors["w1"], 0.5 * net.array("w1"))
    np.testing.assert_array_equal(made.tensors.get("head", net.array("head")), net.array("head"))


def test_views_are_no_more_than_memory_bears() -> None:
    small, large = net_of("plain"), net_of(LARGE)

    assert affordable(small, 128) == 128
    assert affordable(large, 128) == MOST_BYTES // (4 * 64 * 512 * 512) < 128


LARGE = """
g (float[1,3,512,512] image, float[64,3,1,1] w1, float[2,64,1,1] w2) => (float[1,2,512,512] out) {
  c1 = Conv (image, w1)
  r1 = Relu (c1)
  out = Conv (r1, w2)
}"""


@pytest.mark.parametrize(
    "options",
    [{"alpha": 5.0}, {"beta": -1.0}, {"ridge": -3.0}, {"ridge": float("nan")}],
    ids=["alpha", "beta", "ridge below zero", "no ridge"],
)
def test_shares_and_ridges_that_make_no_sense_are_refused_before_any_work(
    options: dict[str, float], tmp_path: Path
) -> None:
    (name,) = options
    with pytest.raises(JobError, match=f"{name} is"):
        Job(model=tmp_path / "none.onnx", out=tmp_path / "out.onnx", **options).methods()


@pytest.mark.parametrize(("effort", "measured"), [("fast", False), ("paper", False), ("balanced", True)])
def test_error_curves_are_measured_where_the_effort_or_the_user_says_so(
    effort: str, measured: bool, tmp_path: Path
) -> None:
    job = Job(model=tmp_path / "none.onnx", out=tmp_path / "out.onnx", macs=0.5, preset_effort=effort)

    assert job.measured() is measured
    assert job.model_copy(update={"allocation": "measured"}).measured()
    assert not job.model_copy(update={"allocation": "uniform"}).measured()
