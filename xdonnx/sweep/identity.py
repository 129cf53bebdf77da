"""What a job reads, and the hash of options and contents by which its result is known."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import xdonnx
from xdonnx.errors import ShotsError
from xdonnx.model import fingerprint, model_files
from xdonnx.sources import list_images
from xdonnx.wanted import Job

# The fields of a job that name a file, and those that may.
PATHS = tuple(
    name
    for name, field in Job.model_fields.items()
    if name != "out" and (field.annotation is Path or Path in get_args(field.annotation))
)
# Sources of samples: paths, before which the name of an input may stand.
SOURCES = ("shots", "pool")
READ = (*PATHS, *SOURCES, "holdout")


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
        found = [content(path) for path in paths]
        read[field] = found[0] if len(found) == 1 else found
    names = [name for source in SOURCES for name, _ in map(named, getattr(job, source)) if name]
    # Only where there are any, for the same reason.
    every = [kept, read, version, *([names] if names else [])]
    return digest([json.dumps(every, sort_keys=True).encode()])


def read_by(job: Job) -> dict[str, tuple[Path, ...]]:
    """Return the files and folders that a job reads, by its fields."""
    found: dict[str, tuple[Path, ...]] = {
        name: (getattr(job, name),) for name in PATHS if getattr(job, name) is not None
    }
    for source in SOURCES:
        if given := getattr(job, source):
            found[source] = tuple(path for _, path in map(named, given))
    if not is_number(job.holdout):
        found["holdout"] = (Path(job.holdout),)
    return found


def named(source: str) -> tuple[str, Path]:
    """Return one of a job's sources of samples as the graph input that it names, '' for none, and its path."""
    name, equals, path = source.partition("=")
    return (name, Path(path)) if equals and not Path(source).exists() else ("", Path(source))


def is_number(text: str | float) -> bool:
    """Return whether a hold-out is a fraction rather than a path."""
    try:
        float(text)
    except ValueError:
        return False
    return True


@functools.cache
def content(path: Path) -> str:
    """Return the hash of all that a path stands for, wherever it lies; see :func:`files_of`."""
    files = files_of(path)
    if path.is_dir():
        return digest(f"{name}\0{fingerprint(file)}\n".encode() for name, file in files.items())
    return digest(fingerprint(file).encode() for file in files.values())


def files_of(path: Path) -> dict[str, Path]:
    """Return the files that a path stands for, by their names beside it.

    A model brings the weights that it keeps outside, a folder all that lies below it, a text file of image paths
    these images.
    """
    if path.is_dir():
        below = sorted(file for file in path.rglob("*") if file.is_file())
        return {file.relative_to(path).as_posix(): file for file in below}
    if path.suffix == ".onnx":
        return {file.relative_to(path.parent).as_posix(): file for file in model_files(path)}
    if path.suffix.lower() == ".txt":
        return {path.name: path} | {str(file): file for file in _listed(path)}
    return {path.name: path}


def _listed(path: Path) -> tuple[Path, ...]:
    """Return the images that a text file names; none where it is something else, such as labels."""
    try:
        return tuple(file for file in list_images(path).paths if file.is_file())
    except (ShotsError, OSError, ValueError):
        return ()


def sources() -> str:
    """Return the hash of the sources of the xdonnx that runs."""
    folder = Path(str(xdonnx.__file__)).parent
    return digest(part for file in sorted(folder.rglob("*.py")) for part in (file.name.encode(), file.read_bytes()))


def digest(parts: Iterable[bytes]) -> str:
    """Return the SHA-256 of bytes, in hex."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def placed(text: str, home: Path) -> Path:
    """Return where a path is that stands in a file of some folder."""
    return Path(os.path.normpath((home / Path(text).expanduser()).absolute()))
