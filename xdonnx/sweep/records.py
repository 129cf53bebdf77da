"""The lines of a runs.jsonl: one for each job as soon as it is done, so that nothing is done twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xdonnx.errors import JobError

Record = dict[str, Any]


def read_records(path: Path, *, mend: bool = True) -> dict[str, Record]:
    """Return the lines of a runs.jsonl by their keys; of two with one key, the later one.

    A last line that was torn when the machine stopped is passed over.

    Parameters
    ----------
    path : Path
    mend : bool
        Whether it is cut off, so that the next one starts afresh.

    Raises
    ------
    JobError
        Another line is no record.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if mend and len(whole) < len(content):
        with path.open("r+b") as stream:
            stream.truncate(len(whole))
    found: dict[str, Record] = {}
    for at, text in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(text)
            found[record["key"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise JobError(f"'{path}', line {at} is no record of a run.\n  Delete that line, or the file.") from error
    return found


def add_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append a line; once this returns, it is on the disk."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
