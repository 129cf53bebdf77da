"""What the machine has to give - memory above all - and what is its fault when a job ends early."""

from __future__ import annotations

import errno
import math
import re
import sys
from pathlib import Path

import psutil

from xdonnx.errors import JobError, MachineError

# Of the memory that is free, what a job takes unasked.
SHARE = 0.6
# Less is a slip of the pen: bytes where gigabytes were meant.
LEAST = 1_000_000
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
# Where control groups say what a container may use and uses: version 2, then version 1.
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_SHORT = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad allocation", "bad_alloc")
_LOST = ("cuda error", "cudnn error", "cublas error", "cusolver error", "nvml", "no cuda-capable device")


def parsed_bytes(text: str | int, flag: str = "--memory") -> int:
    """Return the bytes that a text such as 8GB, 500MB or 2GiB stands for; a number is bytes, a text has its unit.

    Raises
    ------
    JobError
        It stands for none.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kmgt]i?b?|b)\s*", str(text), re.IGNORECASE)
    size = float(found[1]) * _UNITS.get(found[2].lower().removesuffix("b"), math.nan) if found else math.nan
    if isinstance(text, int) and not isinstance(text, bool):
        size = float(text)
    if not size >= LEAST:
        raise JobError(
            f"{flag} is '{text}'.\n  It is an amount of bytes with its unit, 1MB or more: 8GB, 500MB or 2GiB."
        )
    return int(size)


def free_memory() -> int:
    """Return the bytes that this process may still take: of the machine, or of the container that it runs in."""
    free = int(psutil.virtual_memory().available)
    for most, used in _GROUPS:
        try:
            limit, taken = (int(Path(path).read_text()) for path in (most, used))
        except (OSError, ValueError):
            continue  # no such group, or no limit: 'max'
        free = min(free, max(0, limit - taken + _reclaimable()))
    return free


def _reclaimable() -> int:
    """Return the bytes of files that a container's usage counts and that are given up for the asking."""
    for path in ("/sys/fs/cgroup/memory.stat", "/sys/fs/cgroup/memory/memory.stat"):
        try:
            stat = dict(line.split(" ", 1) for line in Path(path).read_text().splitlines())
            return int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))
        except (OSError, ValueError):
            continue
    return 0


def taken_memory() -> int:
    """Return the bytes of memory that this process takes now."""
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """Return the most bytes of memory that this process took so far."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def machines_fault(error: BaseException) -> MachineError | None:
    """Return what to tell the user of an error that is the machine's: memory, disk or GPU; None for others."""
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    text = str(error).lower()
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return MachineError(f"the disk is full: {error}\n  Free space, or set TMPDIR to another disk.")
    if isinstance(error, MemoryError) or any(words in text for words in _SHORT):
        return MachineError(
            f"out of memory: {said}\n  Pass a smaller --memory, use fewer samples (--max-shots), or a larger machine."
        )
    if isinstance(error, RuntimeError) and any(words in text for words in _LOST):
        return MachineError(
            f"the GPU failed: {said}\n  See whether it is still there: xdonnx doctor. --device cpu does without."
        )
    return None
