"""The library makes the students that the commands make, and takes samples and models from memory."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import xdonnx
from xdonnx.events import Event
from xdonnx.model import fingerprint
from xdonnx_cli.app import run

SAMPLES = Path(__file__).parents[1] / "samples"
TEACHER = str(SAMPLES / "digits_mobile.onnx")
OTHER = str(SAMPLES / "digits_vgg.onnx")
UNIT = xdonnx.Preprocess("unit")


# The same students


def test_arrays_and_a_model_in_memory_make_the_student_that_files_make_to_the_byte(
    here: Path, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = digits[0][:60], digits[1][:60]
    np.savez(here / "s.npz", images=images, labels=labels)
    how = ["--preset", "unit", "--method", "l1-norm", "--keep", "0.7", "--max-drop", "90", "--warn-only", "not-slower"]
    assert run(["compress", TEACHER, "--shots", "s.npz", "-o", "typed.onnx", *how, "-q"]) == 0

    heard: list[Event] = []
    options = {"preset": "unit", "method": "l1-norm", "keep": 0.7, "max_drop": 90, "warn_only": "not-slower"}
    report = xdonnx.compress(onnx.load(TEACHER), (images, labels), "called.onnx", progress=heard.append, **options)

    assert fingerprint("called.onnx") == fingerprint("typed.onnx")
    assert report.files.student and report.files.student.path == "called.onnx"
    assert report.files.teacher and report.files.teacher.path == "(in memory)"
    assert {event.stage for event in heard} >= {"read", "shots", "fit", "cut", "verify", "latency"}
    # Both leave a report beside the student, and these agree in all but times and names.
    typed_report, saved = xdonnx.read_report("typed.report"), xdonnx.read_report("called.report")
    assert saved == report
    assert saved.fidelity and typed_report.fidelity
    assert {**dict(saved.fidelity), "worst": ()} == {**dict(typed_report.fidelity), "worst": ()}
    assert [layer.kept for layer in saved.layers] == [layer.kept for layer in typed_report.layers]
    assert "xdonnx.compress(<ModelProto>, <tuple>, 'called.onnx', preset='unit'" in saved.command
    assert "/tmp" not in json.dumps(saved.model_dump(exclude={"warnings"}))


def test_a_student_can_stay_in_memory_and_a_rejected_one_goes_nowhere(
    here: Path, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    student, kept = onnx.ModelProto(), {"method": "l1-norm", "keep": 0.7, "preset": "unit", "warn_only": "not-slower"}

    passed = xdonnx.compress(TEACHER, digits, student, max_shots=20, **kept)
    again = xdonnx.verify(TEACHER, student, digits, preset="unit", max_drop=100)
    rejected = onnx.ModelProto()
    failed = xdonnx.compress(TEACHER, digits, rejected, max_shots=20, min_shrink=0.99, **kept)
    only_asked = xdonnx.compress(TEACHER, digits, max_shots=20, **kept)

    assert passed.exit_code == 0 and passed.student and again.student
    assert len(student.SerializeToString()) == passed.student.bytes < Path(TEACHER).stat().st_size
    assert again.student.macs == passed.student.macs
    assert failed.exit_code == 3 and failed.reasons and not rejected.graph.node
    assert only_asked.student and only_asked.student.macs == passed.student.macs
    assert list(here.iterdir()) == []
    with pytest.raises(xdonnx.JobError, match="holds a graph already"):
        xdonnx.compress(TEACHER, digits, student, **kept)


def test_verify_writes_a_report_only_where_it_is_told_to(here: Path, digits: tuple[np.ndarray, np.ndarray]) -> None:
    report = xdonnx.verify(OTHER, TEACHER, digits, xdonnx.Gate(min_shrink=0.999), preset="unit")
    assert (report.status, report.exit_code) == ("rejected", 3) and list(here.iterdir()) == []

    report = xdonnx.verify(OTHER, TEACHER, digits, max_drop=1, preset="unit", report_dir="verdict")

    assert report.exit_code == 0 and xdonnx.read_report("verdict") == report
    assert report.fidelity and report.fidelity.samples == 450 and report.fidelity.held_out


# Samples from memory


def test_an_endless_loader_is_asked_for_no_more_than_the_job_needs(
    here: Path, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    asked = []

    def endless() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for at in itertools.count():
            asked.append(at)
            yield digits[0][at : at + 1], digits[1][at : at + 1]

    report = xdonnx.compress(TEACHER, endless(), preset="unit", method="l1-norm", keep=0.8, max_shots=12, holdout=0.4)

    # So many fit, and two fifths of all judge.
    assert report.fit_samples == 12 and report.fidelity and report.fidelity.samples == 8 and len(asked) == 20


def test_others_can_judge_from_memory_and_shots_can_be_read_before(
    here: Path, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = digits
    ports = xdonnx.read_net(xdonnx.read_proto(TEACHER)).interface.inputs
    before = xdonnx.read_shots([str(SAMPLES / "shots")], ports, UNIT)

    report = xdonnx.compress(
        TEACHER, before, holdout=(images[:40], labels[:40]), method="l1-norm", keep=0.8, preset="unit", report_dir="r"
    )

    assert report.fit_samples == 100 and report.fidelity and report.fidelity.samples == 40
    assert report.job["holdout"] == "tuple in memory" and report.job["shots"] == ["Shots in memory"]
    assert [path.name for path in here.iterdir()] == ["r"]


@pytest.mark.parametrize("form", ["arrays", "list", "loader"])
def test_the_preset_is_checked_on_samples_in_memory_too(
    form: str, here: Path, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = digits[0][:60], digits[1][:60]
    pairs = list(zip(images[:, None], labels, strict=True))
    forms = {"arrays": (images, labels), "list": pairs, "loader": torch.utils.data.DataLoader(pairs, batch_size=9)}
    how = {"method": "l1-norm", "keep": 0.8, "warn_only": "not-slower"}

    wrong = [xdonnx.verify(TEACHER, TEACHER, forms[form]), xdonnx.compress(TEACHER, forms[form], **how)]
    right = xdonnx.verify(TEACHER, TEACHER, forms[form], preset="unit")

    for report in wrong:
        assert any("'--preset imagenet' was used" in text for text in report.warnings), report.warnings
    assert not any("--preset" in text for text in right.warnings)


# Mistakes

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 16, 16), np.uint8)


@pytest.mark.parametrize(
    ("shots", "options", "kind", "words"),
    [
        (IMAGES, {"max_drp": 1}, xdonnx.JobError, "unknown option 'max_drp'. Did you mean 'max_drop'?"),
        (IMAGES, {"macs": "half"}, xdonnx.JobError, "macs is 'half'"),
        (IMAGES, {"max_drop": "1%"}, xdonnx.JobError, "max_drop is '1%'"),
        (IMAGES, {"seed": 0.5}, xdonnx.JobError, "seed is 0.5"),
        (IMAGES, {"max_drop": 1, "gate": xdonnx.Gate()}, xdonnx.JobError, "gate and max_drop are both given"),
        (IMAGES, {"preset": "unit", "preprocess": UNIT}, xdonnx.JobError, "preprocess and preset are both given"),
        (IMAGES, {"synthetic_shots": 3}, xdonnx.JobError, "both given"),
        (IMAGES, {"labels": "labels.txt"}, xdonnx.JobError, "labels is a file"),
        (IMAGES, {"labels": [1, 2]}, xdonnx.ShotsError, "labels"),
        (IMAGES, {"macs": 0.5, "keep": 0.5}, xdonnx.JobError, "--keep and --macs are both given"),
        (None, {}, xdonnx.ShotsError, "no samples"),
        ("nowhere", {}, xdonnx.ShotsError, "no shots at 'nowhere'"),
        (iter(()), {}, xdonnx.ShotsError, "yields no samples"),
        (5, {}, xdonnx.ShotsError, "int in memory holds no samples"),
        ({1, 2}, {}, xdonnx.ShotsError, "set in memory gives single numbers"),
        (["a.png", IMAGES], {}, xdonnx.ShotsError, "holds no numbers"),
        (np.zeros((8, 3, 3), np.float32), {}, xdonnx.ShotsError, r"wants \(N, 1, 16, 16\)"),
        ((IMAGES, IMAGES, IMAGES), {}, xdonnx.ShotsError, "gives 3 things at once"),
        ((IMAGES, np.arange(5)), {}, xdonnx.ShotsError, "5"),
        ({"a": IMAGES, "b": IMAGES}, {}, xdonnx.ShotsError, "wanted and not there: 'image'"),
        ([(IMAGES, np.arange(8)), IMAGES], {}, xdonnx.ShotsError, "labels some of its batches"),
    ],
)
def test_a_mistake_is_an_error_of_the_library(
    shots: Any, options: dict[str, Any], kind: type[Exception], words: str, here: Path
) -> None:
    with pytest.raises(kind, match=words):
        xdonnx.compress(TEACHER, shots, "student.onnx", **options)
    assert list(here.iterdir()) == []


def test_verify_costs_no_torch(tmp_path: Path) -> None:
    code = f"""
import sys, numpy as np, xdonnx
images = np.random.default_rng(0).integers(0, 256, (9, 16, 16), np.uint8)
report = xdonnx.verify({TEACHER!r}, {TEACHER!r}, images, preset="unit", max_drop=0)
assert report.exit_code == 0 and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, check=True)
