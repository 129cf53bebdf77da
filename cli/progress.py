"""What a running job says on stderr: a bar for each stage on a terminal, lines with -v, else nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from xdonnx.events import Event, Log, ignore
from xdonnx_cli.flags import Talk
from xdonnx_cli.terminal import say, shorten, stderr

STAGES = {
    "read": "read the model",
    "shots": "read the samples",
    "pool": "score the pool",
    "parity": "compare with onnxruntime",
    "curves": "measure curves",
    "tables": "time layers",
    "pace": "time students",
    "smallest": "look for the smallest",
    "fit": "compress",
    "ranks": "look at ranks",
    "split": "take apart",
    "cut": "cut",
    "verify": "verify",
    "latency": "measure latency",
}


@contextmanager
def told(talk: Talk) -> Iterator[Log]:
    """Yield the log that draws a job's events; nothing of a bar is left when it ends, however it ends."""
    console = stderr()
    if talk.verbose:
        yield lambda event: say(console, _line(event)) if event.text else None
    elif talk.quiet or talk.no_progress or not console.is_terminal:
        yield ignore
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}", justify="right"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, transient=True, expand=True) as bars:
            yield _drawing(bars)


def _line(event: Event) -> str:
    # 'curves' tells of a layer after its work, the others before it.
    before = min(event.done + 1, event.total)
    at = {"fit": before, "ranks": before, "split": before, "curves": event.done}.get(event.stage)
    count = f" {at}/{event.total}" if event.total and at is not None else ""
    return f"{'warning' if event.level == 'warning' else event.stage}{count}: {event.text}"


def _drawing(bars: Progress) -> Log:
    """Return a log that gives each stage a bar, and names below it what the job is busy with."""
    tasks: dict[str, TaskID] = {}

    def draw(event: Event) -> None:
        stage = STAGES.get(event.stage, event.stage)
        if event.stage not in tasks:
            for task in tasks.values():
                bars.update(task, total=bars.tasks[task].total or 1, completed=bars.tasks[task].total or 1)
            tasks[event.stage] = bars.add_task(stage, total=None, count="")
        if event.level == "warning":
            return
        task = tasks[event.stage]
        if event.total:
            bars.update(task, total=event.total, completed=event.done, count=f"{event.done}/{event.total}")
        if event.stage in ("curves", "fit", "tables", "ranks", "split") and event.text:
            width = max(12, bars.console.width - 40)
            bars.update(task, description=f"{stage} {Text(shorten(event.text, min(width, 30))).plain}")

    return draw
