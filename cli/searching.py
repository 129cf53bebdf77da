"""Where settings stand: which file it is, and what it holds."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

from xdonnx.errors import JobError

FILE, PROJECT = "xdonnx.toml", "pyproject.toml"
# The head of our table, in a file that may be damaged elsewhere.
_HEAD = re.compile(rb"^\s*\[+\s*[\"']?tool[\"']?\s*\.\s*[\"']?xdonnx\b", re.M)


def chosen(given: str | None) -> Path | None:
    """Return the file: the one that is named, none if that is 'none', else the nearest; None where there is none."""
    if given is None:
        try:
            return nearest(Path.cwd())
        except FileNotFoundError:
            return None  # somebody removed the current folder
    if given == "none":
        return None
    path = Path(os.path.expanduser(given))
    if not path.exists() or path.is_dir():
        raise JobError(f"no configuration at '{given}'.\n  Write one with xdonnx init, or pass --config none.")
    return path


def nearest(folder: Path) -> Path | None:
    """Return the first `xdonnx.toml`, or `pyproject.toml` with a table for us, from a folder upwards.

    The search ends with the folder that holds a repository, or with the home folder.
    """
    home = os.path.expanduser("~")  # '~' itself for a user that has none, as in many containers
    for place in (folder, *folder.parents):
        if os.path.isfile(place / FILE):
            return place / FILE
        if os.path.isfile(place / PROJECT) and _ours(place / PROJECT):
            return place / PROJECT
        if place == Path(home) or any(os.path.exists(place / mark) for mark in (".git", ".hg")):
            return None
    return None


def text_of(path: Path) -> str:
    """Return a file as text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"cannot read '{path}': {error}.\n  Mend it, or pass --config none.") from error


def table_of(path: Path) -> dict[str, Any] | None:
    """Return our part of a file; None where it has none."""
    try:
        whole = tomllib.loads(text_of(path))
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"'{path}' is not TOML: {error}.\n  Text is quoted there: macs = \"50%\".") from error
    if path.name != PROJECT:
        return whole
    tools = whole.get("tool", {})
    ours = tools.get("xdonnx") if isinstance(tools, dict) else None
    if ours is not None and not isinstance(ours, dict):
        raise JobError(f"'{path}': tool.xdonnx is no table.\n  Write [tool.xdonnx] above the keys.")
    return ours


def _ours(project: Path) -> bool:
    """Whether a project's file has a table for us; somebody else's broken file is not our business."""
    try:
        raw = project.read_bytes()
    except OSError:
        return False
    if b"xdonnx" not in raw:
        return False
    try:
        tomllib.loads(raw.decode("utf-8-sig"))
    except ValueError:  # of both the decoder and the parser
        if not _HEAD.search(raw):
            return False
    return table_of(project) is not None
