"""Make an ONNX CNN smaller and faster from a handful of samples, checked in onnxruntime.

>>> import xdonnx
>>> report = xdonnx.compress("teacher.onnx", "shots/", "student.onnx", macs=0.5, max_drop=1)  # doctest: +SKIP

Names are looked up when they are used, so that importing this package costs neither torch nor onnx.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# Torch's OpenMP reads this when it is loaded, so it stands here. By default its threads spin while they wait, and on a
# machine that does other work too (CI above all) a job of seconds then takes minutes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from xdonnx.api import compress, decompose, verify
    from xdonnx.budget import Budget, make_plan
    from xdonnx.decomposition import Decomposition
    from xdonnx.errors import (
        JobError,
        MachineError,
        ModelError,
        NothingToDo,
        ShotsError,
        VerifyError,
        XdonnxError,
    )
    from xdonnx.gate import Gate, rejudge
    from xdonnx.graph import Net, read_net
    from xdonnx.images import Preprocess
    from xdonnx.job import run
    from xdonnx.keywords import CompressOptions, DecomposeOptions, SharedOptions, VerifyOptions
    from xdonnx.model import read_proto
    from xdonnx.patch import Patch, cut
    from xdonnx.publication import write_report
    from xdonnx.report import Report, read_report, schema
    from xdonnx.shots import Shots, read_shots
    from xdonnx.wanted import Job

_HOME = {
    "Budget": "budget",
    "CompressOptions": "keywords",
    "DecomposeOptions": "keywords",
    "Decomposition": "decomposition",
    "Gate": "gate",
    "Job": "wanted",
    "JobError": "errors",
    "MachineError": "errors",
    "ModelError": "errors",
    "Net": "graph",
    "NothingToDo": "errors",
    "Patch": "patch",
    "Preprocess": "images",
    "Report": "report",
    "SharedOptions": "keywords",
    "Shots": "shots",
    "ShotsError": "errors",
    "VerifyError": "errors",
    "VerifyOptions": "keywords",
    "XdonnxError": "errors",
    "compress": "api",
    "cut": "patch",
    "decompose": "api",
    "make_plan": "budget",
    "read_net": "graph",
    "read_proto": "model",
    "read_report": "report",
    "read_shots": "shots",
    "rejudge": "gate",
    "run": "job",
    "schema": "report",
    "verify": "api",
    "write_report": "publication",
}

__all__ = [
    "Budget",
    "CompressOptions",
    "DecomposeOptions",
    "Decomposition",
    "Gate",
    "Job",
    "JobError",
    "MachineError",
    "ModelError",
    "Net",
    "NothingToDo",
    "Patch",
    "Preprocess",
    "Report",
    "SharedOptions",
    "Shots",
    "ShotsError",
    "VerifyError",
    "VerifyOptions",
    "XdonnxError",
    "compress",
    "cut",
    "decompose",
    "make_plan",
    "read_net",
    "read_proto",
    "read_report",
    "read_shots",
    "rejudge",
    "run",
    "schema",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'xdonnx' has no attribute '{name}'")
    found = getattr(importlib.import_module(f"xdonnx.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
