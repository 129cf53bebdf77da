"""The training loop, under losses that spy."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import nets
import numpy as np
import onnx
import pytest
import torch
from loops import FIXED, NUMBERED, SEEN, Spy, gap, halved, net_of, rows_of, same, shots_of, trained
from torch import Tensor

import xdonnx.student
from xdonnx.convert import convert
from xdonnx.errors import JobError
from xdonnx.graph import Net, read_net
from xdonnx.methods import make, training
from xdonnx.methods.bench import Bench
from xdonnx.methods.training import Batch, Schedule, check_schedule, relative_error, schedule, set_apart, train
from xdonnx.methods.tune import matching
from xdonnx.patch import Patch, cut
from xdonnx.runtime import answer, open_session
from xdonnx.student import Taps


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every processor compute in 32 bits, so that what is compared is the loop."""
    monkeypatch.setattr(training, "_cpu_has_bfloat16", lambda: False)


# ---------------------------------------------------------------------------------------------------------- no harm


@pytest.mark.parametrize("name", ["plain", "grouped", "depthwise", "transposed", "residual", "signal", "product"])
def test_training_brings_the_file_closer_to_the_teacher(name: str) -> None:
    net = net_of(name)
    patch = halved(net)

    made = trained(net, patch, shots_of(net, 60), steps=60)

    assert gap(net, made) < 0.9 * gap(net, patch)
    assert made.drop == patch.drop


def test_the_very_patch_comes_back_where_nothing_is_left_to_win() -> None:
    net, events = net_of("plain"), []
    patch = Patch()

    made = trained(net, patch, log=events.append)

    assert made is patch
    assert not [event.text for event in events if event.text]  # nor is anybody bothered


@pytest.mark.parametrize("constant", [0.0, 2.5, float("nan"), float("inf")])
def test_the_very_patch_comes_back_where_the_loss_says_nothing(constant: float) -> None:
    net = net_of("plain")
    patch = halved(net)

    assert trained(net, patch, loss=lambda batch: 0 * batch.student["out"].mean() + constant) is patch


def test_the_very_patch_comes_back_where_training_leads_astray() -> None:
    net = net_of("plain")
    patch = halved(net)

    def astray(batch: Batch) -> Tensor:
        # Trains away from what it is judged by.
        return -matching(batch) if torch.is_grad_enabled() else matching(batch)

    assert trained(net, patch, loss=astray) is patch


def test_what_comes_back_is_the_best_that_the_judges_saw() -> None:
    net, shots, spy, losses = net_of(NUMBERED), shots_of(net_of(NUMBERED)), Spy(), []

    def noted(batch: Batch) -> Tensor:
        found = spy(batch)
        if not torch.is_grad_enabled():
            losses.append(float(found))
        return found

    made = trained(net, halved(net), shots, noted, taps=SEEN, steps=40)

    inputs = {"image": shots.inputs["image"][sorted(rows_of(spy.judging))]}
    teacher, student = (answer(open_session(model), inputs)["out"] for model in (net.source, cut(net, made)))
    # One of the two taps is the input, the same for both.
    assert np.square(student - teacher).sum() / np.square(teacher).sum() / 2 == pytest.approx(min(losses), rel=1e-3)
    assert min(losses) < losses[0]


@pytest.mark.parametrize("where", ["inputs", "loss"])
def test_samples_and_losses_that_are_no_numbers_never_win(where: str) -> None:
    net = net_of(NUMBERED)
    patch = halved(net)
    shots = shots_of(net)
    if where == "inputs":
        shots.inputs["image"][7] = np.nan

    def sometimes(batch: Batch) -> Tensor:
        found = matching(batch)
        return found * float("nan") if where == "loss" and torch.is_grad_enabled() else found

    made = trained(net, patch, shots, sometimes, steps=30)

    assert made is patch


# ------------------------------------------------------------------------------------------------- what stays as it was


@pytest.mark.parametrize("name", ["plain", "grouped", "depthwise", "transposed", "product"])
@pytest.mark.parametrize("drop", [False, True])
def test_zeros_stay_zero_and_the_rest_moves(name: str, drop: bool) -> None:
    net = net_of(name)
    random = np.random.default_rng(0)
    arrays = {layer.weight: net.array(layer.weight) for layer in net.layers.values()}
    zeroed = {n: (a * (random.random(a.shape) < 0.5)).astype(np.float32) for n, a in arrays.items()}
    patch = Patch(zeroed, halved(net).drop if drop else frozenset())

    made = trained(net, patch, shots_of(net, 40), mix=True)

    assert made.drop == patch.drop and made is not patch
    ours, theirs = (
        {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in cut(net, p).graph.initializer}
        for p in (patch, made)
    )
    for weight, array in zeroed.items():
        assert array.shape == made.tensors[weight].shape
        np.testing.assert_array_equal(theirs[weight][ours[weight] == 0], 0)
        assert (theirs[weight] != ours[weight]).any()


