"""Numbers as people read them, on every page and in every table."""

from __future__ import annotations


def amount(number: float, unit: str = "") -> str:
    """Return a count as people read it: 4.19 M, 188 k, 12; bytes with unit 'B' as 757 kB."""
    for step, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= step:
            digits = f"{number / step:#.3g}" if number < 1000 * step else f"{number / step:.0f}"
            return f"{digits.rstrip('.')} {prefix}{unit}"
    return f"{number:.0f} {unit}".rstrip()
