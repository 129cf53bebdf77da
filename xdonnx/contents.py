"""What a job reads, by contents: a file is what it holds, wherever it lies and whatever it is called."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from xdonnx.errors import ShotsError
from xdonnx.model import fingerprint, model_files, model_fingerprint
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


def content(path: Path) -> str:
    """Return the hash of all that a path stands for, wherever it lies; see :func:`files_of`.

    Of a single file it is the file's own.
    """
    if path.suffix == ".onnx" and path.is_file():
        return model_fingerprint(path)
    files = files_of(path)
    if path.is_dir():
        return digest(f"{name}\0{fingerprint(file)}\n".encode() for name, file in files.items())
    parts = [fingerprint(file) for file in files.values()]
    return parts[0] if len(parts) == 1 else digest(part.encode() for part in parts)


# For who reads the same files many times over, and knows that they stay as they are.
remembered = functools.cache(content)


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


def digest(parts: Iterable[bytes]) -> str:
    """Return the SHA-256 of bytes, in hex."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()
