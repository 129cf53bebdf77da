"""A job that was stopped goes on where it was, and gives the same bytes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xdonnx.methods.layerwise as layerwise
from xdonnx.errors import JobError, MachineError, ShotsError
from xdonnx.events import Event
from xdonnx.graph import read_net
from xdonnx.job import run
from xdonnx.machine import free_memory, machines_fault, parsed_bytes
from xdonnx.model import fingerprint, read_proto
from xdonnx.paths import partial_folder
from xdonnx.planfile import group_names
from xdonnx.report import Report
from xdonnx.wanted import Job

SAMPLES = Path(__file__).parents[2] / "samples"


def job(folder: Path, **more: Any) -> Job:
    options: dict[str, Any] = {
        "model": SAMPLES / "digits_residual.onnx",
        "out": folder / "student.onnx",
        "shots": (str(SAMPLES / "shots"),),
        "preprocess": {"preset": "unit"},
        "method": ("cross", "tune"),
        "preset_effort": "fast",
        "steps": 3,
        "views": 0,
        "macs": 0.5,
        "residual": True,
        "per_class": 2,
    }
    return Job(**{**options, **more})


def undisturbed(folder: Path, **more: Any) -> str:
    """Return the fingerprint of the student of a job that nobody stops."""
    folder.mkdir(exist_ok=True)
    run(job(folder, **more))
    assert [path.name for path in folder.iterdir()] == ["student.onnx"]
    return fingerprint(folder / "student.onnx")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    return undisturbed(tmp_path_factory.mktemp("whole"))


def stopping(at: str, number: int, error: BaseException) -> Callable[[Event], None]:
    """Return a log that stops the job at the so-manieth event of a stage."""
    seen: list[Event] = []

    def log(event: Event) -> None:
        if event.stage == at:
            seen.append(event)
            if len(seen) == number:
                raise error

    return log


def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that fills with the layers that are fitted from now on."""
    fitted: list[str] = []
    fit = layerwise._Visitor._fit

    def noting(self: Any, stop: Any) -> Any:
        fitted.append(stop.layer.name)
        return fit(self, stop)

    monkeypatch.setattr(layerwise._Visitor, "_fit", noting)
    return fitted


@pytest.mark.parametrize(("stage", "number"), [("fit", 1), ("fit", 12), ("tune", 3), ("cut", 1)])
def test_a_job_that_was_stopped_goes_on_to_the_same_bytes(
    stage: str, number: int, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(job(tmp_path), stopping(stage, number, KeyboardInterrupt()))
    assert "--resume" in "".join(stopped.value.__notes__)
    assert [path.name for path in tmp_path.iterdir()] == ["student.onnx.partial"]
    fitted = solved(monkeypatch)

    run(job(tmp_path, resume=True))

    assert fingerprint(tmp_path / "student.onnx") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["student.onnx"]
    if stage in ("tune", "cut"):
        assert not fitted
    if (stage, number) == ("fit", 12):
        assert 0 < len(fitted) < 10


def test_error_curves_are_measured_once(tmp_path: Path) -> None:
    whole = undisturbed(tmp_path / "whole", preset_effort="balanced")
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path, preset_effort="balanced"), stopping("fit", 12, KeyboardInterrupt()))
    seen: list[str] = []

    run(job(tmp_path, preset_effort="balanced", resume=True), lambda event: seen.append(event.stage))

    assert fingerprint(tmp_path / "student.onnx") == whole
    assert "fit" in seen and "curves" not in seen


def test_without_resume_a_job_starts_anew(whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path), stopping("fit", 12, KeyboardInterrupt()))
    fitted = solved(monkeypatch)
    run(job(tmp_path))
    assert len(fitted) >= 12 and fingerprint(tmp_path / "student.onnx") == whole


def test_what_lasts_of_a_killed_process_is_enough_to_go_on(whole: str, tmp_path: Path) -> None:
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_resume import job, stopping
from xdonnx.job import run
from pathlib import Path
class Killed(BaseException):
    def __init__(self): os.kill(os.getpid(), {int(signal.SIGKILL)})
