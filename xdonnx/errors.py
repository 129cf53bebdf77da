"""Every way in which a job can end early, and the exit code that says so.

XdonnxError                 exit
├─ JobError                    2   the recipe: unknown method, impossible target, bad pattern
├─ ModelError                  4   the ONNX file: unreadable, invalid, not runnable, not convertible
├─ ShotsError                  5   the samples: none, unreadable, wrong shape, too few, not finite
├─ VerifyError                 6   the written file: answers or interface differ from what was computed
├─ NothingToDo                 7   no channel may go, or the target is out of reach
└─ MachineError                8   the environment: device absent, out of memory, disk full

A failed gate is not an error: the report says which number, and the exit code is 3.
"""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches


class XdonnxError(Exception):
    """A problem that the user can act on; the text says what, where, and what to do."""

    exit_code = 1


class JobError(XdonnxError):
    """The recipe cannot be carried out as written."""

    exit_code = 2


class ModelError(XdonnxError):
    """The ONNX file cannot be read, run or converted."""

    exit_code = 4


class ShotsError(XdonnxError):
    """The samples cannot be used."""

    exit_code = 5


class VerifyError(XdonnxError):
    """What was written does not answer as what was computed, or has another interface."""

    exit_code = 6


class NothingToDo(XdonnxError):
    """Nothing may be removed, or the target is out of reach."""

    exit_code = 7


class MachineError(XdonnxError):
    """The machine lacks what the job asks for: a device, memory, disk."""

    exit_code = 8


def did_you_mean(word: str, choices: Collection[str]) -> str:
    """Return ' Did you mean 'x'?' where a choice is near the word, else nothing; made to follow a full stop."""
    near = get_close_matches(word, choices, n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
