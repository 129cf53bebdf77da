"""Points and the Pareto set, against definitions written out in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xdonnx.sweep.front import known_quality, pareto, points
from xdonnx.sweep.trials import Trial
from xdonnx.wanted import Job


def dominated(one: tuple[float, float], others: list[tuple[float, float]]) -> bool:
    """Whether some other costs at most as much, is at least as good, and differs in one of them."""
    return any(cost <= one[0] and good >= one[1] and (cost, good) != one for cost, good in others)


@pytest.mark.parametrize("seed", range(40))
def test_the_pareto_set_is_that_of_brute_force(seed: int) -> None:
    generator = np.random.default_rng(seed)
    count = int(generator.integers(0, 30))
    # On a coarse grid many are equal in one of the two, and some in both.
    size = (count, 2)
    drawn = generator.integers(0, 6, size) if seed % 2 else generator.normal(size=size)
    worth = [(float(cost), float(good)) for cost, good in drawn]

    assert pareto(worth) == {at for at, one in enumerate(worth) if not dominated(one, worth)}


def trial(name: str, seed: int, model: str = "net") -> Trial:
    """Return a trial that is known by its name and seed."""
    return Trial(f"{model} {name} {seed}", model, {"method": name}, seed, Job(model=Path("m"), out=Path("o")))


def record(macs: float, accuracy: float | None, status: str = "passed", **more: Any) -> dict[str, Any]:
    return {"status": status, "macs": macs, "accuracy": accuracy, "relative_l2": 1 - (accuracy or 0) / 100, **more}


def test_a_point_is_the_mean_over_its_seeds_with_the_sample_deviation() -> None:
    trials = [trial("a", seed) for seed in range(4)]
    values = [(0.5, 90.0), (0.52, 92.0), (0.48, 97.0)]
    records = {one.key: record(*value) for one, value in zip(trials, values, strict=False)}
    records[trials[1].key]["status"] = "rejected"
    records[trials[3].key] = {"status": "failed", "error": "x"}

    (point,) = points(trials, records, "macs", "accuracy")

    assert point.cost and point.quality
    assert (point.cost.mean, point.cost.std) == pytest.approx((0.5, np.std([0.5, 0.52, 0.48], ddof=1)))
    assert (point.quality.mean, point.quality.std) == pytest.approx((93.0, np.std([90, 92, 97], ddof=1)))
    assert len(point.records) == 3 and point.passed == 2 and point.optimal


def test_the_best_are_told_apart_within_each_model_and_a_rejected_one_may_be_among_them() -> None:
    trials = [trial(name, 0, model) for model in ("one", "two") for name in "abc"]
    worth = [(0.5, 99.0), (0.4, 98.0), (0.45, 97.0), (0.9, 50.0), (0.8, 40.0), (0.9, 45.0)]
    records = {one.key: record(*value, "rejected") for one, value in zip(trials, worth, strict=True)}

    best = {(p.model, p.choices["method"]) for p in points(trials, records, "macs", "accuracy") if p.optimal}
    by_error = {(p.model, p.choices["method"]) for p in points(trials, records, "macs", "error") if p.optimal}

    assert best == by_error == {("one", "a"), ("one", "b"), ("two", "a"), ("two", "b")}


def test_what_was_not_measured_or_not_done_is_no_part_of_the_curve() -> None:
    trials = [trial(name, 0) for name in "abc"]
    records = {trials[0].key: record(0.1, None), trials[1].key: record(0.5, 80.0)}
    found = points(trials, records, "macs", "accuracy")
    assert [point.optimal for point in found] == [False, True, False]
    assert found[0].quality is None and found[2].records == ()


@pytest.mark.parametrize(
    ("accuracy", "agreement", "expected"),
    [(90.0, 95.0, "accuracy"), (None, 95.0, "agreement"), (None, None, "error")],
)
def test_students_are_judged_by_what_their_samples_allow(
    accuracy: float | None, agreement: float | None, expected: str
) -> None:
    records = [{"status": "passed", "accuracy": accuracy, "agreement": agreement}, {"status": "failed"}]
    assert known_quality(records) == expected
