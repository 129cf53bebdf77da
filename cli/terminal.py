"""What everything that is printed shares: where it goes, how numbers read, how long names are shortened."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

# A name is never cut to fewer letters than this, however narrow the window.
_SHORTEST = 12


def stdout() -> Console:
    """Return the console of results; it colours nothing where stdout is no terminal or NO_COLOR is set."""
    return Console(highlight=False, markup=False, emoji=False)


def stderr() -> Console:
    """Return the console of messages and progress."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def say(console: Console, text: str, style: str = "") -> None:
    """Print a line that is not broken, so that paths and commands can be copied."""
    console.print(Text(text, style), soft_wrap=True)


def headline(console: Console, line: Text) -> None:
    """Print what came of it: in one line where nobody says how wide lines may be, so that it can be searched for."""
    console.print(line, soft_wrap=not console.is_terminal and "COLUMNS" not in os.environ)


def shorten(name: str, most: int, tail: float = 0.6) -> str:
    """Return the name with its middle left out where it is longer than `most`; `tail` is the share kept of its end."""
    most = max(most, _SHORTEST)
    if len(name) <= most:
        return name
    end = round((most - 1) * tail)
    return f"{name[: most - 1 - end]}…{name[len(name) - end :]}"


def shortened(names: Iterable[str], most: int) -> dict[str, str]:
    """Return {name: shortened}, cut where the fewest of them become the same.

    Exporters make names that begin alike ('model.layer3.0.conv1') or end alike ('/layer3/BatchNormalization_output_0').
    """
    names = list(dict.fromkeys(names))
    choices = [{name: shorten(name, most, tail) for name in names} for tail in (0.6, 0.3, 0.1, 0.9)]
    return max([*choices, _telling(names, most)], key=lambda choice: len(set(choice.values())))


def _telling(names: Sequence[str], most: int) -> dict[str, str]:
    """Return {name: the part of it that the fewest others have}, for names that begin alike and end alike."""
    most = max(most, _SHORTEST)
    found = {}
    for name in names:
        starts = [0, *(at + 1 for at, letter in enumerate(name) if letter in "/.")]
        start = min(starts, key=lambda at: (sum(name[at : at + most - 2] in other for other in names), at))
        start = min(start, max(0, len(name) - most + 1))
        whole = len(name) - start <= most - (start > 0)
        part = name[start:] if whole else name[start : start + most - 1 - (start > 0)]
        found[name] = "…" * (start > 0) + part + "…" * (not whole)
    return found


def room(console: Console, others: int, *, names: int = 1) -> int:
    """Return how wide each of `names` columns of names may be, where the other columns take `others`."""
    return max(_SHORTEST, (console.width - others) // names)


def percent(part: float, whole: float) -> str:
    """Return what per cent of the whole a part is; nothing where there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole else ""


def plain_table(*columns: str, title: str = "") -> Table:
    """Return a table without lines: the first column is text, the others are numbers.

    A column whose name ends in '<' is text too.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title or None, title_justify="left")
    table.title_style = "bold"
    for at, column in enumerate(columns):
        text = at == 0 or column.endswith("<")
        table.add_column(
            column.removesuffix("<"), justify="left" if text else "right", header_style="dim", overflow="fold"
        )
    return table


def heading(console: Console, text: str) -> None:
    """Print an empty line and a heading."""
    console.print()
    console.print(Text(text, "bold"))


def bullets(console: Console, lines: Sequence[str], mark: str = "-") -> None:
    """Print each line behind a mark, its continuation indented."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for line in lines:
        grid.add_row(f"  {mark}", line)
    console.print(grid)


def beside(path: Path) -> str:
    """Return a path as short as it can be typed from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
