"""`xdonnx report`: a saved report in another form; needs neither model nor samples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xdonnx.errors import JobError, MachineError
from xdonnx.figures import amount
from xdonnx_cli.flags import SWITCH, output, running
from xdonnx_cli.terminal import beside, say, stderr, stdout

if TYPE_CHECKING:
    from xdonnx.report import Report


def report(
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="A report.json, or its folder.", show_default=False)],
    html: Annotated[Path | None, output("--html", "PATH", "One page that opens anywhere, without network.")] = None,
    junit: Annotated[Path | None, output("--junit", "PATH", "JUnit XML: a case for each gate.")] = None,
    markdown: Annotated[Path | None, output("--markdown", "PATH", "A summary of at most 60 lines.")] = None,
    quiet: Annotated[bool, running("--quiet", SWITCH, "Do not name what was written.", "-q")] = False,
    verbose: Annotated[bool, running("--verbose", SWITCH, "Tracebacks.", "-v")] = False,
) -> int:
    """Render a saved report again, of this version's schema or of an older one; without a PATH, print it.

    A PATH of - is stdout. The exit code is 0 whatever the report says; to act on its verdict use xdonnx gate.
    """
    wanted = {"html": html, "junit": junit, "markdown": markdown}
    asked = {form: path for form, path in wanted.items() if path is not None}
    _check(report, asked)
    from xdonnx.report import read_report

    saved = read_report(report)
    if not asked:
        from xdonnx_cli.show import show

        show(stdout(), saved, quiet=quiet)
    for form, path in asked.items():
        text = _drawn(form, saved)
        if str(path) == "-":
            sys.stdout.write(text)
            continue
        _put(path, text)
        if not quiet:
            say(stderr(), f"wrote {beside(path)}  ({amount(path.stat().st_size, 'B')})")
    return 0


def _check(report: Path, asked: dict[str, Path]) -> None:
    """Raise JobError before any work where a file has no place, or would replace the report itself."""
    real = {form: path.resolve() for form, path in asked.items() if str(path) != "-"}
    if len(asked) - len(real) > 1 or len(set(real.values())) < len(real):
        raise JobError("two forms of the report would go to the same place.\n  Give each a PATH of its own.")
    source = (report / "report.json" if report.is_dir() else report).resolve()
    for form, path in real.items():
        if path == source:
            raise JobError(f"--{form} '{asked[form]}' is the report itself.\n  Name another file.")
        if path.is_dir():
            raise JobError(f"--{form} '{asked[form]}' is a folder.\n  Name a file in it.")
        if not path.parent.is_dir():
            raise JobError(f"the folder of --{form} '{asked[form]}' does not exist.\n  Make it first.")


def _drawn(form: str, saved: Report) -> str:
    if form == "html":
        from xdonnx.page import page

        return page(saved)
    if form == "junit":
        from xdonnx.junit import junit

        return junit(saved)
    from xdonnx.summary import summary

    return summary(saved)


def _put(path: Path, text: str) -> None:
    from xdonnx.files import put

    try:
        put(path, text)
    except OSError as error:
        raise MachineError(f"cannot write '{path}': {error.strerror}.\n  Name another file.") from error
