"""The whole job through the Python API: files, bytes, interface, refusal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import same_interface

import xdonnx
import xdonnx.methods as table_of_methods
from xdonnx.budget import Plan
from xdonnx.errors import JobError, ShotsError, VerifyError
from xdonnx.events import Event
from xdonnx.gate import Gate
from xdonnx.graph import Net
from xdonnx.images import Preprocess
from xdonnx.job import run
from xdonnx.methods.bench import Bench, Outcome
from xdonnx.methods.cross import Cross
from xdonnx.model import file_bytes, fingerprint, interface, read_proto
from xdonnx.page import page
from xdonnx.patch import Patch
from xdonnx.paths import rejected_path
from xdonnx.runtime import answer, open_session
from xdonnx.shots import Shots
from xdonnx.wanted import Job

SAMPLES = Path(__file__).parents[2] / "samples"
TEACHERS = ["digits_vgg", "digits_residual", "digits_mobile"]


def job(folder: Path, teacher: str = "digits_mobile", **options: Any) -> Job:
    wanted: dict[str, Any] = {
        "model": SAMPLES / f"{teacher}.onnx",
        "out": folder / "student.onnx",
        "shots": (str(SAMPLES / "shots"),),
        "holdout": str(SAMPLES / "held_out.npz"),
        "preprocess": Preprocess(preset="unit"),
        "preset_effort": "fast",
        "device": "cpu",
    }
    return Job(**(wanted | options))


@pytest.mark.parametrize("teacher", TEACHERS)
def test_half_the_macs_for_less_than_a_point(teacher: str, tmp_path: Path) -> None:
    report = run(job(tmp_path, teacher, gate=Gate(max_drop=1.0)))
    assert report.status == "passed" and report.exit_code == 0
    assert report.teacher and report.student and report.fidelity and report.fidelity.drop
    assert report.student.macs <= 0.55 * report.teacher.macs
    assert report.fidelity.drop.value <= 1.0
    assert report.fidelity.samples == 450
    before, after = read_proto(SAMPLES / f"{teacher}.onnx"), read_proto(tmp_path / "student.onnx")
    same_interface(before, after)
    # The batch axis is still free.
    for rows in (1, 7):
        image = np.random.default_rng(0).random((rows, 1, 16, 16), np.float32)
        assert answer(open_session(tmp_path / "student.onnx"), {"image": image})["logits"].shape == (rows, 10)


@pytest.mark.parametrize("seed", [-1, 2**64, 10**30])
def test_a_seed_that_no_generator_takes_is_refused(seed: int, tmp_path: Path) -> None:
    """Those that torch does not take ended as an internal error, in the middle of the job."""
    with pytest.raises(JobError, match=rf"--seed is {seed}\.\n  It is a whole number from 0 to {2**64 - 1}"):
        job(tmp_path, seed=seed)
    with pytest.raises(JobError, match="--seed is"):
        xdonnx.verify(SAMPLES / "digits_vgg.onnx", SAMPLES / "digits_vgg.onnx", SAMPLES / "shots", seed=seed)


def test_the_largest_seed_is_taken(tmp_path: Path) -> None:
    report = run(job(tmp_path, per_class=5, seed=2**64 - 1))
    assert report.status == "passed" and report.seed == 2**64 - 1


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in ("a", "b"):
        run(job(tmp_path / folder, per_class=5, seed=3))
    first, second = (fingerprint(tmp_path / folder / "student.onnx") for folder in ("a", "b"))
    assert first == second


def test_zeros_are_stored_sparsely_and_the_report_says_what_that_brings(tmp_path: Path) -> None:
    report = run(job(tmp_path, "digits_vgg", structure="element", keep=0.1))
    student = onnx.load(tmp_path / "student.onnx")
    assert student.graph.sparse_initializer
    onnx.checker.check_model(student)
    assert report.teacher and report.student
    assert report.student.bytes < 0.7 * report.teacher.bytes
    assert report.student.nonzero < 0.6 * report.teacher.nonzero
    assert report.student.macs == report.teacher.macs
    assert any("dense" in warning for warning in report.warnings)


def test_the_student_says_where_it_comes_from(tmp_path: Path) -> None:
    run(job(tmp_path))
    facts = interface(read_proto(tmp_path / "student.onnx")).metadata
    assert facts["xdonnx.teacher_sha256"] == fingerprint(SAMPLES / "digits_mobile.onnx")
    assert facts["xdonnx.method"] == "cross"
    assert facts["xdonnx.target"] == "channel macs 0.5"
    assert float(facts["xdonnx.held_out_agreement"]) > 95


def test_the_report_has_every_file_that_the_student_rests_on(tmp_path: Path) -> None:
    np.save(tmp_path / "pool.npy", np.random.default_rng(0).integers(0, 256, (6, 16, 16, 1), np.uint8))
    report = run(job(tmp_path, pool=str(tmp_path / "pool.npy")))

    assert set(report.files.read) == {"holdout", "pool"}
    assert report.files.read["holdout"].bytes == (SAMPLES / "held_out.npz").stat().st_size
    assert report.files.read["pool"].path == str(tmp_path / "pool.npy")
    assert report.files.read["pool"].sha256 in page(report)


def test_external_data_is_read_and_written(tmp_path: Path) -> None:
    teacher = onnx.load(SAMPLES / "digits_mobile.onnx")
    onnx.save(teacher, tmp_path / "teacher.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    report = run(job(tmp_path, model=tmp_path / "teacher.onnx", external_data="always"))
    assert (tmp_path / "student.onnx.data").is_file()
    assert report.student and report.student.bytes == pytest.approx(file_bytes(tmp_path / "student.onnx"), abs=200)
    open_session(tmp_path / "student.onnx")


def test_a_failed_gate_keeps_the_candidate_aside_and_touches_nothing(tmp_path: Path) -> None:
    out = tmp_path / "student.onnx"
    out.write_bytes(b"the one in production")
    report = run(job(tmp_path, keep=0.05, gate=Gate(max_drop=0.0), force=True))
    assert (report.status, report.exit_code) == ("rejected", 3)
    assert out.read_bytes() == b"the one in production"
    assert rejected_path(out).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student.onnx", "student.rejected.onnx"]


def test_a_cut_that_answers_otherwise_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import xdonnx.job

    whole = xdonnx.job.cut

    def broken(net: Any, patch: Any) -> onnx.ModelProto:
        student = whole(net, patch)
        for tensor in student.graph.initializer:
            if len(tensor.dims) == 4:
                array = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array * np.float32(1.5), tensor.name))
                break
        return student

    monkeypatch.setattr(xdonnx.job, "cut", broken)
    with pytest.raises(VerifyError, match="differs from the masked one"):
        run(job(tmp_path))
    assert not list(tmp_path.iterdir())


def test_no_file_of_the_teacher_is_ever_overwritten(tmp_path: Path) -> None:
    teacher = onnx.load(SAMPLES / "digits_mobile.onnx")
    onnx.save(teacher, tmp_path / "s.rejected.onnx")
    with pytest.raises(JobError, match="part of MODEL"):
        run(job(tmp_path, model=tmp_path / "s.rejected.onnx", out=tmp_path / "s.onnx", force=True))
    onnx.save(teacher, tmp_path / "a.onnx", save_as_external_data=True, location="b.onnx.data", size_threshold=0)
    with pytest.raises(JobError, match="part of MODEL"):
        run(job(tmp_path, model=tmp_path / "a.onnx", out=tmp_path / "b.onnx", external_data="always", force=True))


def test_samples_that_fit_do_not_judge(tmp_path: Path) -> None:
    with pytest.raises(ShotsError, match="also among those that fit"):
        run(job(tmp_path, holdout=str(SAMPLES / "shots")))
    with np.load(SAMPLES / "held_out.npz") as held:
        np.savez(tmp_path / "some.npz", images=held["images"][:60], labels=held["labels"][:60])
        np.savez(tmp_path / "more.npz", images=held["images"][40:90], labels=held["labels"][40:90])
    report = run(job(tmp_path, shots=(str(tmp_path / "some.npz"),), holdout=str(tmp_path / "more.npz")))
    assert report.fidelity and report.fidelity.samples == 30
    assert any("20 held-out samples are also among those that fit" in warning for warning in report.warnings)


def test_methods_chain(tmp_path: Path) -> None:
    report = run(job(tmp_path, "digits_vgg", method=("l1-norm", "cross")))
    alone = run(job(tmp_path, "digits_vgg", method=("l1-norm",), preset_effort="balanced", force=True))
    assert report.fidelity and alone.fidelity
    chained, single = report.fidelity.outputs[0].relative_l2, alone.fidelity.outputs[0].relative_l2
    assert chained is not None and single is not None and chained < single


@dataclass(frozen=True)
class Chooser:
    """A method of somebody else's that chooses and fits nothing."""

    def __call__(self, net: Net, patch: Patch, shots: Shots, plan: Plan, bench: Bench) -> Outcome:
        """Drop the last channels of every group."""
        drop = [int(label) for at, keep in plan.channels.items() for label in net.groups[at].ids[keep:]]
        return Outcome(patch.plus({}, drop))

    def check(self, structure: str) -> None:
        """Any structure will do."""


