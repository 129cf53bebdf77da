"""What to try next is said of a student that was made here and rejected, and only what can be done."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from reports import full_report, gate

from xdonnx.limits import CLOSER, next_step
from xdonnx.matches import MatchResult
from xdonnx.report import Report

BOTH = "give more samples: to remove less breaks one of these limits, to remove more another"
MATCH = MatchResult(teacher="a", student=("a",), kept=1, units=2, confidence=0.9, by="weights")


def rejected(*broken: str, **changes: object) -> Report:
    gates = tuple(gate(name, passed=False) for name in broken)
    return full_report(**{"gates": gates, "job": {"method": ["cross"]}, **changes})


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (("max_drop",), CLOSER),
        (("max_drop", "max_error"), CLOSER),
        (("min_shrink", "smaller"), "remove more, as by --macs 30%"),
        (
            ("max_drop", "min_shrink"),
            "give more samples: to remove less breaks one of these limits, to remove more another",
        ),
        ((), ""),
    ],
)
def test_what_is_said_depends_on_the_limits_that_broke(broken: tuple[str, ...], words: str) -> None:
    assert next_step(rejected(*broken)) == words


@pytest.mark.parametrize(
    "changes", [{"status": "passed"}, {"status": "failed"}, {"job": {"gate": {}}}], ids=["passed", "failed", "verify"]
)
def test_nothing_is_said_where_nothing_was_made_or_rejected(changes: Mapping[str, object]) -> None:
    assert next_step(rejected("max_drop", **changes)) == ""


def test_of_a_given_student_nothing_more_can_be_removed_here() -> None:
    assert "xdonnx match" in next_step(rejected("max_error", matches=(MATCH,)))
    assert next_step(rejected("smaller", matches=(MATCH,))) == "cut more with the tool that made the student"
