"""Layers fitted on images of a pool too: the weighted sums against sums by hand, the choice, and what stays apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import xdonnx.direct
from xdonnx.budget import Budget, make_plan
from xdonnx.columns import Geometry
from xdonnx.connection import regression, soft
from xdonnx.convert import convert
from xdonnx.crossval import Fold, choose, measure_folds
from xdonnx.direct import Seen, blended, measure_directly
from xdonnx.events import Event
from xdonnx.graph import Net, read_net
from xdonnx.journal import open_journal
from xdonnx.methods import METHODS, POOLED, layerwise, make
from xdonnx.methods.bench import Bench, Outcome
from xdonnx.methods.cross import Cross
from xdonnx.patch import Patch, cut
from xdonnx.pool import Pool
from xdonnx.resuming import staged
from xdonnx.runtime import answer, open_session
from xdonnx.shots import Shots

LINEAR = Geometry("linear")
Array = NDArray[Any]


def rows_of(seed: int, n: int, d: int = 5) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    x_t = random.standard_normal((n, d)) + 0.3
    return x_t, 0.9 * x_t + 0.2 * random.standard_normal((n, d))


def fold_of(x_t: Array, x_s: Array) -> Fold:
    chunks = [torch.tensor(x_t)], [torch.tensor(x_s)]
    return measure_folds(*chunks, None, LINEAR, bias=True, rows=len(x_t), samples=len(x_t), folds=1)[0]


def by_hand(x_t: Array, x_s: Array, weights: Array) -> Array:
    """Return the mean of x_s x_s' under a weight for each row, with a column of ones."""
    x_s = np.concatenate([x_s, np.ones((len(x_s), 1))], 1)
    return np.asarray((x_s.T * weights) @ x_s / weights.sum())


@pytest.mark.parametrize("share", [0.1, 1.0, 3.0])
def test_a_pool_counts_as_its_share_says_however_many_rows_it_has(share: float) -> None:
    own, pool = rows_of(0, 400), rows_of(1, 90)
    weights = np.concatenate([np.full(400, 1 / 400), np.full(90, share / 90)])

    both = fold_of(*own).and_share(fold_of(*pool), share)

    expected = by_hand(*(np.concatenate(pair) for pair in zip(own, pool, strict=True)), weights)
    np.testing.assert_allclose(both.moments.ss[0].numpy(), expected, rtol=5e-3, atol=1e-3)
    assert fold_of(*own).and_share(None, share).moments.count == 400
    assert torch.equal(fold_of(*own).and_share(fold_of(*pool), 0.0).moments.tt, fold_of(*own).moments.tt)


