"""`report` draws a saved report again: in every form, with nothing but the file, and over nothing of the user's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from junitparser import JUnitXml
from program import Compressed, call, listing

from xdonnx.report import Report, read_report


@pytest.fixture
def saved(compressed: Compressed, here: Path) -> Report:
    """Put a report.json of a job, and nothing else, into the current folder."""
    text = (compressed.folder / "student.report" / "report.json").read_text()
    Path("report.json").write_text(text)
    return read_report(here)


def test_every_form_is_that_which_the_job_wrote(compressed: Compressed, saved: Report) -> None:
    ended = call("report", ".", "--html", "a.html", "--junit", "a.xml", "--markdown", "a.md")

    assert (ended.code, ended.out) == (0, "")
    assert [line.split()[:2] for line in ended.err.splitlines()] == [
        ["wrote", f"a.{end}"] for end in ("html", "xml", "md")
    ]
    for mine, theirs in (("a.html", "report.html"), ("a.xml", "junit.xml"), ("a.md", "summary.md")):
        assert Path(mine).read_text() == (compressed.folder / "student.report" / theirs).read_text()
    assert sorted(listing(Path())) == ["a.html", "a.md", "a.xml", "report.json"]


def test_a_verdict_without_a_limit_says_loudly_that_much_is_lost(saved: Report) -> None:
    """A student at chance level was DONE like any other."""
    assert saved.fidelity and saved.fidelity.drop
    for low, loud in ((4.0, False), (60.0, True)):
        drop = saved.fidelity.drop.model_copy(update={"value": 90.0, "low": low, "high": 95.0})
        bad = saved.model_copy(
            update={
                "fidelity": saved.fidelity.model_copy(update={"drop": drop}),
                "gates": tuple(gate for gate in saved.gates if gate.name != "max_drop"),
            }
        )
        Path("bad.json").write_text(bad.model_dump_json())
        assert ("MUCH IS LOST" in call("gate", "bad.json", "-q", width=200).out) is loud


def test_the_exit_code_is_0_whatever_the_report_says(saved: Report) -> None:
    rejected = saved.model_copy(update={"status": "rejected", "exit_code": 3, "reasons": ("too bad",)})
    Path("bad.json").write_text(rejected.model_dump_json())

    ended = call("report", "bad.json", "--html", "bad.html", "-q")

    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert "too bad" in Path("bad.html").read_text()


def test_a_dash_is_stdout(saved: Report) -> None:
    ended = call("report", "report.json", "--markdown", "-")
    assert ended.code == 0 and ended.err == "" and ": passed (exit code 0)\n" in ended.out

    ended = call("report", "report.json", "--junit", "-", "--html", "page.html")
    assert [suite.name for suite in JUnitXml.fromstring(ended.out.encode())] == ["gates", "verification"]
    assert "wrote page.html" in ended.err


def test_without_a_path_it_is_printed(saved: Report) -> None:
    ended = call("report", ".")
    assert ended.code == 0 and ended.out.startswith("PASSED") and "max_drop: " in ended.out
    assert listing(Path()).keys() == {"report.json"}


def test_what_was_there_is_replaced(saved: Report) -> None:
    Path("a.html").write_text("old")
    assert call("report", ".", "--html", "a.html").code == 0
    assert Path("a.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none", "--html", "a.html"], "no report at 'none'"),
        (["bad.json", "--html", "a.html"], "'bad.json' is no report"),
        (["later.json", "--html", "a.html"], "has schema 2.0"),
        ([".", "--html", "report.json"], "is the report itself"),
        (["report.json", "--junit", "./report.json"], "is the report itself"),
        ([".", "--html", "."], "is a folder"),
        ([".", "--html", "no/a.html"], "does not exist"),
        ([".", "--html", "a", "--junit", "./a"], "the same place"),
        ([".", "--html", "-", "--junit", "-"], "the same place"),
        ([], "REPORT"),
    ],
)
def test_mistakes_are_told_and_write_nothing(saved: Report, arguments: list[str], says: str) -> None:
    Path("bad.json").write_text("[]")
    Path("later.json").write_text('{"schema_version": "2.0"}')
    before = listing(Path())

    ended = call("report", *arguments)

    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: ") and says in ended.err and "Traceback" not in ended.err
    assert listing(Path()) == before


def test_it_imports_neither_torch_nor_onnx(saved: Report) -> None:
    code = """
import sys
from xdonnx_cli.app import run
assert run(["report", ".", "--html", "a.html", "--junit", "a.xml", "--markdown", "a.md"]) == 0
heavy = {"torch", "onnx", "onnx_ir", "onnxruntime", "numpy", "PIL"} & set(sys.modules)
assert not heavy, heavy
assert run(["report", "."]) == 0
assert not {"torch", "onnx", "onnxruntime"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_gate_writes_the_report_as_judged_now(saved: Report) -> None:
    ended = call("gate", ".", "--min-shrink", "99%", "--report-dir", "again")

    assert ended.code == 3 and "again/junit.xml" in ended.out and "again/report.html" in ended.out
    again = read_report("again")
    assert again.status == "rejected" and again.gates[0].name == "min_shrink"
    assert JUnitXml.fromfile("again/junit.xml").failures == sum(not gate.passed for gate in again.gates) == 1
    assert json.loads(Path("report.json").read_text())["status"] == "passed"
