"""How good a given student was before its refit: measured once, reported as the result is, and never in its way."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import xdonnx
from xdonnx import delivery
from xdonnx.events import Event
from xdonnx.images import Preprocess
from xdonnx.model import interface, read_proto
from xdonnx.report import read_report
from xdonnx.shots import read_shots
from xdonnx.wanted import Job

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from program import SAMPLES, call

TEACHER = SAMPLES / "digits_vgg.onnx"
HELD = SAMPLES / "held_out.npz"
DATA = ("--shots", SAMPLES / "shots", "--per-class", "4", "--holdout", HELD, "--preset", "unit")
EASY = [part for name in ("smaller", "not-slower", "removed") for part in ("--warn-only", name)]


@pytest.fixture
def given(here: Path) -> Path:
    """Return a student that l1-norm made and that answers badly."""
    made = call("compress", TEACHER, *DATA, *EASY, "--method", "l1-norm", "--keep", "0.5", "-o", "given.onnx")
    assert made.code == 0, made.err
    return here / "given.onnx"


def test_every_form_of_the_report_says_how_good_the_student_was(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def counted(teacher: Path, student: Path, *arguments: Any, **how: Any) -> Any:
        seen.append(student)
        return compare(teacher, student, *arguments, **how)

    compare = delivery.compare
    monkeypatch.setattr(delivery, "compare", counted)
    job = ("compress", TEACHER, "--student", given, *DATA, *EASY, "--method", "fskd", "-o", "out.onnx")
    ended, judged = call(*job), call("verify", TEACHER, given, "--shots", HELD, "--preset", "unit")

    assert ended.code == 0, ended.err
    assert [path == given for path in seen] == [False, True], "one comparison more, and the result comes first"
    report = read_report("out.report")
    assert report.given and report.fidelity and report.given.accuracy_student is not None
    assert report.given.accuracy_student < 40 < 90 < (report.fidelity.accuracy_student or 0)
    assert (report.given.samples, report.given.held_out, report.given.worst) == (450, True, ())
    jsonschema.validate(report.model_dump(mode="json"), xdonnx.schema())
    # The command that judges any two files finds the very same.
    share, agreement = (f"{value:.2f} %" for value in (report.given.accuracy_student, report.given.top1_agreement))
    error = f"{report.given.outputs[0].relative_l2:.4f}"
    assert all(figure in judged.out for figure in (share, agreement, error))

    (head,) = re.findall(r"^ +teacher +as given +student *$", ended.out, re.M)
    (row,) = re.findall(r"^accuracy .*$", ended.out, re.M)
    assert row.index(share) + len(share) == head.index("as given") + len("as given")
    assert re.search(rf"^agreement +{agreement} +\d", ended.out, re.M)
    assert re.search(rf"^error .* {error} ", ended.out, re.M)
    assert re.search(r"^file size +\S+ kB +\S+ kB ", ended.out, re.M)
    page, markdown = (Path("out.report", name).read_text() for name in ("report.html", "summary.md"))
    assert '<th scope="col">as given</th>' in page and f"<td>{share}</td>" in page
    assert f"<span>teacher 99.56 %, as given {share}</span>" in page
    assert f"| as given, before the refit |  | accuracy {share}, agreement {agreement}, relative L2 {error}" in markdown


def test_a_job_without_a_given_student_says_nothing_of_one(given: Path) -> None:
    report = read_report("given.report")

    assert report.given is None
    assert all("as given" not in Path("given.report", name).read_text() for name in ("report.html", "summary.md"))


def test_a_student_whose_answers_were_no_numbers_is_a_warning(given: Path) -> None:
    proto = onnx.load(given)
    bias = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 1 and tensor.dims[0] == 10)
    bias.CopyFrom(numpy_helper.from_array(np.full(10, np.inf, np.float32), bias.name))
    onnx.save(proto, given)
    job = Job(model=TEACHER, out=Path("out.onnx"), student=given)
    shots, events = read_shots([str(HELD)], interface(read_proto(TEACHER)).inputs, Preprocess("unit")), list[Event]()

    found = delivery._before(job, shots, {"device": "cpu", "held_out": True, "log": events.append})

    warned = [event.text for event in events if event.level == "warning"]
    assert found is None and len(warned) == 1
    assert warned[0].startswith("the given student, before it was refitted: output 'logits' has ")
    assert "not finite" in warned[0]
