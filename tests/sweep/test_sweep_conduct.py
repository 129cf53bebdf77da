"""A sweep from beginning to end: resumed, interrupted, on processes that die, and how it ends."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from recipes import GRID, described, students, swept

import xdonnx
from xdonnx.errors import JobError, MachineError, NothingToDo, ShotsError
from xdonnx.events import Event
from xdonnx.model import fingerprint
from xdonnx.sweep.conduct import run_sweep
from xdonnx.sweep.description import Running
from xdonnx.sweep.measuring import Task
from xdonnx.sweep.results import SweepResults, as_csv, as_markdown, schema


@pytest.fixture
def copied(tiny: tuple[Path, SweepResults], tmp_path: Path) -> tuple[Path, SweepResults]:
    """Return a folder with a copy of the sweep in `out`, and its results."""
    shutil.copytree(tiny[0] / "out", tmp_path / "out")
    return tmp_path, tiny[1]


def facts(results: SweepResults) -> list[dict[str, Any]]:
    """Return all of the trials that is no measurement of time."""
    timed = {"seconds", "latency", "folder"}
    return [trial.model_dump(exclude=timed) for trial in results.trials]


def forget(out: Path, keep: int) -> None:
    """Leave a folder as if the sweep had been killed after so many trials, in the middle of a line."""
    lines = (out / "runs.jsonl").read_bytes().splitlines(keepends=True)
    (out / "runs.jsonl").write_bytes(b"".join([*lines[:keep], lines[keep][:40]]))


def test_a_trial_that_its_gate_rejects_is_a_result(tiny: tuple[Path, SweepResults]) -> None:
    results = tiny[1]
    statuses = {trial.choices["method"]: (trial.status, trial.exit_code) for trial in results.trials}
    assert statuses == {"l1-norm": ("rejected", 3), "refitted": ("passed", 0)}
    assert (results.exit_code, results.status, results.taken, results.quality) == (0, "complete", 4, "accuracy")
    assert all("max_drop" in trial.reason for trial in results.trials if trial.status == "rejected")


def test_the_same_call_again_does_nothing_twice(
    copied: tuple[Path, SweepResults], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = copied
    monkeypatch.setattr(xdonnx, "run", lambda job, **_: pytest.fail("a trial was taken"))
    lines = (folder / "out" / "runs.jsonl").read_bytes()

    again = swept(folder)

    assert again.taken == 0 and facts(again) == facts(before) and again.points == before.points
    assert (folder / "out" / "runs.jsonl").read_bytes() == lines


def test_a_sweep_that_was_killed_goes_on_with_what_is_missing(copied: tuple[Path, SweepResults]) -> None:
    folder, before = copied
    forget(folder / "out", keep=3)
    (folder / "out" / ".scratch" / "trial-of-the-dead").mkdir(parents=True)

    again = swept(folder)

    assert again.taken == 1 and facts(again) == facts(before)
    assert not (folder / "out" / ".scratch").exists()


def test_an_interrupt_keeps_what_is_done_and_says_so(copied: tuple[Path, SweepResults]) -> None:
    folder, before = copied
    forget(folder / "out", keep=1)
    seen: list[str] = []

    def stop(event: Event) -> None:
        seen.append(f"{event.stage} {event.done}/{event.total}")
        if len(seen) == 3:
            raise KeyboardInterrupt

    stopped = swept(folder, log=stop)
    again = swept(folder)

    assert seen == ["begin 1/4", "trial 2/4", "begin 2/4"]
    assert (stopped.exit_code, stopped.status, stopped.taken) == (130, "interrupted", 1)
    assert [trial.status for trial in stopped.trials].count("waiting") == 2
    assert again.taken == 2 and facts(again) == facts(before) and again.exit_code == 0


def test_a_new_row_takes_its_own_trials_only(
    copied: tuple[Path, SweepResults], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = copied

    def refuse(job: xdonnx.Job, **_: Any) -> None:
        raise NothingToDo(f"out of reach: {job.keep}")

    monkeypatch.setattr(xdonnx, "run", refuse)
    more = swept(folder, GRID.replace('{ keep = "20%" }', '{ keep = "20%" }, { keep = "1%" }'))
    assert more.taken == 4 and len(more.trials) == 8
    assert {trial.reason for trial in more.trials if trial.status == "failed"} == {"out of reach: 0.01"}


def test_processes_find_what_one_process_finds_though_one_of_them_is_killed(
    tiny: tuple[Path, SweepResults], tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill() -> None:
        # The folder of a trial is made by the process that does it: it is in the middle of it.
        while not killed:
            for pid in children():
                if any((tmp_path / "out" / ".scratch").glob("trial-*")):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    break
            time.sleep(0.01)

    threading.Thread(target=kill, daemon=True).start()
    results = swept(tmp_path, GRID.replace("[0, 1]", "[1]"), run={"backend": "processes", "jobs": 2})

    assert killed and results.exit_code == 0 and results.taken == 2
    assert students(results).items() <= students(tiny[1]).items()
    for trial in results.trials:
        report = json.loads((tmp_path / "out" / trial.folder / "report.json").read_text())
        assert report["files"]["student"]["sha256"] == trial.student_sha256
    assert children() == [] and not (tmp_path / "out" / ".scratch").exists()


def children() -> list[int]:
    """Return the processes that this one has started to do trials."""
    from multiprocessing import active_children

    return [child.pid for child in active_children() if child.pid]


def test_a_trial_that_kills_its_worker_twice_has_failed_and_the_others_go_on(tmp_path: Path) -> None:
    from xdonnx.sweep.local import processes
    from xdonnx.sweep.trials import grid

    tasks = [Task(one.key, one.job, 1) for one in grid(described(tmp_path), tmp_path)[:2]]
    begun: list[str] = []

    def begin(task: Task) -> None:
        begun.append(task.key)
        if task.key == tasks[0].key:
            for pid in children():
                os.kill(pid, signal.SIGKILL)

    with processes(tmp_path, 1, 1) as perform:
        found = {done.key: done.record for done in perform(tasks, begin)}

    assert begun == [tasks[0].key, tasks[0].key, tasks[1].key]
    lost = found[tasks[0].key]
    assert (lost["status"], lost["exit_code"], lost["final"]) == ("failed", 8, False)
    assert lost["error"].startswith("its worker was lost 2 times: killed by signal 9.")
    assert found[tasks[1].key]["status"] == "passed"


@pytest.mark.parametrize(
    ("error", "code", "again"),
    [
        (ShotsError("too few"), 5, 0),
        (NothingToDo("out of reach"), 7, 0),
        (MachineError("the disk is full"), 8, 4),
        (MemoryError("out of memory"), 8, 4),
        (KeyError("a defect"), 1, 4),
    ],
)
def test_a_sweep_without_any_student_ends_as_its_trials_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, again: int
) -> None:
    def fail(job: xdonnx.Job, **_: Any) -> None:
        raise error

    monkeypatch.setattr(xdonnx, "run", fail)
    results = swept(tmp_path)
    assert results.exit_code == code and {trial.status for trial in results.trials} == {"failed"}
    # What the machine did may pass; what the job says will not.
    assert swept(tmp_path).taken == again
    assert "No student" in (tmp_path / "out" / "sweep.md").read_text()


def test_a_sweep_none_of_which_passes_is_rejected(copied: tuple[Path, SweepResults]) -> None:
    folder, _ = copied
    text = GRID.split('[[method]]\nname = "refitted"')[0]
    results = swept(folder, text)
    assert (results.exit_code, results.taken) == (3, 0)


@pytest.mark.parametrize(("which", "kept"), [("best", 1), ("none", 0)])
def test_students_are_kept_as_the_file_says(tmp_path: Path, which: str, kept: int) -> None:
    results = swept(tmp_path, GRID.replace("seeds = [0, 1]", "seeds = [0]"), run={"students": which})
    expected = [trial for trial in results.trials if trial.choices["method"] == "refitted"][:kept]
    assert {path.parent.name for path in (tmp_path / "out" / "trials").rglob("*.onnx")} == {
        trial.folder.removeprefix("trials/") for trial in expected
    }
    assert len(list((tmp_path / "out" / "trials").rglob("report.json"))) == 2


def kept(folder: Path) -> set[str]:
    """Return the folders of trials in which there is a student."""
    return {f"trials/{path.parent.name}" for path in (folder / "out" / "trials").rglob("student*.onnx")}


@pytest.mark.parametrize(("which", "lost"), [("best", 1), ("none", 2)])
def test_students_that_were_not_kept_are_made_again_once_all_are_wanted(tmp_path: Path, which: str, lost: int) -> None:
    """They were counted as done: nothing was taken, the exit code was 0, and the files were missing."""
    text = GRID.replace("seeds = [0, 1]", "seeds = [0]")
    before = swept(tmp_path, text, run={"students": which})
    assert len(kept(tmp_path)) == 2 - lost

    again = swept(tmp_path, text)

    assert again.taken == lost and again.exit_code == 0 and facts(again) == facts(before)
    assert kept(tmp_path) == {trial.folder for trial in again.trials}
    for trial in again.trials:
        (file,) = (tmp_path / "out" / trial.folder).glob("student*.onnx")
        assert fingerprint(file) == trial.student_sha256
    assert swept(tmp_path, text).taken == 0


@pytest.mark.parametrize("which", ["best", "none"])
def test_the_best_are_made_again_where_another_beat_them_before(tmp_path: Path, which: str) -> None:
    text = GRID.replace("seeds = [0, 1]", "seeds = [0]")
    before = swept(tmp_path, text, run={"students": which})
    (beaten,) = (trial for trial in before.trials if trial.choices["method"] == "l1-norm")
    assert beaten.folder not in kept(tmp_path)

    alone = text.split('[[method]]\nname = "refitted"')[0]
    again = swept(tmp_path, alone, run={"students": "best"})

    assert again.points[0].optimal and again.taken == 1 and beaten.folder in kept(tmp_path)
    assert facts(again) == [fact for fact in facts(before) if fact["key"] == beaten.key]
    assert swept(tmp_path, alone, run={"students": "best"}).taken == 0
    assert swept(tmp_path, alone, run={"students": "none"}).taken == 0


def test_an_interrupt_while_a_student_is_made_again_loses_no_result(tmp_path: Path) -> None:
    text = GRID.replace("seeds = [0, 1]", "seeds = [0]")
    before = swept(tmp_path, text, run={"students": "none"})

    def stop(event: Event) -> None:
        raise KeyboardInterrupt

    stopped = swept(tmp_path, text, run={"students": "best"}, log=stop)
    assert (stopped.exit_code, stopped.taken) == (130, 0) and facts(stopped) == facts(before)
    again = swept(tmp_path, text, run={"students": "best"})
    assert (again.exit_code, again.taken) == (0, 1) and len(kept(tmp_path)) == 1


def test_two_sweeps_never_share_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(MachineError, match="another sweep is running in"):
            swept(tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(MachineError, match=r"cannot write to '.*out'"):
        swept(tmp_path)


def test_a_full_disk_stops_a_sweep_which_then_goes_on(
    copied: tuple[Path, SweepResults], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = copied
    forget(folder / "out", keep=2)

    def full(path: Path, record: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("xdonnx.sweep.conduct.add_record", full)
        with pytest.raises(MachineError, match=r"No space left.*\n  Free space; the same command goes on"):
            swept(folder)
    again = swept(folder)
    assert again.taken == 2 and facts(again) == facts(before)


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (Running(jobs=2, backend="serial"), "the backend serial does one at a time"),
        (Running(address="auto", backend="processes"), "an address is of a Ray cluster"),
    ],
)
def test_settings_of_another_backend_are_refused_before_anything_is_made(
    tmp_path: Path, run: Running, says: str
) -> None:
    with pytest.raises(JobError, match=says):
        run_sweep(described(tmp_path), tmp_path / "out", run=run)
    assert not (tmp_path / "out").exists()


def test_the_json_fits_its_schema_and_the_tables_hold_its_numbers(tiny: tuple[Path, SweepResults]) -> None:
    folder, results = tiny
    saved = json.loads((folder / "out" / "sweep.json").read_text())
    jsonschema.validate(saved, schema())
    assert SweepResults.model_validate(saved) == results
    assert saved["models"][0]["macs"] == 5_388_928 and saved["command"] == "xdonnx sweep tiny.toml"

    lines = list(csv.DictReader(io.StringIO(as_csv(results))))
    assert [float(line["accuracy"]) for line in lines] == [trial.accuracy for trial in results.trials]
    assert [line["optimal"] for line in lines] == ["0", "1", "0", "1"]
    for point in results.points:
        values = [trial.accuracy for trial in results.trials if trial.key in point.trials]
        assert point.quality and point.quality.mean == pytest.approx(sum(v for v in values if v is not None) / 2)
        bold = "**" if point.optimal else ""
        assert f"{bold}{point.quality.mean:.2f} ± " in as_markdown(results)
