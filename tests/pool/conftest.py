"""Scores that tests measure are kept in a folder of each test."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of caches, which is empty."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDONNX_CACHE", str(folder))
    return folder
