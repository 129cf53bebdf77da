"""`xdonnx bench`: how long models take in onnxruntime, timed in turns, and how sure the difference is."""

from __future__ import annotations

import json as encoder
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from xdonnx.errors import JobError, ModelError, ShotsError
from xdonnx_cli.flags import Pixels, Sizes, Talk, data, running
from xdonnx_cli.output import put_json, tables
from xdonnx_cli.progress import told
from xdonnx_cli.terminal import plain_table, room, say, shortened

if TYPE_CHECKING:
    import numpy as np

    from xdonnx.events import Log
    from xdonnx.images import Preprocess
    from xdonnx.model import Port

    Feed = dict[str, np.ndarray[Any, Any]]

ROUNDS, SECONDS, WARM_UP = 1000, 2.0, 0.3
# Below this confidence nothing is concluded.
_SURE = 0.95
# Letters of a name that are worth a column less.
_NAME = 16

_SHOTS = (
    "Feed real samples: a folder of images, .npz or .npy. NAME=PATH, repeated, for several inputs. Default: random "
    "numbers of the graph's types and shapes."
)
_BATCH = "Samples in each run, of every model. Default: as many as one of the graphs fixes, else 1."


@dataclass(frozen=True)
class Timing:
    """How long one model takes, in milliseconds, and what that is of the first one's time.

    Parameters
    ----------
    model : Path
    bytes : int
        Of the file and its external data.
    median, q1, q3 : float
    provider : str
        What really ran it.
    ratio : float
        Of the medians.
    low, high : float
        Between these the ratio lies with that confidence, slow drifts of the machine included.
    confidence : float
        At least 0.95 of six runs or more, the fewest that can say so; below that nothing is concluded.
    """

    model: Path
    bytes: int
    median: float
    q1: float
    q3: float
    provider: str
    ratio: float
    low: float
    high: float
    confidence: float

    @property
    def verdict(self) -> str:
        """What can be said of it beside the first model."""
        if self.confidence < _SURE:
            return "too few runs"
        if self.low > 1:
            return "slower"
        return "faster" if self.high < 1 else "no difference"


def bench(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL...", readable=False, help="ONNX files; the first one is 1.", show_default=False),
    ],
    pixels: Pixels,
    sizes: Sizes,
    talk: Talk,
    shots: Annotated[list[str] | None, data("--shots", "PATH", _SHOTS)] = None,
    batch: Annotated[int | None, data("--batch", "N", _BATCH, min=1)] = None,
    rounds: Annotated[
        int | None, running("--rounds", "N", f"Runs of each model, at most. Default: {ROUNDS}.", min=3)
    ] = None,
    seconds: Annotated[
        float | None, running("--seconds", "S", f"For all models together, at most. Default: {SECONDS:g}.", min=0.01)
    ] = None,
    threads: Annotated[int, running("--threads", "N", "Within an operator; 0: onnxruntime's own choice.", min=0)] = 0,
    device: Annotated[str, running("--device", "NAME", "cpu or cuda:0.")] = "cpu",
    seed: Annotated[int, running("--seed", "N", "Of the random numbers.", min=0)] = 0,
) -> int:
    """Time one or several models in onnxruntime, in turns, so that whatever else the machine does hits all alike.

    Median and quartiles of each after a warm-up, and its ratio to the first model with the band that noise leaves.
    """
    preprocess, shapes = pixels.preprocess(), sizes.shapes()
    from xdonnx.doctor import check_device
    from xdonnx.model import file_bytes, interface, read_proto
    from xdonnx.verification import turns

    check_device(device)
    ports = [_sized(interface(read_proto(model)).inputs, shapes) for model in models]
    _check_names(shapes, ports)
    fixed = _fixed_batches(models, ports)
    count = _batch(fixed, batch, [shapes[port.name][0] for mine in ports for port in mine if port.name in shapes])
    # A number of rounds alone is a wish for exactly so many.
    ends = seconds or (SECONDS if rounds is None else math.inf)
    with told(talk) as log:
        feeds = _feeds(ports, count, shots, preprocess, seed, log)
        times, ran = turns(
            models,
            feeds,
            device=device,
            threads=threads,
            repeats=rounds or ROUNDS,
            seconds=ends,
            warm_up=min(WARM_UP * len(models), ends / 10),
            log=log,
        )
    found = [
        _timing(model, file_bytes(model), times, at, provider)
        for at, (model, provider) in enumerate(zip(models, ran, strict=True))
    ]
    facts = {
        "inputs": "samples" if shots else "random numbers",
        "batch": count,
        "runs": len(times),
        "threads": threads,
        "device": device,
    }
    put_json(talk.json, encoder.dumps({**facts, "models": _rows(found, feeds)}, indent=2))
    why = f", the batch that '{next(iter(fixed))}' fixes" if 0 < len(fixed) < len(set(models)) else ""
    _show(tables(talk), found, facts, feeds[0], why, quiet=talk.quiet)
    return 0


