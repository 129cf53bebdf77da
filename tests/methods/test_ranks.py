"""Which ranks a target comes to: it is met, nothing is taken apart for nothing, and the best choice is found."""

from __future__ import annotations

import contextlib
import itertools
from functools import cache
from pathlib import Path

import nets
import numpy as np
import onnx_ir as ir
import pytest

from xdonnx.cost import measure_cost
from xdonnx.errors import JobError, NothingToDo
from xdonnx.graph import Net, read_net
from xdonnx.model import read_proto
from xdonnx.ranks import Choice, LowRank, choose, weight_of
from xdonnx.splitting import pieces_of, taken_apart

SAMPLES = Path(__file__).parents[2] / "samples"
WIDE = """
g (float[N,3,8,8] image, float[16,3,3,3] w0, float[16,16,3,3] w1, float[24,16,3,3] w2, float[10,24] wf)
  => (float[N,10] out) {
  c0 = Conv <pads = [1,1,1,1]> (image, w0)
  r0 = Relu (c0)
  c1 = Conv <pads = [1,1,1,1]> (r0, w1)
  r1 = Relu (c1)
  c2 = Conv <pads = [1,1,1,1], strides = [2,2]> (r1, w2)
  p = GlobalAveragePool (c2)
  f = Flatten (p)
  out = Gemm <transB = 1> (f, wf)
}"""  # fmt: skip


@cache
def sample(name: str) -> Net:
    return read_net(read_proto(SAMPLES / f"{name}.onnx"))


def wide() -> Net:
    return read_net(nets.from_text(WIDE))


@pytest.mark.parametrize("scheme", ["auto", "spatial", "channel"])
@pytest.mark.parametrize(("kind", "amount"), [("macs", 0.8), ("macs", 0.5), ("params", 0.7)])
@pytest.mark.parametrize("name", ["digits_vgg", "digits_residual"])
def test_the_student_costs_no_more_than_the_target_and_little_less(
    name: str, kind: str, amount: float, scheme: str
) -> None:
    net = sample(name)
    splits = choose(net, LowRank(kind, amount, scheme)).splits

    student = taken_apart(net, {n: pieces_of(net, net.layers[n], split) for n, split in splits.items()})

    before, after = measure_cost(net.source), measure_cost(student)
    reached = getattr(after, kind) / getattr(before, kind)
    assert amount - 0.02 < reached <= amount
    assert after.macs <= before.macs and after.params <= before.params


def loss(choice: Choice) -> float:
    return sum(split.loss for split in choice.splits.values())


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("amount", [0.85, 0.7, 0.55, 0.4])
def test_no_choice_of_ranks_within_the_target_is_better(kind: str, amount: float) -> None:
    """Compared with all the choices there are, of pairs with ranks in steps of four."""
    net = wide()
    names = [name for name in net.layers if name not in ("c0", "out")]
    wanted = LowRank(kind, amount, "spatial", include=tuple(names), round_to=4)
    folded = measure_cost(ir.to_proto(net.model))
    limit = amount * getattr(folded, kind)

    menus = []
    for name in names:
        layer, weight = net.layers[name], weight_of(net, net.layers[name])
        options = [(layer.macs if kind == "macs" else weight.size, 0.0)]
        for rank in range(4, 3 * min(weight.shape[1:3]) + 1, 4):
            with contextlib.suppress(NothingToDo):
                split = choose(net, LowRank("rank", rank, "spatial", include=(name,))).splits[name]
                options.append((getattr(split, kind), split.loss))
        menus.append(options)
    rest = getattr(folded, kind) - sum(menu[0][0] for menu in menus)
    fits = [rows for rows in itertools.product(*menus) if rest + sum(cost for cost, _ in rows) <= limit]
    best = min(sum(lost for _, lost in rows) for rows in fits)

    found = loss(choose(net, wanted))

    assert found == pytest.approx(best)


@pytest.mark.parametrize("amount", [0.9, 0.84, 0.78])
def test_auto_keeps_of_a_layer_what_the_better_scheme_keeps_at_that_cost(amount: float) -> None:
    net = sample("digits_vgg")
    name = max(net.layers, key=lambda name: net.layers[name].macs)

    kept = {
        scheme: choose(net, LowRank("macs", amount, scheme, include=(name,), round_to=1)).splits[name].kept
        for scheme in ("auto", "spatial", "channel")
    }

    assert kept["auto"] == max(kept.values())


@pytest.mark.parametrize("share", [0.5, 0.7, 0.8])
def test_a_share_of_the_energy_is_kept_and_no_cheaper_rank_would(share: float) -> None:
    net = wide()

    split = choose(net, LowRank("energy", share, "spatial", round_to=1)).splits["c1"]

    weight = weight_of(net, net.layers["c1"])[0].transpose(1, 2, 0, 3)
    spectrum = np.linalg.svd(weight.reshape(16 * 3, -1), compute_uv=False) ** 2
    shares = np.cumsum(spectrum) / spectrum.sum()
    assert split.ranks == (int(np.argmax(shares >= share)) + 1,)
    assert split.kept == pytest.approx(shares[split.ranks[0] - 1])


