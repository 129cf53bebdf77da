"""A target for the student's latency, met by measuring: plans are cut with whatever weights and timed.

The tables of `tables` say how much faster one split is than another, not how fast a whole network runs. So what is
predicted is only ever asked for as a share of the teacher's own prediction, and the share is corrected until the one
that is measured is what was wanted: on the line through what was measured above and below it, which is regula falsi.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from xdonnx.budget import Budget, Goal, Plan, macs, pretend
from xdonnx.errors import NothingToDo
from xdonnx.events import Event, Log, ignore
from xdonnx.graph import Net
from xdonnx.intervals import Interval, ratio_band
from xdonnx.patch import Patch, cut
from xdonnx.tables import MULTIPLES, Array, Clock, coarser
from xdonnx.tries import Try

# Students that are timed at most, and the seconds for each of them and the teacher beside it.
TRIES, SECONDS = 8, 2.0
# So many times that is gone on where the ratio is not known to twice `NEAR`; a warning is due where it is not to this.
ROUNDS, WIDE = 2, 0.2
# A student is near enough that is faster than wanted by so much of the teacher's time, or less; and what is aimed at.
NEAR, AIM = 0.03, 0.01
# A finer multiple may be slower by so much for what is predicted of it.
FINER = 1.05
# Shares of the teacher's prediction at which plans are sought that tell one multiple from another.
NEARBY = (0.0, 0.01, 0.02, 0.03)


@dataclass(frozen=True)
class Pace:
    """What a plan was measured to take, timed in turns with the teacher.

    Parameters
    ----------
    share : float
        Of the teacher's prediction that was asked for.
    plan : Plan
    teacher, student : float
        Median milliseconds.
    processor : float, optional
        The ratio of the processor's time that both take, where the others scatter.
    band : Interval
        Between what the ratio of these lies, noise considered.
    """

    share: float
    plan: Plan
    teacher: float
    student: float
    processor: float | None
    band: Interval

    @property
    def ratio(self) -> float:
        """Its time over the teacher's."""
        return self.student / self.teacher if self.processor is None else self.processor


@dataclass(frozen=True)
class Race:
    """What is timed beside what, and how.

    Parameters
    ----------
    net : Net
    teacher : Path
        Its file.
    feed : {graph input: (1, ...)}
        One sample, or the batch that the graph fixes.
    clock : Clock
    strict : bool
        Whether milliseconds count, however they scatter. Else a ratio that they do not tell is taken from the
        processor's time, which other programs do not add to.
    """

    net: Net
    teacher: Path
    feed: Mapping[str, Array]
    clock: Clock
    strict: bool = False

    def run(self, share: float, *plans: Plan) -> list[Pace]:
        """Time students of the plans, with whatever weights, in turns with the teacher; longer where times scatter."""
        models: list[Path | onnx.ModelProto] = [self.teacher, *(student_of(self.net, plan) for plan in plans)]
        feeds, seconds, students = [self.feed] * len(models), SECONDS * len(models) / 2, range(1, len(models))
        times, sure = np.zeros((0, len(models))), False
        bands: list[Interval] = []
        for _ in range(ROUNDS):
            times = np.concatenate([times, self.clock(models, feeds, seconds, False)])
            bands = [ratio_band(times[:, 0], times[:, at]) for at in students]
            sure = all(band.high - band.low <= 2 * NEAR for band in bands)
            if sure:
                break
        medians = np.median(times, axis=0)
        ratios: list[float | None] = [None] * len(models)
        if not sure and not self.strict:
            spent = np.median(self.clock(models, feeds, seconds, True), axis=0)
            ratios = [float(ratio) for ratio in spent / spent[0]]
        return [
            Pace(share, plan, float(medians[0]), float(medians[at]), ratios[at], band)
            for plan, at, band in zip(plans, students, bands, strict=True)
        ]


def student_of(net: Net, plan: Plan) -> onnx.ModelProto:
    """Return a student with the channels of a plan, each group's first ones, and the teacher's weights."""
    drop = [int(label) for at, count in plan.channels.items() for label in net.groups[at].ids[count:]]
    return cut(net, Patch().plus({}, drop))


