"""`xdonnx plan`: how much each layer can lose, and the split of a target that follows, as a file to edit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from xdonnx.errors import JobError
from xdonnx_cli.flags import SWITCH, Data, Pixels, Sizes, Talk, Target, output, running
from xdonnx_cli.output import put_json, tables
from xdonnx_cli.plan import predicted, show_predicted
from xdonnx_cli.progress import told
from xdonnx_cli.terminal import beside, heading, plain_table, room, say, shortened, stderr
from xdonnx_cli.wanted import check_cheaply, fields, library

if TYPE_CHECKING:
    from xdonnx.events import Log
    from xdonnx.job import Job, Prepared
    from xdonnx.planfile import PlanFile, Points

_BARS = "▁▂▃▄▅▆▇█"
_UNMEASURED = "Single weights have no error curves: every layer keeps the same fraction."


@dataclass(frozen=True)
class PlanFiles:
    """Where the plan goes, and the rest of the run."""

    out: Annotated[Path, output("--out", "OUT", "The plan: a TOML file for compress --plan.", "-o")]
    force: Annotated[bool, output("--force", SWITCH, "Replace an OUT that exists.")] = False
    device: Annotated[str, running("--device", "NAME", "auto, cpu or cuda:0.")] = "auto"
    seed: Annotated[int, running("--seed", "N", "Of every draw.", min=0)] = 0


def plan(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", readable=False, help="The teacher: an ONNX file.", show_default=False)
    ],
    data: Data,
    pixels: Pixels,
    sizes: Sizes,
    target: Target,
    files: PlanFiles,
    talk: Talk,
) -> int:
    """Measure how much each layer of a model can lose, and split a target by it.

    OUT is a file to read and to edit: xdonnx compress MODEL --plan OUT does what it says.
    """
    wanted = fields(data, pixels, sizes, target)
    from xdonnx.budget import pattern_of
    from xdonnx.events import hearing
    from xdonnx.paths import check_plan

    check_cheaply(model, target)
    check_plan(files.out, model, force=files.force)
    work = library()
    job: Job = work.Job(model=model, out=files.out, device=files.device, seed=files.seed, **wanted)
    if pattern_of(job.structure):
        raise JobError(
            f"--structure {job.structure} keeps what its pattern says: there is nothing to plan.\n"
            "  Plan for channel or element, or compress at once."
        )
    heard: list[str] = []
    with told(talk) as log:
        note = hearing(log, heard)
        ready: Prepared = work.prepared(job, note, writes=False)
        ready, curves = _split(work, job, ready, note)
    _write(job, ready, curves, list(dict.fromkeys(heard)), talk)
    return 0


def _split(work: Any, job: Job, ready: Prepared, log: Log) -> tuple[Prepared, dict[int, Points]]:
    """Return what stays, and the curves measured: they decide where the job says so, and are shown in any case."""
    program = work.opened(ready, log)
    if job.structure != "channel":
        return work.planned(job, ready, program, log), {}
    measured = work.curves(job, ready, program, log)
    return work.planned(job, ready, program, log, measured), {curve.group: curve.points for curve in measured}


def _write(job: Job, ready: Prepared, curves: dict[int, Points], heard: list[str], talk: Talk) -> None:
    from xdonnx.model import model_fingerprint
    from xdonnx.planfile import make_planfile, write_planfile, written

    file = make_planfile(ready.net, ready.plan, curves, model_fingerprint(job.model), job.target())
    write_planfile(written(ready.net, file, str(job.model), str(job.out)), job.out)
    layers = list(rows(ready, file))
    found = {
        "plan": str(job.out),
        "teacher": {"path": str(job.model), "sha256": file.teacher},
        "structure": file.structure,
        "target": file.target,
        "device": ready.device,
        "fitting_samples": len(ready.fit),
        "predicted": predicted(ready),
        "layers": layers,
        "tries": [one.model_dump() for one in ready.tries],
        "warnings": heard,
    }
    put_json(talk.json, json.dumps(found, indent=2))
    if not talk.quiet:
        _show(tables(talk), job, ready, layers)
    for text in heard if not talk.verbose else ():
        say(stderr(), f"warning: {text}", "yellow")


def rows(ready: Prepared, file: PlanFile) -> Iterator[dict[str, Any]]:
    """Yield what each layer of the file keeps, what that loses, and what it has to do with the MACs."""
    import numpy as np

    from xdonnx.planfile import group_names, macs_share

    net, groups = ready.net, group_names(ready.net)
    whole = max(1, sum(layer.macs for layer in net.layers.values()))
    for layer in file.layer:
        kept, errors = [count for count, _ in layer.curve[::-1]], [error for _, error in layer.curve[::-1]]
        measured = bool(kept) and layer.keep >= kept[0]
        single = file.structure == "element"
        yield {
            "name": layer.name,
            "units": layer.units,
            "keep": layer.keep,
            "error": float(np.interp(layer.keep, kept, errors)) if measured else None,
            "macs_share": net.layers[layer.name].macs / whole if single else macs_share(net, groups[layer.name]),
            "readers": [] if single else list(net.groups[groups[layer.name]].readers),
            "curve": [list(point) for point in layer.curve],
        }


def _show(console: Console, job: Job, ready: Prepared, layers: list[dict[str, Any]]) -> None:
    single = job.structure != "channel"
    head = Text(f"PLAN  {job.target()}", "bold")
    head.append(f", on {len(ready.fit)} samples; {ready.device}", "default not bold")
    console.print(head)
    heading(console, "Layers")
    names = shortened((row["name"] for row in layers), room(console, 58))
    extra = () if single else ("error", "curve<")
    table = plain_table("  weights of" if single else "  channels of", "kept", "of", "MACs", *extra)
    most = max((error for row in layers for _, error in row["curve"]), default=0.0)
    for row in layers:
        cells = [f"  {names[row['name']]}", f"{row['keep']:,}", f"{row['units']:,}", f"{100 * row['macs_share']:.1f} %"]
        if not single:
            error = "" if row["error"] is None else f"{row['error']:.2g}"
            cells += [error, sparkline([error for _, error in row["curve"]], most)]
        table.add_row(*cells)
    console.print(table)
    if single:
        say(console, f"  {_UNMEASURED}", "dim")
    else:
        say(console, "  MACs: the share that these channels take part in.", "dim")
        say(console, "  error: of the last features and answers if this layer alone keeps so many; as a share.", "dim")
        say(console, "  curve: its root, from all channels kept to the fewest; alike in height across layers.", "dim")
    show_predicted(console, predicted(ready), single=single)
    from xdonnx_cli.show import tries

    tries(console, ready.tries)
    console.print()
    say(console, f"Edit {beside(job.out)}, then: xdonnx compress {job.model} --plan {job.out} …")


def sparkline(errors: list[float], most: float) -> str:
    """Return a bar for the root of each error, the tallest for `most`: the largest of all layers, so that rows compare.

    The root is the relative L2 error; of squares one could see the last step only.
    """
    top = len(_BARS) - 1
    return "".join(_BARS[round(top * math.sqrt(min(1.0, error / most))) if most > 0 else 0] for error in errors)
