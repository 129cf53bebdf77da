"""A target for the student's file: what its weights would weigh, and a plan whose file really is within the limit.

Channels cost the bytes of every initializer that bears them. Single weights cost what they cost where zeros are stored
sparsely, which pays below a third of them. Both are predicted, and then a file of the plan is written and weighed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from xdonnx.agreement import keep_sparse
from xdonnx.budget import Budget, Goal, Plan, fewest, out_of_reach
from xdonnx.errors import NothingToDo
from xdonnx.events import Log, ignore
from xdonnx.figures import amount
from xdonnx.graph import Net
from xdonnx.model import file_bytes, too_large, write_proto
from xdonnx.patch import Patch, cut, entry_bytes
from xdonnx.tallies import Tally, tally

# Files are weighed so often at most: each time the limit for what is predicted falls by what the last was too heavy.
_TRIES = 12
# Shares of the weights that are looked at, and the least of them.
_STEPS, _LEAST = 30, 1e-6


@dataclass(frozen=True)
class Scales:
    """What tells how heavy the file of a plan is.

    Parameters
    ----------
    net : Net
    inputs : {graph input: (n, ...)}
        A few samples: sparse weights are only stored where onnxruntime answers alike with them.
    stamp : callable
        Writes into a model what the student's metadata will hold.
    name : str
        Of the student's file: that of the weights beside it stands in it.
    external : {'auto', 'always', 'never'}
        As of `model.write_proto`.
    """

    net: Net
    inputs: Mapping[str, np.ndarray]
    stamp: Callable[[onnx.ModelProto], None]
    name: str
    external: str = "auto"

    def weigh(self, plan: Plan, log: Log = ignore) -> int:
        """Return the bytes of a student of the plan, with whatever weights.

        Raises
        ------
        NothingToDo
            Its zeros are to be stored sparsely, and onnxruntime does not take them.
        """
        student = cut(self.net, _some(self.net, plan))
        if plan.structure != "channel":
            keep_sparse(student, self.inputs, log)
            if plan.weights and not student.graph.sparse_initializer:
                raise NothingToDo(
                    "--size is out of reach: the weights of this model cannot be stored sparsely, so zeros shrink "
                    "nothing.\n  Use --structure channel."
                )
        self.stamp(student)
        if self.external != "always" and not too_large(student):
            return int(student.ByteSize())
        with tempfile.TemporaryDirectory(prefix="xdonnx.") as folder:
            path = Path(folder) / self.name
            write_proto(student, path, external=self.external)
            return file_bytes(path)


def fitted(
    budget: Budget, limit: int, teacher: int, divide: Callable[[Budget, Goal | None], Plan], scales: Scales
) -> Plan:
    """Return a plan whose file is within a limit.

    Parameters
    ----------
    budget : Budget
        Of kind 'size'.
    limit : int
        Bytes.
    teacher : int
        Bytes of its file, of which a target may be a share.
    divide : callable
        Turns a budget, and for channels a goal, into a plan.
    scales : Scales

    Raises
    ------
    NothingToDo
        The limit is out of reach, with the least that is in reach; or the file is within it whatever stays.
    """
    net = scales.net
    whole = scales.weigh(Plan(budget.structure))
    if whole <= limit:
        raise NothingToDo(
            f"--size {budget.told} keeps everything: all of the model is {amount(whole, 'B')} as it would be written.\n"
            "  Ask for less."
        )
    # What is predicted of channels is exact but for metadata, which are much of a small file.
    spare = max(0, whole - _bytes(cut(net, Patch()))) if budget.structure == "channel" else 0
    for at in range(_TRIES):
        try:
            plan = _planned(net, budget, limit - spare, divide)
        except NothingToDo:
            break  # by what is predicted, or as nothing may go at all
        found = scales.weigh(plan)
        if found <= limit:
            return plan
        spare += (found - limit) << at  # a byte less may change no plan
    plan = _leanest(net, budget, divide)
    least = scales.weigh(plan)
    if least <= limit:
        return plan
    if budget.structure == "channel":
        raise out_of_reach(budget, least, teacher)
    raise NothingToDo(
        f"--size {budget.told} is out of reach: with hardly a weight left where weights may go, "
        f"{amount(least, 'B')} ({least / teacher:.1%}) remain.\n  Ask for more than that, or use --structure channel."
    )


def channel_goal(net: Net, limit: float) -> Goal:
    """Return what the file of a choice of channels weighs, but for its last few bytes, and the limit."""
    axes: dict[str, dict[int, Tally]] = {}
    for slot in net.slots:
        axes.setdefault(slot.initializer, {})[slot.axis] = tally(net, slot.ids)
    parts = [(net.array(name).nbytes, list(along.values())) for name, along in axes.items()]
    parts = [(size, along) for size, along in parts if size and any(axis.gone for axis in along)]
    rest = _bytes(cut(net, Patch())) - sum(size for size, _ in parts)

    def of(channels: Mapping[int, int]) -> int:
        total = rest
        for size, along in parts:
            for axis in along:
                size = size * axis.kept(channels) // axis.whole
            total += size
        return total

    return Goal(of, limit)


def _planned(net: Net, budget: Budget, limit: float, divide: Callable[[Budget, Goal | None], Plan]) -> Plan:
    if budget.structure == "channel":
        return divide(budget, channel_goal(net, limit))
    return _element_plan(net, budget, limit, divide)


def _leanest(net: Net, budget: Budget, divide: Callable[[Budget, Goal | None], Plan]) -> Plan:
    """Return the plan of the smallest file there is; raises NothingToDo where nothing may go."""
    if budget.structure == "channel":
        goal = channel_goal(net, 0)
        return divide(budget, replace(goal, limit=goal.cost(fewest(net, budget))))
    return divide(replace(budget, kind="keep", amount=_LEAST, unit=""), None)


def _element_plan(net: Net, budget: Budget, limit: float, divide: Callable[[Budget, Goal | None], Plan]) -> Plan:
    """Return the plan that keeps the largest share of the weights within a limit."""

    def of(share: float) -> tuple[Plan, int]:
        plan = divide(replace(budget, kind="keep", amount=share, unit=""), None)
        found = {net.layers[name].weight: kept for name, kept in plan.weights.items()}
        saved = sum(net.array(name).nbytes - entry_bytes(net.array(name), kept) for name, kept in found.items())
        return plan, rest - saved

    rest = _bytes(cut(net, Patch()))
    low, high = _LEAST, 1.0
    plan, least = of(low)
    if least > limit:
        raise NothingToDo(f"with hardly a weight left {amount(least, 'B')} are predicted.")
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found, size = of(middle)
        low, high, plan = (middle, high, found) if size <= limit else (low, middle, plan)
    return plan


def _some(net: Net, plan: Plan) -> Patch:
    """Return a patch that keeps what a plan says; no other weight is zero, as none may be in the student."""
    drop = [int(label) for at, count in plan.channels.items() for label in net.groups[at].ids[count:]]
    if plan.structure == "channel":
        return Patch().plus({}, drop)
    tensors = {}
    for name, layer in net.layers.items():
        weight = net.array(layer.weight)
        full = np.where(weight == 0, np.asarray(1e-3, weight.dtype), weight)
        full.reshape(-1)[plan.weights.get(name, full.size) :] = 0
        tensors[layer.weight] = full
    return Patch(tensors)


def _bytes(proto: onnx.ModelProto) -> int:
    if too_large(proto):  # protobuf cannot tell then; next to such weights the rest is nothing
        return sum(int(tensor.ByteSize()) for tensor in proto.graph.initializer)
    return int(proto.ByteSize())