def _feeds(
    ports: Sequence[Sequence[Port]],
    batch: int,
    shots: list[str] | None,
    preprocess: Preprocess,
    seed: int,
    log: Log,
) -> list[Feed]:
    """Return what each model is fed, run after run."""
    from xdonnx.shots import read_shots

    if not shots:
        return [_random(mine, batch, seed) for mine in ports]
    inputs = [read_shots(shots, mine, preprocess, log=log).inputs for mine in ports]
    return [_first(values, batch) for values in inputs]


def _rows(found: Sequence[Timing], feeds: Sequence[Feed]) -> list[dict[str, Any]]:
    """Return the models for --json."""
    return [
        {
            **vars(timing),
            "model": str(timing.model),
            "verdict": timing.verdict if at else "first",
            "shapes": {name: list(values.shape) for name, values in feed.items()},
        }
        for at, (timing, feed) in enumerate(zip(found, feeds, strict=True))
    ]


def _sized(ports: Sequence[Port], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Port, ...]:
    """Return a model's inputs with the sizes that were given for those of them that it has."""
    from xdonnx.model import sized

    names = {port.name for port in ports}
    return sized(ports, {name: shape for name, shape in shapes.items() if name in names})


def _check_names(shapes: Mapping[str, Any], ports: Sequence[Sequence[Port]]) -> None:
    names = list(dict.fromkeys(port.name for mine in ports for port in mine))
    for name in shapes:
        if name not in names:
            raise JobError(f"--input-shape: no model has an input '{name}'.\n  Inputs: {', '.join(names)}.")


def _fixed_batches(models: Sequence[Path], ports: Sequence[Sequence[Port]]) -> dict[Path, int]:
    """Return {model: samples that it takes at once} of the models whose graphs fix that."""
    found = {}
    for model, mine in zip(models, ports, strict=True):
        if own := [port.shape[0] for port in mine if port.shape and isinstance(port.shape[0], int)]:
            found[model] = max(own)
    return found


def _batch(fixed: Mapping[Path, int], asked: int | None, given: Sequence[int]) -> int:
    """Return how many samples a run of each model takes: times of different numbers do not compare."""
    first = next(iter(fixed), None)
    for model, count in fixed.items():
        if first is not None and count != fixed[first]:
            raise JobError(
                f"'{first}' takes {fixed[first]} samples at once and '{model}' {count}: their times do not compare.\n"
                "  Time each alone, or export both for the same batch."
            )
        if asked is not None and count != asked:
            raise JobError(f"--batch {asked}: '{model}' takes {count} samples at once.\n  Leave --batch out.")
    return asked or (fixed[first] if first is not None else next(iter(given), 1))


