"""Runs the program as a user does, in this process, and says what it printed and left."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from xdonnx_cli.app import run

SAMPLES = Path(__file__).parents[2] / "samples"
SHOTS = ["--shots", str(SAMPLES / "shots"), "--preset", "unit"]
TEACHER = str(SAMPLES / "digits_mobile.onnx")


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


def call(*arguments: str | Path, width: int = 100, environment: Mapping[str, str] | None = None) -> Ended:
    """Run one command line, with these variables set besides."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setenv("COLUMNS", str(width))
        # Where the tests themselves run in a workflow, typer would colour the help.
        patch.delenv("GITHUB_ACTIONS", raising=False)
        patch.delenv("GITHUB_STEP_SUMMARY", raising=False)
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        code = run([str(argument) for argument in arguments])
    return Ended(code, out.getvalue(), err.getvalue())


def listing(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes, and every folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


@dataclass(frozen=True)
class Compressed:
    """One good run, shared by the tests that look at what it left."""

    folder: Path
    ended: Ended
