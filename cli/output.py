"""Where results go: tables to stdout, or to stderr where --json has stdout for itself."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from xdonnx.errors import JobError, MachineError
from xdonnx.files import put
from xdonnx_cli.flags import Talk
from xdonnx_cli.terminal import stderr, stdout


def command_line() -> str:
    """Return what the user typed, as it can be typed again."""
    return shlex.join(["xdonnx", *sys.argv[1:]])


def tables(talk: Talk) -> Console:
    """Return the console that tables go to."""
    return stderr() if talk.json == "-" else stdout()


def check_json(where: str | None, others: Mapping[str, Sequence[str | Path]]) -> None:
    """Raise JobError or MachineError before any work where --json names a file that cannot be, or one of another flag.

    Parameters
    ----------
    where : str, optional
        What was given; - is stdout.
    others : mapping
        {flag, as it is typed: the paths that it names}.
    """
    if where in (None, "-"):
        return
    path = Path(str(where))
    if path.is_dir():
        raise JobError(f"--json '{where}' is a folder.\n  Name a file in it, or pass --json - for stdout.")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise JobError(f"the folder of --json '{where}' does not exist.\n  Make it, or pass --json - for stdout.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise MachineError(f"cannot write --json '{where}'.\n  Name another file, or pass --json - for stdout.")
    for flag, names in others.items():
        files = [file for name in names for file in _files(Path(name), out=flag == "--out")]
        if path.resolve() in (file.resolve() for file in files):
            raise JobError(
                f"--json '{where}' is a file of {flag}, and would replace it.\n"
                "  Name another, or pass --json - for stdout."
            )


def _files(path: Path, *, out: bool) -> list[Path]:
    """Return a file with those that hold its weights; of a student also what is written in its stead and beside it."""
    if out:
        return [path, path.with_suffix(".report"), path.with_suffix(".rejected.onnx")]
    if path.suffix != ".onnx":
        return [path]
    from xdonnx.model import model_files

    return model_files(path)


def put_json(where: str | None, text: str) -> None:
    """Print the text, or write it to a file; nothing where --json was not given."""
    if where == "-":
        sys.stdout.write(text + "\n")
    elif where is not None:
        try:
            put(Path(where), text + "\n")
        except OSError as error:
            raise MachineError(f"cannot write '{where}': {error.strerror}.") from error
