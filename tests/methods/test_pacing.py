"""A latency that was asked for is met by measuring, whatever the clock says of single layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import xdonnx
from xdonnx import delivery
from xdonnx.budget import Budget, Goal, Plan, candidates, macs, make_plan, pretend
from xdonnx.cost import measure_cost
from xdonnx.errors import NothingToDo
from xdonnx.events import Event
from xdonnx.graph import read_net
from xdonnx.model import read_proto
from xdonnx.pacing import Race, paced, student_of
from xdonnx.report import Figures, Latency, LatencyRatio, Report
from xdonnx.runtime import answer, open_session
from xdonnx.tables import Clock, Kind, Table, coarser, goal_of, multiple_of, one_layer, undominated

SAMPLES = Path(__file__).parents[2] / "samples"
VGG = SAMPLES / "digits_vgg.onnx"
NET = read_net(read_proto(VGG))
FEED = {"image": np.zeros((1, 1, 16, 16), np.float32)}
EVERY = candidates(NET, Budget("latency", 0.5))


def clock(of: Callable[[onnx.ModelProto, float], float]) -> Clock:
    """Return a clock that makes up milliseconds from a model and its millions of MACs, without noise."""

    def timed(models: Sequence[Any], feeds: Sequence[Mapping[str, Any]], seconds: float, _: bool) -> np.ndarray:
        found = []
        for model, feed in zip(models, feeds, strict=True):
            proto = read_proto(model) if isinstance(model, Path) else model
            shapes = {name: values.shape for name, values in feed.items()}
            found.append(of(proto, measure_cost(proto, shapes).macs / 1e6))
        return np.tile(found, (12, 1))

    return timed


def whole(model: onnx.ModelProto) -> bool:
    return len(model.graph.node) > 1


def divide(budget: Budget, goal: Goal) -> Plan:
    return make_plan(NET, budget, goal)


def met(budget: Budget, watch: Clock) -> tuple[Plan, Any, float]:
    """Return the plan of a target, what was tried, and its true share of the teacher's time."""
    plan, tries = paced(budget, goal_of(NET, EVERY, budget, watch), divide, Race(NET, VGG, FEED, watch))
    teacher, student = watch([VGG, student_of(NET, plan)], [FEED, FEED], 1, False)[0]
    return plan, tries, student / teacher


@pytest.mark.parametrize("overhead", [0.0, 1.5, 3.0])
@pytest.mark.parametrize("share", [0.8, 0.65])
def test_a_share_is_met_from_below_though_layers_say_nothing_of_the_overhead(overhead: float, share: float) -> None:
    watch = clock(lambda model, macs: macs + overhead * whole(model))

    plan, tries, ratio = met(Budget("latency", share, round_to=1), watch)

    assert share - 0.05 <= ratio <= share
    assert sum(one.chosen for one in tries) == 1 and len(tries) <= 8
    (chosen,) = (one for one in tries if one.chosen)
    assert chosen.passed and chosen.latency == pytest.approx(ratio)
    assert chosen.macs == macs(NET, pretend(NET, plan.channels)) / macs(NET, pretend(NET, {}))


def test_a_time_is_met_in_milliseconds() -> None:
    watch = clock(lambda model, macs: macs + whole(model))  # the teacher takes 6.39

    plan, _, _ = met(Budget("latency", 4.0, round_to=1, unit="ms"), watch)

    assert 4.0 - 0.05 * 6.39 <= watch([student_of(NET, plan)], [FEED], 1, False)[0, 0] <= 4.0


def test_where_times_scatter_a_share_is_of_the_processors_time_and_milliseconds_are_what_they_are() -> None:
    quiet = clock(lambda model, macs: macs)
    draw = np.random.default_rng(0)

    def busy(models: Any, feeds: Any, seconds: float, processor: bool) -> np.ndarray:
        found = quiet(models, feeds, seconds, processor)
        return found if processor else found * draw.choice([1, 5, 9], found.shape)

    goal = goal_of(NET, EVERY, Budget("latency", 0.7), quiet)
    heard: list[str] = []

    def log(event: Any) -> None:
        heard.extend([event.text] * (event.level == "warning"))

    plan, tries = paced(Budget("latency", 0.7), goal, divide, Race(NET, VGG, FEED, busy), log)
    strict = Race(NET, VGG, FEED, busy, strict=True).run(0.7, plan)[0]

    teacher, student = quiet([VGG, student_of(NET, plan)], [FEED, FEED], 1, False)[0]
    assert 0.65 <= student / teacher <= 0.7
    assert next(one.latency for one in tries if one.chosen) == pytest.approx(student / teacher)
    assert len(heard) == 1 and "latencies scatter" in heard[0] and "the processor's time" in heard[0]
    assert strict.processor is None and strict.ratio == strict.student / strict.teacher


