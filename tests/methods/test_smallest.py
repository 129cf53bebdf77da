"""The smallest student that keeps the gate: found by halving, and to the byte what its target alone would have made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xdonnx
from xdonnx.budget import Budget, floor, make_plan
from xdonnx.errors import NothingToDo
from xdonnx.graph import read_net
from xdonnx.model import read_proto
from xdonnx.tries import TRIES, halve

SAMPLES = Path(__file__).parents[2] / "samples"
MOBILE = SAMPLES / "digits_mobile.onnx"
FAST: dict[str, Any] = {"preset": "unit", "method": "l1-norm", "allocation": "uniform", "warn_only": ["not-slower"]}


def looked_for(edge: float, low: float = 0.1, steps: int = 1000, end: float = 0.0) -> list[float]:
    """Return the shares that are judged where all above an edge are good enough."""
    judged: list[float] = []

    def plan(share: float) -> int:
        if share < end:
            raise NothingToDo("out of reach")
        return round(share * steps)

    def faithful(share: float, _: int) -> bool:
        judged.append(share)
        return share >= edge

    halve(plan, faithful, low)
    return judged


@pytest.mark.parametrize("edge", [0.13, 0.3, 0.547, 0.71, 0.96])
def test_halving_ends_within_a_sixtyfourth_above_the_edge(edge: float) -> None:
    judged = looked_for(edge)

    assert len(judged) == TRIES
    assert edge <= min(share for share in judged if share >= edge) <= edge + 0.9 / 2**TRIES + 0.002


def test_where_nothing_is_good_enough_the_mildest_keeps_nearly_all_and_where_everything_is_little_is_left() -> None:
    assert max(looked_for(2.0)) == pytest.approx(0.986, abs=0.002)
    # While none has failed the limit is not found, and less is tried.
    assert min(looked_for(0.0)) == pytest.approx(0.102, abs=0.002)


def test_a_plan_is_judged_once_and_what_is_out_of_reach_is_none() -> None:
    coarse = looked_for(0.5, steps=8)
    assert len({round(8 * share) for share in coarse}) == len(coarse)
    assert min(looked_for(0.0, low=0.0, end=0.2)) == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize(("structure", "kind"), [("channel", "macs"), ("element", "params")])
def test_the_floor_is_where_a_target_falls_out_of_reach(structure: str, kind: str) -> None:
    net = read_net(read_proto(SAMPLES / "digits_residual.onnx"))
    least = floor(net, Budget(kind, 0.5, structure))

    make_plan(net, Budget(kind, least + 0.005, structure))
    with pytest.raises(NothingToDo, match="out of reach"):
        make_plan(net, Budget(kind, least - 0.005, structure))


@pytest.fixture
def shots() -> tuple[np.ndarray, np.ndarray]:
    with np.load(SAMPLES / "held_out.npz") as held:
        return held["images"][:150], held["labels"][:150]


@pytest.mark.parametrize(("structure", "limit"), [("channel", 0.9), ("element", 0.6)])
def test_the_student_is_the_smallest_that_passed_and_that_of_its_own_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shots: Any, structure: str, limit: float
) -> None:
    monkeypatch.setattr("xdonnx.tries.TRIES", 3)
    out, plain = tmp_path / "smallest.onnx", tmp_path / "plain.onnx"
    given = {**FAST, "structure": structure, "warn_only": ["not-slower", "smaller"]}

    report = xdonnx.compress(MOBILE, shots, out, smallest=True, max_error=limit, **given)

    assert report.exit_code == 0 and len(report.tries) == 3
    assert [one.passed for one in report.tries].count(True) >= 1
    assert all(one.passed == (one.error <= limit) for one in report.tries if one.error is not None)
    (chosen,) = (one for one in report.tries if one.chosen)
    amounts = {float(one.asked.split()[1][:-1]): one for one in report.tries if one.passed}
    assert chosen is amounts[min(amounts)]
    kind, share = chosen.asked.split()
    again = xdonnx.compress(MOBILE, shots, plain, max_error=limit, **given, **{kind: float(share[:-1]) / 100})
    assert plain.read_bytes() == out.read_bytes()
    assert again.tries == ()
    assert report.job["smallest"] is True and report.job[kind] is None


def test_where_the_mildest_fails_it_is_kept_as_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shots: Any
) -> None:
    monkeypatch.setattr("xdonnx.tries.TRIES", 2)
    out = tmp_path / "s.onnx"

    report = xdonnx.compress(MOBILE, shots, out, smallest=True, max_error=0.0001, **FAST)

    assert (report.exit_code, report.status) == (3, "rejected")
    assert not out.exists() and out.with_suffix(".rejected.onnx").is_file()
    mildest = max(report.tries, key=lambda one: one.macs or 0.0)
    assert mildest.chosen and not any(one.passed for one in report.tries)
    assert report.student is not None and report.teacher is not None and mildest.macs is not None
    assert report.student.macs == pytest.approx(mildest.macs * report.teacher.macs, rel=1e-3)
