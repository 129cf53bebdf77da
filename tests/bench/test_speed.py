"""How long the parts take, by pytest-benchmark: `pytest --bench`. Seeds are fixed, so runs of two versions compare.

Where all iterations would take minutes, a few are made, and the name says how many.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

import xdonnx
from xdonnx.budget import Budget, make_plan
from xdonnx.columns import Geometry
from xdonnx.connection import Quadratic, damped
from xdonnx.graph import read_net
from xdonnx.methods.joint import producer_norms
from xdonnx.moments import measure
from xdonnx.patch import Patch, cut
from xdonnx.solve import ADMM, PGD, Greedy, refit
from xdonnx.structure import Channel, Element

pytestmark = pytest.mark.bench

SAMPLES = Path(__file__).parents[2] / "samples"
TEACHERS = ("digits_vgg", "digits_residual", "digits_mobile")
# Columns of 3x3 convolutions with 16, 64, 256 and 512 inputs, and as many outputs.
COLUMNS = (144, 576, 2304, 4608)
CONV = Geometry("conv", 1, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def layer(columns: int) -> tuple[Quadratic, Tensor]:
    """A layer with four times as many columns as positions, as few shots leave it, and the teacher's weights."""
    generator = torch.Generator().manual_seed(columns)
    seen = torch.randn(1, columns, columns // 4, generator=generator).relu().double()
    teacher = torch.randn(1, columns // 9, columns, generator=generator, dtype=torch.float64) / columns**0.5
    hess = seen @ seen.mT / seen.shape[2]
    lin = teacher @ hess
    return damped(Quadratic(hess, lin, (lin * teacher).sum((1, 2))), teacher, 0.01, bias=False), teacher


def channels(columns: int) -> Channel:
    return Channel(torch.arange(columns) // 9)


def rounds(columns: int) -> dict[str, int]:
    return {"rounds": 5 if columns <= 576 else 1, "iterations": 1, "warmup_rounds": 1 if columns <= 576 else 0}


def better_than_magnitude(q: Quadratic, teacher: Tensor, solution, structure, keep: int) -> None:
    """Assert that as many units stay as were asked for, and that they answer better than the largest alone."""
    assert int((structure.scores(solution.weight) > 0).sum()) == keep
    assert float(q(solution.weight)) < float(q(teacher * structure.project(teacher, keep)))


@pytest.mark.parametrize("name", TEACHERS)
def test_read(benchmark, name):
    proto = onnx.load(SAMPLES / f"{name}.onnx")
    net = benchmark(read_net, proto)
    assert net.groups


@pytest.mark.parametrize("agree", [True, False], ids=["one input", "two inputs"])
@pytest.mark.parametrize("width", [16, 64], ids=["16 channels", "64 channels"])
def test_moments_of_fifty_samples(benchmark, width, agree):
    generator = torch.Generator().manual_seed(width)
    size = 512 // width
    teacher = torch.randn(50, width, size, size, generator=generator).relu()
    student = teacher if agree else (teacher + 0.1 * torch.randn(teacher.shape, generator=generator)).relu()
    moments = benchmark(measure, [teacher], [student], CONV, bias=True)
    assert moments.count == 50 * size * size and (moments.tt is moments.ss) == agree


@pytest.mark.parametrize(("columns", "steps"), list(zip(COLUMNS, (3000, 3000, 30, 6), strict=True)))
def test_proximal_descent_by_columns_and_steps(benchmark, columns, steps):
    q, teacher = layer(columns)
    structure, solver = channels(columns), PGD(iterations=steps, rate=1e-4, refit=False)
    keep = structure.count // 2
    found = benchmark.pedantic(solver, (q, teacher, structure, keep), **rounds(columns))
    assert found.steps == steps
    better_than_magnitude(q, teacher, found, structure, keep)


@pytest.mark.parametrize(("columns", "steps"), list(zip(COLUMNS, (300, 300, 30, 6), strict=True)))
def test_admm_for_channels_by_columns_and_steps(benchmark, columns, steps):
    q, teacher = layer(columns)
    structure, solver = channels(columns), ADMM(iterations=steps)
    keep = structure.count // 2
    found = benchmark.pedantic(solver, (q, teacher, structure, keep), **rounds(columns))
    better_than_magnitude(q, teacher, found, structure, keep)


def test_admm_for_single_weights(benchmark):
    q, teacher = layer(576)
    structure = Element(torch.ones(576, dtype=torch.bool), 64)
    found = benchmark.pedantic(ADMM(), (q, teacher, structure, structure.count // 10), **rounds(576))
    better_than_magnitude(q, teacher, found, structure, structure.count // 10)


@pytest.mark.parametrize("columns", COLUMNS)
def test_greedy_by_columns(benchmark, columns):
    q, teacher = layer(columns)
    structure = channels(columns)
    keep = structure.count // 2
    found = benchmark.pedantic(Greedy(), (q, teacher, structure, keep), **rounds(columns))
    better_than_magnitude(q, teacher, found, structure, keep)


@pytest.mark.parametrize("columns", COLUMNS)
def test_refit_by_columns(benchmark, columns):
    q, teacher = layer(columns)
    mask = channels(columns).project(teacher, columns // 18)
    found = benchmark.pedantic(refit, (q, mask, teacher), **rounds(columns))
    assert float(q.grad(found)[mask].abs().max()) < 1e-8 * float(q.lin.abs().max())


@pytest.mark.parametrize("name", TEACHERS)
def test_cut(benchmark, name):
    net = read_net(onnx.load(SAMPLES / f"{name}.onnx"))
    plan = make_plan(net, Budget("macs", 0.5))
    drop = frozenset(
        int(net.groups[at].ids[unit])
        for at, keep in plan.channels.items()
        for unit in np.argsort(-producer_norms(net, net.groups[at]), kind="stable")[keep:]
    )
    student = benchmark(cut, net, Patch({}, drop))
    assert student.ByteSize() < net.source.ByteSize()


def test_whole_job(benchmark, here):
    def compress() -> xdonnx.Report:
        return xdonnx.compress(
            SAMPLES / "digits_vgg.onnx",
            SAMPLES / "shots",
            here / "student.onnx",
            holdout=SAMPLES / "held_out.npz",
            preset="unit",
            macs=0.5,
            device="cpu",
            force=True,
        )

    report = benchmark.pedantic(compress, rounds=3, iterations=1, warmup_rounds=1)
    assert report.student.macs <= report.teacher.macs / 2 and report.fidelity.accuracy_student > 95
