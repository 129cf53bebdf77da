"""A report as files in a folder: report.json for machines, and what people and pipelines read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from xdonnx.errors import MachineError
from xdonnx.events import Event, Log, ignore
from xdonnx.files import put
from xdonnx.junit import junit
from xdonnx.page import page
from xdonnx.report import Report
from xdonnx.summary import summary

# The truth first: should one of the others fail, it is there to be drawn from again.
FORMS: dict[str, Callable[[Report], str]] = {
    "report.json": lambda report: report.model_dump_json(indent=2) + "\n",
    "summary.md": summary,
    "junit.xml": junit,
    "report.html": page,
}


def write_report(report: Report, folder: str | Path | None, *, log: Log = ignore) -> list[Path]:
    """Write the report in every form; append the summary to the file that GITHUB_STEP_SUMMARY names.

    Parameters
    ----------
    report : Report
    folder : path, optional
        None writes no file, and appends only.
    log : Log
        Warned, in the stage 'verify'.

    Returns
    -------
    list of Path
        The files, the truth first. Each is whole or as it was before.

    Raises
    ------
    MachineError
        The folder cannot be written. A step summary that cannot is a warning event only.
    """
    written = [] if folder is None else _write(report, Path(folder))
    step = os.environ.get("GITHUB_STEP_SUMMARY")
    if step:
        try:
            with Path(step).open("a", encoding="utf-8") as stream:
                stream.write(summary(report))
        except OSError as error:
            # Inside a container the path may not exist; the report itself is safe.
            log(Event("verify", f"cannot append to GITHUB_STEP_SUMMARY: {error}", level="warning"))
    return written


def _write(report: Report, folder: Path) -> list[Path]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [put(folder / name, draw(report)) for name, draw in FORMS.items()]
    except OSError as error:
        raise MachineError(f"cannot write the report to '{folder}': {error}.") from error
