"""The baselines against their papers' formulas on plain data, numpy's least squares and scikit-learn's LASSO."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch
from helpers import same_answers
from sklearn.linear_model import Lasso
from torch import Tensor
from torch.nn import functional

from xdonnx.budget import Budget, Plan, make_plan
from xdonnx.columns import Geometry, from_matrix, to_matrix
from xdonnx.connection import Quadratic, objective, regression
from xdonnx.convert import checked, convert
from xdonnx.errors import JobError
from xdonnx.graph import Net, read_net
from xdonnx.images import Preprocess
from xdonnx.job import Job, run
from xdonnx.methods import make
from xdonnx.methods.bench import Bench, Outcome
from xdonnx.methods.channel_pruning import by_lasso, lasso
from xdonnx.methods.fskd import mixed
from xdonnx.methods.thinet import rescaled, smallest_sum
from xdonnx.moments import Moments, measure
from xdonnx.patch import Patch, cut, masked
from xdonnx.shots import Shots
from xdonnx.structure import Channel

SAMPLES = Path(__file__).parents[2] / "samples"
BASELINES = ["thinet", "channel-pruning", "fskd"]


def layer_of(seed: int, *, groups: int = 1, units: int = 8, positions: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Return columns of teacher and student (g, 2 * units + 1, positions), the last one ones, and weights."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, 2 * units, 2 * units, generator=random, dtype=torch.float64)
    x_t = mixing @ torch.randn(groups, 2 * units, positions, generator=random, dtype=torch.float64) + 0.5
    x_s = x_t + 0.5 * torch.randn(x_t.shape, generator=random, dtype=torch.float64)
    ones = torch.ones(groups, 1, positions, dtype=torch.float64)
    weight = torch.randn(groups, 3, 2 * units + 1, generator=random, dtype=torch.float64)
    return torch.cat([x_t, ones], 1), torch.cat([x_s, ones], 1), weight


def error_of(x_t: Tensor, x_s: Tensor, weight: Tensor) -> Quadratic:
    count = x_t.shape[2]
    moments = Moments(x_t @ x_t.mT / count, x_t @ x_s.mT / count, x_s @ x_s.mT / count, count)
    return objective(regression(), moments, weight)


def pairs(units: int) -> Tensor:
    """Two columns for each unit, and the bias, which belongs to none."""
    return torch.tensor([*np.repeat(np.arange(units), 2), -1])


def added(weight: Tensor, x: Tensor, columns: Tensor, unit: int) -> np.ndarray:
    """Return what one unit adds to the output, (g, o * positions)."""
    at = columns == unit
    return (weight[..., at] @ x[:, at]).flatten(1).numpy()


# --------------------------------------------------------------------------------------------------------- ThiNet


@pytest.mark.parametrize("groups", [1, 2])
def test_thinet_removes_the_channels_whose_sum_is_smallest(groups: int) -> None:
    x_t, x_s, weight = layer_of(1, groups=groups)
    columns = pairs(8)
    parts = [added(weight, x_s, columns, unit) for unit in range(8)]
    gone: list[int] = []
    while len(gone) < 5:
        energies = {j: np.square(sum(parts[k] for k in (*gone, j))).sum() for j in range(8) if j not in gone}
        gone.append(min(energies, key=lambda j: energies[j]))

    for keep in (7, 5, 3):
        found = smallest_sum(error_of(x_t, x_s, weight), weight, Channel(columns), keep)

        assert [unit for unit in range(8) if not found.mask[0, 0, 2 * unit]] == sorted(gone[: 8 - keep])
        assert bool(found.mask[..., -1].all())


@pytest.mark.parametrize("groups", [1, 2])
def test_thinet_scales_what_stays_by_least_squares(groups: int) -> None:
    x_t, x_s, weight = layer_of(2, groups=groups)
    columns = pairs(8)
    q = error_of(x_t, x_s, weight)

    found = smallest_sum(q, weight, Channel(columns), 4)

    kept = [unit for unit in range(8) if found.mask[0, 0, 2 * unit]]
    wanted = (weight @ x_t).flatten(1).numpy() - added(weight, x_s, columns, -1)
    for group in range(groups):
        design = np.stack([added(weight, x_s, columns, unit)[group] for unit in kept], 1)
        scales = np.linalg.lstsq(design, wanted[group], rcond=None)[0]
        expected = torch.zeros_like(weight[group])
        expected[:, -1] = weight[group, :, -1]
        for unit, scale in zip(kept, scales, strict=True):
            expected[:, columns == unit] = weight[group][:, columns == unit] * scale
        torch.testing.assert_close(found.weight[group], expected)
    assert found.objective == pytest.approx(float(q(found.weight)))
    assert found.objective < float(q(weight * found.mask))


def test_thinet_scales_by_label_where_others_chose() -> None:
    x_t, x_s, weight = layer_of(3)
    x_t, x_s, weight = x_t[:, :-1], x_s[:, :-1], weight[..., :-1]
    labels = torch.tensor([40, 7] * 8)  # interleaved, as spatial positions behind a Flatten are not
    q = error_of(x_t, x_s, weight)

    found = rescaled(q, weight, labels, torch.ones(1, 3, dtype=torch.bool), bias=False)

    design = np.stack([added(weight, x_s, labels, label)[0] for label in (40, 7)], 1)
    scales = np.linalg.lstsq(design, (weight @ x_t).flatten().numpy(), rcond=None)[0]
    torch.testing.assert_close(found, weight * torch.tensor(np.tile(scales, 8)))


def test_thinet_removes_dead_channels_first_and_leaves_their_scale_at_one() -> None:
    x_t, x_s, weight = layer_of(4)
    for x in (x_t, x_s):
        x[:, 4:8] = 0
    q = error_of(x_t, x_s, weight)

    two_go, one_goes = (smallest_sum(q, weight, Channel(pairs(8)), keep) for keep in (6, 7))

    assert not two_go.mask[..., 4:8].any()
    torch.testing.assert_close(one_goes.weight[..., 6:8], weight[..., 6:8])


@pytest.mark.parametrize("solver", [smallest_sum, by_lasso])
def test_channels_that_an_earlier_method_took_count_as_gone(solver: Any) -> None:
    x_t, x_s, weight = layer_of(5)
    columns = pairs(8)
    for x in (x_t, x_s):
        x[:, 0:2] = x[:, 12:14] = 0  # dead channels, before and after those, are as cheap
    there = (columns < 2) | (columns > 4)  # channels 2, 3 and 4 went before
    x_t, x_s, weight, columns = x_t[:, there], x_s[:, there], weight[..., there], columns[there]

    found = solver(error_of(x_t, x_s, weight), weight, Channel(columns), 5)

    assert bool(found.mask.all())


# ----------------------------------------------------------------------------------------------- Channel Pruning


def centred(weight: Tensor, x_t: Tensor, x_s: Tensor, columns: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return design (rows, units) and target of the LASSO with an intercept for each output."""
    parts = [weight[..., columns == unit] @ x_s[:, columns == unit] for unit in range(int(columns.max()) + 1)]
    design = np.stack([(part - part.mean(2, keepdim=True)).flatten().numpy() for part in parts], 1)
    wanted = weight @ x_t
    return design, (wanted - wanted.mean(2, keepdim=True)).flatten().numpy()


