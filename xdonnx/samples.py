"""The samples that a job or a comparison asks for, wherever they lie: found, and parted in those that fit and judge."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xdonnx.draw import check_seed, unseen
from xdonnx.errors import JobError, ShotsError
from xdonnx.events import Event, Log, ignore
from xdonnx.feeds import wants
from xdonnx.images import Preprocess
from xdonnx.memory import as_array, described, gather
from xdonnx.pool import of_the_pool
from xdonnx.shots import Array, Shots, Unread, list_shots, split

if TYPE_CHECKING:
    # For the annotations only: reading shots must not cost the import of onnx.
    from xdonnx.model import Port

_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, eq=False)
class Request:
    """Which samples are wanted, as flags or keywords say it.

    Parameters
    ----------
    shots : path, sequence of paths, or samples in memory, optional
        In any form that `memory.gather` takes.
    labels : path or (n,) integers, optional
    holdout : float, str, path or samples, optional
        Those that judge: a fraction of all, such as 0.2 or '20%'; or others. None: the same that fit.
    preprocess : Preprocess
    per_class, max_shots : int, optional
        As of `draw.draw`.
    skip_bad : bool
        Leave out what cannot be read.
    synthetic_shots : int, optional
        Random noise, so much of it, in place of samples.
    seed : int
        Of every draw; raises JobError for one that `draw.check_seed` does not take.
    pool : path, sequence of paths, or samples in memory, optional
        Unlabelled images besides, related to the samples or not.
    """

    shots: Any = None
    labels: Any = None
    holdout: Any = None
    preprocess: Preprocess = field(default_factory=Preprocess)
    per_class: int | None = None
    max_shots: int | None = None
    skip_bad: bool = False
    synthetic_shots: int | None = None
    seed: int = 0
    pool: Any = None

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @property
    def names(self) -> tuple[str, ...]:
        """What was given, for messages and reports; of files, what reads them again."""
        paths = _paths(self.shots)
        return (described(self.shots),) if paths is None else paths

    @property
    def held(self) -> bool:
        """Whether any of it is in memory."""
        asked = self.labels, self.holdout
        plain = all(isinstance(value, (str, os.PathLike, int, float, np.number, type(None))) for value in asked)
        return _paths(self.shots) is None or _paths(self.pool) is None or not plain

    def told(self) -> dict[str, Any]:
        """Return what the report says of it."""
        values = {name: getattr(self, name) for name in ("per_class", "max_shots", "skip_bad", "synthetic_shots")}
        pool = _paths(self.pool)
        if pool != ():
            values["pool"] = (described(self.pool),) if pool is None else pool
        return {"shots": list(self.names), "labels": _told(self.labels), "holdout": _told(self.holdout), **values}

    def read(self, ports: Sequence[Port], log: Log = ignore) -> tuple[Shots | Unread, float | Shots]:
        """Return all samples, and the fraction of them that is held out or those that are.

        Raises
        ------
        ShotsError
            Samples of no use.
        JobError
            None were given, or two kinds of them.
        """
        share = fraction(self.holdout)
        if self.synthetic_shots is not None:
            if self.names:
                raise JobError("--shots and --synthetic-shots are both given.\n  Leave the random ones out.")
            log(Event("shots", "samples are random noise: what is measured on them says little.", level="warning"))
            return synthetic(ports, self.synthetic_shots, np.random.default_rng(self.seed)), share or 0.0
        most = self.max_shots
        if most is not None and share:
            # So many fit, and the fraction of all judges.
            most = round(most / (1 - min(share, 0.99)))
        whole = self._found(self.shots, ports, log, labels=self.labels, most=most)
        if share is not None:
            return whole, share
        others = self._found(self.holdout, ports, _naming(log, "hold-out"))
        return whole, others.stream(np.arange(len(others))) if isinstance(others, Unread) else others

    def read_pool(self, ports: Sequence[Port], log: Log = ignore) -> Shots | Unread | None:
        """Return the images of the pool, of files before any is decoded; None where none are asked for.

        Raises
        ------
        ShotsError
            Images of no use.
        """
        if _paths(self.pool) == ():
            return None

        named = _naming(log, "pool")

        def relayed(event: Event) -> None:
            # How many there are is told once they are scored.
            if not event.text or event.level == "warning":
                named(replace(event, stage="pool"))

        try:
            return self._found(self.pool, ports, relayed, labelled=False)
        except ShotsError as error:
            raise of_the_pool(error) from error

    def _found(
        self,
        given: Any,
        ports: Sequence[Port],
        log: Log,
        *,
        labels: Any = None,
        most: int | None = None,
        labelled: bool = True,
    ) -> Shots | Unread:
        """Return samples from memory, or those of files before any is decoded."""
        paths = _paths(given)
        known: Path | Array | None = None
        if isinstance(labels, (str, os.PathLike)):
            known = Path(labels)
        elif labels is not None:
            known = as_array(labels)
        if paths is None:
            if isinstance(known, Path):
                raise JobError("labels is a file, and the samples are in memory.\n  Give labels as an array too.")
            return gather(given, ports, self.preprocess, labels=known, most=most, seed=self.seed, log=log)
        if not paths:
            raise ShotsError(
                "no samples.\n  Pass --shots PATH: a folder of images, an .npz or an .npy; from Python an array, "
                "(images, labels) or a loader too."
            )
        how: dict[str, Any] = {"labels": known, "labelled": labelled, "skip_bad": self.skip_bad, "log": log}
        return list_shots(paths, ports, self.preprocess, **how)


def apart(
    whole: Shots | Unread, held: float | Shots, asked: Request, *, log: Log = ignore, stream: bool = False
) -> tuple[Shots, Shots]:
    """Part samples into those that fit and those that judge, none of which is among the first.

    Parameters
    ----------
    whole, held
        As from `Request.read`. A fraction of 0 judges on those that fit.
    asked : Request
        For the draw.
    stream : bool
        As of `shots.split`.
    log : Log
        Told in the stage 'shots' of samples that are left out.

    Raises
    ------
    ShotsError
        As from `shots.split`; or none is left to judge.
    """
    how: dict[str, Any] = {"per_class": asked.per_class, "max_shots": asked.max_shots, "seed": asked.seed}
    fit, judging = split(whole, **how, holdout=held, stream=stream)
    if not isinstance(held, Shots) and held == 0:
        return fit, judging
    others = unseen(judging, fit)
    if not len(others):
        raise ShotsError(
            f"all {len(judging)} held-out samples are also among those that fit, so they cannot judge.\n"
            "  Hold out others, or pass --holdout 0 to judge on those that fit and say so."
        )
    if len(others) < len(judging):
        many = len(judging) - len(others)
        log(Event("shots", f"{many} held-out samples are also among those that fit: left out.", level="warning"))
    return fit, others


def fraction(holdout: Any) -> float | None:
    """Return the fraction that is held out; None where other samples are."""
    if holdout is None:
        return 0.0
    text = str(holdout) if isinstance(holdout, (str, int, float, np.number)) else ""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


def synthetic(ports: Sequence[Port], count: int, generator: np.random.Generator) -> Shots:
    """Invent shots: standard normal numbers, and uniform ones for an input of uint8 pixels.

    Raises
    ------
    ShotsError
        A size beyond the batch is free, or the type is neither floating nor uint8.
    JobError
        `count` is below 1.
    """
    if count < 1:
        raise JobError(f"{count} synthetic shots are none.\n  Ask for at least 1.")
    inputs: dict[str, Array] = {}
    for port in ports:
        sizes = [size for size in port.shape[1:] if isinstance(size, int)] if port.shape else []
        if port.shape is None or len(sizes) < len(port.shape) - 1:
            raise ShotsError(
                f"input '{port.name}' wants {wants(port)}, which leaves the size of synthetic shots open.\n"
                f"  Pass --input-shape {port.name}:1x3x224x224, with the sizes you need."
            )
        if port.dtype == "uint8":
            inputs[port.name] = generator.integers(0, 256, (count, *sizes), np.uint8)
        elif port.dtype in _FLOATS:
            inputs[port.name] = generator.standard_normal((count, *sizes)).astype(port.dtype)
        else:
            raise ShotsError(
                f"input '{port.name}' takes {port.dtype}, which cannot be invented.\n  Give real samples: --shots PATH."
            )
    return Shots(inputs, None, tuple(f"synthetic[{row}]" for row in range(count)))


def _naming(log: Log, whose: str) -> Log:
    """Have warnings say of which samples they are, where these are not the shots."""

    def named(event: Event) -> None:
        warns = event.level == "warning" and event.text
        log(replace(event, text=f"{whose}: {event.text}") if warns else event)

    return named


def _paths(given: Any) -> tuple[str, ...] | None:
    """Return samples as the paths that they are; None where they are in memory."""
    if given is None:
        return ()
    if isinstance(given, (str, os.PathLike)):
        return (os.fspath(given),)
    if isinstance(given, (list, tuple)) and all(isinstance(part, (str, os.PathLike)) for part in given):
        return tuple(os.fspath(part) for part in given)
    return None


def _told(value: Any) -> str | None:
    """Return a value as a report says it: a path or a number as it is, what is in memory by its kind."""
    if value is None:
        return None
    share = fraction(value)
    if share is not None:
        return f"{share:g}"
    paths = _paths(value)
    return described(value) if paths is None else ", ".join(paths)