def test_the_direct_way_weighs_a_pool_as_the_moments_do() -> None:
    teacher = torch.randn((1, 3, 6), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = [rows_of(0, 400), rows_of(1, 80)]
    candidate = (soft(0.9, 0.5), 0.01)
    chunks = [[torch.tensor(pair[side]) for pair in pairs] for side in (0, 1)]
    own, pool = Seen(chunks[0], chunks[1], None, LINEAR).apart(1)
    assert pool is not None and Seen(chunks[0], chunks[1], None, LINEAR).apart(2)[1] is None
    how: dict[str, Any] = {"bias": True, "each": 0, "dtype": torch.float64}

    found = blended(*(measure_directly(seen, candidate, teacher, **how) for seen in (own, pool)), 0.25)

    folds = [fold_of(*pair) for pair in pairs]
    expected = folds[0].and_share(folds[1], 0.25).quadratic(candidate, teacher, bias=True)
    torch.testing.assert_close(found.hess, expected.hess)
    torch.testing.assert_close(found.lin, expected.lin)
    torch.testing.assert_close(found.const, expected.const)


@pytest.mark.parametrize("related", [True, False])
def test_folds_of_the_samples_choose_the_weight_of_the_pool(related: bool) -> None:
    """A pool that obeys the same law is worth its full weight; one that obeys the opposite is left out."""
    random = np.random.default_rng(0)
    mixing = random.standard_normal((6, 6))

    def rows(n: int, seed: int, *, wrong: bool = False) -> tuple[Array, Array]:
        generator = np.random.default_rng(seed)
        x_t = generator.standard_normal((n, 6))
        noise = generator.standard_normal((n, 6)) * (1 if related else 0.1)
        return x_t, (-1 if wrong else 1) * x_t @ mixing + noise

    teacher = torch.tensor(random.standard_normal((1, 4, 6)))
    own = rows(15, 1)
    folds = measure_folds(
        [torch.tensor(own[0])], [torch.tensor(own[1])], None, LINEAR, bias=False, rows=15, samples=15, folds=3
    )
    chunks = [torch.tensor(x) for x in rows(4000, 2, wrong=not related)]
    pool = measure_folds(chunks[:1], chunks[1:], None, LINEAR, bias=False, rows=0, samples=1, folds=1)[0]
    shares = (0.3, 0.0, 0.1, 1.0)
    everything = torch.ones_like(teacher, dtype=torch.bool), torch.ones(6, dtype=torch.bool)

    best = choose(folds, [(regression(), 0.01)] * 4, teacher, *everything, bias=False, lean=0, pool=pool, shares=shares)

    assert shares[best] == (1.0 if related else 0.0)


@pytest.fixture
def net() -> Net:
    return read_net(nets.build("residual"))


def shots_of(net: Net, rows: int, seed: int) -> Shots:
    return Shots(nets.samples(net.source, rows, seed), None, tuple(map(str, range(rows))))


def outcome(net: Net, shots: Shots, pool: Pool | None, log: Any = lambda event: None, **options: Any) -> Outcome:
    journal = options.pop("journal", None)
    bench = Bench(convert(net, torch.device("cpu")), torch.Generator().manual_seed(0), log, pool=pool, journal=journal)
    options = {"views": 0} | options
    return Cross(**options)(net, Patch(), shots, make_plan(net, Budget("keep", 0.5, "channel")), bench)


def fitted(net: Net, shots: Shots, pool: Pool | None, log: Any = lambda event: None, **options: Any) -> Patch:
    return outcome(net, shots, pool, log, **options).patch


def same(one: Patch, other: Patch) -> bool:
    return one.drop == other.drop and all((one.tensors[name] == other.tensors[name]).all() for name in one.tensors)


def gap(net: Net, patch: Patch) -> float:
    """Return the error of the written student on samples that nobody was fitted on."""
    feed = nets.samples(net.source, 200, seed=77)
    a, b = (next(iter(answer(open_session(model), feed).values())) for model in (net.source, cut(net, patch)))
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def test_images_of_the_same_kind_make_up_for_few_samples(net: Net) -> None:
    shots = shots_of(net, 3, 1)

    assert gap(net, fitted(net, shots, Pool(shots_of(net, 60, 2)))) < 0.9 * gap(net, fitted(net, shots, None))


def test_without_weight_a_pool_changes_nothing_and_one_seed_gives_one_student(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    shots, pool = shots_of(net, 4, 1), Pool(shots_of(net, 60, 2))
    alone, first, again = fitted(net, shots, None), fitted(net, shots, pool), fitted(net, shots, pool)
    monkeypatch.setattr(layerwise, "SHARES", (0.0,))

    assert same(first, again) and not same(first, alone)
    assert same(fitted(net, shots, pool), alone)
    # The published procedure knows no pool.
    published = {"effort": "paper", "solver": "greedy"}
    assert same(fitted(net, shots, pool, **published), fitted(net, shots, None, **published))


def test_traces_tell_the_weight_of_the_pool_and_a_job_that_goes_on_tells_the_same(net: Net, tmp_path: Path) -> None:
    shots, pool = shots_of(net, 9, 1), Pool(shots_of(net, 60, 2))

    def weights(pool: Pool | None, **options: Any) -> list[float | None]:
        return [trace.pool for trace in outcome(net, shots, pool, **options).traces]

    found = weights(pool, journal=open_journal(tmp_path / "j", {}, resume=False))

    assert {weight for weight in found if weight is not None} <= set(layerwise.SHARES) and any(found)
    assert found == weights(pool, journal=open_journal(tmp_path / "j", {}, resume=True))
    # Without folds nothing is chosen; and what nobody looked at has no weight.
    assert weights(pool, effort="fast") == [weight if weight is None else layerwise.SHARES[0] for weight in found]
    assert set(weights(None)) == {None}


def test_a_method_that_an_earlier_run_finished_tells_the_weight_of_the_pool_too(net: Net, tmp_path: Path) -> None:
    shots, pool = shots_of(net, 9, 1), Pool(shots_of(net, 60, 2))
    bench = Bench(convert(net, torch.device("cpu")), torch.Generator().manual_seed(0), pool=pool)
    plan = make_plan(net, Budget("keep", 0.5))
    journal = open_journal(tmp_path / "j", {}, resume=False)

    made = staged(0, Cross(), net, Patch(), shots, plan, bench, journal)

    def never(*_: Any) -> Outcome:
        raise AssertionError("it was made before")

    recalled = staged(0, never, net, Patch(), shots, plan, bench, journal)
    assert [trace.pool for trace in recalled.traces] == [trace.pool for trace in made.traces]
    assert any(trace.pool for trace in recalled.traces)


def test_layers_too_dear_for_moments_are_fitted_on_the_pool_too(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xdonnx.direct, "DEAR", 0)
    shots, pool = shots_of(net, 3, 1), Pool(shots_of(net, 60, 2))

    made = outcome(net, shots, pool)

    assert gap(net, made.patch) < 0.95 * gap(net, fitted(net, shots, None))
    # Layers that read and lose nothing that differs are left alone.
    fitted_ones = [trace.pool for trace in made.traces if trace.objective_before]
    assert len(fitted_ones) > 1 and set(fitted_ones) == {layerwise.SHARES[0]}
    assert {trace.pool for trace in made.traces if not trace.objective_before} == {None}


def test_layers_too_wide_for_moments_do_without_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    net = read_net(nets.build("plain"))
    monkeypatch.setattr(layerwise, "WIDEST", 0)
    shots, pool = shots_of(net, 3, 1), Pool(shots_of(net, 8, 2))

    assert same(fitted(net, shots, pool), fitted(net, shots, None))


def test_a_graph_of_fixed_batch_takes_rows_of_a_pool_in_its_own_runs() -> None:
    text = nets.TEXTS["plain"].replace("float[N,", "float[4,")
    net = read_net(nets.from_text(text))
    shots, pool = shots_of(net, 6, 1), Pool(shots_of(net, 30, 2))

    made = fitted(net, shots, pool)

    assert not same(made, fitted(net, shots, None)) and all(np.isfinite(array).all() for array in made.tensors.values())


def test_where_there_is_no_room_the_pool_is_left_out_and_that_is_said(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xdonnx.walk.MOST_MACS", 1)
    events: list[Event] = []

    made = fitted(net, shots_of(net, 4, 1), Pool(shots_of(net, 60, 2)), events.append)

    assert same(made, fitted(net, shots_of(net, 4, 1), None))
    assert any("without the pool" in event.text for event in events if event.level == "warning")


@pytest.mark.parametrize("name", METHODS)
def test_the_table_says_which_methods_draw_from_a_pool(name: str) -> None:
    assert bool(getattr(make(name, {}), "pools", False)) == (name in POOLED)
