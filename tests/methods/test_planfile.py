"""A plan survives its file, and a slip of the pen in it is one clear error."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest

from xdonnx.budget import Plan
from xdonnx.errors import JobError, NothingToDo
from xdonnx.gate import Gate
from xdonnx.graph import read_net
from xdonnx.images import Preprocess
from xdonnx.job import Job, run
from xdonnx.model import fingerprint, interface, read_proto
from xdonnx.planfile import group_names, macs_share, make_planfile, plan_of, read_planfile, write_planfile, written

SAMPLES = Path(__file__).parents[2] / "samples"
NET = read_net(nets.build("residual"))  # group 0: c0 with c2, 8 channels; group 1: c1, 8 channels
CURVE = ((8, 0.0), (6, 0.0156), (4, 0.1), (1, 2e-9))
HASH = "ab" * 32


def saved(path: Path, plan: Plan, net: Any = NET, curves: Any = None, target: str = "channel macs 0.5") -> Path:
    file = make_planfile(net, plan, curves or {}, HASH, target)
    write_planfile(written(net, file, "model.onnx", path.name), path)
    return path


def edited(tmp_path: Path, old: str, new: str) -> Path:
    path = saved(tmp_path / "plan.toml", Plan("channel", channels={0: 5, 1: 3}))
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


def test_a_plan_and_its_curves_survive_the_file(tmp_path: Path) -> None:
    plan = Plan("channel", channels={1: 3})
    path = saved(tmp_path / "plan.toml", plan, curves={0: CURVE, 1: CURVE[:2]})

    assert plan_of(path, NET, HASH) == plan
    file = read_planfile(path)
    assert (file.teacher, file.structure, file.target) == (HASH, "channel", "channel macs 0.5")
    assert [(la.name, la.units, la.keep, la.curve) for la in file.layer] == [
        ("c0", 8, 8, CURVE), ("c1", 8, 3, CURVE[:2]),
    ]  # fmt: skip
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.toml"]


def test_weights_survive_too(tmp_path: Path) -> None:
    plan = Plan("element", weights={"c1": 144, "c2": 1})
    path = saved(tmp_path / "plan.toml", plan, target="element keep 0.25")
    assert plan_of(path, NET, HASH) == plan
    assert [layer.units for layer in read_planfile(path).layer] == [576, 576]


def test_comments_say_how_much_of_the_macs_a_layer_is_and_who_reads_it(tmp_path: Path) -> None:
    text = saved(tmp_path / "plan.toml", Plan("channel", channels={1: 3})).read_text(encoding="utf-8")
    # c1 and c2 have 8x8x3x3 weights at 64 places, c0 3x8x3x3; the product at the end has 40.
    share = 2 * 64 * 576 / (64 * (216 + 2 * 576) + 40)
    assert macs_share(NET, 1) == pytest.approx(share)
    assert f'# takes part in {share:.1%} of the MACs; read by "c2"\nname = "c1"' in text
    assert text.startswith("# How much of each layer of model.onnx stays.")
    assert tomllib.loads(text)["schema_version"] == 1


def test_names_with_quotes_and_breaks_do_not_break_the_file(tmp_path: Path) -> None:
    model, name = nets.build("residual"), 'c"1\n#\x7f\\ü'
    for node in model.graph.node:
        for names in (node.input, node.output):
            for at, value in enumerate(names):
                names[at] = name if value == "c1" else value
    net = read_net(model)
    path = saved(tmp_path / "plan.toml", Plan("channel", channels={1: 3}), net)
    assert read_planfile(path).layer[0].name == name
    assert plan_of(path, net, HASH).channels == {1: 3}


def test_groups_of_one_maker_have_names_of_their_own() -> None:
    net = read_net(nets.build("split"))
    makers = [group.name for group in net.groups]
    assert len(set(makers)) < len(makers), "the case needs a layer that makes two groups"
    names = group_names(net)
    assert list(names.values()) == list(range(len(net.groups)))
    assert list(names)[:2] == ["c1", "c1#2"]


def test_an_untouched_layer_may_be_left_out(tmp_path: Path) -> None:
    path = edited(tmp_path, "keep = 5", "keep = 8")
    assert plan_of(path, NET, HASH).channels == {1: 3}
    text = path.read_text(encoding="utf-8")
    start = text.index("[[layer]]")
    path.write_text(text[:start] + text[text.index("[[layer]]", start + 1) :], encoding="utf-8")
    assert plan_of(path, NET, HASH).channels == {1: 3}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("schema_version = 1", "schema_version = 9", "'schema_version' is 9"),
        ("structure =", "structur =", "unknown key 'structur'. Did you mean 'structure'?"),
        ('structure = "channel"', 'structure = "2:4"', "'structure' is '2:4'"),
        ("keep = 5", "kept = 5", "in layer 'c0'"),
        ("keep = 5", "", "'keep' is missing in layer 'c0'"),
        ('name = "c0"', "", "'name' is missing in [[layer]] number 1"),
        ("keep = 5", "keep = 5.5", "keep = 5.5 in layer 'c0' is not a whole number"),
        ("keep = 5", "keep = 5.0", "keep = 5.0 in layer 'c0' is not a whole number"),
        ("keep = 5", "keep = true", "keep = True in layer 'c0' is not a whole number"),
        ("keep = 5", 'keep = "5"', "keep = '5' in layer 'c0' is not a whole number"),
        ("keep = 5", "keep = 0", "layer 'c0' has keep = 0.\n  It is a whole number from 1 to 8"),
        ("keep = 5", "keep = 9", "layer 'c0' has keep = 9.\n  It is a whole number from 1 to 8"),
        ("units = 8", "units = 16", "layer 'c0' has units = 16, and the model 8"),
        ('name = "c0"', 'name = "c0x"', "no layer 'c0x' may lose channels. Did you mean 'c0'?"),
        ('name = "c1"', 'name = "c0"', "layer 'c0' stands there twice"),
        ("keep = 5", "keep = 5\nkeep = 6", "is not TOML"),
        (HASH, "cd" * 32, "was made for another model"),
    ],
)
def test_a_slip_of_the_pen_is_one_clear_error(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = edited(tmp_path, old, new)
    with pytest.raises(JobError, match=re.escape(message)) as raised:
        plan_of(path, NET, HASH)
    assert str(path) in str(raised.value) and "\n  " in str(raised.value)


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"(?s)no plan at .*xdonnx plan MODEL"):
        read_planfile(tmp_path / "none.toml")
    with pytest.raises(JobError, match="cannot read the plan"):
        read_planfile(tmp_path)
    (tmp_path / "model.onnx").write_bytes(onnx.ModelProto(ir_version=8).SerializeToString() + b"\xff\xfe")
    with pytest.raises(JobError, match="is not TOML"):
        read_planfile(tmp_path / "model.onnx")


def test_a_plan_that_keeps_everything_is_nothing_to_do(tmp_path: Path) -> None:
    path = saved(tmp_path / "plan.toml", Plan("channel"), curves={1: CURVE})
    with pytest.raises(NothingToDo, match="keeps everything"):
        plan_of(path, NET, HASH)


def job(folder: Path, **options: Any) -> Job:
    wanted: dict[str, Any] = {
        "model": SAMPLES / "digits_mobile.onnx",
        "out": folder / "student.onnx",
        "shots": (str(SAMPLES / "shots"),),
        "preprocess": Preprocess(preset="unit"),
        "device": "cpu",
        "gate": Gate(),
    }
    return Job(**(wanted | options))


def test_an_edited_keep_is_what_the_student_has(tmp_path: Path) -> None:
    teacher = SAMPLES / "digits_mobile.onnx"
    net = read_net(read_proto(teacher))
    name, at = next((n, at) for n, at in group_names(net).items() if net.groups[at].stream is None)
    units = len(net.groups[at].ids)
    file = make_planfile(net, Plan("channel", channels={at: units - 1}), {}, fingerprint(teacher), "by hand")
    text = written(net, file, "m", "p").replace(f"keep = {units - 1}", f"keep = {units - 5}")
    write_planfile(text, tmp_path / "plan.toml")

    report = run(job(tmp_path, plan=tmp_path / "plan.toml"))

    assert report.exit_code == 0
    rows = {layer.layer: layer for layer in report.layers}
    assert (rows[name].kept, rows[name].units) == (units - 5, units)
    for layer in net.layers.values():
        mine = np.isin(layer.out_ids, net.groups[at].ids).any()
        assert rows[layer.name].kept == rows[layer.name].units - (5 if mine else 0)
    weight = net.layers[name].weight
    student = {tensor.name: tuple(tensor.dims) for tensor in read_proto(tmp_path / "student.onnx").graph.initializer}
    assert student[weight][0] == units - 5
    assert interface(read_proto(tmp_path / "student.onnx")).metadata["xdonnx.target"] == "channel plan plan.toml"


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_plan_may_name_weights_that_lie_the_other_way_in_the_file(transposed: int, tmp_path: Path) -> None:
    shape = "5,6" if transposed else "6,5"
    model = nets.from_text(f"""
