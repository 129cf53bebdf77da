"""A size that was asked for is that of the file which is written."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import xdonnx
from xdonnx.amounts import Amount, amount_of, settled
from xdonnx.budget import Budget, Plan, make_plan
from xdonnx.errors import JobError, NothingToDo
from xdonnx.graph import read_net
from xdonnx.model import file_bytes, read_proto
from xdonnx.sizing import Scales, channel_goal, fitted
from xdonnx.wanted import Job

SAMPLES = Path(__file__).parents[2] / "samples"
VGG, MOBILE, RESIDUAL = (SAMPLES / f"digits_{name}.onnx" for name in ("vgg", "mobile", "residual"))


@pytest.mark.parametrize(
    ("given", "number", "unit"),
    [
        ("10MB", 1e7, "B"), ("1.5 kB", 1500, "B"), ("300KB", 3e5, "B"), ("2GB", 2e9, "B"), ("1MiB", 2**20, "B"),
        ("700 B", 700, "B"), ("40%", 0.4, ""), ("0.4", 0.4, ""), (0.4, 0.4, ""), ("99.9%", 0.999, ""),
        ("1e6B", 1e6, "B"),
    ],
)  # fmt: skip
def test_a_size_is_bytes_or_a_share(given: Any, number: float, unit: str) -> None:
    assert amount_of(given, "size") == Amount(number, unit)


@pytest.mark.parametrize(
    ("given", "number", "unit"),
    [("5ms", 5, "ms"), ("0.25 ms", 0.25, "ms"), ("250us", 0.25, "ms"), ("1s", 1000, "ms"), ("70%", 0.7, "")],
)
def test_a_latency_is_a_time_or_a_share(given: str, number: float, unit: str) -> None:
    assert amount_of(given, "latency") == Amount(number, unit)


@pytest.mark.parametrize("kind", ["size", "latency"])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("5", "of what"), (5, "of what"), ("0", "above 0"), ("0%", "above 0"), ("-40%", "above 0"),
        ("120%", "is 100%"),
        ("100%", "is 100%"), ("1", "of what"), ("ten", "an amount such as"), ("", "such as"), ("10XB", "no unit"),
        ("5 MB extra", "an amount such as"), ("nan", "an amount such as"), (True, "such as"), ("inf", "such as"),
    ],
)  # fmt: skip
def test_what_is_neither_is_one_clear_error(kind: str, given: Any, words: str) -> None:
    with pytest.raises(JobError, match=words):
        amount_of(given, kind)


def test_a_job_keeps_a_share_as_a_number_and_an_amount_as_text() -> None:
    assert [settled(given, "size") for given in ("40%", 0.4, "10 MB")] == [0.4, 0.4, "10MB"]
    job = Job(model=VGG, out=Path("s.onnx"), size="10 MB")
    assert (job.size, job.target(), job.budget().amount, job.budget().unit) == ("10MB", "channel size 10MB", 1e7, "B")


def scales(model: Path, **more: Any) -> Scales:
    net = read_net(read_proto(model))
    draw = np.random.default_rng(0)
    inputs = {port.name: draw.random((2, *net.shapes[port.name][1:]), np.float32) for port in net.interface.inputs}
    return Scales(net, inputs, lambda student: None, "student.onnx", **more)


@pytest.mark.parametrize("model", [VGG, MOBILE, RESIDUAL])
def test_what_channels_cost_is_predicted_from_above_to_two_thousandths(model: Path) -> None:
    balance = scales(model)
    for share in (0.3, 0.8):
        plan = make_plan(balance.net, Budget("keep", share, residual=True))

        predicted = channel_goal(balance.net, 0).cost(plan.channels)

        # Narrower tensors need fewer digits for their shapes too, which is not predicted.
        assert balance.weigh(plan) <= predicted <= 1.002 * balance.weigh(plan)


@pytest.mark.parametrize("structure", ["channel", "element"])
@pytest.mark.parametrize("model", [VGG, MOBILE, RESIDUAL])
def test_a_plan_fills_the_limit_and_no_more(model: Path, structure: str) -> None:
    balance = scales(model)
    for share in (0.35, 0.6):
        budget, limit = Budget("size", share, structure, round_to=1), int(share * file_bytes(model))

        plan = fitted(budget, limit, file_bytes(model), lambda b, goal: make_plan(balance.net, b, goal), balance)

        assert 0.93 * limit < balance.weigh(plan) <= limit


@pytest.mark.parametrize("more", [{}, {"external_data": "always"}, {"structure": "element"}])
def test_the_file_that_is_written_is_within_the_limit(tmp_path: Path, more: dict[str, Any]) -> None:
    out, shots = tmp_path / "s.onnx", np.load(SAMPLES / "held_out.npz")["images"][:30]
    size = 90_000

    report = xdonnx.compress(
        MOBILE, shots, out, preset="unit", size="90kB", method="l1-norm", allocation="uniform", **more,
        warn_only=["not-slower"],
    )  # fmt: skip

    assert 0.8 * size < file_bytes(out) <= size
    assert report.student is not None and report.student.bytes == file_bytes(out)
    assert report.job["size"] == "90kB"


def stamp(student: onnx.ModelProto) -> None:
    """Write as much as a job writes into its students."""
    student.metadata_props.add(key="xdonnx.job", value="x" * 500)


@pytest.mark.parametrize("stamped", [False, True])
@pytest.mark.parametrize("structure", ["channel", "element"])
def test_a_size_out_of_reach_says_what_is_in_reach_and_a_large_one_that_nothing_would_go(
    structure: str, stamped: bool
) -> None:
    balance, teacher = scales(RESIDUAL), file_bytes(RESIDUAL)
    balance = replace(balance, stamp=stamp) if stamped else balance

    def plan(amount: float, unit: str = "B") -> Plan:
        budget, limit = Budget("size", amount, structure, unit=unit), amount if unit else amount * teacher
        return fitted(budget, int(limit), teacher, lambda b, goal: make_plan(balance.net, b, goal), balance)

    with pytest.raises(NothingToDo, match=r"--size 2% is out of reach: .* kB .*remain") as error:
        plan(0.02, unit="")
    told, share = re.findall(r"([\d.]+) kB \(([\d.]+)%\)", str(error.value))[0]
    assert float(told) * 1000 / teacher == pytest.approx(float(share) / 100, rel=0.03), "a share of the teacher's file"
    for less in (0.5, 0.9, 0.99):
        with pytest.raises(NothingToDo, match=rf"out of reach: .* {told} kB \({share}%\) remain"):
            plan(less * float(told) * 1000)
    reached = 1.01 * float(told) * 1000
    assert 0.98 * reached < balance.weigh(plan(reached)) <= reached
    with pytest.raises(NothingToDo, match="keeps everything"):
        plan(2e6)


def test_metadata_count_where_hardly_anything_is_to_go() -> None:
    """As large as what was to go, they made every layer keep all its channels, or the target out of reach."""
    balance, teacher = replace(scales(VGG), stamp=stamp), file_bytes(VGG)
    whole = balance.weigh(Plan())

    for less in (1, 100, 400):
        budget = Budget("size", whole - less, round_to=1, unit="B")
        plan = fitted(budget, whole - less, teacher, lambda b, goal: make_plan(balance.net, b, goal), balance)

        assert whole * 0.9 < balance.weigh(plan) <= whole - less
