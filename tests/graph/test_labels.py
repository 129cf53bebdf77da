"""Which channels may go, which are tied, and the reasons for those that stay."""

from __future__ import annotations

import nets
import numpy as np
import pytest

from xdonnx.errors import ModelError
from xdonnx.graph import Net, read_net


def groups(net: Net) -> dict[str, tuple[int, tuple[str, ...], tuple[str, ...], bool]]:
    return {g.name: (len(g.ids), g.producers, g.readers, g.stream is not None) for g in net.groups}


def test_a_plain_chain_has_a_group_for_each_hidden_layer() -> None:
    net = read_net(nets.build("plain"))
    assert groups(net) == {"c1": (8, ("c1",), ("out",), False)}
    assert set(net.pinned.values()) == {
        "it is graph output 'out'",
        "'image', which 'c1' reads, has no channels that can go",
    }


def test_an_addition_ties_channels_into_a_stream() -> None:
    net = read_net(nets.build("residual"))
    assert groups(net) == {
        "c0": (8, ("c0", "c2"), ("c1", "out"), True),
        "c1": (8, ("c1",), ("c2",), False),
    }


def test_concat_joins_labels_in_order() -> None:
    net = read_net(nets.build("concat"))
    assert groups(net) == {
        "c1": (6, ("c1",), ("c2", "c3"), False),
        "c2": (4, ("c2",), ("out",), False),
        "c3": (5, ("c3",), ("out",), False),
    }
    columns = net.layers["out"].columns
    assert columns.tolist() == [*net.layers["c2"].out_ids, *net.layers["c3"].out_ids]


def test_depthwise_hands_channels_on() -> None:
    net = read_net(nets.build("depthwise"))
    assert groups(net) == {"c1": (8, ("c1",), ("out",), False)}
    assert net.layers["c2"].depthwise
    assert np.array_equal(net.layers["c2"].out_ids, net.layers["c1"].out_ids)


def test_grouped_convolutions_lose_the_same_channels_in_every_group() -> None:
    net = read_net(nets.build("grouped"))
    # 8 channels in two groups of 4, 6 outputs in two groups of 3: units are pairs.
    assert {name: row[0] for name, row in groups(net).items()} == {"c1": 4, "c2": 3}
    made = net.layers["c1"].out_ids
    assert np.array_equal(made[:4], made[4:])


def test_flatten_repeats_labels_for_every_position() -> None:
    net = read_net(nets.build("flatten"))
    assert np.array_equal(net.layers["d"].columns, np.repeat(net.layers["c1"].out_ids, 16))
    assert groups(net)["d"] == (5, ("d",), ("out",), False)


def test_a_gate_ties_its_maker_to_what_it_gates() -> None:
    net = read_net(nets.build("gate"))
    assert groups(net)["c1"] == (8, ("c1", "e"), ("q", "out"), False)
    assert groups(net)["q"] == (4, ("q",), ("e",), False)


def test_channel_shuffle_ties_across_its_groups() -> None:
    net = read_net(nets.build("shuffle"))
    # Shuffled: 0 4 1 5 | 2 6 3 7. The shuffle ties i to i + 4, the two groups 0 to 2, 4 to 6, 1 to 3, 5 to 7.
    assert {name: row[0] for name, row in groups(net).items()} == {"c1": 2, "c2": 4}
    made = net.layers["c1"].out_ids
    assert len(set(made[::2])) == len(set(made[1::2])) == 1


def test_what_is_not_understood_pins_with_its_name() -> None:
    text = """
g (float[N,3,8,8] image, float[8,3,3,3] w1, float[8] b1, float[6,8,3,3] w2) => (float[N,6,8,8] out) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1, b1)
  n = LRN <size = 5> (c1)
  out = Conv <pads = [1,1,1,1]> (n, w2)
}"""
    net = read_net(nets.from_text(text))
    assert not net.groups
    assert net.reasons(net.layers["c1"]) == ["LRN 'n' is not followed"]


def test_softmax_pins_only_along_its_axis() -> None:
    text = """
g (float[N,3,8,8] image, float[8,3,3,3] w1, float[6,8,3,3] w2) => (float[N,6,8,8] out) {
  c1 = Conv <pads = [1,1,1,1]> (image, w1)
  n = Softmax <axis = AXIS> (c1)
  out = Conv <pads = [1,1,1,1]> (n, w2)
}"""
    assert read_net(nets.from_text(text.replace("AXIS", "3"))).groups
    along = read_net(nets.from_text(text.replace("AXIS", "1")))
    assert along.reasons(along.layers["c1"]) == ["Softmax 'n' runs along them"]


def test_a_weight_shared_by_two_layers_stays_whole() -> None:
    text = """
g (float[N,3,8,8] image, float[4,3,1,1] w0, float[4,4,3,3] w, float[6,4,3,3] w2) => (float[N,6,8,8] out) {
  c0 = Conv (image, w0)
  c1 = Conv <pads = [1,1,1,1]> (c0, w)
  r = Relu (c1)
  c2 = Conv <pads = [1,1,1,1]> (r, w)
  out = Conv <pads = [1,1,1,1]> (c2, w2)
}"""
    net = read_net(nets.from_text(text))
    assert not net.groups
    assert any("share the weight 'w'" in reason for reason in net.pinned.values())


def test_macs_are_positions_times_weights() -> None:
    net = read_net(nets.build("plain"))
    assert net.layers["c1"].macs == 64 * 8 * 3 * 9
    assert net.layers["out"].macs == 16 * 6 * 8 * 9


def test_a_graph_without_convolution_is_refused() -> None:
    text = "g (float[N,6] image, float[4,6] w) => (float[N,4] out) { out = Gemm <transB = 1> (image, w) }"
    with pytest.raises(ModelError, match="no convolution"):
        read_net(nets.from_text(text))