g (float[N,3,8,8] image, float[6,3,3,3] w1, float[6] b1, float[{shape}] wf, float[5] bf) => (float[N,5] out) {{
  c1 = Conv (image, w1, b1)
  r1 = Relu (c1)
  p = GlobalAveragePool (r1)
  f = Flatten (p)
  out = Gemm <transB = {transposed}> (f, wf, bf)
}}""")
    onnx.save(model, tmp_path / "m.onnx")
    net = read_net(model)
    path = saved(tmp_path / "plan.toml", Plan("element", weights={"out": 10}), net, target="element keep 0.3")
    path.write_text(path.read_text().replace(HASH, fingerprint(tmp_path / "m.onnx")))
    np.save(tmp_path / "x.npy", nets.samples(model, 30)["image"])

    run(Job(model=tmp_path / "m.onnx", out=tmp_path / "s.onnx", shots=(str(tmp_path / "x.npy"),), plan=path,
            method=("l1-norm",), gate=Gate(warn_only=("smaller", "not_slower"))))  # fmt: skip

    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in read_proto(tmp_path / "s.onnx").graph.initializer}
    before = net.array("wf")
    largest = np.abs(before) >= np.sort(np.abs(before).ravel())[-10]
    assert np.array_equal(tensors["wf"], np.where(largest, before, 0))


def test_a_plan_of_weights_brings_its_structure_along(tmp_path: Path) -> None:
    teacher = SAMPLES / "digits_mobile.onnx"
    net = read_net(read_proto(teacher))
    name = [name for name, layer in net.layers.items() if layer.kernel][2]
    file = make_planfile(net, Plan("element", weights={name: 7}), {}, fingerprint(teacher), "by hand")
    write_planfile(written(net, file, "m", "p"), tmp_path / "plan.toml")

    report = run(job(tmp_path, plan=tmp_path / "plan.toml"))

    rows = {layer.layer: layer.kept for layer in report.layers}
    assert rows[name] == 7
    whole = {key: int(np.count_nonzero(net.array(layer.weight))) for key, layer in net.layers.items()}
    assert all(kept == whole[key] for key, kept in rows.items() if key != name)
    with pytest.raises(JobError, match=r"--structure is channel, and .* has structure element"):
        job(tmp_path, plan=tmp_path / "plan.toml", structure="channel")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs": 0.5}, "--macs and --plan are both given"),
        ({"keep": 0.5}, "--keep and --plan are both given"),
        ({"exclude": ("c1",)}, "--exclude has no say where --plan is given"),
        ({"round_to": 4}, "--round-to has no say"),
        ({"residual": True}, "--residual has no say"),
        ({"allocation": "uniform"}, "--allocation has no say"),
    ],
)
def test_a_plan_is_the_only_target(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = saved(tmp_path / "plan.toml", Plan("channel", channels={1: 3}))
    with pytest.raises(JobError, match=message):
        run(job(tmp_path, plan=path, **options))
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.toml"]
