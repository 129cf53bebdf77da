"""`inspect` and what it rests on: the survey of a net, and the list of operators that run in torch."""

from __future__ import annotations

import io
import json
from pathlib import Path

import nets
import onnx
import pytest
from program import SAMPLES, TEACHER, call
from rich.console import Console
from rich.progress import Progress

from xdonnx.cost import measure_cost
from xdonnx.coverage import IN_TORCH
from xdonnx.graph import Net, read_net
from xdonnx.model import read_proto
from xdonnx.patch import Patch, cut
from xdonnx.survey import survey

MODELS = ["digits_vgg", "digits_residual", "digits_mobile"]


def macs_by_layer(net: Net, drop: set[int]) -> dict[str, int]:
    """Return the MACs of each layer with these channels cut, as the cost of the file that is then written."""
    layers = measure_cost(cut(net, Patch(drop=frozenset(drop)))).layers
    return {name: layer.macs or 0 for name, layer in layers.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("residual", [False, True])
def test_share_and_floor_are_those_of_a_real_cut(name: str, residual: bool) -> None:
    net = read_net(read_proto(SAMPLES / f"{name}.onnx"))
    groups = [group for group in net.groups if residual or group.stream is None]
    whole = macs_by_layer(net, set())

    found = getattr(survey(net), "residual" if residual else "plain")

    least = macs_by_layer(net, {int(label) for group in groups for label in group.ids[1:]})
    touched = sum(whole[name] for name, macs in least.items() if macs < whole[name])
    assert found.floor == pytest.approx(sum(least.values()) / sum(whole.values()))
    assert found.share == pytest.approx(touched / sum(whole.values()))


def test_layers_are_described_as_the_file_has_them() -> None:
    net = read_net(nets.build("grouped"))

    first, second, last = survey(net).layers

    assert (first.op, first.kernel, first.groups, first.inputs, first.outputs) == ("Conv", (1, 1), 1, 3, 8)
    assert (second.groups, second.inputs, second.outputs, second.kernel, second.size) == (2, 8, 6, (3, 3), (8, 8))
    assert second.macs == 6 * 4 * 3 * 3 * 8 * 8 and second.params == 6 * 4 * 3 * 3 + 6
    assert (last.free, last.whole) == (0, "it is graph output 'out'")
    assert first.share + second.share + last.share == pytest.approx(1)


def test_channels_that_are_added_into_are_told_from_those_that_are_pinned() -> None:
    found = survey(read_net(nets.build("residual")))

    layers = {layer.layer: layer for layer in found.layers}
    assert (layers["c1"].free, layers["c1"].added, layers["c1"].whole) == (8, 0, "")
    assert (layers["c0"].free, layers["c0"].added) == (0, 8)
    assert "Add 's'" in layers["c0"].whole and "--residual" in layers["c0"].whole
    assert found.residual.floor < found.plain.floor < 1


def test_operators_are_counted_and_sorted_by_where_they_run(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N,3,8,8] image) => (float[N,4,8,8] out)
    <float[4,3,1,1] w = {0,1,2,3,4,5,6,7,8,9,10,11}, float[4] s = {1,1,1,1}, float[4] z = {0,0,0,0}> {
      one = Constant <value = float {1.0}> ()
      c = Conv (image, w)
      n = BatchNormalization (c, s, z, z, s)
      h = Hardmax <axis = 1> (n)
      out = Add (h, one)
    }"""
    proto = onnx.parser.parse_model(text)

    runs = {use.op: (use.count, use.runs) for use in survey(read_net(proto)).operators}

    assert runs == {
        "Constant": (1, "folded"),
        "Conv": (1, "torch"),
        "BatchNormalization": (1, "folded"),
        "Hardmax": (1, "onnxruntime"),
        "Add": (1, "torch"),
    }


def test_the_list_of_operators_is_that_of_the_converters_there_are() -> None:
    """An operator runs in torch if every version of it that onnx knows has a converter."""
    from onnx2torch.node_converters.registry import _CONVERTER_REGISTRY

    from xdonnx.operators import register

    register()
    versions: dict[str, set[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            versions.setdefault(schema.name, set()).add(schema.since_version)
    covered: dict[str, set[int]] = {}
    for key in _CONVERTER_REGISTRY:
        if key.domain == "":
            covered.setdefault(key.operation_type, set()).add(key.version)

    complete = {name for name, known in covered.items() if versions.get(name, set()) <= known}
    assert {name for name in IN_TORCH if name in versions} == {name for name in complete if name in versions}


@pytest.mark.parametrize("width", [60, 160])
@pytest.mark.parametrize("name", MODELS)
def test_every_width_holds_every_layer(name: str, width: int) -> None:
    ended = call("inspect", SAMPLES / f"{name}.onnx", width=width)

    assert ended.code == 0, ended.err
    assert max(map(len, ended.out.splitlines()[1:])) <= width
    layers = read_net(read_proto(SAMPLES / f"{name}.onnx")).layers
    table = ended.out.split("Layers (")[1].split("\n\n")[0].splitlines()
    assert len(table) == 2 + len(layers)
    assert "it is graph output 'logits'" in ended.out
    assert "of the MACs can be compressed" in " ".join(ended.out.split())


@pytest.mark.parametrize("most", [14, 19, 25, 40])
def test_names_that_begin_and_end_alike_are_shortened_to_what_differs(most: int) -> None:
    """Six rows of a plan read /feature…tion_output_0, in a window of 80 columns."""
    from xdonnx_cli.terminal import shortened

    names = [f"/features/features.{n}/features.{n}.1/BatchNormalization_output_0" for n in (0, 1, 3, 4, 6, 17)]
    short = shortened([*names, "logits"], most)

    assert len(set(short.values())) == 7 and short["logits"] == "logits"
    assert max(map(len, short.values())) <= most
    for name in names:
        assert short[name].strip("…") in name or "…" in short[name].strip("…")


def test_names_of_a_hundred_layers_stay_apart_when_shortened() -> None:
    from xdonnx_cli.terminal import shortened

    begin = [f"model.backbone.stages.{k}.conv" for k in range(100)]
    end = [f"/{k:02}/backbone/stages/Convolution_output_0" for k in range(100)]

    for names in (begin, end):
        short = shortened(names, 16)
        assert len(set(short.values())) == 100 and max(map(len, short.values())) <= 16


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_bar_names_layers_so_that_one_tells_them_apart(width: int) -> None:
    """Forty letters of stage and layer begin alike; other exporters' names end alike as well."""
    from xdonnx.events import Event
    from xdonnx_cli.progress import _drawing

    differ = [f"model.backbone.stages.2.blocks.{k}.conv{n}" for k in range(6) for n in (1, 2)]
    alike = [f"/features/features.{n}/features.{n}.1/BatchNormalization_output_0" for n in range(12)]
    for names in (differ, alike):
        bars = Progress(console=Console(file=io.StringIO(), width=width))
        draw, shown = _drawing(bars), []
        for at, name in enumerate(names):
            draw(Event("fit", name, done=at, total=len(names)))
            shown.append(bars.tasks[-1].description.removeprefix("compress "))
        assert all(short not in shown[max(0, at - 8) : at] for at, short in enumerate(shown))
        assert max(map(len, shown)) <= max(12, min(30, width - 40))
        assert shown[0].startswith("…") and names[0].endswith(shown[0][1:])
        assert names is alike or all(name.endswith(short[1:]) for name, short in zip(names, shown, strict=True))


