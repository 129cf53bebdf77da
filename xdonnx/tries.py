"""What a job tried on the way to its student, and the search for the smallest one that keeps the gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from pydantic import BaseModel, Field

from xdonnx.errors import NothingToDo
from xdonnx.strict import STRICT

# Students that are made and judged at most, and how near to each other two of them are worth being.
TRIES, FINEST = 6, 0.002
# Tries while none has failed, so that what was not reached is not taken for the limit.
MOST_TRIES = 12

P = TypeVar("P")


class Try(BaseModel):
    """A student that was made, or timed, on the way to the one that was written."""

    model_config = STRICT
    asked: str = Field(description="of this try: 'macs 43.1%', or 'predicted latency 72.5%' by the times of its layers")
    macs: float | None = Field(default=None, description="its share of the teacher's")
    latency: float | None = Field(
        default=None,
        description="median over the teacher's, timed in turns; of the processor's time where the warnings say so",
    )
    drop: float | None = Field(default=None, description="points lost")
    error: float | None = Field(default=None, description="relative L2 of the worst output")
    passed: bool = Field(description="whether it kept every limit; of latency: whether it was as fast as was asked for")
    chosen: bool = False


def tried(tries: Sequence[Try]) -> list[tuple[str, ...]]:
    """Return the tries as rows of a table: what was asked, what it came to, what was found, and the verdict."""
    return [
        (
            one.asked,
            "" if one.macs is None else f"{100 * one.macs:.1f} %",
            "; ".join(
                text
                for text in (
                    "" if one.latency is None else f"latency {100 * one.latency:.1f} %",
                    "" if one.drop is None else f"drop {one.drop:.2f}",
                    "" if one.error is None else f"error {one.error:.4f}",
                )
                if text
            ),
            ("passed" if one.passed else "failed") + (", chosen" if one.chosen else ""),
        )
        for one in tries
    ]


def halve(plan: Callable[[float], P], faithful: Callable[[float, P], bool], floor: float) -> None:
    """Look for the smallest share that is good enough, by halving what lies between a floor and the whole.

    Parameters
    ----------
    plan : callable
        Turns a share into a plan; NothingToDo where there is none.
    faithful : callable
        Makes and judges the student of a plan that is new: whether still less may stay.
    floor : float
        The share of which there is nothing left to remove.
    """
    low, high = floor, 1.0
    seen: list[tuple[P, bool]] = []
    while high - low > FINEST and len(seen) < (MOST_TRIES if all(good for _, good in seen) else TRIES):
        # So many digits as a user types, who may want the same again.
        share = round((low + high) / 2, 3)
        try:
            found = plan(share)
        except NothingToDo:
            # Nearly all is to stay, and so all does; or nearly nothing, which rounding does not allow.
            low, high = (share, high) if share - floor < 1 - share else (low, share)
            continue
        known = [good for other, good in seen if other == found]
        good = known[0] if known else faithful(share, found)
        if not known:
            seen.append((found, good))
        low, high = (low, share) if good else (share, high)
