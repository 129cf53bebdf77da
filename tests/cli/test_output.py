"""`--json FILE`: never a file that the command reads or makes, never half of one, never refused after the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from program import SAMPLES, SHOTS, TEACHER, Compressed, call, listing

JOB = [*SHOTS, "--method", "l1-norm", "--keep", "0.8"]


@pytest.mark.parametrize(
    ("where", "flag"),
    [
        ("teacher.onnx", "MODEL"), ("weights.bin", "MODEL"), ("./teacher.onnx", "MODEL"), ("s.onnx", "--out"),
        ("s.report", "--out"), ("s.rejected.onnx", "--out"), ("link.json", "MODEL"), ("held.npz", "--holdout"),
    ],
)  # fmt: skip
def test_the_report_replaces_no_file_of_the_command(here: Path, where: str, flag: str) -> None:
    onnx.save(onnx.load(TEACHER), "teacher.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    Path("link.json").symlink_to("teacher.onnx")
    Path("held.npz").write_bytes((SAMPLES / "held_out.npz").read_bytes())
    before = listing(here)

    ended = call("compress", "teacher.onnx", *JOB, "--holdout", "held.npz", "-o", "s.onnx", "--json", where)

    assert ended.code == 2 and f"--json '{where}' is a file of {flag}, and would replace it." in ended.err
    assert listing(here) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "a.onnx", "b.onnx", *SHOTS, "--json", "a.onnx"],
        ["verify", "a.onnx", "b.onnx", *SHOTS, "--json", "b.onnx"],
        ["verify", "a.onnx", "b.onnx", "--shots", "image=x.npz", "--json", "x.npz"],
        ["bench", "a.onnx", "b.onnx", "--json", "b.onnx"],
        ["plan", "a.onnx", *SHOTS, "-o", "plan.toml", "--json", "plan.toml"],
        ["gate", "report.json", "--max-drop", "1", "--json", "report.json"],
    ],
)
def test_no_command_replaces_what_it_was_given(here: Path, arguments: list[str]) -> None:
    for name in ("a.onnx", "b.onnx", "x.npz", "report.json"):
        Path(name).write_text(name)

    ended = call(*arguments)

    assert ended.code == 2 and "and would replace it" in ended.err, ended.err
    for name in ("a.onnx", "b.onnx", "x.npz", "report.json"):
        assert Path(name).read_text() == name


@pytest.mark.parametrize(("where", "says"), [(".", "is a folder"), ("none/r.json", "does not exist")])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(here: Path, where: str, says: str) -> None:
    ended = call("compress", TEACHER, *JOB, "-o", "s.onnx", "--json", where)

    assert ended.code == 2 and f"--json '{where}'" in ended.err and says in ended.err
    assert listing(here) == {}


_FULL = """
import resource, signal, sys
from xdonnx_cli.app import run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["gate", "init"])
def test_a_disk_that_is_full_leaves_the_old_file(compressed: Compressed, here: Path, command: str) -> None:
    """`init --force` had emptied the file by then, `--json` left half a report."""
    old = "seed = 3\n"
    Path("xdonnx.toml" if command == "init" else "r.json").write_text(old)
    report = str(compressed.folder / "student.report")
    arguments = ["init", "--force"] if command == "init" else ["gate", report, "--json", "r.json"]

    done = subprocess.run([sys.executable, "-c", _FULL, *arguments], capture_output=True, text=True, check=False)

    assert done.returncode == 8 and "cannot write" in done.stderr, done.stderr
    assert [path.read_text() for path in here.iterdir()] == [old]


def test_a_pipe_gets_the_report_and_a_link_stays_one(compressed: Compressed, here: Path) -> None:
    report = str(compressed.folder / "student.report")
    Path("real.json").write_text("old")
    Path("link.json").symlink_to("real.json")
    os.mkfifo("pipe")
    reader = subprocess.Popen(["cat", "pipe"], stdout=subprocess.PIPE, text=True)

    codes = [call("gate", report, "--json", where).code for where in ("pipe", "link.json")]

    found = reader.communicate(timeout=20)[0]
    assert codes == [0, 0] and Path("link.json").is_symlink() and Path("pipe").is_fifo()
    assert json.loads(found)["exit_code"] == 0 and Path("real.json").read_text() == found