def test_json_holds_the_whole_survey() -> None:
    ended = call("inspect", TEACHER, "--json")

    found = json.loads(ended.out)
    expected = json.loads(json.dumps(survey(read_net(read_proto(TEACHER))).to_dict()))
    assert found["bytes"] == Path(TEACHER).stat().st_size
    assert {key: found[key] for key in expected} == expected


def test_a_free_size_is_assumed_aloud_and_taken_when_given(tmp_path: Path) -> None:
    proto = nets.build("plain")
    for axis in (2, 3):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"size{axis}"
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    onnx.save(proto, tmp_path / "free.onnx")

    assumed = call("inspect", tmp_path / "free.onnx", "--json")
    given = call("inspect", tmp_path / "free.onnx", "--json", "--input-shape", "image:1x3x16x16")

    assert json.loads(assumed.out)["assumed"] == ["image axis 2 = 224", "image axis 3 = 224"]
    assert json.loads(given.out)["assumed"] == []
    assert json.loads(given.out)["macs"] == 8 * 3 * 9 * 16 * 16 + 6 * 8 * 9 * 8 * 8


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["none.onnx"], 4, "no model at"),
        ([TEACHER, "--input-shape", "picture:1x1x16x16"], 2, "no input 'picture'"),
        ([TEACHER, "--input-shape", "image:1x1x16"], 2, "not what the graph takes"),
    ],
)
def test_mistakes_have_their_exit_codes(arguments: list[str], code: int, says: str) -> None:
    ended = call("inspect", *arguments)

    assert (ended.code, ended.out) == (code, "") and says in ended.err
