"""`xdonnx sweep` as it is typed: what it prints and writes, and each way in which it ends."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from program import SAMPLES, call, listing

import xdonnx
from xdonnx.sweep.results import SweepResults

PROGRAM = [sys.executable, "-c", "from xdonnx_cli.app import main; main()"]
SWEEP = f"""
title = "Tiny"
seeds = [0, 1]
targets = [{{ keep = "80%" }}, {{ keep = "60%" }}]
[options]
shots = "{SAMPLES}/shots"
holdout = "{SAMPLES}/held_out.npz"
preset = "unit"
include = ["*features.3*"]
per-class = 1
max-drop = 6
[[model]]
model = "{SAMPLES}/digits_vgg.onnx"
[[method]]
name = "l1-norm"
"""
SEARCH = SWEEP.replace('targets = [{ keep = "80%" }, { keep = "60%" }]', "") + (
    "[search]\ntrials = 2\n[search.space]\nkeep = { low = 0.5, high = 0.9 }\n"
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return a folder with a sweep that was run, and how that ended."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "tiny.toml").write_text(SWEEP)
    return folder, call("sweep", folder / "tiny.toml", "-o", folder / "out", "--json", folder / "out.json", "-v")


def test_a_sweep_prints_its_points_and_names_its_files(done: tuple[Path, Any]) -> None:
    folder, ended = done
    assert ended.code == 0
    assert ended.out.startswith("PASSED  4 trials: 2 passed, 2 rejected by their gate")
    rows = [line.split() for line in ended.out.splitlines() if "keep" in line and "of 2" in line]
    assert [row[row.index("keep") : row.index("keep") + 2] for row in rows] == [["keep", "60%"], ["keep", "80%"]]
    assert all(row[0] == "★" for row in rows) and "Teacher: 99.56 % accuracy" in ended.out
    assert "4 trials taken" in ended.out
    for name in ("report.html", "sweep.csv", "sweep.md", "sweep.json"):
        assert (folder / "out" / name).stat().st_size > 300 and name in ended.out
    told = [line.split(":")[0] for line in ended.err.splitlines()]
    assert told == [
        f"{at}/4 digits_vgg | l1-norm | keep {keep}% | seed {seed}"
        for at, (seed, keep) in enumerate([(0, 80), (0, 60), (1, 80), (1, 60)], start=1)
    ]


def test_the_json_is_that_of_the_folder_and_fits_the_schema_that_is_printed(done: tuple[Path, Any]) -> None:
    folder, _ = done
    saved = json.loads((folder / "out.json").read_text())
    assert saved == json.loads((folder / "out" / "sweep.json").read_text())
    ended = call("sweep", "--schema")
    assert ended.code == 0
    jsonschema.validate(saved, json.loads(ended.out))
    assert SweepResults.model_validate(saved).exit_code == 0


def test_json_to_stdout_leaves_the_tables_to_stderr_and_nothing_is_done_twice(done: tuple[Path, Any]) -> None:
    folder, _ = done
    ended = call("sweep", folder / "tiny.toml", "-o", folder / "out", "--json", "-")
    assert ended.code == 0 and json.loads(ended.out)["taken"] == 0
    assert "PASSED  4 trials" in ended.err


def test_a_dry_run_lists_what_is_done_and_what_is_not_and_writes_nothing(done: tuple[Path, Any]) -> None:
    folder, _ = done
    (folder / "more.toml").write_text(SWEEP.replace("[0, 1]", "[1, 2]"))
    before = listing(folder)

    ended = call("sweep", folder / "more.toml", "-o", folder / "out", "--dry-run")
    listed = call("sweep", folder / "more.toml", "-o", folder / "new", "--dry-run", "--json", "-")

    assert ended.code == listed.code == 0 and listing(folder) == before
    assert [line.split("  ")[0] for line in ended.out.splitlines()] == [
        "done", "done", "todo", "todo", "2 of 4 trials are done",
    ]  # fmt: skip
    assert [(trial["state"], trial["seed"]) for trial in json.loads(listed.out)] == [
        ("todo", 1), ("todo", 1), ("todo", 2), ("todo", 2),
    ]  # fmt: skip


def test_a_dry_run_lists_students_that_are_wanted_and_gone(done: tuple[Path, Any], here: Path) -> None:
    shutil.copytree(done[0], "copy")
    next(Path("copy/out/trials").rglob("student*.onnx")).unlink()
    for which, first in (("all", "again"), ("none", "done")):
        Path("copy/sweep.toml").write_text(SWEEP + f'\n[run]\nstudents = "{which}"\n')
        listed = call("sweep", "copy/sweep.toml", "-o", "copy/out", "--dry-run", "--json", "-")
        assert sorted(trial["state"] for trial in json.loads(listed.out)) == [first, "done", "done", "done"]


def test_a_dry_run_of_a_search_names_what_it_chooses_from(here: Path) -> None:
    Path("search.toml").write_text(SEARCH + 'connection = ["auto", "soft"]\n')
    ended = call("sweep", "search.toml", "--dry-run", "--trials", "9")
    assert ended.code == 0 and listing(here).keys() == {"search.toml"}
    assert "keep: 0.5 to 0.9\n" in ended.out and "connection: auto, soft\n" in ended.out
    assert "9 points for each of 1 models" in ended.out


def test_the_folder_is_named_after_the_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(job: Any, **_: Any) -> None:
        raise xdonnx.NothingToDo("target out of reach")

    monkeypatch.setattr(xdonnx, "run", refuse)
    Path("mine.toml").write_text(SWEEP)
    ended = call("sweep", "mine.toml")
    assert ended.code == 7 and (here / "mine.sweep" / "report.html").is_file()
    assert "FAILED  4 trials: 4 failed" in ended.out and "target out of reach" in ended.out


def test_one_trial_is_told_as_one(done: tuple[Path, Any]) -> None:
    folder, _ = done
    more = (folder / "tiny.toml").read_text().replace("seeds = [0, 1]", "seeds = [0]").replace('"60%"', '"70%"')
    (folder / "one.toml").write_text(more)
    ended = call("sweep", folder / "one.toml", "-o", folder / "out")
    assert "1 trial taken" in ended.out


def test_a_sweep_none_of_which_passes_ends_with_3(done: tuple[Path, Any]) -> None:
    folder, _ = done
    (folder / "strict.toml").write_text(SWEEP.replace('{ keep = "80%" }, ', ""))
    ended = call("sweep", folder / "strict.toml", "-o", folder / "out")
    assert ended.code == 3 and ended.out.startswith("REJECTED  2 trials: 2 rejected by their gate")


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        (
            SWEEP.replace("per-class", "per-clas"),
            [],
            "'bad.toml', line 10, [options]: unknown key: 'per-clas'. Did you",
        ),
        (SWEEP.replace("[[model]]", "[[modle]]"), [], "'bad.toml', modle: unknown key. Did you mean 'model'?"),
        (SWEEP, ["--backend", "rey"], "unknown --backend 'rey'. Did you mean 'ray'?"),
        (SWEEP, ["--trials", "3"], "--trials 3 is of a search, and 'bad.toml' has no [search]"),
        (SWEEP, ["--backend", "serial", "--jobs", "2"], "the backend serial does one at a time"),
        (SWEEP, ["--backend", "processes", "--address", "auto"], "an address is of a Ray cluster"),
        (SWEEP, ["-o", "bad.toml"], "'bad.toml' is a file"),
    ],
)
def test_what_is_typed_or_written_wrongly_ends_with_2(here: Path, text: str, words: list[str], says: str) -> None:
    Path("bad.toml").write_text(text)
    ended = call("sweep", "bad.toml", *words)
    assert ended.code == 2 and says in ended.err
    assert listing(here).keys() == {"bad.toml"}


@pytest.mark.parametrize(
    ("text", "words", "missing", "says"),
    [
        (SWEEP, ["--backend", "ray"], "ray", "python -m pip install 'ray>="),
        (SWEEP, ["--address", "auto"], "ray", "python -m pip install 'ray>="),
        (SEARCH, [], "optuna", "python -m pip install 'optuna>="),
    ],
)
def test_what_is_not_installed_ends_with_8_and_the_line_that_installs_it(
    here: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: list[str], missing: str, says: str
) -> None:
    whole = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == missing:
            raise ImportError(f"No module named '{missing}'")
        return whole(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    Path("tiny.toml").write_text(text)
    ended = call("sweep", "tiny.toml", *words)
    assert ended.code == 8 and says in ended.err and "internal" not in ended.err


@pytest.mark.parametrize(("backend", "sent"), [("serial", "SIGINT"), ("processes", "SIGINT"), ("processes", "SIGKILL")])
def test_a_sweep_that_is_stopped_goes_on_with_the_same_command(here: Path, backend: str, sent: str) -> None:
    Path("tiny.toml").write_text(SWEEP)
    words = [*PROGRAM, "sweep", "tiny.toml", "--backend", backend, "-v"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        process.send_signal(getattr(signal, sent))
        out, err = process.communicate(timeout=120)
    lines = Path("tiny.sweep/runs.jsonl").read_text().splitlines()
    again = call("sweep", "tiny.toml", "--json", "-")

    assert first.startswith("1/4 ") and 1 <= len(lines) < 4
    if sent == "SIGINT":
        assert process.returncode == 130 and "INTERRUPTED  4 trials: " in out and "Traceback" not in err
        assert "The same command does the rest." in err
    else:
        assert process.returncode == -signal.SIGKILL
    results = json.loads(again.out)
    assert again.code == 0 and results["taken"] == 4 - len(lines) and results["status"] == "complete"
    assert not Path("tiny.sweep/.scratch").exists()


def test_help_and_a_grid_bring_in_neither_ray_nor_optuna_and_help_no_torch(done: tuple[Path, Any]) -> None:
    folder, _ = done
    words = ["sweep", str(folder / "tiny.toml"), "-o", str(folder / "out"), "-q"]
    code = f"""
import sys
import xdonnx
from xdonnx_cli.app import run
assert run(["--help"]) == run(["sweep", "--help"]) == 0
assert not {{"torch", "onnx", "numpy", "ray", "optuna"}} & set(sys.modules)
assert run({words!r}) == 0
assert "torch" in sys.modules and not {{"ray", "optuna", "sqlalchemy"}} & set(sys.modules)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "100"}
    )
    assert ended.returncode == 0, ended.stderr
