"""What the report says of each layer: what it kept, and why the rest of it had to stay."""

from __future__ import annotations

import nets
import numpy as np
import pytest

from xdonnx.accounting import layer_results
from xdonnx.graph import read_net
from xdonnx.methods.bench import Outcome
from xdonnx.patch import Patch
from xdonnx.survey import survey


@pytest.mark.parametrize("name", ["residual", "grouped", "depthwise"])
def test_layers_give_the_reasons_that_inspect_gives(name: str) -> None:
    net = read_net(nets.build(name))
    rows = {row.layer: row for row in layer_results(net, Outcome(Patch()), "channel", residual=False)}
    for seen in survey(net).layers:
        if not seen.free:
            assert rows[seen.layer].note == seen.whole and seen.whole, seen.layer


def test_layers_that_keep_their_single_weights_say_why() -> None:
    """The report of --structure element passed over the first convolution and the classifier without a word."""
    net = read_net(nets.build("residual"))
    convolutions = [layer for layer in net.layers.values() if layer.op == "Conv"]
    cut = {layer.weight: 0 * net.array(layer.weight) for layer in convolutions[1:]}

    notes = {row.layer: row.note for row in layer_results(net, Outcome(Patch(tensors=cut)), "element")}

    assert notes.pop(convolutions[0].name) == "the first convolution keeps its weights"
    for layer in net.layers.values():
        if layer is not convolutions[0]:
            assert notes[layer.name] == ("" if layer.op == "Conv" else "single weights go from convolutions only")
    assert any(notes.values())


def test_a_layer_that_training_moved_still_says_why_it_kept_its_weights() -> None:
    net = read_net(nets.build("residual"))
    first, second, *_ = [layer for layer in net.layers.values() if layer.op == "Conv"]
    moved = {first.weight: 1.1 * net.array(first.weight), second.weight: net.array(second.weight).copy()}
    moved[second.weight].flat[0] = 0
    notes = {row.layer: row.note for row in layer_results(net, Outcome(Patch(tensors=moved)), "element")}
    assert notes[first.name] == "the first convolution keeps its weights" and notes[second.name] == ""


def test_a_job_that_may_cut_residual_streams_gives_no_stream_as_a_reason() -> None:
    net = read_net(nets.build("residual"))
    notes = {
        free: [row.note for row in layer_results(net, Outcome(Patch()), "channel", residual=free)] for free in (0, 1)
    }
    assert any("--residual" in note for note in notes[0]) and not any("--residual" in note for note in notes[1])


def test_what_a_layer_kept_is_counted_by_its_channels() -> None:
    net = read_net(nets.build("residual"))
    group = next(group for group in net.groups if group.stream is None)
    drop = frozenset(int(label) for label in group.ids[:3])
    rows = {row.layer: row for row in layer_results(net, Outcome(Patch(drop=drop)), "channel")}
    for layer in net.layers.values():
        gone = int(np.isin(layer.out_ids, list(drop)).sum())
        assert (rows[layer.name].kept, rows[layer.name].units) == (len(layer.out_ids) - gone, len(layer.out_ids))
    assert sum(row.kept < row.units for row in rows.values()) == len(group.producers)
