"""Fixtures, the paths that tests import from, and the switches for slow tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
# Before any test imports torch: see `xdonnx/__init__.py`.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes share the cores; threads of each would wait for those of the others.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--paper", action="store_true", help="run the minutes-long reproductions (needs XDONNX_DATA)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    data = os.environ.get("XDONNX_DATA")
    for item in items:
        if ("corpus" in item.keywords or "paper" in item.keywords) and not data:
            item.add_marker(pytest.mark.skip(reason="set XDONNX_DATA to the folder of real models"))
        elif "paper" in item.keywords and not config.getoption("--paper"):
            item.add_marker(pytest.mark.skip(reason="minutes long: pass --paper"))


@pytest.fixture
def data() -> Path:
    """Return the folder of real models and images."""
    return Path(os.environ["XDONNX_DATA"])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the images and labels that the samples hold out."""
    with np.load(Path(__file__).parents[1] / "samples" / "held_out.npz") as held:
        return held["images"], held["labels"]
