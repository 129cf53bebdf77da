"""Points, the trials that differ by their seeds alone, and those of them that nothing beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from xdonnx.sweep.records import Record
from xdonnx.sweep.trials import Trial

# What a record calls them.
COSTS = {"macs": "macs", "bytes": "bytes", "weights": "nonzero", "latency": "latency"}
QUALITIES = {"accuracy": "accuracy", "agreement": "agreement", "error": "relative_l2"}


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, and the standard deviation between them (of a sample: n - 1); None below two of them."""

    mean: float
    std: float | None = None


@dataclass(frozen=True)
class Point:
    """Trials that differ by their seeds alone.

    Parameters
    ----------
    model : str
    choices : mapping
    trials : tuple of Trial
    records : tuple of Record
        Of those that gave a student, in the order of the seeds.
    cost : Spread or None
        Share of the teacher's; None where no trial gave a student of which it is known.
    quality : Spread or None
        Per cent, or a relative error.
    passed : int
        Trials that kept every limit.
    optimal : bool
        Whether no point of the same model costs less and is as good, or costs as much and is better.
    """

    model: str
    choices: Mapping[str, Any]
    trials: tuple[Trial, ...]
    records: tuple[Record, ...] = ()
    cost: Spread | None = None
    quality: Spread | None = None
    passed: int = 0
    optimal: bool = False


def points(trials: Sequence[Trial], records: Mapping[str, Record], cost: str, quality: str) -> list[Point]:
    """Return the points of a sweep, those that are Pareto-optimal within their model marked.

    Parameters
    ----------
    trials : sequence of Trial
    records : mapping
        What is known of them, by their keys.
    cost : {'macs', 'bytes', 'weights', 'latency'}
    quality : {'accuracy', 'agreement', 'error'}
    """
    together: dict[Any, list[Trial]] = {}
    for trial in trials:
        together.setdefault(trial.point, []).append(trial)
    found = [_point(tuple(its), records, COSTS[cost], QUALITIES[quality]) for its in together.values()]
    best: set[int] = set()
    for model in dict.fromkeys(point.model for point in found):
        mine = [at for at, point in enumerate(found) if point.model == model and point.cost and point.quality]
        worth = [(_cost(found[at]), signed(_quality(found[at]), quality)) for at in mine]
        best |= {mine[at] for at in pareto(worth)}
    return [replace(point, optimal=at in best) for at, point in enumerate(found)]


def pareto(worth: Sequence[tuple[float, float]]) -> set[int]:
    """Return which pairs (cost, quality) no other dominates, which is one that is as good in both and better in one.

    Of equal pairs all stay or none.
    """
    best: set[int] = set()
    highest = float("-inf")
    order = sorted(range(len(worth)), key=lambda at: (worth[at][0], -worth[at][1]))
    for place, at in enumerate(order):
        twin = place > 0 and worth[order[place - 1]] == worth[at] and order[place - 1] in best
        if worth[at][1] > highest or twin:
            best.add(at)
            highest = worth[at][1]
    return best


def signed(quality: float, kind: str) -> float:
    """Return a quality such that more is better."""
    return -quality if kind == "error" else quality


def known_quality(records: Sequence[Record]) -> str:
    """Return what students are judged by where nobody said it: accuracy, else agreement, else the error of outputs."""
    good = [record for record in records if record["status"] != "failed"]
    for name in ("accuracy", "agreement"):
        if good and all(record[name] is not None for record in good):
            return name
    return "error" if good and all(record["agreement"] is None for record in good) else "accuracy"


def _point(trials: tuple[Trial, ...], records: Mapping[str, Record], cost: str, quality: str) -> Point:
    done = [records[trial.key] for trial in trials if trial.key in records]
    good = tuple(record for record in done if record["status"] != "failed")
    judged = [record for record in good if record[cost] is not None and record[quality] is not None]
    return Point(
        model=trials[0].model,
        choices=trials[0].choices,
        trials=trials,
        records=good,
        cost=_spread([record[cost] for record in judged]),
        quality=_spread([record[quality] for record in judged]),
        passed=sum(record["status"] == "passed" for record in good),
    )


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None)


def _cost(point: Point) -> float:
    assert point.cost is not None
    return point.cost.mean


def _quality(point: Point) -> float:
    assert point.quality is not None
    return point.quality.mean
