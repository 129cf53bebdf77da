"""Trials: what they are known by, and what one of them leaves."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import onnxruntime
import pytest
from recipes import GRID, SAMPLES, described, write

from xdonnx.contents import content, remembered
from xdonnx.model import fingerprint
from xdonnx.report import read_report
from xdonnx.sweep.description import read_sweep
from xdonnx.sweep.results import SweepResults
from xdonnx.sweep.trials import grid
from xdonnx_cli.app import run as command_line


def test_a_trial_is_known_by_its_options_and_the_contents_of_its_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for file in ("digits_vgg.onnx", "held_out.npz"):
            shutil.copy(SAMPLES / file, tmp_path / name)
        shutil.copytree(SAMPLES / "shots", tmp_path / name / "shots")

    def keys(name: str, text: str = GRID) -> list[str]:
        remembered.cache_clear()
        path = write(tmp_path / name, text.replace(str(SAMPLES), "."))
        return [one.key for one in grid(read_sweep(path), tmp_path / "out")]

    first = keys("one")
    assert len(set(first)) == 4 and keys("two") == first, "where files lie makes no difference"
    assert keys("two", GRID.replace('title = "Tiny"', 'title = "Other"\ncost = "bytes"')) == first
    assert not set(keys("two", GRID.replace("per-class = 2", "per-class = 3"))) & set(first)
    assert not set(keys("two", GRID.replace("max-drop = 20", "max-drop = 21"))) & set(first)
    (tmp_path / "two" / "shots" / "3" / "00.png").unlink()
    assert not set(keys("two")) & set(first)


def test_the_images_that_a_list_names_count_as_its_contents(tmp_path: Path) -> None:
    shutil.copy(SAMPLES / "shots" / "0" / "00.png", tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png\n")
    before = content(tmp_path / "list.txt")
    shutil.copy(SAMPLES / "shots" / "1" / "00.png", tmp_path / "a.png")
    remembered.cache_clear()
    assert content(tmp_path / "list.txt") != before


def test_a_trial_leaves_its_report_and_its_student_in_a_folder_of_its_own(tiny: tuple[Path, SweepResults]) -> None:
    folder, results = tiny
    for trial in results.trials:
        place = folder / "out" / trial.folder
        name = {"passed": "student.onnx", "rejected": "student.rejected.onnx"}[trial.status]
        assert {path.name for path in place.iterdir()} == {"report.json", name}
        assert fingerprint(place / name) == trial.student_sha256
        onnxruntime.InferenceSession(place / name, providers=["CPUExecutionProvider"])
        report = read_report(place)
        assert report.status == trial.status and report.files.student and report.files.teacher
        assert Path(report.files.student.path) == place / name, "the report names the place where it lies"
        assert report.job["out"] == str(place / "student.onnx")
        assert report.fidelity and report.fidelity.accuracy_student == trial.accuracy
        assert report.student and report.teacher and report.student.macs / report.teacher.macs == trial.macs


def test_the_command_of_a_trial_makes_the_same_student(
    tiny: tuple[Path, SweepResults], tmp_path: Path, one_thread: None
) -> None:
    trial = next(trial for trial in tiny[1].trials if trial.status == "passed")
    words = shlex.split(trial.command)
    assert words[:2] == ["xdonnx", "compress"] and words[-2:] == ["-o", "student.onnx"]

    code = command_line([*words[1:-1], str(tmp_path / "student.onnx"), "-q"])

    assert code == 0 and fingerprint(tmp_path / "student.onnx") == trial.student_sha256


def test_the_lines_of_a_sweep_are_its_trials(tiny: tuple[Path, SweepResults]) -> None:
    folder, results = tiny
    lines = [json.loads(line) for line in (folder / "out" / "runs.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [trial.key for trial in results.trials]
    assert [line["seed"] for line in lines] == [0, 0, 1, 1]


@pytest.mark.parametrize("old", ['method = "cross"', "views = 0"])
def test_options_at_their_defaults_do_not_enter_the_key(tmp_path: Path, old: str) -> None:
    plain = [one.key for one in grid(described(tmp_path), tmp_path)]
    text = GRID.replace(old, f'solver = "auto"\n{old}')
    assert [one.key for one in grid(described(tmp_path, text), tmp_path)] == plain
