"""A plan as a file that people edit: how many units each layer keeps, beside what it would lose.

The file is TOML. What it says is checked against the model before any work, so that a slip of the pen ends in one clear
message and not in another student than was meant.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from xdonnx.budget import Plan, macs, pretend
from xdonnx.errors import JobError, MachineError, NothingToDo, did_you_mean
from xdonnx.graph import Net
from xdonnx.tomlfile import quoted, read_toml

Points = tuple[tuple[int, float], ...]
"""(units kept, error) from all units downwards; see `allocation.Curve`."""

HEADER = """\
# How much of each layer of {model} stays. Written by xdonnx plan; edit it, then:
#   xdonnx compress {model} --plan {name} --shots … -o student.onnx
#
# keep    {what} that stay: a whole number from 1 to units.
#         A layer that is left out, or whose keep is its units, keeps all of them.
# curve   [kept, error]: what was measured when this layer alone keeps so many: the squared error of the network's
#         last features and answers, as a share of their energy. It is there to be read; changing it changes nothing.
"""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PlannedLayer(_Strict):
    """What one layer keeps.

    Parameters
    ----------
    name : str
        For channels the first layer that makes them, numbered where it makes several kinds; else the layer.
    units, keep : int
        How many there are and how many stay.
    curve : tuple of (kept, error)
        Empty where nothing was measured.
    """

    name: str
    units: int
    keep: int
    curve: Points = ()


class PlanFile(_Strict):
    """A plan as written. `teacher` is the SHA-256 of the model's file, `target` what was asked for."""

    schema_version: Literal[1] = 1
    teacher: str
    structure: Literal["channel", "element"]
    target: str = ""
    layer: tuple[PlannedLayer, ...] = Field(())


def group_names(net: Net) -> dict[str, int]:
    """Return {name: index into `net.groups`}: the layer that makes the channels, with '#2' for its second group."""
    names: dict[str, int] = {}
    for at, group in enumerate(net.groups):
        name, number = group.name, 1
        while name in names or (number > 1 and name in net.layers):
            number += 1
            name = f"{group.name}#{number}"
        names[name] = at
    return names


def weight_counts(net: Net) -> dict[str, int]:
    """Return {layer: number of weights}."""
    return {name: int(net.array(layer.weight).size) for name, layer in net.layers.items()}


def make_planfile(net: Net, plan: Plan, curves: Mapping[int, Points], teacher: str, target: str) -> PlanFile:
    """Return a plan as it is written to a file.

    Parameters
    ----------
    plan : Plan
        Of channels or of single weights.
    curves : {group: points}
        What was measured. Groups that have a curve are written even where they keep all their channels.
    teacher : str
        From :func:`xdonnx.model.model_fingerprint`.
    target : str
        What was asked for.
    """
    if plan.structure == "element":
        sizes = weight_counts(net)
        layers = [PlannedLayer(name=name, units=sizes[name], keep=keep) for name, keep in plan.weights.items()]
        return PlanFile(teacher=teacher, structure="element", target=target, layer=tuple(layers))
    layers = []
    for name, at in group_names(net).items():
        if at in plan.channels or at in curves:
            units = len(net.groups[at].ids)
            keep = plan.channels.get(at, units)
            layers.append(PlannedLayer(name=name, units=units, keep=keep, curve=curves.get(at, ())))
    return PlanFile(teacher=teacher, structure="channel", target=target, layer=tuple(layers))


def macs_share(net: Net, at: int) -> float:
    """Return the share of all layers' MACs that a group's channels take part in."""
    whole = macs(net, pretend(net, {}))
    return 1 - macs(net, pretend(net, {at: 0})) / max(whole, 1)


def written(net: Net, file: PlanFile, model: str, name: str) -> str:
    """Return the TOML text of a plan, with comments for who edits it.

    Parameters
    ----------
    model, name : str
        Paths of the teacher and of the plan, as they are typed.
    """
    single = file.structure == "element"
    model, name = quoted(model)[1:-1], quoted(name)[1:-1]
    lines = [HEADER.format(model=model, name=name, what="Weights" if single else "Channels")]
    lines += [
        f"schema_version = {file.schema_version}",
        f"teacher = {quoted(file.teacher)}",
        f"structure = {quoted(file.structure)}",
        f"target = {quoted(file.target)}",
    ]
    groups = group_names(net)
    whole = max(1, sum(layer.macs for layer in net.layers.values()))
    for layer in file.layer:
        if single:
            about = f"{net.layers[layer.name].macs / whole:.1%} of the MACs"
        else:
            readers = ", ".join(quoted(reader) for reader in net.groups[groups[layer.name]].readers)
            about = f"takes part in {macs_share(net, groups[layer.name]):.1%} of the MACs; read by {readers}"
        lines += ["", "[[layer]]", f"# {about}", f"name = {quoted(layer.name)}"]
        lines += [f"units = {layer.units}", f"keep = {layer.keep}"]
        if layer.curve:
            points = ", ".join(f"[{kept}, {float(f'{error:.4g}')!r}]" for kept, error in layer.curve)
            lines.append(f"curve = [{points}]")
    return "\n".join(lines) + "\n"


