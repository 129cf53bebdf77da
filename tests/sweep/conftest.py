"""One small sweep, run once for all tests that look at what it left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from recipes import swept

from xdonnx.sweep.results import SweepResults


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Give torch the one thread that a trial has: sums that are split end in other digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepResults]:
    """Return a folder with a sweep in `out`, done one trial after another, and its results."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder, swept(folder, command="xdonnx sweep tiny.toml")