def test_a_method_of_another_package_may_choose_what_cross_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of_methods.available() | {"mine": table_of_methods.Entry(f"{__name__}:Chooser", "", "", "")}
    monkeypatch.setattr(table_of_methods, "available", lambda: table)
    report = run(job(tmp_path, "digits_vgg", method=("mine", "cross")))
    assert report.exit_code == 0 and report.job["method"] == ["mine", "cross"]
    for chain in (("cross", "thinet"), ("l1-norm", "cross", "l1-norm"), ("l1-norm", "bp", "cross")):
        with pytest.raises(JobError, match=f"--method {chain[-1]} decides what goes.*behind {chain[-2]} it would"):
            job(tmp_path, method=chain).methods()


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_where_training_brings_nothing_all_samples_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, effort: str
) -> None:
    monkeypatch.setattr("xdonnx.methods.tune.train", lambda net, patch, *_: Outcome(patch))
    told: list[str] = []

    def note(event: Event) -> None:
        told.append(event.text)

    for name, methods in (("alone", ("cross",)), ("chained", ("cross", "tune"))):
        run(job(tmp_path, out=tmp_path / f"{name}.onnx", method=methods, preset_effort=effort, per_class=6), note)
        assert told.count("Fit the layers again, on all samples") == (name == "chained")

    alone, chained = (onnx.load(tmp_path / f"{name}.onnx").graph for name in ("alone", "chained"))
    assert alone.initializer == chained.initializer


