"""junit.xml is what CI systems count: its verdict is the report's, and any text survives in it."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as Tree

import pytest
from junitparser import Error, Failure, JUnitXml, Skipped, TestSuite
from reports import full_report, gate

from xdonnx.junit import junit
from xdonnx.publication import write_report
from xdonnx.report import InterfaceCheck, Report

# What the schema of Jenkins' xunit plugin, which others follow, lets an element have.
ALLOWED = {
    "testsuites": ("name time tests failures errors", "testsuite"),
    "testsuite": (
        "name tests failures errors group time skipped timestamp hostname id package file log url",
        "testsuite properties testcase system-out system-err",
    ),
    "testcase": ("name time classname group", "skipped error failure system-out system-err"),
    "properties": ("", "property"),
    "property": ("name value", ""),
    "failure": ("type message", ""),
    "error": ("type message", ""),
    "skipped": ("type message", ""),
    "system-out": ("", ""),
}


def suites(report: Report) -> dict[str, TestSuite]:
    """Return the suites as junitparser reads them."""
    parsed = JUnitXml.fromstring(junit(report).encode())
    return {suite.name: suite for suite in parsed}


def broken(report: Report) -> set[str]:
    """Return the names of the cases that failed."""
    return {
        case.name
        for suite in suites(report).values()
        for case in suite
        if any(isinstance(found, Failure | Error) for found in case.result)
    }


def test_a_failed_gate_is_a_failure_with_value_limit_and_interval() -> None:
    (case,) = suites(full_report())["gates"]
    (failure,) = case.result
    assert (case.name, case.classname) == ("max_drop", "xdonnx.gates")
    assert failure.message == "max_drop: 2.00 points, allowed at most 1 points"
    assert "value: 2.00 points" in failure.text and "limit: 1 points" in failure.text
    assert "interval: -3.10 to 8.20 points at 95 % confidence; 50 samples can show 8.00 points at best" in failure.text


def test_a_gate_that_warns_is_no_failure_but_says_so() -> None:
    gates = (gate(level="warn"), gate("min_shrink", value=0.5, bound=0.5, limit=0.1, unit="fraction", passed=True))
    found = suites(full_report(status="passed", exit_code=0, gates=gates, interface=InterfaceCheck()))
    assert [bool(case.result) for case in found["gates"]] == [False, False]
    warned, passed = found["gates"]
    assert warned.system_out.startswith("warning: max_drop: 2.00 points")
    assert passed.system_out.startswith("min_shrink: 50.00 %, allowed at least 10 %")
    assert (found["gates"].tests, found["gates"].failures) == (2, 0)


def test_differences_of_the_interface_are_failures_of_their_section() -> None:
    found = suites(full_report())["verification"]
    names = {case.name: case for case in found}
    assert names["interface: opset"].result[0].text == "opset 18, the teacher has 17"
    assert not names["interface: inputs"].result and not names["answers"].result
    assert names["warnings"].system_out == "warning: 50 held-out samples can show a drop of 8.00 points at best"
    assert {prop.name: prop.value for prop in found.properties()}["command"].startswith("xdonnx compress 'my model")


@pytest.mark.parametrize("interface", [None, InterfaceCheck(), InterfaceCheck(inputs=("input 'a' is gone",))])
@pytest.mark.parametrize("code", [1, 3, 5, 6])
@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize("gates", [(), (gate(),), (gate(passed=True),)])
def test_a_report_that_did_not_pass_has_a_broken_case_whatever_else_it_holds(
    interface: InterfaceCheck | None, code: int, answered: bool, gates: tuple
) -> None:
    report = full_report(
        status="rejected" if code == 3 else "failed",
        exit_code=code,
        interface=interface,
        gates=gates,
        reasons=("why",),
        **({} if answered else {"fidelity": None}),
    )
    assert broken(report)


@pytest.mark.parametrize("interface", [None, InterfaceCheck()])
@pytest.mark.parametrize("gates", [(), (gate(passed=True),), (gate(level="warn"),)])
def test_a_report_that_passed_has_no_broken_case(interface: InterfaceCheck | None, gates: tuple) -> None:
    assert not broken(full_report(status="passed", exit_code=0, reasons=(), interface=interface, gates=gates))


def test_what_was_not_compared_is_skipped() -> None:
    report = full_report(status="failed", exit_code=5, fidelity=None, interface=None, gates=(), reasons=("no shots",))
    skipped = {case.name for case in suites(report)["verification"] if any(isinstance(r, Skipped) for r in case.result)}
    assert skipped == {f"interface: {part}" for part in ("inputs", "outputs", "opset", "metadata")} | {"answers"}
    assert broken(report) == {"job"}


def test_the_counts_are_those_of_the_cases() -> None:
    top = Tree.fromstring(junit(full_report()))
    for suite in top.iter("testsuite"):
        for tag, name in (("testcase", "tests"), ("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            assert int(suite.get(name)) == len(list(suite.iter(tag))), name
    assert int(top.get("tests")) == len(list(top.iter("testcase"))) and int(top.get("failures")) == 2


@pytest.mark.parametrize("report", [full_report(), full_report(fidelity=None, interface=None, gates=(), warnings=())])
def test_elements_and_attributes_are_those_of_the_common_schema(report: Report) -> None:
    for element in Tree.fromstring(junit(report)).iter():
        attributes, children = (set(part.split()) for part in ALLOWED[element.tag])
        assert set(element.attrib) <= attributes, element.tag
        assert {child.tag for child in element} <= children, element.tag
        if element.tag == "testsuite":
            assert {"name", "tests", "failures", "errors"} <= set(element.attrib)
            assert element.get("timestamp") == "2026-11-21T08:00:00"


def test_text_that_xml_cannot_hold_is_written_out(tmp_path: Path) -> None:
    nasty = "\x1b[31mred\x00 <b>&amp; \ud800 \uffff ünï ]]>"
    report = full_report(warnings=(nasty,), reasons=(nasty,), command=nasty, gates=(gate(nasty),))
    case = list(suites(report)["verification"])[-1]
    assert case.system_out == "warning: \\x1b[31mred\\x00 <b>&amp; \\ud800 \\uffff ünï ]]>"
    (tmp_path / "junit.xml").write_text(junit(report), encoding="utf-8")
    assert JUnitXml.fromfile(str(tmp_path / "junit.xml")).failures == 2


def test_the_written_file_parses(tmp_path: Path) -> None:
    write_report(full_report(), tmp_path)
    parsed = JUnitXml.fromfile(str(tmp_path / "junit.xml"))
    assert [suite.name for suite in parsed] == ["gates", "verification"]
