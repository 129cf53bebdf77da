"""Which file is found, whatever else lies on the way up, and what is not taken for a path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from program import TEACHER, call

from xdonnx.errors import JobError
from xdonnx_cli.app import FLAGS
from xdonnx_cli.configuration import from_file
from xdonnx_cli.searching import nearest

PROGRAM = [sys.executable, "-c", "from xdonnx_cli.app import main; main()"]


@pytest.mark.parametrize(
    "content",
    [
        "[project]\ndescription = 'für xdonnx'\n".encode("latin-1"),
        "[project]\n".encode("utf-16"),
        b"[project\ndependencies = ['xdonnx']\n",
        b"[project]\ndependencies = ['xdonnx']\n",
        b"\x00\xff xdonnx",
    ],
)
def test_somebody_elses_project_is_passed_over(here: Path, content: bytes) -> None:
    """A Latin-1 letter in the file of the project around it made every command a usage error."""
    (here / "xdonnx.toml").write_text("seed = 3")
    (here / "inner").mkdir()
    (here / "inner" / "pyproject.toml").write_bytes(content)

    assert nearest(here / "inner") == here / "xdonnx.toml"
    os.chdir(here / "inner")
    assert call("inspect", TEACHER).code == 0


@pytest.mark.parametrize("head", ["[tool.xdonnx]", '[ tool . "xdonnx" ]', "[tool.xdonnx.gate]"])
def test_a_table_of_ours_in_a_damaged_file_is_told(here: Path, head: str) -> None:
    (here / "pyproject.toml").write_bytes(f"[project]\nname = 'ü'\n{head}\n".encode("latin-1"))
    with pytest.raises(JobError, match="cannot read"):
        nearest(here)


@pytest.mark.parametrize(
    "text",
    [
        "[tool.xdonnx]\nseed = 3\n", '[tool."xdonnx"]\nseed = 3\n', "[tool]\nxdonnx = { seed = 3 }\n",
        "tool.xdonnx.seed = 3\n", "tool = { xdonnx = { seed = 3 } }\n", "\ufeff[ tool.xdonnx ]\nseed = 3\n",
    ],
)  # fmt: skip
def test_our_table_is_found_in_every_way_to_write_it(here: Path, text: str) -> None:
    """Two of them were looked for as text, and passed over in silence."""
    (here / "pyproject.toml").write_text(text, encoding="utf-8")

    assert nearest(here) == here / "pyproject.toml"
    assert from_file(here / "pyproject.toml", FLAGS, "compress")["seed"].value == "3"
    (here / "pyproject.toml").write_text(text.replace("seed", "sead"))
    ended = call("inspect", TEACHER)
    assert ended.code == 2 and "unknown key 'sead'" in ended.err


def test_a_table_that_is_none_is_told(here: Path) -> None:
    (here / "pyproject.toml").write_text("[tool]\nxdonnx = 3\n")
    ended = call("inspect", TEACHER)
    assert ended.code == 2 and "tool.xdonnx is no table" in ended.err


_NOBODY = """
import os, pathlib, sys
os.environ.pop("HOME", None)
import pwd
def unknown(_):
    raise KeyError("no such user")
pwd.getpwuid = unknown
from xdonnx_cli.app import run
sys.exit(run(sys.argv[1:]))
"""


def test_a_user_without_a_home_has_settings_too(here: Path) -> None:
    """Containers run under numbers that no user has: Path.home() raises there, which was an internal error."""
    for config, code in (([], 0), (["--config", "~/nothing.toml"], 2)):
        command = [sys.executable, "-c", _NOBODY, "inspect", TEACHER, *config]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr


def test_a_folder_that_is_gone_is_no_internal_error(here: Path) -> None:
    (here / "gone").mkdir()
    code = f"import os, sys; os.chdir({str(here / 'gone')!r}); os.rmdir({str(here / 'gone')!r}); {PROGRAM[2]}"
    done = subprocess.run([sys.executable, "-c", code, "inspect", TEACHER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-1", "2e-1"),
        ("20%", "20%"),
        (".2", ".2"),
        ("2 %", "2 %"),
        ("fifth", "{here}/fifth"),
        ("0.2x", "{here}/0.2x"),
    ],
)
def test_a_number_is_no_path_however_it_is_written(
    here: Path, monkeypatch: pytest.MonkeyPatch, text: str, value: str
) -> None:
    (here / "deep").mkdir()
    (here / "xdonnx.toml").write_text(f"holdout = '{text}'\njson = '5'")
    monkeypatch.chdir(here / "deep")

    found = from_file(here / "xdonnx.toml", FLAGS, "compress")

    assert found["holdout"].value == value.format(here=here)
    assert found["json"].value == f"{here}/5", "of what is a path or -, any number is a path"