def fitted_by_sklearn(design: np.ndarray, target: np.ndarray, strength: float) -> np.ndarray:
    model = Lasso(alpha=strength, fit_intercept=False, tol=1e-12, max_iter=1_000_000)
    return np.asarray(model.fit(design, target).coef_)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("keep", [1, 4, 9])
def test_the_lasso_agrees_with_scikit_learn(seed: int, keep: int) -> None:
    x_t, x_s, weight = layer_of(10 + seed, units=12)
    design, target = centred(weight, x_t, x_s, pairs(12))
    rows = len(target)

    beta, strength, _ = lasso(torch.tensor(design.T @ design / rows), torch.tensor(design.T @ target / rows), keep)

    assert int((beta != 0).sum()) == keep
    np.testing.assert_allclose(beta.numpy(), fitted_by_sklearn(design, target, strength), rtol=1e-5, atol=1e-7)
    # The largest such strength: above the stretch on which these betas live there are fewer.
    for factor in np.linspace(1.02, 3, 12):
        other = np.flatnonzero(np.abs(fitted_by_sklearn(design, target, strength * factor)) > 1e-9)
        assert len(other) < keep or set(other) == set(np.flatnonzero(beta.numpy()))


def test_the_lasso_meets_its_optimality_conditions_also_after_channels_left_again() -> None:
    left_again = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        design = random.standard_normal((40, 16)) @ (np.eye(16) + 0.8 * random.standard_normal((16, 16)))
        gram, target = torch.tensor(design.T @ design), torch.tensor(design.T @ random.standard_normal(40))
        for keep in (3, 8, 13):
            beta, strength, turns = lasso(gram, target, keep)
            slope = target - gram @ beta
            active = beta != 0
            assert int(active.sum()) == keep
            torch.testing.assert_close(slope[active], strength * beta[active].sign(), rtol=1e-6, atol=0.0)
            assert float(slope[~active].abs().max()) <= strength * (1 + 1e-6)
            left_again += turns > keep
    assert left_again >= 3


