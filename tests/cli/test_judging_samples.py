"""Which samples judge in `verify`, and what is said of them: the very ones of the job that made the student."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from program import SAMPLES, TEACHER, call

from xdonnx.job import Job, prepared
from xdonnx.report import Report, read_report


def verified(*arguments: str | Path) -> Report:
    """Compare a model with itself on samples."""
    ended = call("verify", TEACHER, TEACHER, *arguments, "--preset", "unit", "--json", "again.json")
    assert ended.code == 0, ended.err
    return read_report("again.json")


@pytest.mark.parametrize("holdout", ["0.3", "others.npz"])
def test_held_out_samples_that_also_fit_judge_neither_the_job_nor_again(here: Path, holdout: str) -> None:
    """Thirty images that stand there twice: 18 were held out, and those whose twin fitted judged again in `verify`."""
    with np.load(SAMPLES / "held_out.npz") as held:
        images, labels = held["images"][:30], held["labels"][:30]
        np.savez("twice.npz", images=np.concatenate([images, images]), labels=np.concatenate([labels, labels]))
        np.savez("others.npz", images=held["images"][20:60], labels=held["labels"][20:60])
    data = {"shots": ("twice.npz",), "holdout": holdout, "seed": 3}
    job = Job(model=TEACHER, out="s.onnx", preprocess={"preset": "unit"}, **data)
    ready = prepared(job)

    again = verified("--shots", "twice.npz", "--holdout", holdout, "--seed", "3")

    assert again.fidelity and again.fidelity.samples == len(ready.held_out)
    assert 0 < len(ready.held_out) < (18 if holdout == "0.3" else 40)
    assert {case.id for case in again.fidelity.worst} <= set(ready.held_out.ids)
    assert any("held-out samples are also among those that fit: left out" in text for text in again.warnings)


def test_without_a_hold_out_all_judge_though_they_stand_there_twice(here: Path) -> None:
    with np.load(SAMPLES / "held_out.npz") as held:
        np.savez("twice.npz", images=np.concatenate([held["images"][:9]] * 2))

    again = verified("--shots", "twice.npz")

    assert again.fidelity and again.fidelity.samples == 18
    assert not any("left out" in text for text in again.warnings)


@pytest.mark.parametrize("where", ["--shots", "--holdout"])
def test_every_file_that_is_left_out_is_named_with_its_reason(here: Path, where: str) -> None:
    with np.load(SAMPLES / "held_out.npz") as held:
        for folder in ("good", "bad"):
            (here / folder).mkdir()
            for at in range(12):
                Image.fromarray(held["images"][at + 20 * (folder == "bad")]).save(f"{folder}/{at:02}.png")
    for at in range(8):
        Path(f"bad/{at:02}.png").write_bytes(b"" if at % 2 else b"no image")

    shots = ["--shots", "bad"] if where == "--shots" else ["--shots", "good", "--holdout", "bad"]
    again = verified(*shots, "--skip-bad")

    assert again.fidelity and again.fidelity.samples == 4
    said = "\n".join(again.warnings)
    for at in range(8):
        assert f"'{at:02}.png' ({'0 bytes' if at % 2 else 'not an image'})" in said
    assert ("hold-out: left out 8 of 12 images" in said) == (where == "--holdout")
    assert any(text.startswith("left out 8 of 12 images") for text in again.warnings) == (where == "--shots")


def test_noise_is_called_noise(here: Path) -> None:
    ended = call("verify", TEACHER, TEACHER, "--synthetic-shots", "20", "--json", "-")

    assert ended.code == 0
    assert any("random noise" in text for text in json.loads(ended.out)["warnings"])
