"""From a target to a plan, whatever the target is of: what is predicted, and what only a file or a clock can tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from xdonnx.allocation import Curve, allocate
from xdonnx.budget import MEASURED, Budget, Goal, Plan, candidates, make_plan
from xdonnx.events import Log, ignore
from xdonnx.graph import Net
from xdonnx.model import file_bytes
from xdonnx.pacing import Race, paced
from xdonnx.sizing import Scales, fitted
from xdonnx.tables import Array, Clock, goal_of
from xdonnx.tries import Try


@dataclass(frozen=True)
class Means:
    """What a target is measured with.

    Parameters
    ----------
    teacher : Path
        Its file.
    feed : {graph input: (1, ...)}
        One sample, or the batch that the graph fixes.
    clock : Clock
    scales : Scales
    """

    teacher: Path
    feed: Mapping[str, Array]
    clock: Clock
    scales: Scales


def first_plan(net: Net, budget: Budget) -> Plan:
    """Return the plan of a target that needs no measuring; else some plan, which shows that there is anything to do.

    Raises
    ------
    JobError, NothingToDo
        As of `budget.make_plan`.
    """
    if budget.kind in (*MEASURED, "smallest"):
        return make_plan(net, replace(budget, kind="keep", amount=0.5, unit=""))
    return make_plan(net, budget)


def met(
    net: Net, budget: Budget, curves: Sequence[Curve] | None, means: Means, log: Log = ignore
) -> tuple[Plan, tuple[Try, ...]]:
    """Return the plan of a target, and what was tried for it.

    Parameters
    ----------
    net : Net
    budget : Budget
    curves : sequence of Curve, optional
        By which layers lose; without them all lose the same fraction.
    means : Means
    log : Log

    Raises
    ------
    NothingToDo
        The target is out of reach.
    """

    def divide(wanted: Budget, goal: Goal | None) -> Plan:
        return make_plan(net, wanted, goal) if curves is None else allocate(net, curves, wanted, goal)

    if budget.kind == "size":
        whole = file_bytes(means.teacher)
        return fitted(budget, limit_of(budget, means.teacher), whole, divide, means.scales), ()
    if budget.kind == "latency":
        goal = goal_of(net, candidates(net, budget), budget, means.clock, log)
        return paced(
            budget, goal, divide, Race(net, means.teacher, means.feed, means.clock, strict=bool(budget.unit)), log
        )
    return divide(budget, None), ()


def limit_of(budget: Budget, teacher: Path) -> int:
    """Return the bytes that a student's file may have."""
    return int(budget.amount if budget.unit else budget.amount * file_bytes(teacher))