def test_the_same_clock_gives_the_same_plan() -> None:
    watch = clock(lambda model, macs: macs + 2 * whole(model))
    assert met(Budget("latency", 0.6), watch)[0] == met(Budget("latency", 0.6), watch)[0]


def test_what_is_out_of_reach_names_the_fastest_that_was_measured() -> None:
    watch = clock(lambda model, macs: macs + 20 * whole(model))
    with pytest.raises(
        NothingToDo, match=r"--latency 50% is out of reach: .* takes 20\.\d ms, 7\d\.\d% of the teacher"
    ) as e:
        met(Budget("latency", 0.5, round_to=8), watch)
    best = float(str(e.value).split(" ms, ")[1].split("%")[0]) / 100
    assert met(Budget("latency", best + 0.002, round_to=8), watch)[2] <= best + 0.002


def test_a_time_that_the_teacher_keeps_is_nothing_to_do() -> None:
    with pytest.raises(NothingToDo, match=r"the teacher takes 5\.39 ms as it is"):
        met(Budget("latency", 6.0, unit="ms"), clock(lambda model, macs: macs))


def test_where_times_are_macs_the_predicted_share_is_that_of_the_macs() -> None:
    goal = goal_of(NET, EVERY, Budget("latency", 0.5, round_to=4), clock(lambda model, macs: macs))
    for count in (4, 20, 24):
        channels = dict.fromkeys(EVERY, count)
        share = macs(NET, pretend(NET, channels)) / macs(NET, pretend(NET, {}))
        # A hundredth is left to what multiplies the channels of two groups between the widths that were timed.
        assert goal.cost(channels) / goal.limit == pytest.approx(share, abs=0.01)


def test_channels_are_kept_in_the_multiples_that_save_time() -> None:
    smooth = {less: 10.0 - 0.1 * less for less in (0, 1, 2, 4, 8, 16)}
    blocks = {0: 10.0, 1: 10.0, 2: 10.0, 4: 10.0, 8: 9.2, 16: 8.4}
    worse = {**smooth, 1: 12.0, 2: 12.0}

    assert [multiple_of(times) for times in (smooth, blocks, worse)] == [1, 8, 4]
    assert multiple_of(dict.fromkeys(smooth, 5.0)) == 16
    assert multiple_of({0: 3.0}) == 1
    assert undominated({8: 3.0, 16: 2.0, 24: 2.5, 32: 4.0, 40: 3.9}) == [16, 24, 40]


