"""From the images that --pool names to a pool to draw from: read, samples left out, scored by the teacher, told of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from xdonnx.draw import digests, of_batch
from xdonnx.errors import ShotsError
from xdonnx.events import Event, Log, ignore, legible
from xdonnx.model import model_fingerprint
from xdonnx.pool import Pool, of_the_pool
from xdonnx.relatedness import VERSION, Gauge, noise_like, open_gauge, standardised
from xdonnx.report import tool
from xdonnx.scorecache import load, place, save
from xdonnx.sheet import PoolImage, PoolSheet
from xdonnx.shots import Shots, Unread
from xdonnx.worst import thumbnail

Array = NDArray[Any]

# Images that are scored together, and noise images that the scores are measured by.
BATCH, NOISE = 64, 128
# Of each end of the pool, how many the report shows.
SHOWN = 12
# Fewer images than half a batch of training has are shown several times in each.
FEW = 16


@dataclass(frozen=True, eq=False)
class Teacher:
    """Who scores: the file, the graph as it was read, and the device of onnxruntime."""

    path: Path
    proto: onnx.ModelProto
    device: str = "cpu"


def collect(
    found: Shots | Unread,
    teacher: Teacher,
    fit: Shots,
    held_out: Shots,
    *,
    how: str,
    most: int = BATCH,
    log: Log = ignore,
) -> tuple[Pool, PoolSheet]:
    """Read the images of a pool once and score them.

    Parameters
    ----------
    found : Shots or Unread
        From `samples.Request.read_pool`.
    teacher : Teacher
    fit, held_out : Shots
        What fits and what judges; images that are among them are left out of the pool.
    how : {'preferential', 'uniform'}
        See `pool.Pool`.
    most : int
        Images that the teacher is shown at once.
    log : Log
        Told of progress in the stage 'pool'.

    Returns
    -------
    Pool, PoolSheet
        What is drawn from, and what the report says of it.

    Raises
    ------
    ShotsError
        Images that cannot be read, or none that is no sample too.
    ModelError, MachineError
        The teacher cannot be run.
    """
    images = read(found, log)
    own = {*digests(fit), *digests(held_out)}
    sample = {name: np.asarray(values[:BATCH]) for name, values in fit.inputs.items()}
    gauge = open_gauge(teacher.proto, sample, device=teacher.device)
    names, measured = _measured(images, gauge, teacher, most, log)
    new = [row for row, digest in enumerate(names) if digest not in own]
    twins = len(names) - len(new)
    if not new:
        raise ShotsError(
            f"--pool: all {len(names)} images are also samples that fit or judge.\n  Give others, or leave --pool out."
        )
    if twins:
        images, measured = images.take(new), measured[new]
        log(Event("pool", f"{twins} images of the pool are also samples that fit or judge: left out."))
    if len(new) < FEW:
        text = f"the pool has {len(new)} image{'s' * (len(new) > 1)} only, drawn over and over: give more."
        log(Event("pool", text, level="warning"))
    scores = None
    if gauge.names:
        made = noise_like(sample, max(NOISE, gauge.batch or 1))
        noise = np.concatenate([gauge(part) for part in _parts(made, max(most, gauge.batch or 1))])
        scores = standardised(measured, noise)
    else:
        text = (
            "nothing of this model says how related an image is (it does not classify, and has no BatchNormalization): "
            "the pool is drawn from uniformly."
        )
        log(Event("pool", text, level="warning"))
    pool = Pool(images, scores, how)
    log(Event("pool", f"{len(pool)} images, {how} draw", len(pool), len(pool)))
    return pool, _sheet(pool, gauge.names, twins)


def read(found: Shots | Unread, log: Log = ignore) -> Shots:
    """Return all images of a pool, checked; many are read when they are used."""
    if isinstance(found, Shots):
        return found
    try:
        return found.stream(np.arange(len(found)))
    except ShotsError as error:
        raise of_the_pool(error) from error


def _measured(images: Shots, gauge: Gauge, teacher: Teacher, most: int, log: Log) -> tuple[list[bytes], Array]:
    """Return the digest of each image and its indicators, from the cache those that it has."""
    width = len(gauge.names)
    path = place([model_fingerprint(teacher.path), str(VERSION), str(tool().onnxruntime), *gauge.names, teacher.device])
    known = load(path, width)
    fresh: dict[bytes, Array] = {}
    names: list[bytes] = []
    for feed in _parts(images.inputs, most):
        these = of_batch(feed)
        names += these
        new = [row for row, digest in enumerate(these) if digest not in known and digest not in fresh]
        if new and width:
            found = gauge({name: values[new] for name, values in feed.items()})
            fresh |= {these[row]: values for row, values in zip(new, found, strict=True)}
        log(Event("pool", "", len(names), len(images)))
    if fresh and not save(path, fresh, width):
        log(Event("pool", f"scores cannot be kept in '{path.parent}': the next job measures them again"))
    return names, np.stack([fresh.get(digest, known.get(digest, np.zeros(width))) for digest in names])


def _parts(inputs: Mapping[str, Any], most: int) -> Iterator[dict[str, Array]]:
    for start in range(0, len(next(iter(inputs.values()))), most):
        yield {name: np.asarray(values[start : start + most]) for name, values in inputs.items()}


def _sheet(pool: Pool, indicators: Sequence[str], twins: int) -> PoolSheet:
    chances = pool.chances()
    facts: dict[str, Any] = {
        "images": len(pool) + twins,
        "used": len(pool),
        "twins": twins,
        "unreadable": tuple(map(legible, pool.images.skipped)),
        "draw": pool.how if pool.scores is not None else "uniform",
        "indicators": tuple(indicators),
        "effective": float(1 / np.square(chances).sum()),
    }
    if pool.scores is None:
        return PoolSheet(**facts)
    order = np.argsort(pool.scores, kind="stable")
    most, least = order[:SHOWN], order[SHOWN:][::-1][:SHOWN]
    return PoolSheet(
        **facts,
        quantiles=tuple(float(q) for q in np.quantile(pool.scores, (0, 0.25, 0.5, 0.75, 1))),
        most_related=tuple(_image(pool, chances, int(row)) for row in most),
        least_related=tuple(_image(pool, chances, int(row)) for row in least),
    )


def _image(pool: Pool, chances: Array, row: int) -> PoolImage:
    assert pool.scores is not None
    return PoolImage(
        sample=legible(pool.images.ids[row]),
        score=float(pool.scores[row]),
        chance=float(chances[row]),
        thumbnail=thumbnail({name: np.asarray(values[[row]]) for name, values in pool.images.inputs.items()}),
    )