def test_a_second_run_trains_on_from_the_first() -> None:
    net = net_of("plain")
    first = trained(net, halved(net), shots_of(net, 60), steps=40)

    second = trained(net, first, shots_of(net, 60), steps=40)

    assert second.drop == first.drop
    assert gap(net, second) < gap(net, first)


# -------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("mix", [False, True])
def test_the_same_seed_gives_the_same_bytes_and_another_one_others(mix: bool) -> None:
    net = net_of("plain")
    patch = halved(net)

    first, again, other = (trained(net, patch, mix=mix, seed=seed) for seed in (4, 4, 5))

    assert same(first, again) and not same(first, other)


def test_the_random_state_of_the_caller_is_neither_read_nor_moved() -> None:
    net = net_of("plain")
    torch.manual_seed(5)
    first = trained(net, halved(net), mix=True)
    drawn = torch.rand(1)
    torch.manual_seed(6)
    second = trained(net, halved(net), mix=True)

    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    assert same(first, second)


# ----------------------------------------------------------------------------------------------- who trains, who judges


@pytest.mark.parametrize("rows", [2, 5, 20, 47])
def test_samples_that_judge_are_not_trained_on_and_the_rest_are(rows: int) -> None:
    net, spy = net_of(NUMBERED), Spy()

    trained(net, halved(net), shots_of(net, rows), spy, taps=SEEN, steps=80)

    judges, fits = rows_of(spy.judging), rows_of(spy.training)
    assert not judges & fits
    assert judges | fits == set(range(rows))
    assert len(judges) == max(1, round(training.JUDGES * rows))


def test_judges_that_were_set_apart_judge_and_nobody_else_does() -> None:
    net, spy, judges = net_of(NUMBERED), Spy(), (3, 7, 8, 15, 19)
    bench = Bench(convert(net, torch.device("cpu")), torch.Generator().manual_seed(0), judges=judges)

    train(net, halved(net), shots_of(net, 20), spy, Schedule(40, 8, False, (0.01,)), bench, SEEN)

    assert rows_of(spy.judging) == set(judges)
    assert rows_of(spy.training) == set(range(20)) - set(judges)


@pytest.mark.parametrize(
    ("count", "batch", "judges"),
    [(500, 1, 50), (50, 1, 5), (49, 1, 5), (44, 1, 0), (10, 1, 0), (50, 4, 8), (8, 8, 0), (64, 32, 0)],
)
def test_a_tenth_is_set_apart_where_that_is_enough_to_judge(count: int, batch: int, judges: int) -> None:
    found = set_apart(count, batch, seed=3)

    assert len(found) == judges
    assert list(found) == sorted(set(found)) and all(0 <= row < count for row in found)
    assert found == set_apart(count, batch, seed=3)
    assert not judges or found != set_apart(count, batch, seed=4)


def test_a_single_sample_trains_and_judges() -> None:
    net, spy = net_of(NUMBERED), Spy()

    made = trained(net, halved(net), shots_of(net, 1), spy, taps=SEEN)

    assert rows_of(spy.judging) == rows_of(spy.training) == {0}
    assert made.tensors


def test_few_samples_all_train_where_other_views_of_them_can_judge() -> None:
    net, spy = net_of("plain"), Spy()  # three channels: images, which have views
    taps = Taps(("image",), ("out",))

    trained(net, halved(net), shots_of(net, 3), spy, taps=taps, mix=True, steps=30)

    shown, judged = (
        {x.numpy().tobytes() for b in bs for x in b.teacher["image"]} for bs in (spy.training, spy.judging)
    )
    assert len(judged) > 3 and len(judged - shown) > len(judged) / 2
    originals = shots_of(net, 3).inputs["image"]
    # Every sample lends its pixels to training: a view is made of nothing else.
    for sample in originals:
        assert any(np.isin(sample, b.teacher["image"].numpy()).mean() > 0.5 for b in spy.training)


