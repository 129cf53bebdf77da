"""Scores of images under a teacher, kept between jobs: a file for each teacher in the user's folder for such things.

Several jobs may write it at once: each writes a file of its own and renames it, so that what is read is always whole.
What one of them lost to another it measures again the next time.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Names the folder in place of the usual one.
VARIABLE = "XDONNX_CACHE"
# Images of one teacher; some 25 MB.
MOST = 200_000
_WIDTH = hashlib.sha256().digest_size


def folder() -> Path:
    """Return where caches lie: `XDONNX_CACHE`, else the user's own folder for them."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    usual = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    return (Path(usual) if usual else Path.home() / ".cache") / "xdonnx"


def place(parts: Sequence[str]) -> Path:
    """Return the file of what is told apart by these texts: the teacher, and how its scores are defined."""
    return folder() / f"pool-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.npz"


def load(path: Path, width: int) -> dict[bytes, Array]:
    """Return {digest of an image: its numbers}; nothing where there is no such file, or a damaged one."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as held:
            digests, values = held["digests"], held["values"]
    except Exception:  # a damaged file raises whatever its parsers trip over, and is as good as none
        return {}
    fits = digests.dtype == np.uint8 and digests.shape[1:] == (_WIDTH,) and values.shape == (len(digests), width)
    if not fits or values.dtype != np.float64:
        return {}
    return {digest.tobytes(): row for digest, row in zip(digests, values, strict=True)}


def save(path: Path, found: Mapping[bytes, Array], width: int) -> bool:
    """Add what was found to the file; return whether it could be written, without which a job does well too."""
    whole = {**load(path, width), **found}
    kept = list(whole.items())[-MOST:]
    digests = np.frombuffer(b"".join(digest for digest, _ in kept), np.uint8).reshape(-1, _WIDTH)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                np.savez(stream, digests=digests, values=np.stack([row for _, row in kept]))
            os.replace(draft, path)
        finally:
            Path(draft).unlink(missing_ok=True)
    except OSError:
        return False
    return True
