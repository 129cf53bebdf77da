"""The report as JUnit XML, which every CI system shows: a case for each gate and each promise of the interface."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from xml.etree import ElementTree as Tree

from xdonnx.report import GateResult, InterfaceCheck, Report, gate_figures, gate_line, interval_line, judged_by

# What XML 1.0 cannot hold, not even escaped.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: Report) -> str:
    """Return the report as JUnit XML with the suites `gates` and `verification`.

    A gate that only warns never fails: what it says is in the case's output. A job that failed has at least one case
    that failed, whatever it failed of.
    """
    suites = [_suite("gates", report, _gates(report)), _suite("verification", report, _verification(report))]
    top = Tree.Element("testsuites", {"name": "xdonnx", **_counts(suites), "time": f"{report.seconds:.3f}"})
    top.extend(suites)
    Tree.indent(top)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + Tree.tostring(top, encoding="unicode") + "\n"


def _counts(suites: Sequence[Tree.Element]) -> dict[str, str]:
    return {name: str(sum(int(suite.get(name, "0")) for suite in suites)) for name in ("tests", "failures", "errors")}


def _suite(name: str, report: Report, cases: Sequence[Tree.Element]) -> Tree.Element:
    found = {kind: sum(case.find(kind) is not None for case in cases) for kind in ("failure", "error", "skipped")}
    suite = Tree.Element(
        "testsuite",
        {
            "name": name,
            "tests": str(len(cases)),
            "failures": str(found["failure"]),
            "errors": str(found["error"]),
            "skipped": str(found["skipped"]),
            "timestamp": _timestamp(report.started),
            # The job's own time stands once, where a sum over the suites is right.
            "time": f"{report.seconds if name == 'verification' else 0:.3f}",
        },
    )
    if name == "verification":
        facts = {"command": report.command, "device": report.device, "seed": str(report.seed)}
        kept = Tree.SubElement(suite, "properties")
        for key, value in facts.items():
            Tree.SubElement(kept, "property", {"name": key, "value": _text(value)})
    suite.extend(cases)
    return suite


def _gates(report: Report) -> list[Tree.Element]:
    """Return a case for each gate."""
    cases = []
    for gate in report.gates:
        case = _case("gates", gate.name)
        if gate.passed or gate.level == "warn":
            _say(case, ("" if gate.passed else "warning: ") + _gate_text(report, gate))
        else:
            _blame(case, "failure", "GateFailed", gate_line(gate), _gate_text(report, gate))
        cases.append(case)
    return cases


def _gate_text(report: Report, gate: GateResult) -> str:
    value, _, limit = gate_figures(gate)
    lines = [gate_line(gate), f"value: {value}", f"judged: {judged_by(gate)}", f"limit: {limit}"]
    interval = interval_line(report, gate.name)
    return "\n".join([*lines, *([f"interval: {interval}"] if interval else [])])


def _verification(report: Report) -> list[Tree.Element]:
    """Return a case for each section of the interface, for the answers, for the job's end and for its warnings."""
    cases = []
    told = False
    for section in InterfaceCheck.model_fields:
        case = _case("verification", f"interface: {section}")
        found = getattr(report.interface, section) if report.interface else None
        if found is None:
            _skip(case, "the interface was not compared")
        elif found != "same":
            told = True
            count = f"{len(found)} difference{'s' * (len(found) != 1)} in {section}"
            _blame(case, "failure", "InterfaceDiffers", count, "\n".join(found))
        cases.append(case)
    cases.append(answers := _case("verification", "answers"))
    if report.fidelity is not None:
        _say(answers, f"compared on {report.fidelity.samples} samples")
    elif report.exit_code == 6 and not told:
        told = True
        _blame(answers, "failure", "AnswersDiffer", "; ".join(report.reasons), "\n".join(report.reasons))
    else:
        _skip(answers, "no answer was compared")
    cases.append(ended := _case("verification", "job"))
    told = told or any(gate.level == "fail" and not gate.passed for gate in report.gates)
    if report.status != "passed" and not told:
        reasons = report.reasons or (f"exit code {report.exit_code}",)
        _blame(ended, "error", "JobFailed", "; ".join(reasons), "\n".join(reasons))
    cases.append(warned := _case("verification", "warnings"))
    if report.warnings:
        _say(warned, "\n".join(f"warning: {line}" for line in report.warnings))
    return cases


def _case(suite: str, name: str) -> Tree.Element:
    return Tree.Element("testcase", {"classname": f"xdonnx.{suite}", "name": _text(name), "time": "0.000"})


def _blame(case: Tree.Element, tag: str, kind: str, message: str, text: str) -> None:
    found = Tree.SubElement(case, tag, {"type": kind, "message": _text(" ".join(message.split()))})
    found.text = _text(text)


def _skip(case: Tree.Element, why: str) -> None:
    Tree.SubElement(case, "skipped", {"message": why})


def _say(case: Tree.Element, text: str) -> None:
    Tree.SubElement(case, "system-out").text = _text(text)


def _text(text: str) -> str:
    r"""Return the text with what XML forbids written out, as in `\x1b`."""
    return _FORBIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def _timestamp(started: str) -> str:
    """Return the start in UTC without a zone, which is all that the common schema takes."""
    try:
        moment = datetime.fromisoformat(started)
    except ValueError:
        return _text(started)
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="seconds")