def write_planfile(text: str, path: Path) -> None:
    """Write a plan so that `path` either holds all of it or is untouched; raises MachineError where it cannot."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            draft = Path(folder) / path.name
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, path)
    except OSError as error:
        raise MachineError(f"cannot write '{path}': {error}.\n  Free space or choose another folder.") from error


def read_planfile(path: str | Path) -> PlanFile:
    """Read a plan, before it is known to fit a model.

    Raises
    ------
    JobError
        There is no such file, it is not TOML, or it holds what no plan holds.
    """
    path = Path(path)
    found = read_toml(path, "plan", "xdonnx plan", f"xdonnx plan MODEL --shots PATH -o {path.name}")
    try:
        return PlanFile.model_validate_json(json.dumps(found, default=str))
    except ValidationError as error:
        # A key that is misspelt is missing too: the spelling is the news.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        raise JobError(f"'{path}': {_told(first, found)}") from error


def plan_of(path: str | Path, net: Net, teacher: str) -> Plan:
    """Read a plan for a model.

    Parameters
    ----------
    path : path-like
    net : Net
        The teacher.
    teacher : str
        Its file's SHA-256.

    Raises
    ------
    JobError
        The file is none, is of another model, or names layers and numbers that the model does not have.
    NothingToDo
        Every layer keeps all it has.
    """
    file = read_planfile(path)
    if file.teacher != teacher:
        raise JobError(
            f"'{path}' was made for another model: its teacher is {file.teacher[:12]}….\n"
            f'  Make one for this model with xdonnx plan. If it is the same network saved again: teacher = "{teacher}".'
        )
    single = file.structure == "element"
    groups = group_names(net)
    units = weight_counts(net) if single else {name: len(net.groups[at].ids) for name, at in groups.items()}
    keep = _checked(path, file, units)
    losing = {name: count for name, count in keep.items() if count < units[name]}
    if not losing:
        raise NothingToDo(f"'{path}' keeps everything.\n  Lower 'keep' of some layer below its 'units'.")
    if single:
        shared = next((name for name in losing if net.layers[name].weight in net.shared), None)
        if shared is not None:
            raise JobError(f"'{path}': layer '{shared}' shares its weight with another.\n  It keeps all: leave it out.")
        return Plan("element", weights=losing)
    channels = {groups[name]: count for name, count in losing.items()}
    return Plan("channel", channels=dict(sorted(channels.items())))


def _checked(path: str | Path, file: PlanFile, units: Mapping[str, int]) -> dict[str, int]:
    """Return {layer: units kept} of a file whose every line fits the model."""
    keep: dict[str, int] = {}
    for layer in file.layer:
        if layer.name not in units:
            near = did_you_mean(layer.name, units)
            raise JobError(
                f"'{path}': no layer '{layer.name}' may lose {_what(file)}.{near}\n"
                "  Names are those that xdonnx plan wrote; xdonnx inspect lists them too."
            )
        if layer.name in keep:
            raise JobError(f"'{path}': layer '{layer.name}' stands there twice.\n  Leave one of the two.")
        if layer.units != units[layer.name]:
            raise JobError(
                f"'{path}': layer '{layer.name}' has units = {layer.units}, and the model {units[layer.name]}.\n"
                "  Only 'keep' is for editing: put 'units' back."
            )
        if not 1 <= layer.keep <= layer.units:
            raise JobError(
                f"'{path}': layer '{layer.name}' has keep = {layer.keep}.\n"
                f"  It is a whole number from 1 to {layer.units}, its units."
            )
        keep[layer.name] = layer.keep
    return keep


def _what(file: PlanFile) -> str:
    return "single weights" if file.structure == "element" else "channels"


def _told(error: ErrorDetails, found: Mapping[str, object]) -> str:
    """Return what is wrong with a file, and where."""
    key = error["loc"][0]
    where, known = "", tuple(PlanFile.model_fields)
    if key == "layer" and len(error["loc"]) > 1:
        tables, at = found["layer"], error["loc"][1]
        table = tables[at] if isinstance(tables, list) and isinstance(at, int) else {}
        name = table.get("name") if isinstance(table, Mapping) else None
        where = f"layer '{name}'" if name else f"[[layer]] number {int(at) + 1}"
        known = tuple(PlannedLayer.model_fields)
        key = error["loc"][2] if len(error["loc"]) > 2 else "layer"
    here = f" in {where}" if where else ""
    if error["type"] == "extra_forbidden":
        near = did_you_mean(str(key), known)
        return f"unknown key '{key}'{here}.{near}\n  Keys{' of a layer' if where else ''}: {', '.join(known)}."
    if error["type"] == "missing":
        return f"'{key}' is missing{here}.\n  Put it back, or write the plan again: xdonnx plan."
    if key == "keep":
        return f"keep = {error['input']!r}{here} is not a whole number.\n  It is the number of units that stay."
    return f"'{key}'{here} is {error['input']!r}.\n  {error['msg']}."