def test_judges_are_spared_where_training_brings_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[int] = []

    def spy(self: Cross, net: Any, patch: Any, shots: Any, plan: Any, bench: Any) -> Outcome:
        fitted.append(len(shots))
        return fit(self, net, patch, shots, plan, bench)

    fit = Cross.__call__
    monkeypatch.setattr(Cross, "__call__", spy)
    run(job(tmp_path, method=("cross", "tune"), keep=0.4, steps=60, preset_effort="balanced", per_class=6))

    assert fitted == [54]


def test_progress_names_every_layer_once_in_order(tmp_path: Path) -> None:
    events: list[Event] = []
    run(job(tmp_path), events.append)
    fits = [event for event in events if event.stage == "fit" and event.total]
    assert [event.done for event in fits] == sorted(event.done for event in fits)
    assert len({event.text for event in fits}) == len(fits)
    stages = list(dict.fromkeys(event.stage for event in events))
    assert stages[:2] == ["read", "shots"] and stages.index("fit") < stages.index("cut")


def test_synthetic_shots_are_reported_as_such(tmp_path: Path) -> None:
    report = run(job(tmp_path, shots=(), synthetic_shots=16, holdout="0.25"))
    assert any("random noise" in warning for warning in report.warnings)


def test_no_samples_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShotsError, match="no samples"):
        run(job(tmp_path, shots=()))


def test_the_random_state_of_the_caller_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    run(job(tmp_path))
    assert torch.equal(torch.rand(1), expected)