def test_every_step_shows_a_whole_batch_even_of_few_samples() -> None:
    net, spy = net_of(NUMBERED), Spy()

    trained(net, halved(net), shots_of(net, 4), spy, taps=SEEN, steps=6, batch=10)

    assert [len(batch.student["out"]) for batch in spy.training] == [10] * 6


def test_labels_belong_to_their_samples() -> None:
    net, spy = net_of(NUMBERED), Spy()

    trained(net, halved(net), shots_of(net, labels=True), spy, taps=SEEN)

    for batch in (*spy.training, *spy.judging):
        assert batch.labels is not None
        rows = (10 * batch.teacher["image"].flatten(1)[:, 0]).round().long()
        assert torch.equal(batch.labels, rows % 3)


@pytest.mark.parametrize("name", ["plain", NUMBERED])
def test_labels_never_come_with_mixed_samples(name: str) -> None:
    net, spy = net_of(name), Spy()

    trained(net, halved(net), shots_of(net, labels=True), spy, mix=True)

    assert spy.training and all(batch.labels is None for batch in spy.training)


def test_mixtures_are_shown_to_both_networks() -> None:
    net, spy = net_of(NUMBERED), Spy()

    trained(net, Patch({"w1": 1.001 * net.array("w1")}), shots_of(net), spy, taps=SEEN, mix=True, steps=3)

    originals = shots_of(net).inputs["image"]
    seen = torch.cat([batch.teacher["image"] for batch in spy.training]).numpy()
    distance = np.abs(seen[:, None] - originals[None]).max((2, 3, 4)).min(1)
    assert (distance > 1e-3).any()
    first = spy.training[0]
    torch.testing.assert_close(first.student["out"], first.teacher["out"], rtol=0.01, atol=0.01)


def test_the_teachers_channels_that_the_student_lost_are_not_compared() -> None:
    net, spy = net_of("plain"), Spy()

    trained(net, halved(net), loss=spy)

    for batch in (*spy.training, *spy.judging):
        assert batch.teacher["r1"].shape == batch.student["r1"].shape
        assert batch.student["r1"].shape[1] == len(net.layers["c1"].out_ids) // 2


# ------------------------------------------------------------------------------------------------------ batches, graphs


def test_chunks_of_a_batch_move_weights_as_the_whole_batch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    net = net_of(NUMBERED)

    # A mean over samples: ratios of sums would differ between chunks.
    def mean(batch: Batch) -> Tensor:
        return (batch.student["out"] - batch.teacher["out"]).square().mean()

    monkeypatch.setattr(training, "SMALL_BATCH", 8)
    whole = trained(net, halved(net), loss=mean, steps=15)
    spy = Spy(mean)
    monkeypatch.setattr(training._Run, "_rows_at_once", lambda self, sample: 2)
    chunked = trained(net, halved(net), loss=spy, steps=15)

    assert [len(batch.student["out"]) for batch in spy.training] == [2] * (15 * 4)
    for name, array in whole.tensors.items():
        np.testing.assert_allclose(chunked.tensors[name], array, atol=1e-4)
        assert (array != net.array(name)).any()


def test_a_graph_that_takes_one_sample_at_once_is_fed_one_at_once() -> None:
    net, spy = net_of(FIXED), Spy()
    patch = halved(net)

    made = trained(net, patch, shots_of(net, 40), spy, steps=30)

    assert {len(batch.student["out"]) for batch in (*spy.training, *spy.judging)} == {1}
    assert len(spy.training) % 30 == 0
    assert gap(net, made) < gap(net, patch)


def test_a_batch_of_one_that_is_only_written_there_does_not_slow_training_down() -> None:
    net, spy = read_net(nets.from_text(NUMBERED.replace("N,", "1,"))), Spy()
    assert net.interface.inputs[0].shape[0] == 1

    trained(net, halved(net), shots_of(net), spy, steps=5)

    assert [len(batch.student["out"]) for batch in spy.training] == [8] * 5


def test_a_node_that_onnxruntime_runs_does_not_stop_training(monkeypatch: pytest.MonkeyPatch) -> None:
    net = net_of("plain")
    program = convert(net, torch.device("cpu"), ("r1",))
    monkeypatch.setattr(training, "_cpu_has_bfloat16", lambda: True)
    bench = Bench(program, torch.Generator().manual_seed(0))

    made = train(net, halved(net), shots_of(net), matching, Schedule(20, 8, False, (0.01,)), bench).patch

    assert gap(net, made) < gap(net, halved(net))


