"""The program as a process: what it imports, how it takes a signal, what it does with colours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from program import SHOTS, TEACHER, Compressed, listing

PROGRAM = [sys.executable, "-c", "from xdonnx_cli.app import main; main()"]


def test_nothing_but_compress_and_plan_imports_torch(compressed: Compressed, tmp_path: Path) -> None:
    report, student = compressed.folder / "student.report", compressed.folder / "student.onnx"
    code = f"""
import sys
from xdonnx_cli.app import run
heavy = ("torch", "onnx", "onnxruntime", "numpy", "PIL")
for command in ("", "compress", "plan", "decompose", "inspect", "verify", "report", "gate", "methods", "doctor"):
    assert run([*([command] if command else []), "--help"]) == 0
assert run(["--version"]) == run(["methods"]) == 0
assert not set(heavy) & set(sys.modules), "help and methods have to be instant"
assert run(["inspect", {TEACHER!r}]) == 0
assert run(["decompose", {TEACHER!r}, "-o", "low.onnx", "--macs", "90%"]) == 0
assert run(["verify", {TEACHER!r}, {str(student)!r}, *{SHOTS!r}]) == 0
assert run(["gate", {str(report)!r}, "--max-drop", "100"]) == 0
assert run(["doctor"]) == 0
assert "torch" not in sys.modules and "torchvision" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_mistakes_in_names_and_numbers_do_not_wait_for_torch(tmp_path: Path) -> None:
    """A mistyped method, or an OUT that exists, took as long as the import of torch."""
    (tmp_path / "old.onnx").touch()
    code = f"""
import sys
from xdonnx_cli.app import run
for command in ("compress", "plan"):
    start = [command, {TEACHER!r}, *{SHOTS!r}, "-o", "new"]
    assert run([*start, "--macs", "0"]) == run([*start, "--structure", "chanel"]) == 2
    assert run([*start[:-1], "old.onnx"]) == 2
    assert run([command, "none.onnx", *start[2:]]) == 4
job = ["compress", {TEACHER!r}, *{SHOTS!r}, "-o", "new.onnx"]
assert run([*job, "--method", "cros"]) == run([*job, "--method", "cros", "--dry-run"]) == 2
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_job_that_is_stopped_while_it_fits_leaves_what_resume_needs(
    tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    job = ["compress", TEACHER, *SHOTS, "-o", str(tmp_path / "student.onnx"), "--preset-effort", "best", "-v"]
    with subprocess.Popen([*PROGRAM, *job], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stdout is not None
        seen = next((line for line in process.stderr if line.startswith("fit")), "")
        process.send_signal(sent)
        out, err = process.communicate(timeout=120)

    assert seen, "the job never began to fit"
    assert process.returncode == code and out == "" and "Traceback" not in err
    assert {name.split("/")[0] for name in listing(tmp_path)} == {"student.onnx.partial"}
    assert "--resume" in err


@pytest.mark.parametrize(
    ("setting", "coloured"), [({"FORCE_COLOR": "1"}, True), ({"NO_COLOR": "1"}, False), ({}, False)]
)
def test_colours_are_for_terminals_and_for_those_who_want_them(
    compressed: Compressed, setting: dict[str, str], coloured: bool
) -> None:
    plain = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "PY_COLORS")}
    gate = [*PROGRAM, "gate", str(compressed.folder / "student.report")]

    done = subprocess.run(gate, env=plain | {"TERM": "xterm"} | setting, capture_output=True, text=True, check=False)

    assert done.returncode == 0 and ("\x1b[" in done.stdout) is coloured


def test_a_terminal_without_arrows_gets_question_marks(compressed: Compressed) -> None:
    gate = [*PROGRAM, "gate", str(compressed.folder / "student.report")]

    done = subprocess.run(gate, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)

    assert done.returncode == 0 and b"PASSED" in done.stdout and b"?" in done.stdout
