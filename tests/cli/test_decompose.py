"""`decompose` and the call of that name: what is written, what is said of it, and every mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
from helpers import same_interface
from program import SAMPLES, call, listing

import xdonnx
import xdonnx.decomposition
from xdonnx.cost import measure_cost
from xdonnx.model import fingerprint
from xdonnx.runtime import answer, open_session

TEACHER = str(SAMPLES / "digits_vgg.onnx")


@pytest.mark.parametrize("scheme", ["auto", "spatial", "channel"])
def test_the_file_written_is_what_the_table_and_the_json_say(here: Path, scheme: str) -> None:
    ended = call("decompose", TEACHER, "--macs", "60%", "--scheme", scheme, "-o", "low.onnx", "--json", "low.json")

    assert ended.code == 0 and ended.err == ""
    before, after, told = onnx.load(TEACHER), onnx.load("low.onnx"), json.loads(Path("low.json").read_text())
    onnx.checker.check_model(after, full_check=True)
    same_interface(before, after)
    cost, whole = measure_cost(after), measure_cost(before)
    assert 0.58 < cost.macs / whole.macs <= 0.6
    size = Path("low.onnx").stat().st_size
    assert told["student"] == {"bytes": size, "params": cost.params, "macs": cost.macs}
    assert told["teacher"] == {"bytes": Path(TEACHER).stat().st_size, "params": whole.params, "macs": whole.macs}
    assert (told["model"], told["out"], told["target"]) == (TEACHER, "low.onnx", f"{scheme} macs 0.6")
    saved = sum(layer["macs_before"] - layer["macs_after"] for layer in told["layers"])
    assert whole.macs - cost.macs == saved
    # The last piece makes the layer's value, so that layers can be matched by name.
    makers = {name: node for node in after.graph.node for name in node.output}
    for layer in told["layers"]:
        pieces = {"svd": 2, "spatial": 2}.get(layer["scheme"], 1 + int(np.less(layer["ranks"], layer["of"]).sum()))
        node, count = makers[layer["layer"]], 1
        while node.input[0].startswith(f"{layer['layer']}."):
            node, count = makers[node.input[0]], count + 1
        assert count == pieces and 0 < layer["kept"] < 1
    assert f"{100 * cost.macs / whole.macs:.1f} % of the MACs" in ended.out.splitlines()[0]
    assert f"Taken apart ({len(told['layers'])})" in ended.out and f"Whole ({len(told['whole'])})" in ended.out
    stamps = {entry.key: entry.value for entry in after.metadata_props if entry.key.startswith("xdonnx.")}
    assert stamps == {
        "xdonnx.version": call("--version").out.split()[1], "xdonnx.teacher_sha256": fingerprint(TEACHER),
        "xdonnx.method": "decompose", "xdonnx.target": f"{scheme} macs 0.6",
    }  # fmt: skip


def test_a_teacher_keeps_its_answers_where_little_is_taken(here: Path, digits: tuple[np.ndarray, np.ndarray]) -> None:
    assert call("decompose", TEACHER, "--macs", "80%", "-o", "low.onnx", "-q").code == 0

    image = digits[0][:200, None].astype(np.float32) / 255
    before, after = (answer(open_session(path), {"image": image})["logits"] for path in (TEACHER, "low.onnx"))

    assert (before.argmax(1) == after.argmax(1)).mean() > 0.98


def test_the_same_job_writes_the_same_bytes_and_its_student_can_be_decomposed_again(here: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        assert call("decompose", TEACHER, "--params", "60%", "-o", name).code == 0
    assert call("decompose", "a.onnx", "--params", "80%", "-o", "c.onnx").code == 0

    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()
    stamps = [entry.value for entry in onnx.load("c.onnx").metadata_props if entry.key == "xdonnx.teacher_sha256"]
    assert stamps == [fingerprint("a.onnx")]


def test_a_dry_run_says_the_same_and_writes_nothing(here: Path) -> None:
    dry = call("decompose", TEACHER, "--energy", "80%", "-o", "low.onnx", "--dry-run", "--json", "-")
    assert listing(here) == {}
    wet = call("decompose", TEACHER, "--energy", "80%", "-o", "low.onnx", "--json", "-")

    assert json.loads(dry.out) == {**json.loads(wet.out), "out": None}
    assert dry.err.startswith("DRY RUN") and "Wrote" not in dry.err and "Wrote low.onnx" in wet.err


@pytest.mark.parametrize("width", [60, 100])
def test_tables_fit_the_window(here: Path, width: int) -> None:
    ended = call("decompose", SAMPLES / "digits_residual.onnx", "--macs", "50%", "-o", "low.onnx", width=width)

    rows = ended.out.partition("Taken apart")[2].partition("Whole")[0].strip().splitlines()
    names = json.loads(call("decompose", SAMPLES / "digits_residual.onnx", "-o", "x", "--json", "-").out)["layers"]
    assert len(rows) == 2 + len(names) and max(map(len, rows)) <= width


def test_verbose_tells_every_layer_and_free_sizes_are_assumed_aloud(here: Path) -> None:
    proto = nets.build("plain")
    for axis in (2, 3):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"size{axis}"
        proto.graph.output[0].type.tensor_type.shape.dim[axis].dim_param = f"out{axis}"
    onnx.save(proto, "free.onnx")

    assumed = call("decompose", "free.onnx", "--macs", "80%", "-o", "a.onnx", "-v")
    given = call("decompose", "free.onnx", "--macs", "80%", "-o", "b.onnx", "--input-shape", "image:1x3x16x16")

    assert "ranks 1/1: out" in assumed.err and "split 1/1: out" in assumed.err
    assert "warning: assumed: image axis 2 = 224, image axis 3 = 224 (choose with --input-shape)" in assumed.err
    assert given.code == 0 and given.err == ""
    open_session("b.onnx").run(None, {"image": np.zeros((2, 3, 20, 12), np.float32)})


def letter(here: Path) -> list[str]:
    (here / "model.onnx").write_text("this is a letter to my aunt")
    return ["model.onnx"]


def of_no_convolution(here: Path) -> list[str]:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[N,1,16,16] x) => (float[N,1,16,16] y) { y = Relu (x) }'
    onnx.save(onnx.parser.parse_model(text), here / "model.onnx")
    return ["model.onnx"]


def itself(here: Path) -> list[str]:
    onnx.save(onnx.load(TEACHER), here / "model.onnx")
    return ["model.onnx", "-o", "model.onnx", "--force"]


def there_already(here: Path) -> list[str]:
    (here / "old.onnx").write_text("mine")
    return [TEACHER, "-o", "old.onnx"]


def given(*flags: str) -> Callable[[Path], list[str]]:
    return lambda here: [TEACHER, *flags]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (given("--macs", "0"), 2, "--macs is 0"),
        (given("--params", "100%"), 2, "--params is 1"),
        (given("--energy", "2"), 2, "2 is above 1"),
        (given("--rank", "0"), 2, "--rank is 0"),
        (given("--rank", "2.5"), 2, "valid integer"),
        (given("--macs", "50%", "--energy", "90%"), 2, "--macs and --energy are both given"),
        (given("--rank", "4", "--round-to", "8"), 2, "--round-to has no say"),
        (given("--round-to", "some"), 2, "neither auto nor a number"),
        (given("--scheme", "chanel"), 2, "Did you mean 'channel'"),
        (given("--include", "stage*"), 2, "matches no layer"),
        (given("--exclude", "stage*"), 2, "matches no layer"),
        (given("--external-data", "allways"), 2, "Did you mean 'always'"),
        (given("--input-shape", "picture:1x1x16x16"), 2, "no input 'picture'"),
        (given("-o", "low.pt"), 2, "is called .pt"),
        (given("-o", "nowhere/low.onnx"), 2, "does not exist"),
        (itself, 2, "The teacher is never overwritten"),
        (there_already, 2, "Pass --force"),
        (lambda here: ["none.onnx"], 4, "no model at"),
        (letter, 4, "not an ONNX file"),
        (of_no_convolution, 4, "no convolution"),
        (given("--macs", "2%"), 7, "out of reach"),
        (given("--energy", "99.99%"), 7, "no rank that saves keeps 99.99"),
        (given("--rank", "5000"), 7, "rank 5000 saves nothing"),
    ],
)
def test_every_mistake_has_its_code_and_leaves_nothing(
    arguments: Callable[[Path], list[str]], code: int, says: str, here: Path
) -> None:
    made = arguments(here)
    before = listing(here)

    ended = call("decompose", *made, *([] if "-o" in made else ["-o", "low.onnx"]), width=200)

    assert (ended.code, ended.out) == (code, "") and says in ended.err, ended.err
    assert listing(here) == before


@pytest.mark.parametrize("damage", ["answers", "interface", "graph"])
def test_a_student_that_is_not_what_was_computed_is_not_written(
    damage: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = xdonnx.decomposition.taken_apart

    def wrong(*given: Any) -> onnx.ModelProto:
        proto = right(*given)
        if damage == "answers":
            node = next(node for node in proto.graph.node if any("column" in name for name in node.input))
            # As many, at the wrong end.
            next(a for a in node.attribute if a.name == "pads").ints[:] = [2, 0, 0, 0]
        elif damage == "interface":
            proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 11
        else:
            proto.graph.node[0].op_type = "Convolve"
        return proto

    monkeypatch.setattr(xdonnx.decomposition, "taken_apart", wrong)
    ended = call("decompose", TEACHER, "--scheme", "spatial", "-o", "low.onnx")

    assert ended.code == 6 and listing(here) == {}


# From Python


def test_a_call_makes_the_file_that_the_command_makes_and_models_may_be_in_memory(here: Path) -> None:
    assert call("decompose", TEACHER, "--macs", "70%", "--exclude", "*classifier*", "-o", "typed.onnx").code == 0
    student, stages = onnx.ModelProto(), []

    called = xdonnx.decompose(TEACHER, "called.onnx", macs=0.7, exclude="*classifier*", progress=stages.append)
    held = xdonnx.decompose(onnx.load(TEACHER), student, macs=0.7, exclude=["*classifier*"], round_to="auto")
    asked = xdonnx.decompose(TEACHER, macs=0.7, exclude=["*classifier*"])

    assert fingerprint("called.onnx") == fingerprint("typed.onnx")
    assert called.layers == held.layers == asked.layers and called.student == asked.student
    onnx.save(student, "held.onnx")
    assert measure_cost(student).macs == called.student.macs
    assert {event.stage for event in stages} == {"read", "ranks", "split", "verify"}
    with pytest.raises(xdonnx.JobError, match="holds a graph already"):
        xdonnx.decompose(TEACHER, student)
    assert {path.name for path in here.iterdir()} == {"typed.onnx", "called.onnx", "held.onnx"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mac": 0.5}, "unknown option 'mac'. Did you mean 'macs'"),
        ({"macs": "half"}, "macs is 'half'"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"macs": 0.5, "rank": 3}, "--macs and --rank are both given"),
        ({"energy": 0.0}, "--energy is 0"),
        ({"scheme": "tucker"}, "unknown --scheme 'tucker'"),
    ],
)
def test_mistakes_in_options_are_told(options: dict[str, Any], says: str, here: Path) -> None:
    with pytest.raises(xdonnx.JobError, match=says):
        xdonnx.decompose(TEACHER, "low.onnx", **options)
    assert listing(here) == {}