def blocky(size: int) -> Clock:
    """Return a clock of kernels that compute whole blocks of the channels that they read and make."""

    def blocks(count: int) -> float:
        return -(-count // size) * size / count

    def of(model: onnx.ModelProto, macs: float) -> float:
        weights = [tensor.dims for tensor in model.graph.initializer if len(tensor.dims) > 1]
        return sum(macs / len(weights) * blocks(made) * blocks(read) for made, read, *_ in weights) if weights else macs

    return clock(of)


@pytest.mark.parametrize("size", [1, 8])
def test_round_to_auto_is_measured(size: int) -> None:
    goal = goal_of(NET, EVERY, Budget("latency", 0.5), blocky(size))
    wide = {at: counts for at, counts in goal.counts.items() if len(NET.groups[at].ids) == 96}

    steps = {at: np.diff(counts).min() for at, counts in wide.items()}
    assert set(steps.values()) == ({1} if size == 1 else {8})


def test_a_multiple_that_one_layer_likes_and_the_whole_network_does_not_is_not_kept() -> None:
    def of(model: onnx.ModelProto, macs: float) -> float:
        makes = [tensor.dims[0] for tensor in model.graph.initializer if len(tensor.dims) == 4]
        return macs * (2 if whole(model) and any(made % 4 for made in makes) else 1)

    plan, _, ratio = met(Budget("latency", 0.7), clock(of))

    made = {at: NET.layers[NET.groups[at].name].op for at in plan.channels}
    assert {count % 4 for at, count in plan.channels.items() if made[at] == "Conv"} == {0}
    assert 0.65 <= ratio <= 0.7


def test_coarser_counts_stay_those_of_narrow_groups_that_have_no_more() -> None:
    goal = Goal(lambda channels: 0, 0.0, {0: [1, 2, 3, 4], 1: list(range(1, 65))})

    made = coarser(goal, 16)

    assert made.counts == {0: [2, 4], 1: [16, 32, 48, 64]}


def test_between_widths_time_is_linear_in_each() -> None:
    table = Table((8, 16, 32), (4, 8), np.array([[8 * 4, 8 * 8], [16 * 4, 16 * 8], [32 * 4, 32 * 8]], float))
    for read, made in ((8, 4), (12, 5), (32, 8), (20, 2), (4, 6)):
        assert table.at(read, made) == pytest.approx(read * made)
    assert Table((3,), (8,), np.array([[7.0]])).at(100, 1) == 7.0


CONV = Kind("Conv", (3, 3), (2, 2), (1, 1), (1, 1, 1, 1), (), 1, 1, (1, 9, 9), "float32", True, False)


@pytest.mark.parametrize(
    ("kind", "point", "makes"),
    [
        (CONV, (5, 7), (1, 7, 5, 5)),
        (replace(CONV, groups=3, bias=False), (6, 9), (1, 9, 5, 5)),
        (replace(CONV, groups=0), (99, 7), (1, 7, 5, 5)),
        (replace(CONV, groups=0, times=2), (99, 8), (1, 8, 5, 5)),
        (replace(CONV, op="ConvTranspose", output_padding=(1, 1)), (5, 7), (1, 7, 18, 18)),
        (replace(CONV, kernel=(3,), strides=(1,), dilations=(2,), pads=(2, 2), size=(1, 9)), (5, 7), (1, 7, 9)),
        (Kind("Gemm", (), (), (), (), (), 1, 1, (4,), "float32", True, False), (5, 7), (4, 7)),
        (Kind("MatMul", (), (), (), (), (), 1, 1, (1, 6), "float32", False, True), (5, 7), (1, 6, 7)),
    ],
)
def test_a_model_of_one_layer_runs_and_makes_what_it_should(kind: Kind, point: Any, makes: tuple[int, ...]) -> None:
    model, feed = one_layer(kind, point)
    assert answer(open_session(model), feed)["y"].shape == makes


def test_a_student_that_is_far_below_the_target_is_told_with_what_was_asked() -> None:
    """Between 60 and 100 % of the time no width is to be had: rounding lets none."""
    watch = clock(lambda model, macs: 5.39 if macs > 5 else min(macs, 0.6 * 5.39))
    heard: list[Event] = []
    goal = goal_of(NET, EVERY, Budget("latency", 0.9), watch)

    _, tries = paced(Budget("latency", 0.9), goal, divide, Race(NET, VGG, FEED, watch), heard.append)

    (chosen,) = (one.latency for one in tries if one.chosen)
    assert chosen is not None and chosen <= 0.6
    (told,) = (event.text for event in heard if event.level == "warning")
    assert f"nearer to --latency 90%, 90.0% of the teacher's 5.39 ms, than one at {chosen:.1%}" in told


@pytest.mark.parametrize(
    ("target", "teacher", "student", "band", "says"),
    [
        (Budget("latency", 0.1, unit="ms"), 0.25, 0.14, 0.02, "is 40.0% of what the teacher took in the end, 0.25 ms"),
        (Budget("latency", 0.1, unit="ms"), 0.125, 0.0975, 0.02, ""),
        (Budget("latency", 0.8), 0.1, 0.083, 0.02, "took 83.0% (81.0% to 85.0%)"),
        (Budget("latency", 0.8), 0.1, 0.081, 0.02, ""),
        (Budget("latency", 0.8), 0.1, 0.07, 0.02, "took 70.0%"),
        (Budget("latency", 0.8), 0.1, 0.07, 0.05, ""),
        (Budget("macs", 0.5), 0.1, 0.2, 0.01, ""),
    ],
)
def test_a_student_whose_last_timing_misses_the_target_is_told(
    target: Budget, teacher: float, student: float, band: float, says: str
) -> None:
    def figures(median: float, ratio: LatencyRatio | None) -> Figures:
        times = Latency(median=median, q1=median, q3=median, provider="CPU", threads=1, runs=9, batch=1, ratio=ratio)
        return Figures(bytes=1, params=1, nonzero=1, macs=1, latency_ms=times)

    share = student / teacher
    ratio = LatencyRatio(value=share, low=share - band, high=share + band, confidence=0.95)
    report = Report.model_construct(teacher=figures(teacher, None), student=figures(student, ratio))

    told = delivery._missed(target, report)

    assert (says in told) if says else not told


def test_a_student_of_a_real_clock_is_faster_and_the_report_tells_the_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound is generous: other work on the machine is measured too."""
    monkeypatch.setattr("xdonnx.tables.SECONDS", 0.3)
    monkeypatch.setattr("xdonnx.pacing.SECONDS", 0.2)
    shots = np.load(SAMPLES / "held_out.npz")["images"][:30]

    report = xdonnx.compress(
        VGG, shots, tmp_path / "s.onnx", preset="unit", latency="85%", method="l1-norm", allocation="uniform",
        warn_only=["not-slower"],
    )  # fmt: skip

    (chosen,) = (one for one in report.tries if one.chosen)
    assert chosen.latency is not None and 0.2 < chosen.latency <= 0.85
    assert report.teacher is not None and report.student is not None
    assert report.student.macs == pytest.approx(chosen.macs * report.teacher.macs, rel=1e-3)
    assert report.student.macs < 0.95 * report.teacher.macs
