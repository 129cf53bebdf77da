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
    parser.addoption("--bench", action="store_true", help="time the parts, one after the other, and run nothing else")
    parser.addoption("--paper", action="store_true", help="run the minutes-long reproductions (needs XDONNX_DATA)")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    if config.getoption("--bench"):
        if not config.pluginmanager.hasplugin("benchmark"):
            raise pytest.UsageError("--bench needs pytest-benchmark: python -m pip install '.[test]'")
        # Before pytest-xdist looks: what runs side by side cannot be timed.
        config.option.numprocesses = 0


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("benchmark") and not config.getoption("--bench"):
        # Else pytest-benchmark warns that it times nothing beside pytest-xdist, and warnings are errors.
        config.option.benchmark_disable = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    data = os.environ.get("XDONNX_DATA")
    if config.getoption("--bench"):
        others = [item for item in items if not item.get_closest_marker("bench")]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item.get_closest_marker("bench")]
    for item in items:
        if item.get_closest_marker("bench") and not config.getoption("--bench"):
            item.add_marker(pytest.mark.skip(reason="times parts for minutes: pass --bench"))
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