def paced(
    budget: Budget, goal: Goal, divide: Callable[[Budget, Goal], Plan], race: Race, log: Log = ignore
) -> tuple[Plan, tuple[Try, ...]]:
    """Return a plan whose student was measured to be at or just below the target, and all that was tried.

    Parameters
    ----------
    budget : Budget
        Of kind 'latency'.
    goal : Goal
        What layers cost; see `tables.goal_of`.
    divide : callable
        Turns a budget and a goal into a plan.
    race : Race
    log : Log
        Told of progress in the stage 'pace'.

    Raises
    ------
    NothingToDo
        The target is out of reach, with the best that was measured; or the teacher meets it.
    """
    whole = goal.cost({})
    least = goal.cost({at: counts[0] for at, counts in goal.counts.items()})
    # How fast the teacher is has to be known before a time can be a share of it.
    found = race.run(1.0, Plan()) if budget.unit else []
    _check_slower(budget, found)
    if not budget.round_to:
        goal, first = _rounded(budget, goal, divide, race, _next(budget, found, least / max(whole, 1)) or 1.0)
        found += first
        least = goal.cost({at: counts[0] for at, counts in goal.counts.items()})
    for _ in range(2 * TRIES):
        share = _next(budget, found, least / max(whole, 1))
        if share is None or len({tuple(pace.plan.channels.items()) for pace in found}) >= TRIES:
            break
        try:
            plan = divide(budget, replace(goal, limit=max(share * whole, least)))
        except NothingToDo:
            # No narrower network is predicted to be faster: what was measured so far is all there is.
            if not found:
                raise
            break
        known = next((pace for pace in found if pace.plan == plan), None)
        pace = replace(known, share=share) if known else race.run(share, plan)[0]
        found.append(pace)
        if known:
            continue
        text = f"{pace.ratio:.1%} of the teacher's {pace.teacher:.3g} ms, for {_wanted(budget, pace):.1%}"
        log(Event("pace", text, done=len(found), total=TRIES))
    return _chosen(budget, found, race.net, log)


def _rounded(
    budget: Budget, goal: Goal, divide: Callable[[Budget, Goal], Plan], race: Race, share: float
) -> tuple[Goal, list[Pace]]:
    """Return the goal with the multiples that suit the whole network, and what was timed of it to see that.

    Alone a layer may well be as fast as its channels are few, and yet hand its neighbours, as at a Concat, what has to
    be laid out anew for them. So students of about the same prediction are timed whose counts are ever coarser, and the
    finest is taken that is hardly slower for what was predicted of it than any.
    """
    goals: list[tuple[Goal, float, Plan]] = []
    for by in reversed(MULTIPLES):
        made = coarser(goal, by)
        try:
            at, plan = _telling(budget, made, divide, share, by)
        except NothingToDo:
            continue  # so coarse that all would stay
        # What cannot get as far is no choice, however fast it is.
        far = goal.cost(plan.channels) <= (share + NEAR) * goal.cost({})
        if (far or not goals) and all(plan != other for *_, other in goals):
            goals.append((made, at, plan))
    if len(goals) < 2:
        return (goals[0][0] if goals else goal), []
    timed = race.run(share, *(plan for *_, plan in goals))
    paces = [replace(pace, share=at) for pace, (_, at, _) in zip(timed, goals, strict=True)]
    worth = [pace.ratio / goal.cost(pace.plan.channels) for pace in paces]
    best = next(at for at, each in enumerate(worth) if each <= FINER * min(worth))
    return goals[best][0], [paces[best]]


def _telling(
    budget: Budget, goal: Goal, divide: Callable[[Budget, Goal], Plan], share: float, by: int
) -> tuple[float, Plan]:
    """Return the plan near a share of whose counts the most are multiples of no more than this, and its share."""
    whole = goal.cost({})
    least = goal.cost({at: counts[0] for at, counts in goal.counts.items()})
    near = [(share - less, max((share - less) * whole, least)) for less in NEARBY]
    plans = [(at, divide(budget, replace(goal, limit=limit))) for at, limit in near]
    return max(plans, key=lambda found: sum(count % (2 * by) > 0 for count in found[1].channels.values()))


