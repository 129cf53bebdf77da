"""The training loop beside a pool: what is in a batch, what judges, and that one seed gives one student."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import nets
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from xdonnx.convert import convert
from xdonnx.errors import JobError
from xdonnx.graph import Net, read_net
from xdonnx.methods.bench import Bench
from xdonnx.methods.bp import BP
from xdonnx.methods.training import Batch, Schedule, relative_error, train
from xdonnx.patch import Patch
from xdonnx.pool import UNLABELLED, Pool
from xdonnx.shots import Shots
from xdonnx.student import Taps

SEEN = Taps(("image",), ("out",))


@pytest.fixture
def net() -> Net:
    return read_net(nets.build("plain"))


def shots_of(net: Net, rows: int, value: float, *, labels: bool = False) -> Shots:
    """Return samples whose numbers all lie around a value, by which they are known again."""
    inputs = nets.samples(net.source, rows, seed=1)
    marked = {name: (value + 0.1 * np.tanh(array)).astype(array.dtype) for name, array in inputs.items()}
    return Shots(marked, np.arange(rows) % 3 if labels else None, tuple(map(str, range(rows))))


def halved(net: Net) -> Patch:
    return Patch({}, frozenset(int(label) for group in net.groups for label in group.ids[::2]))


def bench_of(net: Net, pool: Pool | None) -> Bench:
    return Bench(convert(net, torch.device("cpu")), torch.Generator().manual_seed(0), pool=pool)


def trained(net: Net, pool: Pool | None, *, labels: bool = False, mix: bool = False) -> tuple[Patch, list[Batch], Any]:
    """Return the student, the batches that trained it, and those that judged."""
    training: list[Batch] = []
    judging: list[Batch] = []

    def loss(batch: Batch) -> torch.Tensor:
        (training if torch.is_grad_enabled() else judging).append(batch)
        return relative_error(batch.student["out"], batch.teacher["out"])

    shots = shots_of(net, 60, 1.0, labels=labels)
    made = train(net, halved(net), shots, loss, Schedule(12, 8, mix, (0.01,)), bench_of(net, pool), SEEN)
    return made.patch, training, judging


def of_the_pool(batch: Batch) -> NDArray[np.bool_]:
    """Return which rows are from the pool, whose numbers lie around -1."""
    return np.asarray(batch.teacher["image"].flatten(1).mean(1) < 0)


def test_half_of_a_batch_is_of_the_pool_and_none_of_what_judges(net: Net) -> None:
    _, training, judging = trained(net, Pool(shots_of(net, 30, -1.0)))

    assert training and all(of_the_pool(batch).tolist() == [False] * 4 + [True] * 4 for batch in training)
    assert judging and not any(of_the_pool(batch).any() for batch in judging)


def test_images_of_the_pool_have_no_label(net: Net) -> None:
    _, training, judging = trained(net, Pool(shots_of(net, 30, -1.0, labels=True)), labels=True)

    for batch in training:
        assert batch.labels is not None
        assert ((batch.labels == UNLABELLED).numpy() == of_the_pool(batch)).all()
        assert set(batch.labels[:4].tolist()) <= {0, 1, 2}
    assert all(UNLABELLED not in batch.labels for batch in judging)


def test_a_method_that_learns_labels_alone_trains_as_without_a_pool() -> None:
    net = read_net(nets.build("flatten"))
    shots = shots_of(net, 20, 1.0, labels=True)
    found = [
        BP(steps=5)(net, halved(net), shots, None, bench_of(net, pool)).patch  # type: ignore[arg-type]
        for pool in (None, Pool(shots_of(net, 30, -1.0)))
    ]

    assert all((found[0].tensors[name] == found[1].tensors[name]).all() for name in found[0].tensors)


@pytest.mark.parametrize("mix", [False, True])
def test_one_seed_gives_one_student_and_the_pool_changes_it(net: Net, mix: bool) -> None:
    pool = Pool(shots_of(net, 30, -1.0), np.linspace(-1.5, 1.5, 30))
    first, again, uniform, none = (
        trained(net, one, mix=mix)[0] for one in (pool, replace(pool), replace(pool, how="uniform"), None)
    )

    def same(one: Patch, other: Patch) -> bool:
        return all((one.tensors[name] == other.tensors[name]).all() for name in one.tensors)

    assert same(first, again) and not same(first, uniform) and not same(first, none)


def test_a_pool_of_one_image_works(net: Net) -> None:
    _, training, _ = trained(net, Pool(shots_of(net, 1, -1.0), np.zeros(1)))

    assert all(of_the_pool(batch).sum() == 4 for batch in training)


def test_related_images_are_drawn_more_often_by_the_odds_of_their_scores(net: Net) -> None:
    scores = np.linspace(-1, 1, 5)
    pool = Pool(shots_of(net, 5, -1.0), scores)
    drawn = pool.draw(20_000, seed=0)[net.interface.inputs[0].name]
    first = pool.images.inputs[net.interface.inputs[0].name]

    counts = np.array([(drawn.reshape(20_000, -1)[:, 0] == row).sum() for row in first.reshape(5, -1)[:, 0]])

    assert counts / 20_000 == pytest.approx(np.exp(-scores / 0.5) / np.exp(-scores / 0.5).sum(), abs=0.01)
    assert replace(pool, how="uniform").chances() == pytest.approx(np.full(5, 0.2))
    assert Pool(pool.images).chances() == pytest.approx(np.full(5, 0.2))


def test_a_draw_that_is_none_is_refused(net: Net) -> None:
    with pytest.raises(JobError, match=r"'preferental'\. Did you mean 'preferential'"):
        Pool(shots_of(net, 2, 0.0), how="preferental")
