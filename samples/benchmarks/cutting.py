"""Removing channels by magnitude: xdonnx on an ONNX file, Torch-Pruning on the module that it was exported from."""

from __future__ import annotations

import copy
import importlib.util
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import onnx
import torch
import walking
from torch import nn

from xdonnx.budget import Budget, make_plan
from xdonnx.cost import measure_cost
from xdonnx.graph import read_net
from xdonnx.methods.bench import Bench
from xdonnx.methods.l1_norm import L1Norm
from xdonnx.patch import Patch, cut
from xdonnx.shots import Shots


@dataclass
class Cuts:
    """Seconds run by run: ours from file to file in memory; theirs from module to module, and to a file as well."""

    name: str
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    exported: list[float] = field(default_factory=list)
    kept_by_ours: float = 0.0
    kept_by_theirs: float = 0.0


def available() -> bool:
    """Whether Torch-Pruning is installed."""
    return importlib.util.find_spec("torch_pruning") is not None


def compare(name: str, module: nn.Module, model: Path, folder: Path, repeats: int) -> Cuts:
    """Let both take half of the MACs, residual streams included, and nothing be fitted.

    Parameters
    ----------
    name : str
    module : nn.Module
    model : Path
        The same network as ONNX.
    folder : Path
        For what is exported.
    repeats : int
    """
    found = Cuts(name)
    teacher = onnx.load(model)
    whole = measure_cost(teacher).macs
    for _ in range(repeats):
        began = time.process_time()
        student = ours(teacher)
        found.ours.append(time.process_time() - began)
        theirs = copy.deepcopy(module)
        began = time.process_time()
        prune(theirs)
        found.theirs.append(time.process_time() - began)
        path = folder / "theirs.onnx"
        walking.export(theirs, path)
        found.exported.append(time.process_time() - began)
    found.kept_by_ours = measure_cost(student).macs / whole
    found.kept_by_theirs = measure_cost(onnx.load(path)).macs / whole
    return found


def ours(teacher: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model without the filters of smallest magnitude."""
    net = read_net(teacher)
    plan = make_plan(net, Budget("macs", walking.MACS, residual=True))
    # Magnitude looks neither at samples nor at activations.
    nothing = Shots({}, None, ())
    outcome = L1Norm()(net, Patch(), nothing, plan, Bench(cast(Any, None), torch.Generator()))
    return cut(net, outcome.patch)


def prune(module: nn.Module) -> None:
    """Remove the same share of channels from every layer, in place, by Torch-Pruning."""
    import torch_pruning

    linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about how it is traced
        torch_pruning.pruner.MagnitudePruner(
            module,
            torch.zeros(1, 3, walking.SIZE, walking.SIZE),
            torch_pruning.importance.MagnitudeImportance(p=1),
            # A layer's MACs fall with the square of the share that stays.
            pruning_ratio=1 - walking.MACS**0.5,
            ignored_layers=linear[-1:],
        ).step()
