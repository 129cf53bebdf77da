"""What a table shows: cells from finished runs, and the terminal, CSV, Markdown and picture made of them."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import rich.table
from description import Row, Run, Table
from rich.text import Text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COSTS = ("macs", "bytes", "nonzero")
# Okabe and Ito's colours, with grey and wine for their yellow, which is too faint on white. Markers differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#000000", "#7F7F7F")
MARKERS = "osD^vPX<>*"
# What the legend calls the dotted line.
TEACHER = "the teacher"
STROKE: dict[str, Any] = {
    "linewidth": 1.6,
    "markersize": 5.5,
    "capsize": 2.5,
    "elinewidth": 1.0,
    "markeredgecolor": "white",
    "markeredgewidth": 0.6,
}


@dataclass(frozen=True)
class Cell:
    """A method at some shots per class in a row of the table.

    `values` are {seed: accuracy or agreement in per cent}; `costs` and `seconds` are means over these runs, costs as
    shares of the teacher's; `reasons` say why there are no more values.
    """

    row: str
    method: str
    per_class: int | None
    values: Mapping[int, float]
    costs: Mapping[str, float]
    seconds: float | None
    teacher: float | None
    judged: int | None
    reasons: tuple[str, ...]

    @property
    def mean(self) -> float | None:
        """The mean over seeds; None where no run gave a value."""
        return fmean(self.values.values()) if self.values else None

    @property
    def std(self) -> float | None:
        """The standard deviation between seeds (of a sample: n - 1); None below two of them."""
        return stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def text(self) -> str:
        """What the table says: '79.57 ± 0.80', 'n/a', or nothing where nothing ran yet."""
        if self.mean is None:
            return "n/a" if self.reasons else ""
        return f"{self.mean:.2f}" + (f" ± {self.std:.2f}" if self.std is not None else "")


def cells(table: Table, runs: Sequence[Run], records: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
    """Return the cells of a table, in its order, from the records of finished runs by their keys."""
    together: dict[tuple[str, str, int | None], list[Run]] = {}
    for run in runs:
        together.setdefault((run.row, run.method, run.per_class), []).append(run)
    judges = {row.name: row.judge for row in table.row}
    return [_cell(its, judges[row], records) for (row, _, _), its in together.items()]


def _cell(runs: Sequence[Run], judge: str, records: Mapping[str, Mapping[str, Any]]) -> Cell:
    done = {run.seed: records[run.key] for run in runs if run.key in records}
    good = {seed: record for seed, record in done.items() if record.get(judge) is not None}
    reasons = [record["error"] for record in done.values() if record["error"]]
    if len(good) + len(reasons) < len(done):
        reasons.append(f"no {judge} was measured: without labels, judge by agreement")
    any_good = next(iter(good.values()), {})
    return Cell(
        row=runs[0].row,
        method=runs[0].method,
        per_class=runs[0].per_class,
        values={seed: record[judge] for seed, record in sorted(good.items())},
        costs={name: fmean(record[name] for record in good.values()) for name in COSTS} if good else {},
        seconds=fmean(record["seconds"] for record in good.values()) if good else None,
        teacher=any_good.get("teacher"),
        judged=any_good.get("judged"),
        reasons=tuple(dict.fromkeys(reasons)),
    )


@dataclass(frozen=True)
class Grid:
    """A row of the table as it is read: methods by shots per class, and what must be known to read it."""

    row: Row
    methods: tuple[str, ...]
    cells: Mapping[tuple[str, int | None], Cell]
    caption: str
    notes: tuple[str, ...]

    @property
    def heads(self) -> list[str]:
        """The columns' names, that of the methods first."""
        return ["method", *("all samples" if k is None else f"{k} per class" for k in self.row.columns)]

    @property
    def best(self) -> set[tuple[str, int | None]]:
        """The cells that no other of their column beats, where there are others."""
        found = set()
        for k in self.row.columns:
            means = {name: self.cells[name, k].mean for name in self.methods}
            given = {name: round(mean, 2) for name, mean in means.items() if mean is not None}
            found |= {(name, k) for name, mean in given.items() if len(given) > 1 and mean == max(given.values())}
        return found


def grids(table: Table, found: Sequence[Cell]) -> list[Grid]:
    """Return the rows of a table in which something has been done."""
    made = []
    for row in table.row:
        mine = {(cell.method, cell.per_class): cell for cell in found if cell.row == row.name}
        if any(cell.text for cell in mine.values()):
            names = tuple(dict.fromkeys(name for name, _ in mine))
            made.append(Grid(row, names, mine, _caption(row, list(mine.values())), _notes(list(mine.values()))))
    return made


