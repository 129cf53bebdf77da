"""Trials on this machine: one after another in this process, or several at a time in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # It brings torch, which a worker may load only once it has said how many threads it gets.
    from xdonnx.sweep.measuring import Done, Perform, Task

# How often a task may lose its worker: once may be bad luck, twice is its own doing.
DEATHS = 2


@contextmanager
def serial(scratch: Path) -> Iterator[Perform]:
    """Yield what does tasks one after another, in this process.

    Parameters
    ----------
    scratch : Path
        A folder for temporary files.
    """
    from xdonnx.sweep.measuring import measure

    def perform(tasks: Sequence[Task], begin: Callable[[Task], None]) -> Iterator[Done]:
        for task in tasks:
            begin(task)
            yield measure(task, scratch)

    yield perform


@contextmanager
def processes(scratch: Path, jobs: int, threads: int) -> Iterator[Perform]:
    """Yield what does tasks in processes, started when they are needed and ended when the context is left.

    A process that dies takes nothing with it but its own task, which is given to another one once; then it has failed.

    Parameters
    ----------
    scratch : Path
        A folder for temporary files; those of a process that was ended stay there.
    jobs : int
        How many at a time.
    threads : int
        Of each.
    """
    crew = _Crew(scratch, jobs, threads)

    def perform(tasks: Sequence[Task], begin: Callable[[Task], None]) -> Iterator[Done]:
        waiting, deaths = deque(tasks), Counter[str]()
        while waiting or crew.busy:
            crew.hand_out(waiting, begin)
            lines: list[Any] = list(crew.busy)
            for line in wait(lines):
                assert isinstance(line, Connection)
                task = crew.busy.pop(line)
                try:
                    yield line.recv()
                except (EOFError, OSError):
                    why = crew.bury(line)
                    deaths[task.key] += 1
                    if deaths[task.key] < DEATHS:
                        waiting.appendleft(task)
                    else:
                        yield lost(task, why)

    try:
        yield perform
    finally:
        # A trial takes minutes: nobody who stops the sweep waits for those under way.
        for process in crew.all.values():
            process.terminate()
        for line in list(crew.all):
            crew.bury(line)


def lost(task: Task, why: str) -> Done:
    """Return what is recorded of a task that lost its worker as often as it may."""
    from xdonnx.sweep.measuring import failure

    return failure(task, f"its worker was lost {DEATHS} times: {why}.\n  Short of memory? Run fewer at a time: --jobs.")


@dataclass(frozen=True)
class _Crew:
    """Processes by the lines to them, and what those that are not idle are doing."""

    scratch: Path
    most: int
    threads: int
    all: dict[Any, BaseProcess] = field(default_factory=dict)
    busy: dict[Any, Task] = field(default_factory=dict)

    def hand_out(self, waiting: deque[Task], begin: Callable[[Task], None]) -> None:
        """Give tasks to idle processes, and to new ones as long as there may be more."""
        while waiting:
            line = next((line for line in self.all if line not in self.busy), None)
            if line is None:
                if len(self.all) >= self.most:
                    return
                line = self.start()
            try:
                line.send(waiting[0])
            except OSError:  # it died while it was idle: no fault of the task's
                self.bury(line)
                continue
            self.busy[line] = waiting.popleft()
            begin(self.busy[line])

    def start(self) -> Connection:
        """Start a process and return the line to it."""
        ours, theirs = multiprocessing.Pipe()
        # A fork of a process that has threads may hang, and torch and onnxruntime have them.
        process = multiprocessing.get_context("spawn").Process(
            target=_work, args=(theirs, self.scratch, self.threads), daemon=True
        )
        # Ctrl-C is for this process, which then ends the others: they are born deaf to it.
        mask = getattr(signal, "pthread_sigmask", None)
        before = mask(signal.SIG_BLOCK, {signal.SIGINT}) if mask else set()
        try:
            process.start()
        finally:
            if mask:
                mask(signal.SIG_SETMASK, before)
        # Else the line would outlive the process, and its end would never be seen.
        theirs.close()
        self.all[ours] = process
        return ours

    def bury(self, line: Any) -> str:
        """Wait for the end of a process and say what it was."""
        process = self.all.pop(line)
        line.close()
        process.join()
        code = process.exitcode or 0
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def _work(line: Connection, scratch: Path, threads: int) -> None:
    """Do tasks until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow, daemon=True).start()
    # What is loaded from here on reads these once.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, str(threads))
    warnings.simplefilter("ignore")
    from xdonnx.sweep.measuring import measure

    while True:
        try:
            task = line.recv()
        except (EOFError, OSError):
            return
        line.send(measure(task, scratch))


def _follow() -> None:
    """End this process when the one that started it has ended, even if that was killed: nobody wants the results."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
