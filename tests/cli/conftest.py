"""An empty folder to work in, and one good run that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from program import SAMPLES, SHOTS, TEACHER, Compressed, call


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    """Compress a sample teacher once."""
    folder = tmp_path_factory.mktemp("compressed")
    ended = call(
        "compress", TEACHER, *SHOTS, "-o", folder / "student.onnx", "--preset-effort", "fast", "--per-class", "4",
        "--holdout", SAMPLES / "held_out.npz", "--max-drop", "50", "--min-shrink", "10%", "--json", folder / "run.json",
    )  # fmt: skip
    return Compressed(folder, ended)
