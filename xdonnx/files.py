"""Text files written whole or not at all, and files that are not there yet."""

from __future__ import annotations

import os
from pathlib import Path

_POINTER = b"version https://git-lfs"


def unfetched(path: Path) -> str:
    """Return what to do about a file that git-lfs has not fetched; nothing where it is no pointer to one."""
    try:
        with path.open("rb") as stream:
            found = stream.read(len(_POINTER)) == _POINTER
    except OSError:
        return ""
    what = f"'{path}' is a Git LFS pointer: the file itself was not fetched."
    return f"{what}\n  Run: git lfs pull. In CI check out with `lfs: true`." if found else ""


def put(path: Path, text: str) -> Path:
    """Write a file whole or leave it as it was, whatever goes wrong; raises OSError.

    A link stays one, and what it names is written; a pipe or a device is written to as it is.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8", errors="replace", newline="\n")
        return path
    whole = path.resolve()
    # A name of its own, so that jobs which share a folder never rename each other's halves.
    draft = whole.with_name(f".{whole.name}.{os.getpid()}")
    try:
        # A lone surrogate, as in a file name that is not UTF-8, becomes a question mark rather than an error.
        draft.write_text(text, encoding="utf-8", errors="replace", newline="\n")
        os.replace(draft, whole)
    finally:
        draft.unlink(missing_ok=True)
    return path
