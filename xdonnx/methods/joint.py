"""Channels that several layers read, as a residual stream's are: what goes must suit all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from xdonnx.budget import Plan
from xdonnx.columns import to_matrix
from xdonnx.connection import Quadratic, correction, damped, objective, restricted
from xdonnx.convert import Program
from xdonnx.events import Event, Log
from xdonnx.graph import Group, Net
from xdonnx.moments import enough, measure
from xdonnx.shelf import Room
from xdonnx.solve import remove_jointly
from xdonnx.structure import Channel, units
from xdonnx.walk import Stop, walk

# A layer with more columns than this is fitted from its columns: the moments and their factors would take over 2 GB.
WIDEST = 6000
# Up to this many readers of the same channels are weighed exactly, with the others adapting; beyond, one by one.
MOST_JOINT = 4


def joint_choice(
    net: Net,
    program: Program,
    inputs: Mapping[str, np.ndarray],
    plan: Plan,
    ridge: float,
    log: Log,
    room: Room,
    gone: Collection[int] = (),
) -> set[int]:
    """Return the labels that go from channels which several layers read.

    The first reader must not decide for all, so every reader's moments are taken in a walk of the teacher alone, and a
    channel's cost is summed over them. What is `gone` by an earlier method counts toward the plan.
    """
    left = {at: remaining(net.groups[at].ids, gone) for at in plan.channels if len(net.groups[at].readers) > 1}
    open_groups = {at: net.groups[at] for at, ids in left.items() if len(ids) > plan.channels[at]}
    if not open_groups:
        return set()
    last = {at: max(group.readers, key=list(net.layers).index) for at, group in open_groups.items()}
    problems: dict[int, list[tuple[Quadratic, Tensor, Channel]]] = {at: [] for at in open_groups}
    drop: set[int] = set()

    def visit(stop: Stop) -> None:
        name = stop.layer.name
        mine = [at for at, group in open_groups.items() if name in group.readers]
        if mine and len(stop.layer.columns) <= WIDEST:
            each = enough(len(stop.layer.columns), len(next(iter(inputs.values()))))
            moments = measure(stop.teacher, stop.teacher, stop.geometry, bias=stop.bias is not None, each=each)
            teacher = to_matrix(stop.weight, stop.bias, stop.geometry).to(moments.tt)
            quadratic = objective(correction(), moments, teacher)
            quadratic = damped(quadratic, teacher, max(ridge, 1e-4), bias=stop.bias is not None)
            columns = torch.tensor(stop.layer.columns, device=teacher.device)
            if stop.bias is not None:
                columns = torch.cat([columns, columns.new_full((1,), -1)])
            alive = standing(columns, gone)
            quadratic, teacher, columns = restricted(quadratic, alive), teacher[..., alive], columns[alive]
            for at in mine:
                problems[at].append((quadratic, teacher, Channel(units(columns, left[at]))))
        for at in mine:
            if last[at] == name:
                log(Event("fit", f"{open_groups[at].name}: read by {len(open_groups[at].readers)} layers"))
                drop.update(_least_missed(net, open_groups[at], left[at], problems.pop(at), plan.channels[at]))

    walk(net, program, inputs, visit, room, answers=False, last=max(last.values(), key=list(net.layers).index))
    return drop


def _least_missed(
    net: Net, group: Group, ids: np.ndarray, problems: list[tuple[Quadratic, Tensor, Channel]], keep: int
) -> list[int]:
    if problems and len(problems) <= MOST_JOINT:
        stays = remove_jointly(problems, keep).cpu().numpy()
        return [int(label) for label, stay in zip(ids, stays, strict=True) if not stay]
    score = np.zeros(len(ids))
    for quadratic, teacher, channel in problems:
        energy = (quadratic.lin * teacher).sum((0, 1)) / quadratic.const.sum().clamp(min=1e-30)
        for unit in range(len(ids)):
            score[unit] += float(energy[channel.columns == unit].sum())
    if not problems:
        score = producer_norms(net, group)[np.isin(group.ids, ids)]
    order = np.argsort(-score, kind="stable")
    return [int(ids[unit]) for unit in order[keep:]]


def remaining(ids: np.ndarray, gone: Collection[int]) -> np.ndarray:
    """Return the labels that an earlier method left, in order."""
    return ids[~np.isin(ids, sorted(gone))]


def standing(columns: Tensor, gone: Collection[int]) -> Tensor:
    """Mark the columns whose label is not gone, (d,)."""
    return ~torch.isin(columns, torch.tensor(sorted(gone), dtype=torch.long, device=columns.device))


def producer_norms(net: Net, group: Group) -> np.ndarray:
    """Return the L1 norm of the filters that make each unit, summed over producers (Li et al., ICLR 2017)."""
    score = np.zeros(len(group.ids))
    for name in group.producers:
        layer = net.layers[name]
        weight = np.abs(net.array(layer.weight))
        if layer.op == "ConvTranspose":
            rows = weight.reshape(layer.groups, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(len(layer.out_ids), -1)
        elif layer.transposed:
            rows = weight.T
        else:
            rows = weight.reshape(len(layer.out_ids), -1)
        norms = rows.sum(1)
        for unit, label in enumerate(group.ids):
            score[unit] += norms[layer.out_ids == label].sum()
    return score
