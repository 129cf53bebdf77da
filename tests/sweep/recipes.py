"""Sweeps that take seconds, on the sample teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xdonnx.sweep.conduct import run_sweep
from xdonnx.sweep.description import Description, read_sweep
from xdonnx.sweep.results import SweepResults

SAMPLES = Path(__file__).parents[2] / "samples"
DATA = f"""
[options]
shots = "{SAMPLES}/shots"
holdout = "{SAMPLES}/held_out.npz"
preset = "unit"
per-class = 2
"""
MODEL = f"""
[[model]]
model = "{SAMPLES}/digits_vgg.onnx"
"""
# Two methods that differ in what they refit, for nothing is fitted by the first; a limit that only the second keeps.
GRID = f"""
title = "Tiny"
seeds = [0, 1]
targets = [{{ keep = "20%" }}]
{DATA}include = ["*features.3*"]
max-drop = 20
{MODEL}
[[method]]
name = "l1-norm"

[[method]]
name = "refitted"
method = "cross"
preset-effort = "fast"
views = 0
"""


def write(folder: Path, text: str = GRID) -> Path:
    """Return a sweep's file in a folder."""
    path = folder / "tiny.toml"
    path.write_text(text, encoding="utf-8")
    return path


def swept(folder: Path, text: str = GRID, *, out: str = "out", **options: Any) -> SweepResults:
    """Run a sweep in a folder."""
    run = options.pop("run", {})
    sweep = read_sweep(write(folder, text))
    return run_sweep(sweep, folder / out, run=sweep.run.model_copy(update=run), **options)


def students(results: SweepResults) -> dict[str, str | None]:
    """Return the hash of the student of each trial that has one."""
    return {trial.key: trial.student_sha256 for trial in results.trials if trial.student_sha256}


def described(folder: Path, text: str = GRID) -> Description:
    """Return a sweep, read."""
    return read_sweep(write(folder, text))
