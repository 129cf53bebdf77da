"""`plan`: what it measures, prints and writes, and what `compress --plan` makes of it."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from program import SAMPLES, SHOTS, TEACHER, Ended, call, listing

from xdonnx.model import interface, read_proto
from xdonnx.report import read_report
from xdonnx_cli.planning import sparkline

HELD = ["--holdout", str(SAMPLES / "held_out.npz")]


@dataclass(frozen=True)
class Planned:
    """One good run, shared by the tests that look at what it left."""

    path: Path
    ended: Ended
    found: Any
    toml: Any


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    folder = tmp_path_factory.mktemp("planned")
    path = folder / "plan.toml"
    ended = call("plan", TEACHER, *SHOTS, *HELD, "--macs", "40%", "-o", path, "--json", folder / "plan.json")
    assert ended.code == 0, ended.err
    found = json.loads((folder / "plan.json").read_text())
    return Planned(path, ended, found, tomllib.loads(path.read_text(encoding="utf-8")))


def test_table_json_and_file_say_the_same(planned: Planned) -> None:
    layers = planned.found["layers"]
    assert [(la["name"], la["units"], la["keep"]) for la in layers] == [
        (la["name"], la["units"], la["keep"]) for la in planned.toml["layer"]
    ]
    assert planned.toml["target"] == planned.found["target"] == "channel macs 0.4"
    assert planned.ended.out.startswith("PLAN  channel macs 0.4, on 100 samples; ")
    for layer in layers:
        numbers = [
            str(layer["keep"]),
            str(layer["units"]),
            f"{100 * layer['macs_share']:.1f} %",
            f"{layer['error']:.2g}",
        ]
        assert re.search(rf"^  \S+ +{' +'.join(numbers)} +[▁-█]+ *$", planned.ended.out, re.M), layer
        assert [kept for kept, _ in layer["curve"]] == sorted((kept for kept, _ in layer["curve"]), reverse=True)
        assert layer["curve"][0] == [layer["units"], 0.0]
    assert "compress" in planned.ended.out and not planned.ended.err
    assert sorted(entry.name for entry in planned.path.parent.iterdir()) == ["plan.json", "plan.toml"]


def test_the_prediction_keeps_the_target(planned: Planned) -> None:
    predicted = planned.found["predicted"]
    assert 0.3 * predicted["teacher_macs"] < predicted["student_macs"] <= 0.4 * predicted["teacher_macs"]
    ratio = 100 * predicted["student_macs"] / predicted["teacher_macs"]
    assert re.search(rf"^  MACs .* {ratio:.1f} %", planned.ended.out, re.M)


def test_compress_does_what_the_plan_says_and_what_it_predicts(planned: Planned, here: Path) -> None:
    ended = call(
        "compress", TEACHER, *SHOTS, *HELD, "--plan", planned.path, "-o", "student.onnx", "--preset-effort", "fast"
    )

    assert ended.code == 0, ended.err
    report = read_report(here / "student.report")
    assert report.student and report.student.macs == planned.found["predicted"]["student_macs"]
    rows = {layer.layer: layer.kept for layer in report.layers}
    for layer in planned.found["layers"]:
        assert rows[layer["name"]] == layer["keep"]
    assert interface(read_proto(here / "student.onnx")).metadata["xdonnx.target"] == "channel plan plan.toml"
    assert report.job["plan"] == str(planned.path)


def test_a_dry_run_shows_the_plan_of_the_file_and_the_measured_one_without_it(planned: Planned, here: Path) -> None:
    job = ["compress", TEACHER, *SHOTS, *HELD, "-o", "student.onnx", "--dry-run"]
    kept = {row["name"]: row["keep"] for row in planned.found["layers"] if row["keep"] < row["units"]}

    of_file = call(*job, "--plan", planned.path)
    measured = json.loads(call(*job, "--macs", "40%", "--json", "-").out)
    even = json.loads(call(*job, "--macs", "40%", "--json", "-", "--allocation", "uniform").out)

    assert of_file.code == 0, of_file.err
    assert re.search(r"^  split +as the plan says", of_file.out, re.M)
    for count, units in ((row["keep"], row["units"]) for row in planned.found["layers"] if row["name"] in kept):
        assert re.search(rf"^  \S+ +{count} +{units} +\S", of_file.out, re.M)
    assert (measured["split"], even["split"]) == ("measured", "uniform")
    assert {row["name"]: row["kept"] for row in measured["plan"]} == kept
    assert {row["name"]: row["kept"] for row in even["plan"]} != kept
    assert listing(here) == {}


def test_weights_are_planned_without_curves_and_that_is_said(here: Path) -> None:
    ended = call(
        "plan", TEACHER, *SHOTS, "--structure", "element", "--keep", "25%", "-o", "plan.toml", "--json", "run.json"
    )
    assert ended.code == 0, ended.err
    assert "Single weights have no error curves: every layer keeps the same fraction." in ended.out
    found = tomllib.loads((here / "plan.toml").read_text(encoding="utf-8"))
    assert found["structure"] == "element" and all("curve" not in layer for layer in found["layer"])
    assert all(layer["keep"] == max(1, round(layer["units"] / 4)) for layer in found["layer"])
    assert all(layer["error"] is None for layer in json.loads((here / "run.json").read_text())["layers"])


def test_a_fraction_of_every_layer_is_split_evenly_and_measured_all_the_same(here: Path) -> None:
    ended = call("plan", TEACHER, *SHOTS, "--keep", "0.5", "-o", "plan.toml", "-q", "--json", "-")
    assert ended.code == 0 and not ended.err
    layers = json.loads(ended.out)["layers"]
    assert all(layer["keep"] == layer["units"] // 2 and 0 <= layer["error"] < 1 for layer in layers)


def test_a_file_that_exists_is_replaced_only_by_force(here: Path) -> None:
    (here / "plan.toml").write_text("mine")
    job = ["plan", TEACHER, *SHOTS, "--structure", "element", "--keep", "0.5", "-o", "plan.toml"]
    refused = call(*job)
    assert refused.code == 2 and "'plan.toml' exists.\n  Pass --force" in refused.err
    assert listing(here) == {"plan.toml": b"mine"}
    assert call(*job, "--force").code == 0
    assert (here / "plan.toml").read_bytes().startswith(b"# How much of each layer")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["none.onnx", *SHOTS, "-o", "p.toml"], 4, "no model at 'none.onnx'"),
        ([TEACHER, "-o", "p.toml"], 5, "Pass --shots PATH"),
        ([TEACHER, "--shots", "none", "-o", "p.toml"], 5, "no shots at 'none'"),
        ([TEACHER, *SHOTS], 2, "Missing option '-o' / '--out'"),
        ([TEACHER, *SHOTS, "-o", "no/p.toml"], 2, "the folder of 'no/p.toml' does not exist"),
        ([TEACHER, *SHOTS, "-o", "."], 2, "is a folder"),
        ([TEACHER, *SHOTS, "-o", TEACHER, "--force"], 2, "OUT is MODEL"),
        ([TEACHER, *SHOTS, "-o", "p.toml", "--macs", "0.5", "--keep", "0.5"], 2, "are both given"),
        ([TEACHER, *SHOTS, "-o", "p.toml", "--structure", "2:4"], 2, "there is nothing to plan"),
        ([TEACHER, *SHOTS, "-o", "p.toml", "--structure", "elment", "--keep", "0.5"], 2, "Did you mean 'element'?"),
        ([TEACHER, *SHOTS, "-o", "p.toml", "--exclude", "nothing*"], 2, "matches no layer"),
        ([TEACHER, *SHOTS, "-o", "p.toml", "--macs", "1%"], 7, "out of reach"),
        ([TEACHER, *SHOTS, "-o", "p.toml", "--json", "no/where.json"], 2, "the folder of --json"),
    ],
)
def test_what_cannot_be_planned_is_told_and_leaves_nothing(
    here: Path, arguments: list[str], code: int, message: str
) -> None:
    ended = call("plan", *arguments)
    assert (ended.code, message in " ".join(ended.err.replace("\n  ", " ").split())) == (code, True), ended.err
    assert listing(here) == {}


@pytest.mark.parametrize(
    ("old", "new", "code", "message"),
    [
        ("keep =", "keeps =", 2, "unknown key 'keeps' in layer"),
        ("teacher = \"", "teacher = \"0", 2, "was made for another model"),
        ("schema_version", "[", 2, "is not TOML"),
    ],
)  # fmt: skip
def test_compress_refuses_a_plan_with_a_slip_in_it(
    planned: Planned, here: Path, old: str, new: str, code: int, message: str
) -> None:
    text = planned.path.read_text(encoding="utf-8")
    (here / "plan.toml").write_text(text.replace(f"\n{old}", f"\n{new}"), encoding="utf-8")
    ended = call("compress", TEACHER, *SHOTS, "--plan", "plan.toml", "-o", "student.onnx")
    assert ended.code == code and message in ended.err and "'plan.toml'" in ended.err
    assert sorted(listing(here)) == ["plan.toml"]


def test_a_plan_and_another_target_or_structure_do_not_go_together(planned: Planned, here: Path) -> None:
    job = ["compress", TEACHER, *SHOTS, "--plan", planned.path, "-o", "student.onnx"]
    for more, message in (
        (["--macs", "50%"], "--macs and --plan are both given"),
        (["--structure", "element"], "--structure is element, and"),
        (["--residual"], "--residual has no say"),
    ):
        ended = call(*job, *more)
        assert ended.code == 2 and message in ended.err
    missing = call("compress", TEACHER, *SHOTS, "--plan", "none.toml", "-o", "student.onnx")
    assert missing.code == 2 and "no plan at 'none.toml'" in missing.err


def test_warnings_are_told_although_there_is_no_report(here: Path) -> None:
    job = ["plan", TEACHER, "--synthetic-shots", "12", "--structure", "element", "--keep", "0.5", "-o", "plan.toml"]
    ended = call(*job, "--json", "-")
    assert ended.code == 0 and "warning: samples are random noise" in ended.err
    assert any("random noise" in text for text in json.loads(ended.out)["warnings"])
    assert call(*job, "--force", "-v").err.count("random noise") == 1


def test_bars_are_as_high_as_the_root_of_what_they_stand_for() -> None:
    assert sparkline([0.0, 0.25, 1.0], 1.0) == "▁▅█"
    assert sparkline([0.0, 0.0], 0.0) == "▁▁" and sparkline([], 1.0) == ""