seen = []
def log(event):
    seen.append(event.stage)
    if seen.count("fit") == 4: Killed()
run(job(Path({str(tmp_path)!r})), log)
"""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, check=False)
    assert done.returncode == -signal.SIGKILL
    run(job(tmp_path, resume=True))
    assert fingerprint(tmp_path / "student.onnx") == whole


def test_a_damaged_entry_is_made_again(whole: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path), stopping("tune", 3, KeyboardInterrupt()))
    for path in partial_folder(tmp_path / "student.onnx").glob("*.npz"):
        path.write_bytes(path.read_bytes()[:100])
    run(job(tmp_path, resume=True))
    assert fingerprint(tmp_path / "student.onnx") == whole


@pytest.mark.parametrize(
    ("change", "named"), [({"seed": 1}, "held out, samples, seed differ"), ({"macs": 0.6}, "macs differs")]
)
def test_the_work_of_another_job_is_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path), stopping("fit", 2, KeyboardInterrupt()))
    with pytest.raises(JobError, match=rf"another job: {named}\.\n"):
        run(job(tmp_path, resume=True, **change))
    assert partial_folder(tmp_path / "student.onnx").is_dir(), "the work of the first job must not be lost"


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (partial_folder(tmp_path / "student.onnx")).mkdir()
    (partial_folder(tmp_path / "student.onnx") / "thesis.txt").write_text("mine")
    with pytest.raises(JobError, match="in the way"):
        run(job(tmp_path))
    assert (partial_folder(tmp_path / "student.onnx") / "thesis.txt").read_text() == "mine"


def test_resume_with_nothing_to_go_on_with_says_so(tmp_path: Path, whole: str) -> None:
    report = run(job(tmp_path, resume=True))
    assert any("starts anew" in warning for warning in report.warnings)
    assert fingerprint(tmp_path / "student.onnx") == whole


def test_a_defect_or_a_mistake_leaves_nothing_to_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run(job(tmp_path), stopping("tune", 3, ZeroDivisionError()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("CUDA error: unspecified launch failure"), "GPU failed"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
    ],
)
def test_what_the_machine_fails_is_told_and_can_go_on(error: Exception, said: str, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=said) as failed:
        run(job(tmp_path), stopping("tune", 3, error))
    assert "--resume" in "".join(failed.value.__notes__)
    assert any((partial_folder(tmp_path / "student.onnx")).glob("*.npz"))


def test_what_is_no_fault_of_the_machine_is_none() -> None:
    assert machines_fault(RuntimeError("shapes differ")) is None and machines_fault(OSError("odd")) is None


def test_a_journal_that_cannot_be_written_only_warns(
    whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("xdonnx.journal.np.savez", full)
    report = run(job(tmp_path))
    assert report.exit_code == 0 and any("--resume will not find" in warning for warning in report.warnings)
    assert fingerprint(tmp_path / "student.onnx") == whole


def test_a_job_with_little_memory_gives_the_same_bytes_and_says_what_it_took(whole: str, tmp_path: Path) -> None:
    report: Report = run(job(tmp_path, memory="1MB"))
    assert fingerprint(tmp_path / "student.onnx") == whole
    assert report.memory and report.memory.limit == 10**6 and report.memory.spilled > 10**6
    assert report.memory.peak > 10**8
    assert any("the peak may pass the limit" in warning for warning in report.warnings)
    assert json.loads(report.model_dump_json())["memory"]["limit"] == 10**6


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("1.5 gib", 3 * 2**29), ("500m", 5 * 10**8), (3_000_000, 3_000_000), (" 2000kB ", 2_000_000)],
)
def test_amounts_of_memory_are_read(text: str, size: int) -> None:
    assert parsed_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "8 apples", "-1GB", "0", "0.1", "GB", "1e9", "nan", "8", "8000000", "1kB", 8, True]
)
def test_what_is_no_amount_of_memory_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="--memory is"):
        job(tmp_path, memory=text)


def test_some_memory_is_free() -> None:
    assert 2**26 < free_memory() < 2**50


def test_an_edited_plan_makes_another_job(tmp_path: Path) -> None:
    more = {"macs": None, "residual": False, "plan": tmp_path / "plan.toml", "method": ("cross",), "steps": None}
    groups = group_names(read_net(read_proto(SAMPLES / "digits_residual.onnx")))
    name = next(iter(groups))
    text = (
        f'schema_version = 1\nteacher = "{fingerprint(SAMPLES / "digits_residual.onnx")}"\nstructure = "channel"\n'
        f'[[layer]]\nname = "{name}"\nunits = UNITS\nkeep = 4\n'
    )
    units = len(read_net(read_proto(SAMPLES / "digits_residual.onnx")).groups[groups[name]].ids)
    more["plan"].write_text(text.replace("UNITS", str(units)))
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path, **more), stopping("cut", 1, KeyboardInterrupt()))
    more["plan"].write_text(text.replace("UNITS", str(units)).replace("keep = 4", "keep = 6"))
    with pytest.raises(JobError, match="another job: plan differs"):
        run(job(tmp_path, resume=True, **more))


def test_other_images_in_the_pool_make_another_job(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    np.save(tmp_path / "pool.npy", random.integers(0, 256, (6, 16, 16, 1), np.uint8))
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path, pool=str(tmp_path / "pool.npy")), stopping("cut", 1, KeyboardInterrupt()))
    np.save(tmp_path / "pool.npy", random.integers(0, 256, (6, 16, 16, 1), np.uint8))
    with pytest.raises(JobError, match=r"another job: images of the pool, pool differ|another job: .*pool"):
        run(job(tmp_path, pool=str(tmp_path / "pool.npy"), resume=True))


@pytest.mark.parametrize("content", ["{}", "null", "[]", "no json"])
def test_a_folder_with_a_file_called_as_ours_is_left_alone(content: str, tmp_path: Path) -> None:
    folder = partial_folder(tmp_path / "student.onnx")
    folder.mkdir()
    (folder / "job.json").write_text(content)
    (folder / "precious.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(JobError, match="in the way"):
            run(job(tmp_path, resume=resume))
    assert (folder / "precious.txt").read_text() == "mine" and (folder / "job.json").read_text() == content


def test_what_others_put_beside_our_work_stays(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path), stopping("fit", 3, KeyboardInterrupt()))
    folder = partial_folder(tmp_path / "student.onnx")
    (folder / "precious.txt").write_text("mine")
    run(job(tmp_path))
    assert [path.name for path in folder.iterdir()] == ["precious.txt"]


def test_what_is_left_of_a_removal_cut_short_is_in_nobodys_way(tmp_path: Path) -> None:
    folder = partial_folder(tmp_path / "student.onnx")
    folder.mkdir()
    (folder / f"{'a' * 32}.npz").touch()
    (folder / ".job.json.123").touch()
    assert run(job(tmp_path)).exit_code == 0 and not folder.exists()


def test_work_of_another_job_in_the_same_folder_is_never_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = undisturbed(tmp_path / "expected", macs=0.7)
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path), stopping("cut", 1, KeyboardInterrupt()))
    monkeypatch.setattr("xdonnx.journal._cleared", lambda folder: None)  # as where nothing may be removed
    run(job(tmp_path, macs=0.7))
    assert fingerprint(tmp_path / "student.onnx") == expected


def test_a_mistake_while_going_on_does_not_cost_the_work(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path), stopping("tune", 3, KeyboardInterrupt()))
    with pytest.raises(ShotsError):
        run(job(tmp_path, resume=True), stopping("parity", 1, ShotsError("unreadable for a moment")))
    assert any(partial_folder(tmp_path / "student.onnx").glob("*.npz"))


def test_a_job_goes_on_from_another_place(whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path), stopping("tune", 3, KeyboardInterrupt()))
    monkeypatch.chdir(SAMPLES)
    run(job(tmp_path, resume=True, model=Path("digits_residual.onnx"), shots=("shots",)))
    assert fingerprint(tmp_path / "student.onnx") == whole