def _caption(row: Row, mine: Sequence[Cell]) -> str:
    counts = sorted({len(cell.values) for cell in mine if cell.values})
    good = [cell for cell in mine if cell.values]
    if not good:
        return "No run gave a value."
    what = "Top-1 accuracy" if row.judge == "accuracy" else "Top-1 agreement with the teacher"
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    spread = "mean ± standard deviation" if counts[-1] > 1 else "one value"
    parts = [f"{what} in per cent on {good[0].judged} held-out samples, {spread}, n = {many}."]
    if good[0].teacher is not None:
        parts.append(f"Teacher: {good[0].teacher:.2f} % accuracy.")
    shares = [f"{_range([cell.costs[name] for cell in good])} of the {name}" for name in ("macs", "bytes")]
    parts.append(f"Students keep {' and '.join(shares)}.".replace("macs", "MACs"))
    return " ".join(parts)


def _range(shares: Sequence[float]) -> str:
    low, high = (f"{100 * share:.1f}" for share in (min(shares), max(shares)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _notes(mine: Sequence[Cell]) -> tuple[str, ...]:
    """Return why cells are n/a or lack seeds, each reason once, with the methods that it stopped."""
    stopped: dict[str, list[str]] = {}
    for cell in mine:
        for reason in cell.reasons:
            stopped.setdefault(" ".join(reason.split()), []).append(cell.method)
    return tuple(f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in stopped.items())


def for_terminal(grid: Grid) -> rich.table.Table:
    """Return a row of the table for rich to print, without its caption."""
    made = rich.table.Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), title=Text(grid.row.name, "bold"))
    made.title_justify = "left"
    for at, head in enumerate(grid.heads):
        made.add_column(head, justify="right" if at else "left", header_style="dim", no_wrap=True)
    best = grid.best
    for name in grid.methods:
        shown = [(grid.cells[name, k].text, "bold green" if (name, k) in best else "") for k in grid.row.columns]
        made.add_row(Text(name), *(Text(*each) for each in shown))
    return made


def markdown(title: str, shown: Sequence[Grid]) -> str:
    """Return the table as Markdown: a heading, a caption and a table for each row."""
    lines = [f"# {title}"] if title else []
    for grid in shown:
        lines += ["", f"## {grid.row.name}", "", _escaped(grid.caption), ""]
        lines += [f"| {' | '.join(grid.heads)} |", f"|---|{'---:|' * len(grid.row.columns)}"]
        best = grid.best
        for name in grid.methods:
            texts = [(grid.cells[name, k].text, (name, k) in best) for k in grid.row.columns]
            lines.append(f"| {' | '.join([_escaped(name), *(f'**{t}**' if bold else t for t, bold in texts)])} |")
        lines += ["", *(f"- n/a, {_escaped(note)}" for note in grid.notes)] if grid.notes else []
    return "\n".join(lines).strip() + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def write_csv(path: Path, table: Table, found: Sequence[Cell]) -> None:
    """Write every cell as a line, with the value of each seed; empty where there is none."""
    judges = {row.name: row.judge for row in table.row}
    seeds = list(dict.fromkeys(table.seeds))
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        heads = ["row", "shots_per_class", "method", "judge", "mean", "std", "n", *(f"seed_{seed}" for seed in seeds)]
        writer.writerow([*heads, *COSTS, "seconds", "teacher_accuracy", "judged", "reason"])
        for cell in found:
            mean = "n/a" if cell.mean is None and cell.reasons else cell.mean
            line = [cell.row, cell.per_class or "all", cell.method, judges[cell.row], mean, cell.std, len(cell.values)]
            line += [*(cell.values.get(seed) for seed in seeds), *(cell.costs.get(name) for name in COSTS)]
            writer.writerow([*line, cell.seconds, cell.teacher, cell.judged, " | ".join(cell.reasons)])