def _random(ports: Sequence[Port], batch: int, seed: int) -> Feed:
    """Return random numbers that the graph can take.

    Integers are 0 and 1, but for uint8, which are pixels: an input may index a table of unknown length.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    feed: Feed = {}
    for port in ports:
        if port.shape is None or any(not isinstance(size, int) for size in port.shape[1:]):
            raise JobError(f"input '{port}' leaves its size open.\n  Choose one: --input-shape {port.name}:1x3x224x224")
        whole = [size for size in port.shape if isinstance(size, int)]
        shape = (batch, *whole[len(whole) - len(port.shape) + 1 :]) if port.shape else ()
        try:
            dtype = np.dtype(port.dtype)
        except TypeError as error:
            raise ModelError(f"input '{port}' takes no numbers, so none can be invented.") from error
        if dtype.kind == "f":
            feed[port.name] = np.asarray(generator.standard_normal(shape)).astype(dtype)
        elif dtype.kind in "biu":
            top = 256 if dtype == np.uint8 else 2
            feed[port.name] = np.asarray(generator.integers(0, top, shape)).astype(dtype)
        else:
            raise ModelError(f"input '{port}' takes {port.dtype}, which cannot be invented.\n  Give --shots.")
    return feed


def _first(inputs: Mapping[str, np.ndarray[Any, Any]], batch: int) -> Feed:
    rows = min(len(values) for values in inputs.values())
    if rows < batch:
        raise ShotsError(f"a run takes {batch} samples, and there are {rows}.\n  Give more, or a smaller --batch.")
    return {name: values[:batch] for name, values in inputs.items()}


def _timing(model: Path, size: int, times: np.ndarray[Any, Any], at: int, provider: str) -> Timing:
    """Compare one column of (runs, models) milliseconds with the first."""
    import numpy as np

    from xdonnx.intervals import ratio_band

    q1, median, q3 = (float(value) for value in np.percentile(times[:, at], (25, 50, 75)))
    band = ratio_band(times[:, 0], times[:, at])
    return Timing(model, size, median, q1, q3, provider, band.value, band.low, band.high, band.confidence)


def _show(
    console: Console, found: Sequence[Timing], facts: Mapping[str, Any], feed: Feed, why: str, *, quiet: bool
) -> None:
    """Print the table, and below it how it was measured; `why` tells what decided on the batch."""
    compared = len(found) > 1
    sure = all(timing.confidence >= _SURE for timing in found)
    extra = ("ratio", f"{100 * _SURE:.0f} % sure" if sure else "seen", "<") if compared else ()
    rows = [["median", "q1 to q3", *extra]]
    for at, timing in enumerate(found):
        cells = [f"{timing.median:.3g} ms", f"{timing.q1:.3g} to {timing.q3:.3g}"]
        if compared:
            band = f"{timing.low:.3f} to {timing.high:.3f}" if at else ""
            cells += [f"{timing.ratio:.3f}", band, timing.verdict if at else ""]
        rows.append(cells)
    if console.width < _width(rows) + _NAME:  # which model it is says more than how its runs scatter
        rows = [[cell for at, cell in enumerate(row) if at != 1] for row in rows]
    names = shortened([str(timing.model) for timing in found], room(console, _width(rows)))
    table = plain_table("", *rows[0])
    table.columns[0].no_wrap = True
    for timing, cells in zip(found, rows[1:], strict=True):
        table.add_row(names[str(timing.model)], *cells)
    console.print(table)
    if quiet:
        return
    threads = f"--threads {facts['threads']}" if facts["threads"] else "threads as onnxruntime chooses"
    ran = ", ".join(dict.fromkeys(timing.provider.removesuffix("ExecutionProvider") for timing in found))
    say(console, f"{facts['runs']} runs each, in turns, after a warm-up; {ran}, {threads}", "dim")
    shapes = ", ".join(f"{name} {values.dtype} {values.shape}" for name, values in feed.items())
    say(console, f"fed with {facts['inputs']}: {shapes}{why}", "dim")
    if not facts["device"].startswith("cpu") and ran == "CPU":
        say(console, f"warning: {facts['device']} was asked for, but onnxruntime ran on the CPU", "yellow")


def _width(rows: Sequence[Sequence[str]]) -> int:
    """Return how wide columns of these cells are, each with the gap before it."""
    return sum(2 + max(map(len, column)) for column in zip(*rows, strict=True))
