"""A report as files in a folder: report.json for machines, and what people and pipelines read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from xdonnx.errors import MachineError
from xdonnx.events import Event, Log, ignore
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


def write_report(report: Report, folder: str | Path, *, log: Log = ignore) -> list[Path]:
    """Write the report in every form; append the summary to the file that GITHUB_STEP_SUMMARY names.

    Returns
    -------
    list of Path
        The files, the truth first. Each is whole or as it was before.

    Raises
    ------
    MachineError
        The folder cannot be written. A step summary that cannot is a warning event only.
    """
    folder, written = Path(folder), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in FORMS.items():
            written.append(put(folder / name, draw(report)))
    except OSError as error:
        raise MachineError(f"cannot write the report to '{folder}': {error}.") from error
    step = os.environ.get("GITHUB_STEP_SUMMARY")
    if step:
        try:
            with Path(step).open("a", encoding="utf-8") as stream:
                stream.write(summary(report))
        except OSError as error:
            # Inside a container the path may not exist; the report itself is safe.
            log(Event("verify", f"cannot append to GITHUB_STEP_SUMMARY: {error}", level="warning"))
    return written


def put(path: Path, text: str) -> Path:
    """Write a file whole or not at all; raises OSError."""
    # A name of its own, so that jobs which share a folder never rename each other's halves.
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # A lone surrogate, as in a file name that is not UTF-8, becomes a question mark rather than an error.
        draft.write_text(text, encoding="utf-8", errors="replace", newline="\n")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path
