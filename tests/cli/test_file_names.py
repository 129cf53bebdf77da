"""Files whose names are not UTF-8 are read and written like others; reports show '?' for what they cannot hold."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import onnx
import pytest
from program import SAMPLES, TEACHER, call, listing

from xdonnx.report import read_report

ODD = os.fsdecode(b"m\xe9")


@pytest.fixture
def odd(here: Path) -> list[str]:
    """Make a teacher, the same with its weights outside, and images, all of such names; return the flags of these."""
    try:
        shutil.copy(TEACHER, f"{ODD}.onnx")
    except OSError:
        pytest.skip("this file system has none")
    outside = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save(onnx.load(TEACHER), "outside.onnx", **outside)
    Path("outside.onnx").rename(f"{ODD} outside.onnx")
    for file in (SAMPLES / "shots").glob("*/*.png"):
        folder = Path(f"{ODD} shots") / file.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / f"{ODD}{file.name}")
    return ["--shots", f"{ODD} shots", "--preset", "unit"]


def test_two_models_are_compared(odd: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["xdonnx", "verify", f"{ODD}.onnx"])
    places = ["--report-dir", f"{ODD} report", "--json", f"{ODD}.json"]

    ended = call("verify", f"{ODD}.onnx", str(SAMPLES / "digits_vgg.onnx"), *odd, *places)

    assert ended.code == 0, ended.err
    report = read_report(f"{ODD} report")
    assert (
        report.files.teacher and report.files.teacher.path == "m?.onnx" and report.command == "xdonnx verify 'm?.onnx'"
    )
    assert report.job["shots"] == ["m? shots"] and report.files.shots and report.files.shots.path == "m? shots"
    assert report.fidelity and all(shot.sample.split("/")[1].startswith("m?") for shot in report.fidelity.worst)
    assert len(report.fidelity.worst) > 0
    assert json.loads(Path(f"{ODD}.json").read_text()) == json.loads(report.model_dump_json())
    assert call("report", f"{ODD} report", "--html", f"{ODD}.html").code == 0


def test_weights_outside_are_read(odd: list[str]) -> None:
    ended = call("verify", f"{ODD} outside.onnx", f"{ODD}.onnx", *odd, "--max-error", "0")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("where", ["never", "always"])
def test_a_student_is_written(odd: list[str], where: str) -> None:
    job = ["--method", "l1-norm", "--keep", "0.8", "--warn-only", "not-slower", "--external-data", where]

    ended = call("compress", f"{ODD}.onnx", *odd, *job, "-o", f"{ODD} student.onnx")

    assert ended.code == 0, ended.err
    made = {name for name in listing(Path()) if "student" in name}
    forms = {
        f"{ODD} student.report{name}" for name in ("", "/junit.xml", "/report.html", "/report.json", "/summary.md")
    }
    # What lies outside is named in the file, which holds UTF-8 alone.
    assert made == {f"{ODD} student.onnx", *forms} | ({"m? student.onnx.data"} if where == "always" else set())
    assert call("verify", f"{ODD}.onnx", f"{ODD} student.onnx", *odd).code == 0


def test_weights_cannot_lie_in_a_folder_of_such_a_name(odd: list[str]) -> None:
    ended = call("compress", TEACHER, *odd, "-o", f"{ODD} shots/student.onnx", "--external-data", "always")
    assert ended.code == 2 and "its folder's name is not UTF-8" in ended.err


def test_what_is_wrong_with_such_a_model_is_told(odd: list[str]) -> None:
    model = onnx.load(TEACHER)
    model.graph.node[0].op_type = "Convolution"
    onnx.save(model, f"{ODD} broken.onnx")
    ended = call("verify", f"{ODD} broken.onnx", f"{ODD}.onnx", *odd)
    assert ended.code == 4 and "is not a valid ONNX model" in ended.err
