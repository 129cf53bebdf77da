"""Measure xdonnx against the published algorithm, against plain passes and against Torch-Pruning; write the tables.

python samples/benchmarks/benchmark.py --data DIR -o samples/benchmarks.md
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import cutting
import solving
import torch
import walking
import writing
from torch import nn

from xdonnx.errors import JobError, MachineError, XdonnxError

PARTS = ("solving", "walking", "cutting")  # in the order of the page


class Run:
    """What the parts share: where to write, and what to say on the way."""

    def __init__(self, given: argparse.Namespace, words: Sequence[str]) -> None:
        self.given = given
        where = "XDONNX_DATA=DIR " if "solving" in given.only and "--data" not in words else ""
        self.command = where + shlex.join(["python", "samples/benchmarks/benchmark.py", *words])
        self.began = time.monotonic()
        self.loads: list[float] = []
        self.sections: dict[str, list[str]] = {}
        self.left: list[str] = []

    def say(self, text: str) -> None:
        """Tell how far it is, on stderr."""
        if hasattr(os, "getloadavg"):
            self.loads.append(os.getloadavg()[0])
        print(f"{time.monotonic() - self.began:6.0f} s  {text}", file=sys.stderr, flush=True)

    def write(self, part: str, section: list[str], left: Sequence[str] = ()) -> None:
        """Write what is there and what is not yet, so that an interrupt loses only what is being measured."""
        self.sections[part] = section
        self.left = [f"{part} {name}" for name in left]
        about = writing.machine(self.loads)
        sections = [self.sections[name] for name in PARTS if name in self.sections]
        missing = [name for name in PARTS if name in self.given.only and name not in self.sections]
        self.given.out.write_text(writing.page(sections, about, self.command, [*missing, *self.left]))


def solve(run: Run) -> None:
    """Measure the published algorithm on activations and on moments, and the default."""
    given = run.given
    job = solving.job_of(given.data, "paper")
    solved = solving.solve_layers(job, run.say, repeats=given.layer_repeats, steps=given.steps, whole=not given.quick)
    layers = writing.layers(solved, given.steps)
    run.write("solving", layers)
    found = solving.run_efforts(given.data, run.say, repeats=given.repeats)
    run.write("solving", layers + writing.efforts(found, solved, solving.held_out(given.data)))


def cut(run: Run, folder: Path) -> None:
    """Measure cutting alone."""
    found = []
    for name in run.given.networks:
        run.say(f"cut: {name}")
        module = walking.network(name)
        found.append(cutting.compare(name, module, exported(name, folder, module), folder, run.given.repeats))
    run.write("cutting", writing.cuts(found))


def walk(run: Run, folder: Path) -> None:
    """Measure the layer-wise stage of large networks, each in a process."""
    measured = {}
    for name in run.given.networks:
        model = exported(name, folder)
        run.say(f"stage: {name}")
        measured[name] = walking.in_a_process(model, run.given.samples, run.given.stage_repeats)
        left = [other for other in run.given.networks if other not in measured]
        run.write("walking", writing.networks(measured, run.given.samples), left)


def exported(name: str, folder: Path, module: nn.Module | None = None) -> Path:
    """Return a network of torchvision as a file, made where it is not there yet."""
    path = folder / f"{name}.onnx"
    if not path.exists():
        walking.export(module or walking.network(name), path)
    return path


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Return what was typed; refuses what cannot be measured before anything is."""
    parser = argparse.ArgumentParser(prog="benchmark.py", description=(__doc__ or "").splitlines()[0])
    listed = _listed
    parser.add_argument("-o", "--out", type=Path, default=Path("benchmarks.md"), metavar="FILE.md")
    parser.add_argument("--data", type=Path, metavar="DIR", help="teachers and images; default: $XDONNX_DATA")
    parser.add_argument("--only", type=listed(PARTS), default=PARTS, metavar="A,B", help=f"of {','.join(PARTS)}")
    parser.add_argument(
        "--networks", type=listed(walking.NETWORKS), default=walking.NETWORKS, metavar="A,B", help="of torchvision"
    )
    parser.add_argument("--samples", type=_count, default=64, metavar="N", help="of large networks; default: 64")
    parser.add_argument("--repeats", type=_count, default=3, metavar="N", help="default: 3")
    parser.add_argument("--layer-repeats", type=_count, default=3, metavar="N", help="of each layer; default: 3")
    parser.add_argument("--stage-repeats", type=_count, default=3, metavar="N", help="of large networks; default: 3")
    parser.add_argument("--steps", type=_count, default=30, metavar="N", help="timed on activations; default: 30")
    parser.add_argument("--quick", action="store_true", help="never make all 3,000 steps on activations: minutes less")
    given = parser.parse_args(words)
    if given.data is None and os.environ.get("XDONNX_DATA"):
        given.data = Path(os.environ["XDONNX_DATA"])
    return given


def _listed(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"no '{name}'; choices: {', '.join(choices)}")
        return names

    return parse


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of at least 1")
    return int(text)


def check(given: argparse.Namespace) -> None:
    """Raise what stands in the way, before minutes are spent."""
    if "solving" in given.only:
        if given.data is None:
            raise JobError("--only solving needs a real network.\n  --data DIR or XDONNX_DATA names the folder.")
        solving.job_of(given.data, "paper")
    if "cutting" in given.only and not cutting.available():
        raise MachineError(
            "--only cutting needs Torch-Pruning.\n  pip install torch-pruning, or leave it out: --only solving,walking"
        )
    if not given.out.parent.is_dir():
        raise MachineError(f"no folder '{given.out.parent}'.\n  Make it, or name another file: -o FILE.md")


def start(words: Sequence[str]) -> None:
    """Run one command line.

    Raises
    ------
    XdonnxError
        Something is missing.
    """
    given = arguments(words)
    check(given)
    torch.set_num_threads(1)  # processor time is that of all threads
    run = Run(given, words)
    with TemporaryDirectory(prefix="xdonnx-benchmark-") as name:
        folder = Path(name)
        if "cutting" in given.only:
            cut(run, folder)
        if "solving" in given.only:
            solve(run)
        if "walking" in given.only:
            walk(run, folder)
    run.say(f"wrote {given.out}")


def main() -> None:
    """Run the script on what was typed, and end the process with its exit code."""
    # As an exception it unwinds, and temporary folders go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    warnings.simplefilter("ignore")
    try:
        start(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except XdonnxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
