"""`tune`, on small nets and through whole jobs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loops import SAMPLES, TWO_ANSWERS, TWO_INPUTS, Spy, gap, halved, net_of, shots_of, trained

from xdonnx.budget import Budget, make_plan
from xdonnx.convert import convert
from xdonnx.errors import JobError
from xdonnx.graph import Net
from xdonnx.images import Preprocess
from xdonnx.job import Job, run
from xdonnx.methods import training
from xdonnx.methods.bench import Bench
from xdonnx.methods.cross import Cross
from xdonnx.methods.tune import Tune, matching
from xdonnx.model import fingerprint
from xdonnx.patch import Patch
from xdonnx.shots import Shots
from xdonnx.student import find_taps


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every processor compute in 32 bits, so that what is compared is the loop."""
    monkeypatch.setattr(training, "_cpu_has_bfloat16", lambda: False)


def tuned(net: Net, patch: Patch, rows: int = 60, steps: int = 80) -> Patch:
    bench = Bench(convert(net, torch.device("cpu")), torch.Generator().manual_seed(0))
    plan = make_plan(net, Budget("keep", 0.5))
    return Tune(steps=steps)(net, patch, shots_of(net, rows, labels=True), plan, bench).patch


@pytest.mark.parametrize("text", [TWO_INPUTS, TWO_ANSWERS, "signal", "volume"])
def test_tune_mends_two_inputs_and_several_answers_and_regressions(text: str) -> None:
    net = net_of(text)
    patch = halved(net)

    made = tuned(net, patch)

    assert made.drop == patch.drop
    assert gap(net, made) < 0.8 * gap(net, patch)


def test_every_trial_and_check_says_step_loss_and_rate_as_they_were() -> None:
    net, events, steps = net_of("plain"), [], 2 * training.TRIAL_STEPS + 20

    trained(net, halved(net), shots_of(net, 60), log=events.append, steps=steps, rates=(0.003, 0.01))

    texts = [event.text for event in events if event.text]
    assert [text.split(":")[0] for text in texts[:2]] == ["trial"] * 2 and texts[0].endswith("at rate 0.003")
    checks = [re.fullmatch(rf"step (\d+) of {steps}: held-out loss (\S+) at rate (\S+)", text) for text in texts[2:-1]]
    assert all(checks)
    assert [int(check[1]) for check in checks if check] == list(range(10, steps + 1, 10))
    losses, rates = ([float(check[at]) for check in checks if check] for at in (2, 3))
    assert f"-> {min(losses):.4g} at rate" in texts[-1]
    assert max(rates) <= 0.01 and rates[2:] == sorted(rates[2:], reverse=True)


def test_matching_is_the_mean_over_taps_of_the_relative_error() -> None:
    net, spy = net_of(TWO_ANSWERS), Spy()
    trained(net, halved(net), loss=spy, steps=1)
    batch = spy.judging[0]

    found = float(matching(batch))

    taps = find_taps(net, convert(net, torch.device("cpu"))).all
    assert set(batch.student) == set(taps) == {"r2", "price", "scores"}
    errors = [
        np.square(batch.student[tap].numpy() - batch.teacher[tap].numpy()).sum()
        / np.square(batch.teacher[tap].numpy()).sum()
        for tap in taps
    ]
    assert found == pytest.approx(np.mean(errors), rel=1e-5)


def job(folder: Path, teacher: str, *method: str, **options: Any) -> Job:
    wanted: dict[str, Any] = {
        "model": SAMPLES / f"{teacher}.onnx",
        "out": folder / f"{'-'.join(method)}.onnx",
        "force": True,
        "shots": (str(SAMPLES / "shots"),),
        "holdout": str(SAMPLES / "held_out.npz"),
        "preprocess": Preprocess(preset="unit"),
        "device": "cpu",
        "method": method,
        "keep": 0.5,
        "steps": 40,
    }
    return Job(**(wanted | options))


@pytest.mark.parametrize("teacher", ["digits_residual", "digits_mobile"])
def test_tune_wins_back_what_a_heavy_cut_costs_on_digits(teacher: str, tmp_path: Path) -> None:
    bare = run(job(tmp_path, teacher, "l1-norm", steps=None))
    tuned = run(job(tmp_path, teacher, "l1-norm", "tune"))

    assert bare.fidelity and tuned.fidelity and bare.student and tuned.student
    before, after = (report.fidelity.outputs[0].relative_l2 for report in (bare, tuned) if report.fidelity)
    assert before is not None and after is not None and after < 0.95 * before
    assert tuned.student.macs == bare.student.macs


def test_cross_then_tune_is_closer_than_cross_and_repeats_to_the_byte(tmp_path: Path) -> None:
    cross = run(job(tmp_path, "digits_mobile", "cross", steps=None, preset_effort="fast", keep=0.3))
    prints = []
    for _ in range(2):
        both = run(job(tmp_path, "digits_mobile", "cross", "tune", preset_effort="fast", keep=0.3))
        prints.append(fingerprint(tmp_path / "cross-tune.onnx"))

    assert cross.fidelity and both.fidelity
    first, second = cross.fidelity.outputs[0].relative_l2, both.fidelity.outputs[0].relative_l2
    assert first is not None and second is not None and second < first
    assert prints[0] == prints[1]


def test_samples_that_judge_the_training_are_seen_by_no_method_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[bytes]] = {}

    def spied(kind: type) -> None:
        real = kind.__call__

        def call(self: Any, net: Net, patch: Patch, shots: Shots, plan: Any, bench: Bench) -> Any:
            rows = next(iter(shots.inputs.values()))
            seen[kind.__name__] = {row.tobytes() for row in rows}
            seen[f"{kind.__name__} judges"] = {rows[at].tobytes() for at in bench.judges}
            return real(self, net, patch, shots, plan, bench)

        monkeypatch.setattr(kind, "__call__", call)

    spied(Cross)
    spied(Tune)
    run(job(tmp_path, "digits_mobile", "cross", "tune", preset_effort="fast"))

    assert len(seen["Tune"]) == 100 and len(seen["Tune judges"]) == 10
    assert seen["Cross"] == seen["Tune"] - seen["Tune judges"]
    run(job(tmp_path, "digits_mobile", "cross", steps=None, preset_effort="fast"))
    assert seen["Cross"] == seen["Tune"]


def test_tune_leaves_the_zeros_of_single_weights_alone_on_digits(tmp_path: Path) -> None:
    bare = run(job(tmp_path, "digits_mobile", "l1-norm", steps=None, structure="element"))
    tuned = run(job(tmp_path, "digits_mobile", "l1-norm", "tune", structure="element"))

    assert bare.student and tuned.student and bare.fidelity and tuned.fidelity
    assert tuned.student.nonzero == bare.student.nonzero
    before, after = (report.fidelity.outputs[0].relative_l2 for report in (bare, tuned) if report.fidelity)
    assert before is not None and after is not None and after < before


def test_tune_alone_is_refused_with_what_to_put_before_it(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"(?s)tune removes nothing.*--method cross --method tune"):
        run(job(tmp_path, "digits_mobile", "tune"))
    with pytest.raises(JobError, match="tune removes nothing"):
        job(tmp_path, "digits_mobile", "tune", "cross").methods()
    assert not list(tmp_path.iterdir())


def test_steps_are_no_option_of_a_method_that_does_not_train(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="--steps is no option of --method l1-norm"):
        job(tmp_path, "digits_mobile", "l1-norm").methods()
