"""The layer-wise stage against a pass of teacher and student, in time and memory, on networks of torchvision.

python samples/benchmarks/walking.py MODEL.onnx SAMPLES REPEATS

prints what was measured as JSON; a process of its own, since the peak of memory is that of a process.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

SIZE, MACS = 224, 0.5
NETWORKS = ("mobilenet_v2", "resnet50", "vgg16", "densenet121")


def images(count: int, seed: int = 0) -> np.ndarray:
    """Return noise at three scales, (count, 3, SIZE, SIZE): neighbouring pixels resemble each other, as in photos."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, 3, SIZE, SIZE)
    for size in (7, 28, SIZE):
        noise = torch.randn(count, 3, size, size, generator=generator)
        total += nn.functional.interpolate(noise, size=(SIZE, SIZE), mode="bilinear")
    return total.numpy()


def network(name: str) -> nn.Module:
    """Return a network of torchvision with random weights, and statistics that keep its activations finite."""
    import torchvision

    torch.manual_seed(0)
    module: nn.Module = getattr(torchvision.models, name)(weights=None)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
    with torch.no_grad():
        module.train()(torch.tensor(images(8)))
    return module.eval()


def export(module: nn.Module, path: Path) -> None:
    """Write a network as ONNX, its batch axis free."""
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["logits"]}
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    example = torch.zeros(1, 3, SIZE, SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the legacy exporter announces its end
        torch.onnx.export(module, (example,), path, dynamo=False, opset_version=17, dynamic_axes=axes, **names)


def in_a_process(model: Path, samples: int, repeats: int) -> dict[str, Any]:
    """Return what `stage` measures, in a process of its own."""
    command = [sys.executable, __file__, str(model), str(samples), str(repeats)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def stage(model: Path, samples: int, repeats: int) -> dict[str, Any]:
    """Measure plan and fit between a pass of the teacher and one of the student, so that all see the same machine.

    Parameters
    ----------
    model : Path
    samples : int
    repeats : int

    Returns
    -------
    dict
        Seconds run by run: `plan`, `fit`, `teacher`, `student`; peak memory of the process in bytes after the first
        pass (`passing`) and at the end (`peak`); `macs` of the teacher for a sample, `kept` by the student.
    """
    from xdonnx.convert import convert
    from xdonnx.graph import read_net
    from xdonnx.job import opened, planned, prepared
    from xdonnx.methods.bench import Bench
    from xdonnx.patch import Patch, cut
    from xdonnx.walk import walk
    from xdonnx.wanted import Job

    found: dict[str, Any] = {name: [] for name in ("plan", "fit", "teacher", "student")}
    with TemporaryDirectory(prefix="xdonnx-benchmark-") as folder:
        shots = Path(folder) / "shots.npy"
        np.save(shots, images(samples))
        out = Path(folder) / "student.onnx"
        job = Job(model=model, out=out, shots=(str(shots),), macs=MACS, holdout="0", device="cpu")
        ready = prepared(job)
        program = opened(ready)

    def passed(net: Any, program: Any) -> float:
        began = time.process_time()
        walk(net, program, ready.fit.inputs, lambda stop: None)
        return time.process_time() - began

    for turn in range(repeats):
        found["teacher"].append(passed(ready.net, program))
        if not turn:
            found["passing"] = peak()
        began = time.process_time()
        plan = planned(job, ready, program).plan
        middle = time.process_time()
        bench = Bench(program, torch.Generator().manual_seed(0))
        outcome = job.methods()[0](ready.net, Patch(), ready.fit, plan, bench)
        found["fit"].append(time.process_time() - middle)
        found["plan"].append(middle - began)
        if not turn:
            found["peak"] = peak()
        sizes: Mapping[str, Any] = {name: array.shape for name, array in ready.fit.inputs.items()}
        student = read_net(cut(ready.net, outcome.patch), sizes)
        found["student"].append(passed(student, convert(student, torch.device("cpu"))))
    totals = [sum(layer.macs for layer in net.layers.values()) for net in (ready.net, student)]
    return {**found, "macs": totals[0], "kept": totals[1] / totals[0]}


def peak() -> int:
    """Return the most memory that this process has had, in bytes."""
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps(stage(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
