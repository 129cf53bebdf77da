"""Plug in a method of one's own: it picks the filters that go and lets Cross refit the rest. Takes [FOLDER]."""

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import xdonnx.summary
from xdonnx.budget import Budget, Plan
from xdonnx.convert import convert
from xdonnx.methods.bench import Bench, Outcome
from xdonnx.methods.cross import Cross


@dataclass(frozen=True)
class Median:
    """Drop the filters nearest to all others, which can stand in for them (He et al., CVPR 2019); then refit."""

    def check(self, structure: str) -> None:
        """Accept every structure; a method raises JobError here for those that it cannot do."""

    def __call__(self, net: xdonnx.Net, patch: xdonnx.Patch, shots: xdonnx.Shots, plan: Plan, bench: Bench) -> Outcome:
        """Name the labels that go; `cut` finds every tensor that bears them."""
        drop: list[int] = []
        for at, keep in plan.channels.items():
            maker = net.layers[net.groups[at].name]
            rows = torch.tensor(net.array(maker.weight)).flatten(1)
            drop += maker.out_ids[torch.cdist(rows, rows).sum(1).argsort()[: len(rows) - keep].numpy()].tolist()
        return Cross()(net, patch.plus({}, drop), shots, replace(plan, channels={}), bench)


teacher, how = Path(__file__).with_name("digits_residual.onnx"), xdonnx.Preprocess("unit")
net, out = xdonnx.read_net(xdonnx.read_proto(teacher)), Path((sys.argv[1:] or [tempfile.mkdtemp()])[0], "median.onnx")
out.parent.mkdir(parents=True, exist_ok=True)
fit, rest = (xdonnx.read_shots([f"{teacher.parent}/{n}"], net.interface.inputs, how) for n in ("shots", "held_out.npz"))
plan, bench = xdonnx.make_plan(net, Budget("macs", 0.5)), Bench(convert(net, torch.device("cpu")), torch.Generator())
out.write_bytes(xdonnx.cut(net, Median()(net, xdonnx.Patch(), fit, plan, bench).patch).SerializeToString())
print(xdonnx.summary.summary(xdonnx.verify(teacher, out, rest, max_drop=1)))