def test_the_intercept_is_free_while_the_lasso_chooses() -> None:
    x_t, x_s, weight = layer_of(20)
    x_s[:, :4] += 30  # means that the intercept takes away, and that would decide everything without one
    design, target = centred(weight, x_t, x_s, pairs(8))
    rows = len(target)
    beta, _, _ = lasso(torch.tensor(design.T @ design / rows), torch.tensor(design.T @ target / rows), 4)

    found = by_lasso(error_of(x_t, x_s, weight), weight, Channel(pairs(8)), 4)

    assert torch.equal(found.mask[0, 0, :-1:2], beta != 0)


@pytest.mark.parametrize("groups", [1, 2])
def test_channel_pruning_refits_by_least_squares_and_keeps_the_bias(groups: int) -> None:
    x_t, x_s, weight = layer_of(21, groups=groups)

    found = by_lasso(error_of(x_t, x_s, weight), weight, Channel(pairs(8)), 5)

    assert found.converged and bool(found.mask[..., -1].all())
    assert int(found.mask[0, 0].sum()) == 2 * 5 + 1
    for group in range(groups):
        columns = found.mask[group, 0].numpy()
        expected = np.linalg.lstsq(x_s[group, columns].numpy().T, (weight @ x_t)[group].numpy().T, rcond=None)[0].T
        np.testing.assert_allclose(found.weight[group][:, columns].numpy(), expected, rtol=1e-6, atol=1e-8)


def test_the_lasso_survives_twins_dead_channels_and_too_few_positions() -> None:
    x_t, x_s, weight = layer_of(22, positions=2)
    weight[..., 2:4] = weight[..., 0:2]
    for x in (x_t, x_s):
        x[:, 2:4] = x[:, 0:2]
        x[:, 8:12] = 0
    q = error_of(x_t, x_s, weight)

    for keep in range(1, 8):
        found = by_lasso(q, weight, Channel(pairs(8)), keep)

        assert int(found.mask[0, 0].sum()) == 2 * keep + 1
        assert bool(found.weight.isfinite().all())
        assert not found.mask[..., 8:12].any() or keep > 6


# ------------------------------------------------------------------------------------------------------------ FSKD


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_fskd_fits_its_mixture_by_least_squares_on_the_outputs_that_stay(groups: int, bias: bool) -> None:
    x_t, x_s, weight = layer_of(30, groups=groups)
    if not bias:
        x_t, x_s, weight = x_t[:, :-1], x_s[:, :-1], weight[..., :-1]
    rows = torch.tensor([[True, False, True], [True, True, False]])[:groups]
    columns = torch.zeros(weight.shape[2], dtype=torch.long)

    found = mixed(error_of(x_t, x_s, weight), weight, columns, rows, bias=bias, ridge=0.0)

    for group in range(groups):
        live = rows[group].numpy()
        source = (weight @ x_s)[group, live].numpy()
        if bias:
            source = np.concatenate([source, np.ones((1, source.shape[1]))])
        mixture = np.linalg.lstsq(source.T, (weight @ x_t)[group, live].numpy().T, rcond=None)[0].T
        expected = weight[group].numpy().copy()
        expected[live] = mixture[:, : live.sum()] @ expected[live]
        if bias:
            expected[live, -1] += mixture[:, -1]
        np.testing.assert_allclose(found[group].numpy(), expected, rtol=1e-6, atol=1e-7)


