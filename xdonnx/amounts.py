"""Sizes of files and times of runs as people write them: 10MB, 5ms, or a share of the teacher's such as 40%."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xdonnx.errors import JobError

SIZES: Mapping[str, float] = {
    "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
}  # fmt: skip
TIMES: Mapping[str, float] = {"us": 1e-3, "µs": 1e-3, "ms": 1, "s": 1e3}
_UNITS = {"size": SIZES, "latency": TIMES}
_EXAMPLES = {"size": ("10MB", "40%"), "latency": ("5ms", "70%")}


@dataclass(frozen=True)
class Amount:
    """How much of something.

    Parameters
    ----------
    number : float
        A share of the teacher's above 0 and below 1; else bytes, or milliseconds.
    unit : {'', 'B', 'ms'}
        '' is a share.
    """

    number: float
    unit: str = ""


def amount_of(given: Any, kind: str) -> Amount:
    """Read a size or a latency.

    Parameters
    ----------
    given : str or number
        '10MB', '5 ms', '40%', or a share as a number.
    kind : {'size', 'latency'}

    Raises
    ------
    JobError
        It is neither, zero or less, or a share that leaves all.
    """
    units, (whole, share) = _UNITS[kind], _EXAMPLES[kind]
    said = str(given).strip()
    found = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-zµ%]*)", said)
    if found is None or isinstance(given, bool):
        raise JobError(f"--{kind} is '{said}'.\n  Write an amount such as {whole}, or a share such as {share}.")
    number, word = float(found[1]), found[2]
    if not 0 < number < math.inf:
        raise JobError(f"--{kind} is '{said}', and has to be above 0.\n  For example {whole}, or {share}.")
    if word in ("", "%"):
        # As a decimal, since 99.9 / 100 is not 0.999.
        number = float(f"{found[1]}e-2") if word and "e" not in found[1].lower() else number / 100 if word else number
        if number < 1:
            return Amount(number)
        if word:
            raise JobError(f"--{kind} is '{said}': the teacher's is 100%.\n  Write less, such as {share}.")
        raise JobError(f"--{kind} is '{said}' of what?\n  Write a unit, as in {whole}, or a share as in {share}.")
    unit = next((name for name in units if name.lower() == word.lower()), None)
    if unit is None:
        raise JobError(
            f"--{kind} is '{said}': there is no unit '{word}'.\n  Units: {', '.join(units)}, or % of the teacher's."
        )
    return Amount(number * units[unit], "B" if kind == "size" else "ms")


def fraction_of(given: Any) -> Any:
    """Return per cent in text as the fraction that they are, '50%' as 0.5; anything else as it is."""
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*%\s*", given) if isinstance(given, str) else None
    # As a decimal, since 99.9 / 100 is not 0.999.
    return float(f"{found[1]}e-2") if found else given


def settled(given: Any, kind: str) -> float | str:
    """Return a size or a latency as a job keeps it: a share as a number, else text without spaces."""
    found = amount_of(given, kind)
    return "".join(str(given).split()) if found.unit else found.number