def _chosen(budget: Budget, found: Sequence[Pace], net: Net, log: Log) -> tuple[Plan, tuple[Try, ...]]:
    kept = [pace for pace in found if _gap(budget, pace) <= 0 and pace.plan.channels]
    if not kept:
        fastest = min(found, key=lambda pace: pace.ratio)
        raise NothingToDo(
            f"--latency {budget.told} is out of reach: the fastest student that was measured takes "
            f"{fastest.student:.3g} ms, {fastest.ratio:.1%} of the teacher's {fastest.teacher:.3g} ms.\n"
            "  Ask for more than that, or pass --residual."
        )
    best = max(kept, key=lambda pace: pace.ratio)
    _warn(budget, best, log)
    whole = macs(net, pretend(net, {}))
    tries = {
        tuple(pace.plan.channels.items()): Try(
            asked=f"predicted latency {pace.share:.1%}",
            macs=macs(net, pretend(net, pace.plan.channels)) / max(whole, 1),
            latency=pace.ratio,
            passed=_gap(budget, pace) <= 0,
            chosen=pace.plan == best.plan,
        )
        for pace in found
        if pace.plan.channels
    }
    return best.plan, tuple(tries.values())


def _check_slower(budget: Budget, found: Sequence[Pace]) -> None:
    for pace in found:
        if pace.teacher <= budget.amount:
            raise NothingToDo(
                f"--latency {budget.told}: the teacher takes {pace.teacher:.3g} ms as it is.\n  Ask for less than that."
            )


def _warn(budget: Budget, pace: Pace, log: Log) -> None:
    """Say so where nothing was near enough, or the clock is hardly to be trusted."""
    if _gap(budget, pace) < -NEAR:
        text = (
            f"no student was found nearer to --latency {budget.told}, {_wanted(budget, pace):.1%} of the teacher's "
            f"{pace.teacher:.3g} ms, than one at {pace.ratio:.1%}: widths go in steps, and times scatter. "
            "--round-to 1 takes every width"
        )
        log(Event("pace", text, level="warning"))
    if pace.band.high - pace.band.low > WIDE:
        text = (
            "latencies scatter, as on a machine that does other work: a student measured at "
            f"{pace.student / pace.teacher:.0%} of the teacher may be at {pace.band.low:.0%} to {pace.band.high:.0%}"
        )
        if pace.processor is not None:
            text += f"; so the processor's time on one thread was compared instead: {pace.processor:.1%}"
        log(Event("pace", text, level="warning"))


def _wanted(budget: Budget, pace: Pace) -> float:
    """Return the ratio to the teacher that a student was to have."""
    return budget.amount / pace.teacher if budget.unit else budget.amount


def _gap(budget: Budget, pace: Pace) -> float:
    """Return by how much of the teacher's time a student is slower than wanted; faster is negative."""
    return pace.ratio - _wanted(budget, pace)


def _next(budget: Budget, found: Sequence[Pace], floor: float) -> float | None:
    """Return the share of the teacher's prediction to ask for next; None where nothing is left to try."""
    wanted = _wanted(budget, found[-1]) if found else budget.amount
    gaps = [(pace.share, _gap(budget, pace)) for pace in found if pace.plan.channels]
    if not gaps:
        return max(wanted, floor)
    if any(-NEAR <= gap <= 0 for _, gap in gaps):
        return None
    below = max((point for point in gaps if point[1] <= 0), default=None)
    if below is None:
        return _further(gaps, floor)
    # Noise may put a slower student among the faster ones; the teacher itself is always above.
    slower = [point for point in gaps if point[1] > 0 and point[0] > below[0]]
    return _between(below, min(slower, default=(1.0, 1 - wanted)))


def _further(gaps: Sequence[tuple[float, float]], floor: float) -> float | None:
    """Return a share below all that were too slow, by the line through the teacher and the last."""
    share, gap = min(gaps)
    if share <= floor + 1e-9:
        return None
    if len(gaps) >= TRIES - 2:
        return floor
    return max(floor, share - max(0.03, 1.2 * (gap + AIM)))


def _between(below: tuple[float, float], above: tuple[float, float]) -> float | None:
    """Return where the line through two points is what is aimed at, though not too near to either."""
    width = above[0] - below[0]
    if width < 0.002:
        return None
    place = below[0] + width * (-AIM - below[1]) / (above[1] - below[1])
    return float(np.clip(place, below[0] + 0.1 * width, above[0] - 0.1 * width))