def test_fskd_merges_exactly_what_a_1x1_convolution_would_compute() -> None:
    random = torch.Generator().manual_seed(31)
    weight, bias = torch.randn(6, 3, 3, 3, generator=random), torch.randn(6, generator=random)
    x_t = torch.randn(4, 3, 7, 7, generator=random)
    x_s = x_t + 0.3 * torch.randn(x_t.shape, generator=random)
    geometry = Geometry("conv", 1, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    matrix = to_matrix(weight, bias, geometry).double()
    q = objective(regression(), measure([x_t], [x_s], geometry, bias=True), matrix)
    every = torch.ones(1, 6, dtype=torch.bool)

    found = mixed(q, matrix, torch.zeros(28, dtype=torch.long), every, bias=True, ridge=0.0)
    made, constant = from_matrix(found, geometry, True, (6, 3, 3, 3))

    wanted, seen = (functional.conv2d(x.double(), weight.double(), bias.double(), padding=1) for x in (x_t, x_s))
    source = np.concatenate([seen.movedim(1, 0).flatten(1).numpy(), np.ones((1, 4 * 49))])
    mixture = torch.tensor(np.linalg.lstsq(source.T, wanted.movedim(1, 0).flatten(1).numpy().T, rcond=None)[0].T)
    inserted = functional.conv2d(seen, mixture[:, :6, None, None].contiguous(), mixture[:, 6].contiguous())
    torch.testing.assert_close(functional.conv2d(x_s.double(), made, constant, padding=1), inserted)


def test_fskd_stays_near_the_identity_where_the_shots_leave_it_open() -> None:
    x_t, x_s, weight = layer_of(32)
    weight[:, 1] = weight[:, 0]  # two filters that always agree
    columns, rows = torch.zeros(17, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool)

    agreeing = mixed(error_of(x_t, x_s, weight), weight, columns, rows, bias=True, ridge=1e-6)
    same_input = mixed(error_of(x_s, x_s, weight), weight, columns, rows, bias=True, ridge=1e-6)
    dead = torch.cat([0 * x_t[:, :-1], x_t[:, -1:]], 1)
    silent = mixed(error_of(dead, dead, weight), weight, columns, rows, bias=True, ridge=1e-6)

    q = error_of(x_t, x_s, weight)
    source = torch.cat([weight @ x_s, torch.ones(1, 1, 60, dtype=torch.float64)], 1)[0].numpy()
    wanted = (weight @ x_t)[0].numpy()
    left = wanted - np.linalg.lstsq(source.T, wanted.T, rcond=None)[0].T @ source
    assert float(q(agreeing)) == pytest.approx(np.square(left).sum() / 60, rel=1e-3)
    torch.testing.assert_close(agreeing[:, 0], agreeing[:, 1])
    torch.testing.assert_close(same_input, weight)
    torch.testing.assert_close(silent, weight)


# ------------------------------------------------------------------------------------------------------ whole nets


@cache
def parsed(name: str) -> Net:
    return read_net(nets.build(name))


def compressed(
    name: str, method: str, *, patch: Patch | None = None, plan: Plan | None = None, **options: Any
) -> tuple[Net, Plan, Outcome]:
    net = parsed(name)
    inputs = nets.samples(net.source, 12)
    plan = plan or make_plan(net, Budget("keep", 0.5, residual=True))
    bench = Bench(checked(net, convert(net, torch.device("cpu")), inputs), torch.Generator().manual_seed(0))
    shots = Shots(inputs, None, tuple(map(str, range(12))))
    return net, plan, make(method, options)(net, patch or Patch(), shots, plan, bench)


@pytest.mark.parametrize("method", ["thinet", "channel-pruning"])
def test_layers_that_lose_nothing_stay_as_they_are(method: str) -> None:
    net = parsed("residual")
    (inner,) = (at for at, group in enumerate(net.groups) if group.stream is None)

    _, _, outcome = compressed("residual", method, plan=Plan(channels={inner: 4}))

    (reader,) = net.groups[inner].readers
    assert set(outcome.patch.tensors) <= {net.layers[reader].weight, net.layers[reader].bias}
    assert len(outcome.patch.drop) == 4


def test_thinet_never_moves_a_bias() -> None:
    net, _, outcome = compressed("concat", "thinet")

    for layer in net.layers.values():
        if layer.bias in outcome.patch.tensors:
            np.testing.assert_array_equal(outcome.patch.tensors[layer.bias], net.array(layer.bias))


def test_thinet_scales_the_channels_of_every_group_that_a_layer_reads() -> None:
    net, _, outcome = compressed("concat", "thinet")
    last = list(net.layers.values())[-1]

    before, after = net.array(last.weight)[..., 0, 0], outcome.patch.tensors[last.weight][..., 0, 0]

    factors = after / before
    kept = ~np.isin(last.columns, sorted(outcome.patch.drop))
    assert len({at for at, g in enumerate(net.groups) if np.isin(g.ids, last.columns[kept]).any()}) == 2
    np.testing.assert_allclose(factors, np.broadcast_to(factors[0], factors.shape), rtol=1e-4, atol=1e-6)
    assert (np.abs(factors[0][kept] - 1) > 1e-3).all() and not factors[0][~kept].any()


@pytest.mark.parametrize("name", ["grouped", "depthwise", "residual", "padded"])
def test_fskd_removes_what_l1_norm_removes(name: str) -> None:
    net, plan, outcome = compressed(name, "fskd")

    _, _, bare = compressed(name, "l1-norm", plan=plan)

    assert outcome.patch.drop == bare.patch.drop
    same_answers(masked(net, outcome.patch), cut(net, outcome.patch), nets.samples(net.source))


def test_fskd_mixes_only_outputs_of_one_group_that_stay() -> None:
    net, _, outcome = compressed("grouped", "fskd")
    layer = list(net.layers.values())[1]
    dropped = sorted(outcome.patch.drop)
    lives, columns = ~np.isin(layer.out_ids, dropped), ~np.isin(layer.columns, dropped)
    assert layer.groups == 2 and not lives.all() and not columns.all()

    before, after = (a.reshape(6, -1)[:, columns] for a in (net.array("w2"), outcome.patch.tensors["w2"]))

    for group in (slice(0, 3), slice(3, 6)):
        old, new = before[group][lives[group]], after[group][lives[group]]
        mixture = np.linalg.lstsq(old.T, new.T, rcond=None)[0]
        np.testing.assert_allclose(old.T @ mixture, new.T, atol=1e-5)
        assert np.abs(new - old).max() > 1e-2
        np.testing.assert_array_equal(after[group][~lives[group]], before[group][~lives[group]])


@pytest.mark.parametrize("method", BASELINES)
def test_baselines_take_over_what_another_method_dropped(method: str) -> None:
    for first in ("thinet", "l1-norm"):
        _, plan, before = compressed("residual", first)

        _, _, after = compressed("residual", method, patch=before.patch, plan=plan)

        if method == "fskd":
            assert after.patch.drop == before.patch.drop
        assert after.patch.drop >= before.patch.drop


def job(folder: Path, teacher: str, method: str, **options: Any) -> Job:
    wanted: dict[str, Any] = {
        "model": SAMPLES / f"{teacher}.onnx",
        "out": folder / "student.onnx",
        "force": True,
        "shots": (str(SAMPLES / "shots"),),
        "holdout": str(SAMPLES / "held_out.npz"),
        "preprocess": Preprocess(preset="unit"),
        "device": "cpu",
        "method": (method,),
        "keep": 0.5,
    }
    return Job(**(wanted | options))


@pytest.mark.parametrize("teacher", ["digits_residual", "digits_mobile"])
def test_every_baseline_wins_back_most_of_what_removal_costs(teacher: str, tmp_path: Path) -> None:
    gaps = {}
    for method in ("l1-norm", *BASELINES):
        report = run(job(tmp_path, teacher, method))
        assert report.fidelity
        gaps[method] = report.fidelity.outputs[0].relative_l2
    assert all(gaps[method] < 0.7 * gaps["l1-norm"] for method in BASELINES), gaps


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("structure", ["element", "2:4"])
def test_single_weights_are_refused_with_what_is_legal(method: str, structure: str, tmp_path: Path) -> None:
    keep = 0.5 if structure == "element" else None
    with pytest.raises(JobError, match=f"(?s)--structure {structure}.*Legal: --structure channel"):
        job(tmp_path, "digits_vgg", method, structure=structure, keep=keep).methods()


def test_options_of_other_methods_and_senseless_ridges_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="--ridge is no option"):
        job(tmp_path, "digits_vgg", "thinet", ridge=0.1).methods()
    for method in ("fskd", "channel-pruning"):
        with pytest.raises(JobError, match="ridge is -1"):
            job(tmp_path, "digits_vgg", method, ridge=-1.0).methods()
