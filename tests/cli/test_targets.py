"""The targets that users mean, as they are typed: a file's size, a latency, the smallest that passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from program import SAMPLES, SHOTS, call

VGG = str(SAMPLES / "digits_vgg.onnx")
QUICK = [*SHOTS, "--per-class", "3", "--allocation", "uniform"]


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have models take as many milliseconds as they have millions of MACs."""
    from xdonnx.cost import measure_cost
    from xdonnx.model import read_proto

    def clock(models: Any, feeds: Any, seconds: float, _: bool) -> np.ndarray:
        protos = [read_proto(model) if isinstance(model, Path) else model for model in models]
        shapes = [{name: values.shape for name, values in feed.items()} for feed in feeds]
        found = [measure_cost(*pair).macs / 1e6 for pair in zip(protos, shapes, strict=True)]
        return np.tile(found, (12, 1))

    monkeypatch.setattr("xdonnx.job.stopwatch", lambda device: clock)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--size", "5"], "--size is '5' of what?"),
        (["--size", "0MB"], "has to be above 0"),
        (["--size=-3MB"], "has to be above 0"),
        (["--size", "120%"], "the teacher's is 100%"),
        (["--latency", "fast"], "--latency is 'fast'"),
        (["--latency", "5"], "of what?"),
        (["--latency", "70%", "--macs", "50%"], "--macs and --latency are both given"),
        (["--latency", "70%", "--structure", "element"], "--latency does not go with --structure element"),
        (["--smallest"], "no gate says how bad the student may be"),
        (["--smallest", "--min-shrink", "10%"], "no gate says how bad the student may be"),
        (["--smallest", "--max-drop", "1", "--warn-only", "max-drop"], "--warn-only lifts max-drop"),
        (["--smallest", "--max-drop", "1", "--structure", "2:4"], "Leave --smallest out"),
        (["--smallest", "--max-drop", "1", "--size", "1MB"], "both given"),
    ],
)
def test_a_target_that_makes_no_sense_is_a_usage_error(here: Path, typed: list[str], words: str) -> None:
    ended = call("compress", VGG, *SHOTS, *typed, "-o", "s.onnx")

    assert ended.code == 2 and words in ended.err
    assert not list(here.iterdir())


def test_plan_and_dry_run_show_the_plan_of_a_latency(here: Path, slow_clock: None) -> None:
    dry = call("compress", VGG, *QUICK, "--latency", "60%", "--dry-run", "--json", "dry.json", "-o", "s.onnx")
    plan = call("plan", VGG, *QUICK, "--latency", "60%", "--json", "plan.json", "-o", "plan.toml")

    assert (dry.code, plan.code) == (0, 0), dry.err + plan.err
    found = [json.loads(Path(name).read_text()) for name in ("dry.json", "plan.json")]
    for one, ended in zip(found, (dry, plan), strict=True):
        (chosen,) = (each for each in one["tries"] if each["chosen"])
        assert 0.55 <= chosen["latency"] <= 0.6
        assert one["predicted"]["student_macs"] / one["predicted"]["teacher_macs"] == pytest.approx(chosen["latency"])
        assert "Tries" in ended.out and "passed, chosen" in ended.out
    assert {row["kept"] for row in found[0]["plan"]} < {row["keep"] for row in found[1]["layers"]} | {0}
    assert 'target = "channel latency 0.6"' in Path("plan.toml").read_text()


def test_dry_run_shows_the_first_try_of_the_smallest(here: Path) -> None:
    ended = call("compress", VGG, *QUICK, "--smallest", "--max-drop", "1", "--dry-run", "-o", "s.onnx")

    assert ended.code == 0, ended.err
    assert "smallest" in ended.out and "the first try" in ended.out


def test_out_of_reach_ends_with_seven_and_the_best_in_reach(here: Path, slow_clock: None) -> None:
    size = call("compress", VGG, *QUICK, "--size", "1%", "-o", "s.onnx")
    latency = call("compress", VGG, *QUICK, "--latency", "1%", "--round-to", "8", "-o", "s.onnx")

    assert (size.code, latency.code) == (7, 7)
    assert "--size 1% is out of reach" in size.err and "kB (2.1%) remain" in size.err
    assert "--latency 1% is out of reach" in latency.err and "of the teacher's 5.39 ms" in latency.err


def test_a_file_of_settings_takes_the_new_targets_and_what_is_typed_replaces_them(here: Path) -> None:
    Path("xdonnx.toml").write_text('size = "40%"\n[compress]\nmax-drop = 1.0\n')
    asked = ["compress", VGG, *QUICK, "--dry-run", "-o", "s.onnx", "--json", "job.json", "--quiet"]

    jobs = []
    for more in ([], ["--macs", "30%"], ["--smallest"]):
        ended = call(*asked, *more)
        assert ended.code == 0, ended.err
        jobs.append(json.loads(Path("job.json").read_text())["job"])

    assert [(job["size"], job["macs"], job["smallest"]) for job in jobs] == [
        (0.4, None, False), (None, 0.3, False), (None, None, True),
    ]  # fmt: skip
