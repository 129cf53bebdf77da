"""One file for each published method, and the table that names them; nothing is imported until asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any

from xdonnx.errors import JobError


@dataclass(frozen=True)
class Entry:
    """A row of the table: where the method lives, what it rests on, and when to choose it."""

    target: str
    paper: str
    advice: str
    needs: str


METHODS: Mapping[str, Entry] = {
    "cross": Entry(
        "xdonnx.methods.cross:Cross",
        "Bai, Wu, King, Lyu: Few Shot Network Compression via Cross Distillation, AAAI 2020",
        "The default. Layer by layer, from 1 to 50 unlabelled samples per class.",
        "samples, no labels",
    ),
    "tune": Entry(
        "xdonnx.methods.tune:Tune",
        "Wang, Cao, Wang, Wu: Compressing Models with Few Samples: Mimicking then Replacing, CVPR 2022",
        "After another method (--method cross --method tune), or by --preset-effort best: all layers at once.",
        "samples, no labels",
    ),
    "squeeze": Entry(
        "xdonnx.methods.squeeze:Squeeze",
        "Li, Shu, Xie, Qu, Kong: Hierarchical Knowledge Squeezed Adversarial Network Compression, AAAI 2020",
        "After another method (--method cross --method squeeze): as tune, with squeezed features and an adversary.",
        "samples, no labels",
    ),
    "l1-norm": Entry(
        "xdonnx.methods.l1_norm:L1Norm",
        "Li, Kadav, Durdanovic, Samet, Graf: Pruning Filters for Efficient ConvNets, ICLR 2017",
        "The baseline: what removal alone costs, with nothing fitted.",
        "nothing",
    ),
    "thinet": Entry(
        "xdonnx.methods.thinet:ThiNet",
        "Luo, Wu, Lin: ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression, ICCV 2017",
        "A baseline: greedy choice of channels, one scale for each that stays. To compare with its published figures.",
        "samples, no labels",
    ),
    "channel-pruning": Entry(
        "xdonnx.methods.channel_pruning:ChannelPruning",
        "He, Zhang, Sun: Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017",
        "A baseline: the LASSO chooses channels, least squares refit. Wants more shots than cross.",
        "samples, no labels",
    ),
    "fskd": Entry(
        "xdonnx.methods.fskd:FSKD",
        "Li, Li, Liu, Zhang: Few Sample Knowledge Distillation for Efficient Network Compression, CVPR 2020",
        "A baseline: the smallest filters go, then a 1x1 layer mends each layer's outputs and is merged into it.",
        "samples, no labels",
    ),
    "bp": Entry(
        "xdonnx.methods.bp:BP",
        "Rumelhart, Hinton, Williams: Learning Representations by Back-propagating Errors, Nature 1986",
        "A baseline: the smallest filters or weights go, then cross entropy on the labels of the shots.",
        "labelled samples",
    ),
    "fitnet": Entry(
        "xdonnx.methods.fitnet:FitNet",
        "Romero, Ballas, Kahou, Chassang, Gatta, Bengio: FitNets: Hints for Thin Deep Nets, ICLR 2015",
        "A baseline: the smallest filters or weights go, then hints at the middle and the teacher's softened answers.",
        "samples, no labels",
    ),
}


# Those that decide what goes, and of these the ones that leave weights as they were, so that another may fit them.
REMOVING = frozenset({"cross", "thinet", "channel-pruning", "fskd", "l1-norm"})
UNFITTED = frozenset({"l1-norm"})
# Those that draw from a pool of unlabelled images.
POOLED = frozenset({"cross", "tune", "squeeze", "fitnet"})
# Those that can refit a student which another tool made, and the efforts that they know there.
REFITTING, REFITTING_EFFORTS = ("cross", "fskd"), ("balanced", "fast")


def available() -> dict[str, Entry]:
    """Return the table with what other packages add through the entry-point group `xdonnx.methods`."""
    found = dict(METHODS)
    for point in entry_points(group="xdonnx.methods"):
        found.setdefault(point.name, Entry(point.value, f"from {point.value.split(':')[0]}", "", ""))
    return found


def named(name: str) -> Entry:
    """Return the row of a method; raises JobError where there is none."""
    table = available()
    if name not in table:
        near = get_close_matches(name, table, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise JobError(f"unknown method '{name}'.{hint}\n  Methods: {', '.join(table)}.")
    return table[name]


def make(name: str, options: Mapping[str, Any]) -> Any:
    """Return a method with the options that it has; options of other methods are passed over.

    Raises
    ------
    JobError
        There is no such method.
    """
    module, _, attribute = named(name).target.partition(":")
    kind = getattr(importlib.import_module(module), attribute)
    known = {field.name for field in fields(kind)}
    return kind(**{key: value for key, value in options.items() if key in known})