def test_a_fixed_batch_is_also_noticed_where_onnxruntime_runs_a_node() -> None:
    net = net_of(FIXED)
    program = convert(net, torch.device("cpu"), ("f",))
    bench = Bench(program, torch.Generator().manual_seed(0))

    made = train(net, halved(net), shots_of(net), matching, Schedule(20, 8, False, (0.01,)), bench).patch

    # No gradient passes that node, so there may be nothing to win: what counts is that one at once was found out.
    assert gap(net, made) <= gap(net, halved(net))


def test_a_net_whose_cut_graph_does_not_convert_is_trained_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xdonnx.student, "_small", lambda *arguments: None)
    net = net_of("plain")

    made = trained(net, halved(net), shots_of(net, 60), steps=40)

    assert gap(net, made) < gap(net, halved(net))


# ------------------------------------------------------------------------------------------------- progress, schedules


@pytest.mark.parametrize("steps", [1, 20, 2 * training.TRIAL_STEPS + 1])
def test_progress_counts_every_step_up_to_the_announced_total(steps: int) -> None:
    net, events = net_of("plain"), []

    trained(net, halved(net), log=events.append, steps=steps, rates=(0.003, 0.01))

    ticks = [event for event in events if event.total]
    assert {event.stage for event in events} == {"tune"}
    assert [event.done for event in ticks] == list(range(1, len(ticks) + 1))
    assert {event.total for event in ticks} == {len(ticks)}
    trials = 2 * training.TRIAL_STEPS if steps > 2 * training.TRIAL_STEPS else 0
    assert len(ticks) == trials + steps
    assert "loss" in events[-1].text and not events[-1].total


def test_trials_pass_over_rates_that_do_harm() -> None:
    net, events = net_of("plain"), []

    trained(net, halved(net), log=events.append, steps=2 * training.TRIAL_STEPS + 10, rates=(0.003, 30.0))

    assert events[-1].text.endswith("at rate 0.003")


def test_large_nets_get_fewer_steps_and_no_net_none() -> None:
    small = net_of("plain")
    macs = sum(layer.macs for layer in small.layers.values())

    def stretched(factor: float) -> Net:
        layers = {name: replace(layer, macs=int(layer.macs * factor)) for name, layer in small.layers.items()}
        return replace(small, layers=layers)

    for effort in training.STEPS:
        made = []
        for power in range(12):
            net = stretched(1e6 * 4**power / macs)
            made.append(schedule(net, effort, None, mix=True))
            cost = 4 * sum(layer.macs for layer in net.layers.values()) * made[-1].batch * made[-1].steps
            assert cost <= training.WORK[effort] or made[-1].steps == training.FEWEST_STEPS
        assert made[0].steps == training.STEPS[effort] and made[-1].steps == training.FEWEST_STEPS
        assert all(first.batch >= second.batch >= 1 for first, second in pairwise(made))


def test_steps_that_are_asked_for_are_made_whatever_the_effort() -> None:
    for effort in training.STEPS:
        assert schedule(net_of("plain"), effort, 7, mix=False).steps == 7


def test_a_batch_is_a_multiple_of_what_the_graph_takes_at_once() -> None:
    net = read_net(nets.from_text(NUMBERED.replace("N,", "6,")))

    assert net.batch == 6
    assert schedule(net, "fast", None, mix=False).batch % 6 == 0


@pytest.mark.parametrize("steps", [0, -3])
@pytest.mark.parametrize("method", ["tune", "bp", "fitnet"])
def test_a_senseless_number_of_steps_is_refused(method: str, steps: int) -> None:
    with pytest.raises(JobError, match=rf"(?s)--steps is {steps}\..*1 or more"):
        make(method, {"steps": steps})


@pytest.mark.parametrize("method", ["tune", "bp", "fitnet"])
def test_an_unknown_effort_is_refused_with_the_nearest(method: str) -> None:
    with pytest.raises(JobError, match=r"(?s)unknown effort 'fastt'. Did you mean 'fast'\?.*balanced, best"):
        make(method, {"effort": "fastt"})
    check_schedule("fast", 1)  # these are fine


def test_relative_error_is_a_share_of_the_teachers_energy() -> None:
    teacher = torch.tensor([[3.0, 4.0]])

    assert float(relative_error(torch.zeros(1, 2), teacher)) == 1
    assert float(relative_error(teacher + torch.tensor([[0.0, 5.0]]), teacher)) == 1
    assert float(relative_error(teacher, teacher)) == 0
    assert np.isfinite(float(relative_error(teacher, 0 * teacher)))
