"""What a running job says on stderr: a bar for each stage on a terminal, lines with -v, else nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from xdonnx.events import Event, Log, ignore
from xdonnx_cli.flags import Talk
from xdonnx_cli.terminal import say, shorten, shortened, stderr

# How long a name may be beside a bar, and from how many before it it has to differ there.
_LONGEST, _BEFORE = 30, 8

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
    before: deque[str] = deque(maxlen=_BEFORE)

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
            name = _short(event.text, before, min(max(12, bars.console.width - 40), _LONGEST))
            bars.update(task, description=f"{stage} {Text(name).plain}")
            if event.text not in before:
                before.append(event.text)

    return draw


def _short(name: str, before: Iterable[str], most: int) -> str:
    """Return the end of a layer's name, where names mostly differ; another part if one just before it ends alike."""
    end, others = shorten(name, most, 1.0), [other for other in before if other != name]
    alike = any(shorten(other, most, 1.0) == end for other in others)
    return shortened([*others, name], most)[name] if alike else end
