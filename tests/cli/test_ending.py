"""A job that fails leaves a report that says so, where one is asked for or an older one says otherwise."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from junitparser import JUnitXml, Skipped
from program import SHOTS, TEACHER, call, listing

from xdonnx.report import Report, read_report

JOB = ["compress", TEACHER, *SHOTS, "--method", "l1-norm", "--keep", "0.6", "--warn-only", "not-slower", "-o", "s.onnx"]
FORMS = ["junit.xml", "report.html", "report.json", "summary.md"]


@pytest.fixture
def passed(here: Path) -> Report:
    """Leave a report of a job that passed."""
    assert call(*JOB, "--report-dir", "report").code == 0
    return read_report("report")


def left() -> tuple[int, str, str]:
    """Return exit code and first reason of the report, and what its case in junit.xml says."""
    report = read_report("report")
    assert report.status == "failed" and sorted(listing(Path("report"))) == FORMS
    assert "failed (exit code" in Path("report/summary.md").read_text()
    assert "Failed" in Path("report/report.html").read_text()
    found = [result for suite in JUnitXml.fromfile("report/junit.xml") for case in suite for result in case.result]
    (failure,) = (result for result in found if not isinstance(result, Skipped))
    return report.exit_code, report.reasons[0], failure.message


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (["--shots", "none", "--force"], 5, "no shots at 'none'"),
        (["--exclude", "*", "--force"], 7, "no channel may go"),
        (["--max-drop", "-1", "--force"], 2, "is no limit"),
        (["--mean", "a", "--force"], 2, "no list of numbers"),
        ([], 2, "'s.onnx' exists"),
    ],
)
def test_a_job_that_fails_replaces_the_report_of_the_one_before(
    passed: Report, change: list[str], code: int, says: str
) -> None:
    """A pipeline that keeps reports whatever happened showed the older one, which had passed."""
    job = [part for part in JOB if "--shots" not in change or part not in SHOTS[:2]]
    before = listing(Path())

    ended = call(*job, "--report-dir", "report", *change)

    assert ended.code == code and says in ended.err
    told, reason, failure = left()
    assert told == code and says in reason and says in failure
    report = read_report("report")
    assert report.command.startswith("xdonnx") and report.job["out"] == "s.onnx" and report.fidelity is None
    assert {name: data for name, data in listing(Path()).items() if not name.startswith("report")} == {
        name: data for name, data in before.items() if not name.startswith("report")
    }


def test_a_comparison_that_fails_leaves_a_report_where_one_was_asked_for(here: Path) -> None:
    ended = call("verify", TEACHER, "none.onnx", *SHOTS, "--report-dir", "report")
    assert ended.code == 4
    told, reason, _ = left()
    assert told == 4 and "no model at 'none.onnx'" in reason


def test_the_warnings_until_then_are_in_the_report(here: Path) -> None:
    shots = [*SHOTS[:2], "--preset", "imagenet"]
    ended = call("compress", TEACHER, *shots, "--exclude", "*", "-o", "s.onnx", "--report-dir", "report")
    assert ended.code == 7
    assert [text for text in read_report("report").warnings if "'--preset unit' fits" in text]


def test_the_report_beside_out_is_replaced_only_where_out_is_to_be(here: Path) -> None:
    assert call(*JOB).code == 0
    before = listing(here)

    kept = call(*JOB)
    assert kept.code == 2 and "'s.onnx' exists" in kept.err and listing(here) == before

    failed = call(*JOB, "--exclude", "*", "--force")
    assert failed.code == 7 and (read_report("s.report").status, read_report("s.report").exit_code) == ("failed", 7)
    assert (here / "s.onnx").read_bytes() == before["s.onnx"]


def test_where_no_report_is_and_none_was_asked_for_nothing_is_left_but_a_summary(here: Path) -> None:
    ended = call(*JOB, "--exclude", "*", environment={"GITHUB_STEP_SUMMARY": "step.md"})
    assert ended.code == 7 and sorted(listing(here)) == ["step.md"]
    assert Path("step.md").read_text().startswith("# xdonnx: failed (exit code 7)")


def test_an_internal_error_is_reported_too(passed: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("xdonnx.job.cut", fail)
    assert call(*JOB, "--force", "--report-dir", "report").code == 1
    assert left()[:2] == (1, read_report("report").reasons[0]) and "planted" in left()[1]


def test_a_report_that_cannot_be_replaced_is_taken_away(passed: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("xdonnx.publication.put", full)
    assert call(*JOB, "--exclude", "*", "--force", "--report-dir", "report").code == 7
    assert listing(Path("report")) == {}


def test_what_fails_after_the_report_is_written_leaves_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("xdonnx_cli.show.show", fail)
    call(*JOB, "--report-dir", "report")
    assert read_report("report").status == "passed"


def test_an_interrupt_is_reported(passed: Report, here: Path) -> None:
    program = [sys.executable, "-c", "from xdonnx_cli.app import main; main()"]
    job = [*JOB[:4], "--preset", "unit", "--preset-effort", "best", "-v", "-o", "t.onnx", "--report-dir", "report"]
    with subprocess.Popen([*program, *job], cwd=here, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(line.startswith("shots") for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)

    assert process.returncode == 143
    assert left() == (143, "terminated", "terminated")


def test_a_resume_with_nothing_to_go_on_with_is_told_before_the_work(here: Path) -> None:
    ended = call(*JOB, "--resume", "--exclude", "*")
    assert ended.code == 7 and f"nothing is kept for '{JOB[JOB.index('-o') + 1]}'" in ended.err
