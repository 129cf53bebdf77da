"""How good a given student was before its refit: measured once, reported as the result is, and never in its way."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from rich.console import Console

import xdonnx
from xdonnx import delivery
from xdonnx.events import Event
from xdonnx.images import Preprocess
from xdonnx.model import interface, read_proto
from xdonnx.page import page
from xdonnx.report import Fidelity, OutputError, read_report
from xdonnx.shots import Shots, read_shots
from xdonnx.summary import summary
from xdonnx.wanted import Job
from xdonnx_cli.show import before_after

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


def broken(path: Path) -> Path:
    """Give a student a classifier's bias of infinities."""
    proto = onnx.load(path)
    bias = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 1 and tensor.dims[0] == 10)
    bias.CopyFrom(numpy_helper.from_array(np.full(10, np.inf, np.float32), bias.name))
    onnx.save(proto, path)
    return path


@pytest.mark.parametrize("method", ["cross", "fskd"])
def test_a_student_whose_layers_put_out_no_numbers_is_refused(given: Path, method: str) -> None:
    ended = call("compress", TEACHER, "--student", broken(given), *DATA, "--method", method, "-o", "out.onnx")

    assert ended.code == 4
    assert "given.onnx" in ended.err and "not finite for these samples" in ended.err and "internal" not in ended.err
    assert not Path("out.onnx").exists()


def before(student: Path, shots: Any, heard: Sequence[str] = (), teacher: Path = TEACHER) -> tuple[Any, list[str]]:
    """Return how a student answered before its refit, and the warnings."""
    events = list[Event]()
    how = {"device": "cpu", "held_out": True, "log": events.append}
    found = delivery._before(Job(model=teacher, out=Path("out.onnx"), student=student), student, shots, how, heard)
    return found, [event.text for event in events if event.level == "warning"]


def test_answers_that_are_no_numbers_on_what_judges_are_a_warning(given: Path) -> None:
    shots = read_shots([str(HELD)], interface(read_proto(TEACHER)).inputs, Preprocess("unit"))

    found, warned = before(broken(given), shots)

    assert found is None and len(warned) == 1
    assert warned[0].startswith("the given student, before it was refitted: output 'logits' has ")
    assert "not finite" in warned[0]


def boxes(path: Path, shift: float) -> Path:
    """Write a model that finds so many boxes as numbers are above zero once they are shifted."""
    text = f"""<ir_version: 8, opset_import: ["": 13]>
    g (float[1,4] x) => (float[K] boxes) <float[1] s = {{{shift}}}> {{
      y = Add(x, s)
      zero = Constant<value_float = 0.0>()
      above = Greater(y, zero)
      flat = Constant<value_ints = [-1]>()
      values = Reshape(y, flat)
      keep = Reshape(above, flat)
      boxes = Compress<axis = 0>(values, keep)
    }}"""
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def test_what_only_the_given_student_does_is_said_of_it_alone(here: Path) -> None:
    teacher, student = boxes(here / "t.onnx", 0.0), boxes(here / "s.onnx", 0.5)
    x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    shots = Shots({"x": x}, None, tuple(map(str, range(8))))

    found, warned = before(student, shots, teacher=teacher)
    said = "output 'boxes': the student's has another length than the teacher's in 5 of 8 runs"

    assert [output.compared for output in found.outputs] == [False]
    assert warned == [f"the given student, before it was refitted: {said}"]
    # What the refitted student does as well is not said twice.
    assert before(student, shots, [said], teacher)[1] == []


def fidelity(**errors: float | None) -> Fidelity:
    outputs = tuple(OutputError(name=n, relative_l2=e, max_abs=None, cosine=None) for n, e in errors.items())
    return Fidelity(samples=9, held_out=True, outputs=outputs)


def test_figures_stand_beside_the_output_that_they_are_of(given: Path) -> None:
    report = read_report("given.report")
    alike = ("model/stage1/head/out", "model/stage2/head/out")
    was, now = fidelity(**dict(zip(alike, (0.77, 0.99), strict=True))), fidelity(**dict.fromkeys(alike, 0.5))
    judged = report.model_copy(update={"given": was, "fidelity": now})
    console = Console(file=io.StringIO(), width=120)

    before_after(console, judged)

    rows = re.findall(r"^error of \S+ +(0\.\d+) +(0\.\d+)", console.file.getvalue(), re.M)  # type: ignore[attr-defined]
    assert rows == [("0.7700", "0.5000"), ("0.9900", "0.5000")]


def test_nothing_to_compare_takes_no_column(given: Path) -> None:
    report = read_report("given.report").model_copy(update={"given": fidelity(logits=None)})
    console = Console(file=io.StringIO(), width=120)

    before_after(console, report)

    forms = (console.file.getvalue(), page(report), summary(report))  # type: ignore[attr-defined]
    assert not any("as given" in form for form in forms)


def test_every_output_of_the_given_student_is_looked_up(given: Path) -> None:
    names = [f"out{at}" for at in range(8)]
    was = fidelity(**{name: 0.9 - at / 10 for at, name in enumerate(names)})
    now = fidelity(**{name: 0.01 * (1 + at) for at, name in enumerate(names)})
    report = read_report("given.report").model_copy(update={"given": was, "fidelity": now})

    drawn = page(report)

    # The worst six now are others than the worst six before.
    assert all(f"<td>{0.9 - at / 10:.6f}" in drawn for at in range(2, 8))
