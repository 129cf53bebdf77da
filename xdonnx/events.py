"""What a running job tells whoever watches it; the command line draws these, the library ignores them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Parameters
    ----------
    stage : str
        What the job is busy with: 'read', 'shots', 'pool', 'parity', 'curves', 'tables', 'pace', 'fit', 'cut',
        'verify', 'latency', 'smallest'.
    text : str
        One line for a person, legible; may be empty on a pure progress tick.
    done, total : int
        Progress within the stage; `total` 0 means unknown.
    level : {'info', 'warning'}
        Warnings also end in the report.
    """

    stage: str
    text: str = ""
    done: int = 0
    total: int = 0
    level: str = "info"

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", legible(self.text))


Log = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Drop the event: the default log of the library."""


def hearing(log: Log, heard: list[str]) -> Log:
    """Return a log that passes events on, and keeps the text of those that warn."""

    def note(event: Event) -> None:
        if event.level == "warning":
            heard.append(event.text)
        log(event)

    return note


def legible(text: str) -> str:
    """Return a text that can be written: names of files that are not UTF-8 hold what cannot, which becomes '?'."""
    return text.encode("utf-8", "replace").decode("utf-8")
