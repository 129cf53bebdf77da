"""What `--dry-run` prints: the job as it was understood, and what would be kept."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from xdonnx.figures import amount
from xdonnx_cli.terminal import heading, percent, plain_table, room, shortened

if TYPE_CHECKING:
    from xdonnx.job import Job, Prepared
    from xdonnx_cli.configuration import Origins

_SPLITS = {
    "file": "as the plan says",
    "measured": "by measured error curves",
    "uniform": "the same fraction in every layer",
    "given": "as the given student has it",
}


def predicted(ready: Prepared) -> dict[str, int]:
    """Return the MACs and the weights that are not zero, of the teacher and of the student to be."""
    import numpy as np

    from xdonnx.budget import macs, params, pattern_of, pretend

    net, plan = ready.net, ready.plan
    if ready.given is not None:
        return _of_given(ready)
    keep = pretend(net, plan.channels)
    gone = sum(int(net.array(net.layers[name].weight).size) - kept for name, kept in plan.weights.items())
    pattern = pattern_of(plan.structure)
    if pattern:
        sizes = [int(net.array(net.layers[name].weight).size) for name in plan.layers]
        gone += sum(size - round(size * pattern[0] / pattern[1]) for size in sizes)
    whole = np.ones(net.labels, bool)
    return {
        "teacher_macs": macs(net, whole),
        "student_macs": macs(net, keep),
        "teacher_params": params(net, whole),
        "student_params": params(net, keep) - gone,
    }


def _of_given(ready: Prepared) -> dict[str, int]:
    assert ready.given is not None
    found = {}
    for whose, net in (("teacher", ready.net), ("student", ready.given.net)):
        found[f"{whose}_macs"] = sum(layer.macs for layer in net.layers.values())
        found[f"{whose}_params"] = sum(layer.params for layer in net.layers.values())
    return found


def rows(ready: Prepared) -> Iterator[dict[str, Any]]:
    """Yield what each group of channels, or each layer, keeps."""
    net, plan = ready.net, ready.plan
    for pair in ready.given.matching.pairs if ready.given else ():
        units = len(net.layers[pair.teacher].out_ids)
        yield {"name": pair.teacher, "kept": len(pair.channels), "units": units, "readers": list(pair.student)}
    for at, count in plan.channels.items():
        group = net.groups[at]
        yield {"name": group.name, "kept": count, "units": len(group.ids), "readers": list(group.readers)}
    for name, count in plan.weights.items():
        yield {"name": name, "kept": count, "units": int(net.array(net.layers[name].weight).size), "readers": []}
    for name in plan.layers:
        yield {"name": name, "kept": plan.structure, "units": None, "readers": []}


def as_dict(job: Job, ready: Prepared, origins: Origins) -> dict[str, Any]:
    """Return all of it for --json."""
    return {
        "job": job.model_dump(mode="json", fallback=str),
        "sources": {name: origin.to_dict() for name, origin in origins.items()},
        "device": ready.device,
        "fitting_samples": len(ready.fit),
        "judging_samples": len(ready.held_out),
        "split": _split(job),
        "predicted": predicted(ready),
        "plan": list(rows(ready)),
        "tries": [one.model_dump() for one in ready.tries],
    }


def show_plan(console: Console, job: Job, ready: Prepared, origins: Origins) -> None:
    """Print the job, where each part of it comes from, the plan and what it comes to."""
    found = as_dict(job, ready, origins)
    console.print(Text("DRY RUN  nothing is written", "bold"))
    heading(console, "Job")
    table = plain_table("", "<", "<")
    table.show_header = False
    for name, value in _given(found["job"], _switches(job)):
        origin = _origin(name.removeprefix("no_"), origins)
        table.add_row(f"  {name.replace('_', '-')}", value, Text(origin, "dim"))
    for name, steps in _trainings(job, ready):
        table.add_row("  then", f"{name}, {steps:,} steps of training", "")
    budget = job.budget()
    if job.plan is None and job.student is None:
        wanted = "" if job.smallest else f" {budget.told.replace('%', ' %')}"
        table.add_row("  target", f"{budget.kind}{wanted}", "the first try" if job.smallest else "")
    table.add_row("  split", _SPLITS[found["split"]], "")
    table.add_row("  samples", f"{len(ready.fit)} fit, {len(ready.held_out)} judge; on {ready.device}", "")
    console.print(table)
    heading(console, "Plan")
    single = job.structure != "channel"
    names = shortened((row["name"] for row in found["plan"]), room(console, 30, names=1 if single else 2))
    others = shortened((name for row in found["plan"] for name in row["readers"]), room(console, 42, names=2))
    table = plain_table(
        "  weights of" if single else "  channels of",
        "kept",
        "of",
        *(() if single else ("made by<" if ready.given else "read by<",)),
    )
    for row in found["plan"]:
        units = "" if row["units"] is None else f"{row['units']:,}"
        kept = row["kept"] if isinstance(row["kept"], str) else f"{row['kept']:,}"
        read = [others[name] for name in row["readers"]]
        readers = () if single else (f"{', '.join(read[:1])}{f' and {len(read) - 1} more' * (len(read) > 1)}",)
        table.add_row(f"  {names[row['name']]}", kept, units, *readers)
    console.print(table)
    show_predicted(console, found["predicted"], single=single)
    from xdonnx_cli.show import tries

    tries(console, ready.tries)


def show_predicted(console: Console, found: Mapping[str, int], *, single: bool) -> None:
    """Print what a plan comes to; `single` where weights are zeroed rather than channels cut."""
    heading(console, "Predicted")
    table = plain_table("", "teacher", "student", "")
    for name, title in (("macs", "  MACs"), ("params", "  weights not zero" if single else "  weights")):
        before, after = found[f"teacher_{name}"], found[f"student_{name}"]
        table.add_row(title, amount(before), amount(after), percent(after, before))
    console.print(table)


def _split(job: Job) -> str:
    if job.student is not None:
        return "given"
    return "file" if job.plan is not None else "measured" if job.measured() else "uniform"


def _given(job: Mapping[str, Any], on: Mapping[str, bool]) -> Iterator[tuple[str, str]]:
    """Yield the options that have a value, those within options by their own name.

    Parameters
    ----------
    job : mapping
    on : {option: whether it has a say}
        Switches that are on by themselves: one that was turned off is yielded as 'no_...'.
    """
    for name, value in job.items():
        if isinstance(value, Mapping) and name != "input_shape":
            yield from _given(value, on)
        elif name in on:
            if on[name]:
                yield (name if value else f"no_{name}"), "True"
        elif value is not None and value is not False and value not in ([], {}, ()):
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            yield name, text


def _trainings(job: Job, ready: Prepared) -> Iterator[tuple[str, int]]:
    """Yield the methods that train the whole student once its layers are fitted, and their steps."""
    from xdonnx.methods.training import schedule

    for method in job.methods():
        if getattr(method, "follows", False) and hasattr(method, "effort") and hasattr(method, "steps"):
            yield type(method).__name__.lower(), schedule(ready.net, method.effort, method.steps, mix=True).steps


def _switches(job: Job) -> dict[str, bool]:
    """Return the switches of methods that are on by themselves, and whether a method of the job has them."""
    names = [name for name, field in type(job).model_fields.items() if field.default is True]
    methods = job.methods()
    return {name: any(hasattr(method, name) for method in methods) for name in names}


def _origin(name: str, origins: Origins) -> str:
    """Return where the value of an option comes from, a file as it can be typed from here."""
    origin = origins.get(name)
    if origin is None:
        return ""
    if origin.path is None:
        return origin.name if origin.source == "environment" else origin.source
    line = "" if origin.line is None else f":{origin.line}"
    return f"{os.path.relpath(origin.path)}{line}"
