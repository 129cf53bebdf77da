"""One good run that several tests look at."""

from __future__ import annotations

import pytest
from program import SAMPLES, SHOTS, TEACHER, Compressed, call


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    """Compress a sample teacher once."""
    folder = tmp_path_factory.mktemp("compressed")
    ended = call(
        "compress", TEACHER, *SHOTS, "-o", folder / "student.onnx", "--preset-effort", "fast", "--per-class", "4",
        "--holdout", SAMPLES / "held_out.npz", "--max-drop", "50", "--min-shrink", "10%", "--json", folder / "run.json",
    )  # fmt: skip
    return Compressed(folder, ended)
