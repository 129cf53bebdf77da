"""The jobs that a sweep asks for: one for each model, choice and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from xdonnx.budget import KINDS, check_budget, pattern_of
from xdonnx.errors import JobError
from xdonnx.sweep.description import Choice, Description, Teacher
from xdonnx.sweep.identity import key
from xdonnx.sweep.options import TARGETS, job_of, told
from xdonnx.wanted import Job

# What is varied by names that the file gives.
AXES = ("method", "structure", "target")
# The folder of a trial is named by so many letters of its key.
SHORT = 12


@dataclass(frozen=True)
class Trial:
    """A job of a sweep.

    Parameters
    ----------
    key : str
        Hash of everything that decides the result.
    model : str
        The name of the teacher.
    choices : mapping
        What was chosen, by what is varied: names, or the numbers of a search.
    seed : int
    job : Job
    refused : str
        Why these options make no sense together; nothing where they do.
    """

    key: str
    model: str
    choices: Mapping[str, Any]
    seed: int
    job: Job
    refused: str = ""

    @property
    def folder(self) -> str:
        """What its folder is called."""
        return self.key[:SHORT]

    @property
    def point(self) -> tuple[str, tuple[tuple[str, Any], ...]]:
        """What trials have in common that differ by their seeds alone."""
        return self.model, tuple(self.choices.items())

    def __str__(self) -> str:
        """Say it in a line."""
        words = [self.model, *(said(name, value) for name, value in self.choices.items() if value != "")]
        return " | ".join([*words, f"seed {self.seed}"])


def grid(sweep: Description, out: Path) -> list[Trial]:
    """Return the trials of a sweep without a search, seeds outermost, so that early results cover all of it.

    Parameters
    ----------
    sweep : Description
    out : Path
        The folder of the sweep.

    Raises
    ------
    JobError
        No trial of some model, method, structure or target can be carried out.
    """
    found = [
        trial(sweep, teacher, dict(zip(sweep.axes, picks, strict=True)), seed, out)
        for seed in sweep.seeds
        for teacher in sweep.models
        for picks in product(*sweep.axes.values())
    ]
    # A pattern takes no target, so that it stands once where the others stand for each target.
    found = list({(one.point, one.seed): one for one in found}.values())
    _check(sweep, found)
    return found


def trial(sweep: Description, teacher: Teacher, picks: Mapping[str, Any], seed: int, out: Path) -> Trial:
    """Return one trial.

    Parameters
    ----------
    sweep : Description
    teacher : Teacher
    picks : mapping
        A choice, or a number for the option of that name, for everything that is varied.
    seed : int
    out : Path
        The folder of the sweep.
    """
    options, choices = dict(teacher.options), {}
    for name, pick in picks.items():
        mine = pick.options if isinstance(pick, Choice) else {name: pick}
        if any(each in TARGETS for each in mine):
            options = {each: value for each, value in options.items() if each not in TARGETS}
        options |= mine
        choices[name] = pick.name if isinstance(pick, Choice) else pick
    if "target" in picks and _is_pattern(options.get("structure", "")):
        options = {each: value for each, value in options.items() if each not in TARGETS}
        choices["target"] = ""
    where = f"'{sweep.path.name}', {teacher.name}, {', '.join(str(value) for value in choices.values())}"
    job = job_of(options, model=teacher.model, where=where, seed=seed)
    known = key(job)
    placed = job.model_copy(update={"out": out.absolute() / "trials" / known[:SHORT] / "student.onnx"})
    return Trial(known, teacher.name, choices, seed, placed, _refusal(job))


def _is_pattern(structure: str) -> bool:
    try:
        return pattern_of(structure) is not None
    except JobError:
        return False


def _refusal(job: Job) -> str:
    """Return why a job cannot be carried out as written, as far as that shows without its files."""
    try:
        if (budget := job.budget()).kind in KINDS:
            check_budget(budget)
        job.measured()
        job.methods()
    except JobError as error:
        return str(error)
    return ""


def _check(sweep: Description, found: Sequence[Trial]) -> None:
    """Raise JobError for a part of the file of which no trial can be done: that is a mistake, and no result."""
    for axis in ("model", *sweep.axes):
        every: dict[str, list[Trial]] = {}
        for one in found:
            every.setdefault(one.model if axis == "model" else one.choices[axis], []).append(one)
        for name, its in every.items():
            if all(one.refused for one in its):
                raise JobError(f"'{sweep.path.name}', {axis} '{name}': {its[0].refused}")


def said(name: str, value: Any) -> str:
    """Return a choice in a few words; what is no named set of options is nothing without its name."""
    return str(value) if name in AXES else f"{name.replace('_', '-')} {told(value)}"
