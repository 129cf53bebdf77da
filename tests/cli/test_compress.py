"""`compress`: what a good job leaves, what a rejected one leaves, what a dry one does not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from program import SAMPLES, SHOTS, TEACHER, Compressed, call, listing

from xdonnx.errors import MachineError
from xdonnx.model import differences, interface, read_proto
from xdonnx.report import read_report


def test_a_student_and_its_report_are_written(compressed: Compressed) -> None:
    folder, ended = compressed.folder, compressed.ended

    assert ended.code == 0, ended.err
    assert sorted(listing(folder)) == [
        "run.json", "student.onnx", "student.report", "student.report/junit.xml", "student.report/report.html",
        "student.report/report.json", "student.report/summary.md",
    ]  # fmt: skip
    teacher, student = read_proto(TEACHER), read_proto(folder / "student.onnx")
    assert differences(interface(teacher), interface(student)) == []
    report = read_report(folder / "student.report")
    assert json.loads((folder / "run.json").read_text()) == json.loads(report.model_dump_json())
    assert report.teacher and report.student and report.student.macs <= report.teacher.macs / 2
    assert report.fidelity and report.fidelity.samples == 450
    assert report.job["preprocess"]["preset"] == "unit" and report.job["per_class"] == 4
    assert {layer.layer for layer in report.layers} >= {"logits"}


def test_the_table_gives_the_verdict_first_and_the_numbers_of_the_report(compressed: Compressed) -> None:
    out, report = compressed.ended.out, read_report(compressed.folder / "student.report")
    assert report.teacher and report.student and report.fidelity

    ratio = 100 * report.student.macs / report.teacher.macs
    assert out.startswith(f"PASSED  {ratio:.1f} % of the MACs")
    size = 100 * report.student.bytes / report.teacher.bytes
    assert re.search(rf"^file size .* {size:.1f} %$", out, re.M)
    assert f"{report.fidelity.accuracy_student:.2f} %" in out
    assert re.search(r"^  passed +max_drop: ", out, re.M) and re.search(r"^  passed +min_shrink: ", out, re.M)
    assert "student.report/report.json" in out
    assert not compressed.ended.err, "no progress where stderr is no terminal"
    assert "\x1b" not in out, "no colours where stdout is no terminal"


def test_a_dry_run_prints_job_and_plan_and_writes_nothing(here: Path) -> None:
    ended = call("compress", TEACHER, *SHOTS, "-o", "student.onnx", "--keep", "50%", "--max-drop", "2", "--dry-run")

    assert ended.code == 0, ended.err
    assert listing(here) == {}
    assert re.search(r"^  preset +unit +command line *$", ended.out, re.M)
    assert re.search(r"^  max-drop +2\.0 +command line *$", ended.out, re.M)
    assert re.search(r"^  samples +80 fit, 20 judge", ended.out, re.M)
    assert re.search(r"^  /gate/gate.1/Conv_output_0 +12 +24 +/gate/gate.3/Conv_output_0", ended.out, re.M)


def test_a_dry_run_tells_of_switches_turned_off_and_of_zeros_where_a_method_has_them(here: Path) -> None:
    job = ["compress", TEACHER, *SHOTS, "-o", "student.onnx", "--keep", "50%", "--dry-run"]
    squeeze = ["--method", "cross", "--method", "squeeze"]

    told = [call(*job, *more).out for more in (["--views", "0"], squeeze, [*squeeze, "--no-adversarial"])]

    assert re.search(r"^  views +0 +command line *$", told[0], re.M) and re.search(
        r"^  seed +0 +default", told[0], re.M
    )
    assert "adversarial" not in told[0], "cross has no adversary"
    assert re.search(r"^  adversarial +True +default *$", told[1], re.M)
    assert re.search(r"^  no-adversarial +True +command line *$", told[2], re.M)
    assert listing(here) == {}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--preset-effort", "best"], "tune, 2,000 steps"),
        (["--method", "cross", "--method", "squeeze", "--steps", "7"], "squeeze, 7 steps"),
        ([], ""),
    ],
)
def test_a_dry_run_tells_how_long_the_whole_is_trained(here: Path, more: list[str], told: str) -> None:
    ended = call("compress", TEACHER, *SHOTS, "-o", "student.onnx", "--keep", "50%", "--dry-run", *more)

    assert re.findall(r"^  then +(.+) of training *$", ended.out, re.M) == [told] * bool(told)


def test_a_dry_run_predicts_what_the_job_then_measures(compressed: Compressed, here: Path) -> None:
    ended = call(
        "compress", TEACHER, *SHOTS, "-o", "student.onnx", "--preset-effort", "fast", "--dry-run", "--json", "-"
    )
    report = read_report(compressed.folder / "student.report")
    assert report.teacher and report.student

    found = json.loads(ended.out)["predicted"]

    assert found["teacher_macs"] == report.teacher.macs and found["student_macs"] == report.student.macs
    layers = sum(layer.params_after for layer in report.layers)
    assert found["student_params"] == pytest.approx(layers, abs=len(report.layers))


def test_a_failed_gate_keeps_the_candidate_aside_and_touches_nothing_else(here: Path) -> None:
    (here / "student.onnx").write_bytes(b"the one that is in use")

    ended = call(
        "compress", TEACHER, *SHOTS, "-o", "student.onnx", "--force", "--method", "l1-norm", "--min-shrink", "99%",
        "--max-error", "0", "--warn-only", "max-error",
    )  # fmt: skip

    assert ended.code == 3
    assert ended.out.startswith("REJECTED") and "min_shrink: " in ended.out and "  warning max_error" in ended.out
    assert "\n  - next: remove more, as by --macs 30%" in ended.out
    assert (here / "student.onnx").read_bytes() == b"the one that is in use"
    onnx.checker.check_model(here / "student.rejected.onnx")
    assert sorted(listing(here)) == [
        "student.onnx", "student.rejected.onnx", "student.report", "student.report/junit.xml",
        "student.report/report.html", "student.report/report.json", "student.report/summary.md",
    ]  # fmt: skip
    report = read_report(here / "student.report")
    assert (report.status, report.exit_code) == ("rejected", 3)
    assert report.files.student and report.files.student.path == "student.rejected.onnx"


def test_json_has_stdout_for_itself(compressed: Compressed, here: Path) -> None:
    ended = call("gate", compressed.folder / "student.report", "--min-shrink", "99%", "--json", "-")

    assert json.loads(ended.out)["exit_code"] == ended.code == 3
    assert ended.err.startswith("REJECTED")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "1", "I;16"])
def test_images_of_any_mode_are_shots(here: Path, mode: str) -> None:
    folder = here / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(5):
        pixels = generator.integers(0, 256, (16, 16, 3), np.uint8)
        image = Image.fromarray(pixels)
        if mode == "I;16":
            image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
        elif mode != "RGB":
            image = image.convert(mode)
        image.save(folder / f"{number}.png")

    ended = call("compress", TEACHER, "--shots", folder, "--preset", "unit", "-o", "student.onnx", "--dry-run")

    assert ended.code == 0, ended.err
    assert "4 fit, 1 judge" in ended.out


def test_an_unreadable_image_is_left_out_when_that_is_asked_for(here: Path) -> None:
    for number, image in enumerate(sorted((SAMPLES / "shots" / "5").iterdir())):
        (here / f"{number}.png").write_bytes(image.read_bytes())
    (here / "bad.png").write_bytes(b"no image")
    job = ["compress", TEACHER, "--shots", here, "--preset", "unit", "-o", here / "student.onnx", "--dry-run"]

    refused, accepted = call(*job), call(*job, "--skip-bad", "-v")

    assert refused.code == 5 and "bad.png" in refused.err and "--skip-bad" in refused.err
    assert accepted.code == 0 and "warning: left out 1 of 11 images: 'bad.png'" in accepted.err


def test_a_free_size_is_filled_by_input_shape(here: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N,3,H,W] image) => (float[N,4,H,W] out)
    <float[8,3,1,1] w1 = {W1}, float[4,8,1,1] w2 = {W2}> { c = Conv (image, w1)  r = Relu (c)  out = Conv (r, w2) }"""
    one, two = (", ".join(str(k % 7 - 3.0) for k in range(size)) for size in (24, 32))
    onnx.save(onnx.parser.parse_model(text.replace("W1", one).replace("W2", two)), here / "free.onnx")
    job = ["compress", "free.onnx", "--synthetic-shots", "5", "-o", "student.onnx", "--dry-run", "--json", "-"]

    refused, filled = call(*job), call(*job, "--input-shape", "image:1x3x6x5")

    assert refused.code == 5 and "--input-shape image:" in refused.err
    assert json.loads(filled.out)["predicted"]["teacher_macs"] == (3 * 8 + 8 * 4) * 6 * 5


def test_a_report_that_cannot_be_written_does_not_hide_the_student(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MachineError("cannot write the report to 'student.report': no space left.")

    monkeypatch.setattr("xdonnx.publication.write_report", full)

    ended = call("compress", TEACHER, *SHOTS, "-o", "student.onnx", "--method", "l1-norm", "--keep", "0.5")

    assert ended.code == 8 and "no space left" in ended.err and "whole, and passed: 'student.onnx'" in ended.err
    assert sorted(listing(here)) == ["student.onnx"]
