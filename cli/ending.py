"""How a command ends that fails: its exit code, its words, and the report that takes the place of an older one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdonnx.errors import MachineError, XdonnxError
from xdonnx.machine import machines_fault
from xdonnx_cli.output import command_line
from xdonnx_cli.terminal import say, stderr

if TYPE_CHECKING:
    from xdonnx.events import Log

INTERRUPTED = 130


def ended(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the message of what ended a command; no message where it is known already."""
    if isinstance(error, XdonnxError):
        return error.exit_code, _noted(str(error), error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, _noted("interrupted", error)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1, _noted("terminated", error)
    # typer's own errors; their class has another home in every few versions of typer.
    usage = getattr(error, "format_message", None)
    if usage is not None:
        if type(error).__name__ == "NoArgsIsHelpError":
            return 2, ""  # the help was printed
        where = getattr(getattr(error, "ctx", None), "command_path", "xdonnx")
        said = usage()
        extra = " Samples go behind --shots." if "unexpected extra argument" in said else ""
        return 2, f"{said}{extra}\n  See: {where} --help"
    if fault := machines_fault(error):
        return fault.exit_code, str(fault)
    name = type(error).__name__
    return 1, (
        f"internal: {name}: {error}\n"
        "  This is a defect of xdonnx. Please report it with the command and the traceback that -v prints."
    )


def _noted(text: str, error: BaseException) -> str:
    """Return the text with what was noted on the way up, such as that the job can go on."""
    return "\n  ".join([text, *getattr(error, "__notes__", ())])


@dataclass
class Attempt:
    """A command that is to leave a report.

    Parameters
    ----------
    folder : Path, optional
        Where it goes.
    job : mapping
        What was asked for.
    device, seed
        For the report.
    kept : bool
        Whether a report is there, so that whatever goes wrong thereafter leaves it alone.
    heard : list of str
        Warnings so far.
    """

    folder: Path | None
    job: Mapping[str, Any]
    device: str
    seed: int
    kept: bool = False
    heard: list[str] = field(default_factory=list)

    def noting(self, log: Log) -> Log:
        """Return a log that also keeps the warnings."""
        from xdonnx.events import hearing

        return hearing(log, self.heard)


@contextmanager
def attempted(folder: Path | None, job: Mapping[str, Any], *, device: str, seed: int) -> Iterator[Attempt]:
    """Run what is to leave a report; where it fails, write one that says so, and let the error pass.

    An older report in the folder would tell a pipeline that looks at nothing else of the job before. Without a folder
    only the summary goes where GITHUB_STEP_SUMMARY says.
    """
    attempt, started, clock = Attempt(folder, job, device, seed), datetime.now().astimezone(), time.perf_counter()
    try:
        yield attempt
    except BaseException as error:
        if not attempt.kept and not isinstance(error, (BrokenPipeError, GeneratorExit)):
            _leave(attempt, error, started, time.perf_counter() - clock)
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            # Of these only the code is told further up.
            for line in getattr(error, "__notes__", ()):
                say(stderr(), line)
        raise


def _leave(attempt: Attempt, error: BaseException, started: datetime, seconds: float) -> None:
    from xdonnx.events import legible
    from xdonnx.publication import FORMS, write_report
    from xdonnx.report import Files, Report, plain, tool

    code, text = ended(error)
    report = Report(
        status="failed",
        exit_code=code,
        reasons=(legible(text),),
        started=started.isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        tool=tool(),
        command=legible(command_line()),
        job=plain(attempt.job),
        seed=attempt.seed,
        device=attempt.device,
        files=Files(),
        fit_samples=None,
        warnings=tuple(dict.fromkeys(attempt.heard)),
    )
    try:
        write_report(report, attempt.folder)
    except MachineError:
        # The error itself is told. What can be done about an old report is to take it away.
        for path in [attempt.folder / name for name in FORMS] if attempt.folder is not None else []:
            _remove(path)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return