def plot(path: Path, title: str, shown: Sequence[Grid]) -> None:
    """Draw a panel for each row: what is judged over shots per class, a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plt: Any = pyplot
    wide = 1 if len(shown) == 1 else 2 if len(shown) <= 4 else 3
    high = math.ceil(len(shown) / wide)
    beside = wide * high == len(shown) and any(len(grid.row.columns) > 1 for grid in shown)
    with plt.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "legend.frameon": False}):
        size = (4.3 * wide + 1.8 * beside, 3.3 * high + 0.3 * bool(title))
        figure, axes = plt.subplots(high, wide, figsize=size, layout="constrained", squeeze=False)
        names = list(dict.fromkeys(name for grid in shown for name in grid.methods))
        looks = {name: _look(at) for at, name in enumerate(names)}
        for grid, panel in zip(shown, axes.flat, strict=False):
            (_lines if len(grid.row.columns) > 1 else _dots)(panel, grid, looks)
            _dress(panel, grid)
        _legend(figure, list(axes.flat), len(shown), names)
        if title:
            figure.suptitle(title, fontsize=12, fontweight="bold")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _look(at: int) -> dict[str, Any]:
    """Return how a method is drawn; colour and marker repeat out of step, so that many methods stay apart."""
    dashes = ("-", "--", ":")[at // len(COLOURS) % 3]
    return {"color": COLOURS[at % len(COLOURS)], "marker": MARKERS[at % len(MARKERS)], "linestyle": dashes}


def _lines(panel: Axes, grid: Grid, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw one line per method; points are set apart a little, so that error bars do not hide each other."""
    ticks = [k for k in grid.row.columns if k is not None]
    # The widest shift is a few per cent of the distance between neighbouring ticks.
    near = min((math.log(b / a) for a, b in pairwise(ticks)), default=math.log(4))
    for at, name in enumerate(grid.methods):
        shift = math.exp(near * (at - (len(grid.methods) - 1) / 2) * min(0.03, 0.16 / len(grid.methods)))
        points = [(k * shift, grid.cells[name, k]) for k in ticks]
        _bars(panel, name, points, looks[name])
    panel.set_xscale("log")
    panel.set_xticks(ticks, labels=[str(k) for k in ticks])
    panel.minorticks_off()
    panel.set_xlim(ticks[0] / math.exp(0.4 * near), ticks[-1] * math.exp(0.4 * near))
    panel.set_xlabel("shots per class")


def _dots(panel: Axes, grid: Grid, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw one point per method, for a row of one column; the axis names the methods."""
    (column,) = grid.row.columns
    for at, name in enumerate(grid.methods):
        _bars(panel, "", [(at, grid.cells[name, column])], looks[name])
    panel.set_xticks(
        range(len(grid.methods)), labels=list(grid.methods), rotation=40, ha="right", rotation_mode="anchor"
    )
    panel.set_xlim(-0.6, len(grid.methods) - 0.4)
    panel.set_xlabel("all samples" if column is None else f"shots per class: {column}")


def _bars(panel: Axes, name: str, points: Sequence[tuple[float, Cell]], look: Mapping[str, Any]) -> None:
    """Draw the cells of a method that have values, with their standard deviations where there are any."""
    drawn = [(x, cell.mean, cell.std or 0.0) for x, cell in points if cell.mean is not None]
    if drawn:
        x, mean, std = zip(*drawn, strict=True)
        panel.errorbar(x, mean, std if any(std) else None, label=name, **look, **STROKE)


def _dress(panel: Axes, grid: Grid) -> None:
    """Give a panel its name, its teacher's line and a grid that stays behind."""
    teacher = next((cell.teacher for cell in grid.cells.values() if cell.teacher is not None), None)
    if grid.row.judge == "accuracy" and teacher is not None:
        panel.axhline(teacher, color="#444444", linewidth=1.0, linestyle=(0, (1, 1.5)), label=TEACHER, zorder=1)
    panel.set_title(grid.row.name, loc="left")
    panel.set_ylabel("top-1 accuracy, %" if grid.row.judge == "accuracy" else "agreement with the teacher, %")
    panel.grid(axis="y", color="#E3E3E3", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.margins(y=0.07)
    panel.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, panels: Sequence[Axes], used: int, names: Sequence[str]) -> None:
    """Put one legend for all panels into a spare one, or beside them: methods in their order, then the teacher."""
    pairs = [pair for panel in panels[:used] for pair in zip(*panel.get_legend_handles_labels(), strict=True)]
    marks = {label: mark for mark, label in reversed(pairs)}
    labels = [label for label in (*names, TEACHER) if label in marks]
    for panel in panels[used:]:
        panel.set_axis_off()
    if used < len(panels):
        panels[used].legend([marks[label] for label in labels], labels, loc="center left", fontsize=10)
    elif labels and labels != [TEACHER]:
        figure.legend([marks[label] for label in labels], labels, loc="outside right upper", fontsize=10)
    elif labels:
        panels[0].legend([marks[TEACHER]], labels, loc="best")
