"""Where results go: tables to stdout, or to stderr where --json has stdout for itself."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from rich.console import Console

from xdonnx.errors import JobError, MachineError
from xdonnx_cli.flags import Talk
from xdonnx_cli.terminal import stderr, stdout


def command_line() -> str:
    """Return what the user typed, as it can be typed again."""
    return shlex.join(["xdonnx", *sys.argv[1:]])


def tables(talk: Talk) -> Console:
    """Return the console that tables go to."""
    return stderr() if talk.json == "-" else stdout()


def check_json(where: str | None) -> None:
    """Raise JobError before any work where --json names a file that cannot be."""
    if where not in (None, "-") and not Path(str(where)).absolute().parent.is_dir():
        raise JobError(f"the folder of --json '{where}' does not exist.\n  Make it, or pass --json - for stdout.")


def put_json(where: str | None, text: str) -> None:
    """Print the text, or write it to a file; nothing where --json was not given."""
    if where == "-":
        sys.stdout.write(text + "\n")
    elif where is not None:
        try:
            Path(where).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise MachineError(f"cannot write '{where}': {error.strerror}.") from error
