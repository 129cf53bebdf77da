"""What a job reads, and the hash of options and contents by which its result is known."""

from __future__ import annotations

import json
import os
from pathlib import Path

import xdonnx
from xdonnx.contents import READ, SOURCES, digest, named, read_by, remembered
from xdonnx.wanted import Job


def key(job: Job, version: str = "") -> str:
    """Return the hash of what decides the result of a job.

    Options at their defaults are left out, so that an option that is new in xdonnx leaves old results valid. A default
    that changed is a change of xdonnx, for which there is `version`.

    Parameters
    ----------
    job : Job
    version : str
        Whatever else makes a result another one.
    """
    kept = job.model_dump(mode="json", exclude_defaults=True, exclude={"out", *READ}, fallback=str)
    # That these are empty where nothing is given is what the keys of older results were made with.
    read: dict[str, str | list[str]] = {"shots": "", "labels": "", "holdout": job.holdout}
    for field, paths in read_by(job).items():
        found = [remembered(path) for path in paths]
        read[field] = found[0] if len(found) == 1 else found
    names = [name for source in SOURCES for name, _ in map(named, getattr(job, source)) if name]
    # Only where there are any, for the same reason.
    every = [kept, read, version, *([names] if names else [])]
    return digest([json.dumps(every, sort_keys=True).encode()])


def sources() -> str:
    """Return the hash of the sources of the xdonnx that runs."""
    folder = Path(str(xdonnx.__file__)).parent
    return digest(part for file in sorted(folder.rglob("*.py")) for part in (file.name.encode(), file.read_bytes()))


def placed(text: str, home: Path) -> Path:
    """Return where a path is that stands in a file of some folder."""
    return Path(os.path.normpath((home / Path(text).expanduser()).absolute()))
