"""The program: its commands, and what becomes of every way in which they can end."""

from __future__ import annotations

import errno
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Annotated

import typer
from typer import Option

from xdonnx.errors import MachineError, XdonnxError
from xdonnx_cli.compress import compress
from xdonnx_cli.doctor import doctor
from xdonnx_cli.flags import SWITCH
from xdonnx_cli.grouping import grouped
from xdonnx_cli.inspection import inspect
from xdonnx_cli.judging import gate, verify
from xdonnx_cli.methods import methods
from xdonnx_cli.planning import plan
from xdonnx_cli.terminal import say, stderr

INTERRUPTED, TERMINATED = 130, 143

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS: tuple[tuple[Callable[..., int], str], ...] = (
    (
        compress,
        "xdonnx compress model.onnx --shots photos/ -o student.onnx\n\n"
        "xdonnx compress model.onnx --shots val.npz --macs 40% --max-drop 1 -o out.onnx",
    ),
    (
        plan,
        "xdonnx plan model.onnx --shots photos/ --macs 40% -o plan.toml\n\n"
        "xdonnx compress model.onnx --shots photos/ --plan plan.toml -o student.onnx",
    ),
    (inspect, "xdonnx inspect model.onnx\n\nxdonnx inspect model.onnx --input-shape image:1x3x640x640 --json"),
    (verify, "xdonnx verify model.onnx student.onnx --shots fresh/ --max-drop 1 --confidence 95%"),
    (gate, "xdonnx gate student.report/report.json --max-drop 2 --min-shrink 30%"),
    (methods, "xdonnx methods"),
    (doctor, "xdonnx doctor"),
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"xdonnx {metadata.version('xdonnx')}")
        raise typer.Exit()


@app.callback(
    epilog="Start with: xdonnx compress model.onnx --shots photos/ -o student.onnx\n\n"
    "Exit codes: 0 passed, 1 internal error, 2 usage, 3 gate failed, 4 model, 5 samples, 6 verification, "
    "7 nothing to do, 8 environment, 130 interrupted."
)
def program(
    version: Annotated[
        bool, Option("--version", metavar=SWITCH, callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make an ONNX CNN smaller and faster from a handful of samples, checked in onnxruntime."""


for _command, _examples in COMMANDS:
    app.command(_command.__name__, epilog=f"Examples:\n\n{_examples}")(grouped(_command))


def main() -> None:
    """Run the program on what was typed, and end the process with its exit code."""
    # A terminal that knows no arrows gets question marks rather than a crash.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # As an exception it unwinds, and temporary files go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    if not _verbose(sys.argv):
        # Deprecations of torch and onnx are for us, not for who compresses a model.
        warnings.simplefilter("ignore")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; everything that goes wrong is told on stderr."""
    try:
        code = app(args=list(arguments), prog_name="xdonnx", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        return _failed(error, verbose=_verbose(arguments))
    if code == INTERRUPTED:
        say(stderr(), "interrupted")
    return int(code or 0)


def _verbose(arguments: Sequence[str]) -> bool:
    return any(argument in ("-v", "--verbose") for argument in arguments)


def _failed(error: Exception, *, verbose: bool) -> int:
    """Tell an error on stderr and return its exit code."""
    console = stderr()
    if verbose:
        say(console, "".join(traceback.format_exception(error)).rstrip())
    code, text = _told(error)
    if text:
        console.print("error:", style="bold red", end=" ")
        say(console, text)
    return code


def _told(error: Exception) -> tuple[int, str]:
    """Return the exit code and the message of an error."""
    if isinstance(error, XdonnxError):
        return error.exit_code, str(error)
    # typer's own errors; their class has another home in every few versions of typer.
    usage = getattr(error, "format_message", None)
    if usage is not None:
        if type(error).__name__ == "NoArgsIsHelpError":
            return 2, ""  # the help was printed
        where = getattr(getattr(error, "ctx", None), "command_path", "xdonnx")
        return 2, f"{usage()}\n  See: {where} --help"
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return MachineError.exit_code, f"out of memory: {error}\n  Use fewer samples: --max-shots, or a larger machine."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return MachineError.exit_code, f"the disk is full: {error}\n  Free space, or set TMPDIR to another disk."
    name = type(error).__name__
    return 1, (
        f"internal: {name}: {error}\n"
        "  This is a defect of xdonnx. Please report it with the command and the traceback that -v prints."
    )
