"""The program: its commands, and what becomes of every way in which they can end."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Annotated, Any

import typer
from typer import Option

from xdonnx_cli.benching import bench
from xdonnx_cli.compress import compress
from xdonnx_cli.configuration import CONFIGURED, Settings, explained
from xdonnx_cli.decomposing import decompose
from xdonnx_cli.doctor import doctor
from xdonnx_cli.ending import INTERRUPTED, ended
from xdonnx_cli.flags import SWITCH
from xdonnx_cli.grouping import HELP, grouped
from xdonnx_cli.inspection import inspect
from xdonnx_cli.judging import gate, verify
from xdonnx_cli.matching import match
from xdonnx_cli.methods import methods
from xdonnx_cli.options import flags_of
from xdonnx_cli.planning import plan
from xdonnx_cli.reporting import report
from xdonnx_cli.starting import init, schema
from xdonnx_cli.sweeping import sweep
from xdonnx_cli.terminal import say, stderr

TERMINATED, PIPE_CLOSED = 143, 141

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    # Commands bring their own: see grouped.
    context_settings={"help_option_names": []},
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
    (
        decompose,
        "xdonnx decompose model.onnx --macs 60% -o student.onnx\n\n"
        "xdonnx decompose model.onnx --scheme spatial --energy 95% -o student.onnx --dry-run",
    ),
    (
        match,
        "xdonnx match model.onnx pruned.onnx --shots photos/ -o match.toml\n\n"
        "xdonnx compress model.onnx --student pruned.onnx --match match.toml --shots photos/ -o student.onnx",
    ),
    (inspect, "xdonnx inspect model.onnx\n\nxdonnx inspect model.onnx --input-shape image:1x3x640x640 --json"),
    (verify, "xdonnx verify model.onnx student.onnx --shots fresh/ --max-drop 1 --confidence 95%"),
    (
        report,
        "xdonnx report student.report --html report.html\n\n"
        "xdonnx report student.report/report.json --junit junit.xml --markdown -",
    ),
    (gate, "xdonnx gate student.report/report.json --max-drop 2 --min-shrink 30%"),
    (
        bench,
        "xdonnx bench model.onnx student.onnx\n\n"
        "xdonnx bench model.onnx student.onnx --threads 1 --batch 8 --input-shape image:1x3x224x224",
    ),
    (
        sweep,
        "xdonnx sweep sweep.toml --dry-run\n\n"
        "xdonnx sweep sweep.toml -o results --jobs 4\n\n"
        "xdonnx sweep search.toml --trials 64 --backend ray --address auto",
    ),
    (methods, "xdonnx methods"),
    (doctor, "xdonnx doctor\n\nxdonnx doctor --json"),
    (init, "xdonnx init\n\nxdonnx init . model.onnx"),
    (schema, "xdonnx schema > report.schema.json\n\nxdonnx schema --config"),
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
    help: HELP = False,
) -> None:
    """Make an ONNX CNN smaller and faster from a handful of samples, checked in onnxruntime."""


# Those that files and variables may set.
FLAGS = {}
for _command, _examples in COMMANDS:
    _flat = grouped(_command)
    if _command.__name__ in CONFIGURED:
        FLAGS[_command.__name__] = flags_of(_flat)
    app.command(_command.__name__, epilog=f"Examples:\n\n{_examples}")(_flat)


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
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = PIPE_CLOSED
    if code == PIPE_CLOSED:
        # What is still to be written has nobody to read it; at its end Python would complain of that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; everything that goes wrong is told on stderr."""
    settings = Settings(FLAGS)
    try:
        code = _built()(args=list(arguments), prog_name="xdonnx", standalone_mode=False, obj=settings)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        return PIPE_CLOSED
    except SystemExit as ended:
        # Typer and rich end the process with 1 where the reader of a pipe has gone, as `| head -1` does.
        if isinstance(ended.__context__, BrokenPipeError):
            return PIPE_CLOSED
        raise
    except Exception as error:
        return _failed(error, settings, verbose=_verbose(arguments) or settings.verbose)
    if code == INTERRUPTED:
        say(stderr(), "interrupted")
    # No command at all is a usage error; older versions of typer print the help and are content.
    return int(code or 0) if arguments else 2


def _built() -> Callable[..., int | None]:
    """Return the program as typer runs it, its options for completion without a type, since they take no value."""
    built: Any = typer.main.get_command(app)
    for option in built.params:
        if option.name in ("install_completion", "show_completion"):
            option.metavar = SWITCH
    return built


def _verbose(arguments: Sequence[str]) -> bool:
    return any(argument in ("-v", "--verbose") for argument in arguments)


def _failed(error: Exception, settings: Settings, *, verbose: bool) -> int:
    """Tell an error on stderr and return its exit code."""
    console = stderr()
    if verbose:
        say(console, "".join(traceback.format_exception(error)).rstrip())
    code, text = ended(error)
    if text:
        console.print("error:", style="bold red", end=" ")
        say(console, explained(text, settings))
    return code