def test_ranks_are_those_asked_for_and_multiples_of_what_is_asked() -> None:
    net = wide()

    assert {s.ranks for s in choose(net, LowRank("rank", 5, "spatial")).splits.values()} == {(5,)}
    assert {s.ranks for s in choose(net, LowRank("rank", 5, "channel")).splits.values()} == {(5, 5), (5,)}
    for step in (3, 8):
        ranks = [
            r for s in choose(net, LowRank("macs", 0.6, "spatial", round_to=step)).splits.values() for r in s.ranks
        ]
        assert ranks and all(rank % step == 0 for rank in ranks)


def test_layers_that_stay_whole_say_why() -> None:
    text = """
    g (float[N,3,8,8] image, float[16,3,3,3] w0, float[16,1,3,3] wd, float[16,16,3,3] w1, float[16,8,2,2] wt,
       float[8,8,3,3] ws, float[4,8,1,1] bad, float[4,4,3,3] fed) => (float[N,4,16,16] out) {
      c0 = Conv <pads = [1,1,1,1]> (image, w0)
      d = Conv <group = 16, pads = [1,1,1,1]> (c0, wd)
      c1 = Conv <pads = [1,1,1,1]> (d, w1)
      t = ConvTranspose <strides = [2,2]> (c1, wt)
      s1 = Conv <pads = [1,1,1,1]> (t, ws)
      s2 = Conv <pads = [1,1,1,1]> (s1, ws)
      n = Conv (s2, bad)
      w = Sin (fed)
      out = Conv <pads = [1,1,1,1]> (n, w)
    }"""
    proto = nets.from_text(text, images=("image", "fed"))
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    broken = nets.numpy_helper.to_array(held["bad"]).copy()
    broken[0] = np.inf
    held["bad"].CopyFrom(nets.numpy_helper.from_array(broken, "bad"))
    net = read_net(proto)

    found = choose(net, LowRank("macs", 0.9))

    assert list(found.splits) == ["c1"]
    words = {"c0": "--include", "d": "depthwise", "t": "transposed", "s1": "'ws'", "s2": "'ws'", "n": "no number",
             "out": "computed by the graph"}  # fmt: skip
    assert found.whole.keys() == words.keys()
    assert all(words[name] in why for name, why in found.whole.items())
    excluded = choose(net, LowRank("macs", 0.96, include=("c0", "c1"), exclude=("c1",), round_to=1))
    assert list(excluded.splits) == ["c0"] and "--exclude" in excluded.whole["c1"]


def test_a_layer_of_low_rank_is_taken_apart_before_any_that_loses() -> None:
    proto = nets.from_text(WIDE)
    held = next(tensor for tensor in proto.graph.initializer if tensor.name == "w2")
    weight = nets.numpy_helper.to_array(held)
    column = np.einsum("orb,ria->oiab", weight[:, :2, 0], np.ones((2, 16, 3)) * [[[1.0]], [[-2.0]]])
    held.CopyFrom(nets.numpy_helper.from_array(column.astype(np.float32), "w2"))

    found = choose(read_net(proto), LowRank("macs", 0.85, round_to=1))

    assert list(found.splits) == ["c2"] and found.splits["c2"].kept == pytest.approx(1)
    assert found.whole["c1"] == "the target is met without it"


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (LowRank("macs", 0.01), r"--macs 1% is out of reach: .* (\d+\.\d)% remain"),
        (LowRank("params", 0.02, round_to=1), r"--params 2% is out of reach: .* (\d+\.\d)% remain"),
    ],
)
def test_a_target_out_of_reach_says_what_is_in_reach(wanted: LowRank, says: str) -> None:
    net = wide()
    with pytest.raises(NothingToDo, match=says) as caught:
        choose(net, wanted)

    least = float(str(caught.value).partition("allows, ")[2].partition("%")[0]) / 100
    assert ("--round-to 1" in str(caught.value)) is (wanted.round_to is None)
    choose(net, LowRank(wanted.kind, least + 0.001, round_to=wanted.round_to))
    with pytest.raises(NothingToDo):
        choose(net, LowRank(wanted.kind, least - 0.001, round_to=wanted.round_to))


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (LowRank("macs", 1.0), "--macs is 1"),
        (LowRank("energy", 0.0), "--energy is 0"),
        (LowRank("rank", 0), "--rank is 0"),
        (LowRank("rank", 4, round_to=8), "--round-to has no say"),
        (LowRank(round_to=0), "--round-to is 0"),
        (LowRank(scheme="spacial"), "Did you mean 'spatial'"),
        (LowRank(include=("stage*",)), "--include 'stage.*' matches no layer"),
        (LowRank(exclude=("stage*",)), "--exclude 'stage.*' matches no layer"),
    ],
)
def test_what_makes_no_sense_is_refused(wanted: LowRank, says: str) -> None:
    with pytest.raises(JobError, match=says):
        choose(wide(), wanted)
