"""Tables of ratios with their spread. Times of one machine say little, so none are written."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from statistics import median
from textwrap import wrap
from typing import Any

from cutting import Cuts
from solving import KEEP, MU, PER_CLASS, STEPS, Effort, Solved
from walking import SIZE

SHOWN = ("xdonnx", "torch", "onnx", "onnxruntime-gpu", "onnxruntime", "torchvision", "torch-pruning", "numpy")


def digits(value: float) -> str:
    """Return a number with three digits that count: '0.0123', '1.23', '12.3', '123', '1,230'."""
    rounded = float(f"{value:.3g}")
    if abs(rounded) >= 100:
        return f"{rounded:,.0f}"
    text = f"{rounded:#.3g}"
    return text if "e" not in text else f"{rounded:.2e}"


def spread(values: Sequence[float]) -> str:
    """Return the median of repeats, and least and most where there are several: '5.1 (4.8 to 5.6)'."""
    if not values:
        return ""
    middle = digits(median(values))
    return middle if len(values) == 1 else f"{middle} ({digits(min(values))} to {digits(max(values))})"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratio of each repeat; both sides of one were timed one after the other."""
    return [a / b for a, b in zip(above, below, strict=True)]


def summed(many: Iterable[Sequence[float]]) -> list[float]:
    """Return the sums of repeats: first to first, second to second."""
    return [sum(each) for each in zip(*many, strict=True)]


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def machine(loads: Sequence[float]) -> list[str]:
    """Return what a run was made on."""
    versions = []
    for name in SHOWN:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    busy = f"; load average {min(loads):.1f} to {max(loads):.1f} during the run" if loads else ""
    return [
        *prose(f"Machine: {platform.machine()}, {os.cpu_count()} cores, {platform.system()}{busy}."),
        *prose(f"Versions: Python {platform.python_version()}, {', '.join(versions)}."),
    ]


def prose(text: str) -> list[str]:
    """Return a paragraph, wrapped, and the empty line after it."""
    return [*wrap(text, 120, break_on_hyphens=False), ""]


def layers(solved: Sequence[Solved], steps: int) -> list[str]:
    """Return the section on single layers."""
    rows = []
    for shape in dict.fromkeys(one.shape for one in solved if one.loses):
        same = [one for one in solved if one.loses and one.shape == shape]
        each = [median(ratios(one.theirs, one.ours)) for one in same]
        name = f"{shape[1]} → {shape[0]} channels, {same[0].positions:,} positions"
        rows.append(_layer_row(name, same, spread(each)))
    losing = [one for one in solved if one.loses]
    ours = summed(one.ours for one in losing)
    rows.append(_layer_row("all of these", losing, spread(ratios(summed(one.theirs for one in losing), ours))))
    time = ratios(summed(one.theirs for one in solved), ours)
    rows.append(["all 3x3 convolutions but the first", str(len(solved)), spread(time), ""])
    text = [
        "## The published algorithm in moment space",
        "",
        *prose(
            f"Cross Distillation as published: mu {MU}, {STEPS:,} Adam steps, a hard ramp of the channels kept. "
            f"ResNet-56 on CIFAR-10, {PER_CLASS} images per class, {KEEP:.0%} of the channels stay. *Time*: torch's "
            "convolutions forwards and backwards on cached activations, over `--preset-effort paper`, which takes "
            f"moments once and makes the same steps on them. On activations {steps} steps of each layer were timed and "
            f"scaled to {STEPS:,}. *Error*: of our weights over that of theirs, both after {steps} steps and measured "
            "on activations. The spread of a row is that between layers, of the sums that between repeats."
        ),
        *grid(("layers", "number", "time: activations over moments", "error: ours over theirs"), rows),
        "",
    ]
    still = [one.moved for one in solved if one.moved is not None]
    if still:
        text += prose(
            f"The last row counts on its left the {len(still)} convolutions too that lose nothing: the published code "
            f"solves them like the others, their weights moved by {max(still):.1g} at most, and xdonnx leaves them "
            "alone."
        )
    whole = [(one, *one.whole) for one in losing if one.whole]
    if whole:
        text += prose(f"All {STEPS:,} steps on activations, once for the first layer of each shape:")
        head = ("layer", "time: activations over moments", "scaled over measured", "error: ours over theirs")
        rows = [
            [
                f"{one.shape[1]} → {one.shape[0]} channels",
                digits(seconds / median(one.ours)),
                digits(median(one.theirs) / seconds),
                f"{error:.6f}",
            ]
            for one, seconds, error in whole
        ]
        text += [*grid(head, rows), ""]
    return text


def _layer_row(name: str, same: Sequence[Solved], time: str) -> list[str]:
    errors = [one.error for one in same if one.error is not None]
    return [name, str(len(same)), time, f"{min(errors):.6f} to {max(errors):.6f}" if errors else ""]


def efforts(found: Sequence[Effort], solved: Sequence[Solved], judged: int) -> list[str]:
    """Return the section on whole networks: the default against the published algorithm."""
    default, *others = found
    rows = [[f"`{default.name}`, the default", "1", f"{default.accuracy:.2f}"]]
    for one in others:
        time = ratios(one.seconds, default.seconds)
        rows.append([f"`{one.name}`: the published algorithm on moments", spread(time), f"{one.accuracy:.2f}"])
    for name, part in (
        ("the published algorithm on activations, layers that lose channels", [one for one in solved if one.loses]),
        ("the same, all 3x3 convolutions but the first", solved),
    ):
        below = median(default.seconds)
        rows.append([name, spread([each / below for each in summed(one.theirs for one in part)]), ""])
    return [
        "## The default against the published algorithm",
        "",
        *prose(
            "The same network, images and channels kept. *Time*: the whole layer-wise stage, from the first layer to "
            f"the last, over that of the default. *Top-1*: per cent of {judged} held-out images, for one draw of the "
            "samples. Rows on activations are their steps alone, scaled as above."
        ),
        *grid(("`--preset-effort`", "time", "top-1"), rows),
        "",
    ]


def networks(found: Mapping[str, Mapping[str, Any]], samples: int) -> list[str]:
    """Return the section on large networks."""
    rows = []
    for name, one in found.items():
        both, stage = summed((one["teacher"], one["student"])), summed((one["plan"], one["fit"]))
        rows.append(
            [
                f"`{name}`",
                digits(one["macs"] / 1e9),
                f"{one['kept']:.0%}",
                spread(ratios(stage, both)),
                f"{sum(one['plan']) / sum(stage):.0%}",
                spread(ratios(one["student"], one["teacher"])),
                f"{one['passing'] / 2**30:.1f}, {one['peak'] / 2**30:.1f} GiB",
            ]
        )
    head = ("network", "GMACs", "kept", "stage over pass", "of it planning", "student over teacher", "memory")
    return [
        "## The layer-wise stage against a pass",
        "",
        *prose(
            "*Stage*: what `xdonnx compress --macs 50%` does between reading and writing - error curves, plan, walk, "
            f"fit. *Pass*: one of the teacher and one of the student, in torch, over the same {samples} samples of "
            f"{SIZE} x {SIZE}. Networks of torchvision with random weights. *Memory*: the most that the process had, "
            "after a pass of the teacher and after the stage."
        ),
        *grid(head, rows),
        "",
    ]


def cuts(found: Sequence[Cuts]) -> list[str]:
    """Return the section on Torch-Pruning."""
    rows = [
        [
            f"`{one.name}`",
            f"{one.kept_by_ours:.0%}, {one.kept_by_theirs:.0%}",
            spread(ratios(one.theirs, one.ours)),
            spread(ratios(one.exported, one.ours)),
        ]
        for one in found
    ]
    return [
        "## Cutting alone, against Torch-Pruning",
        "",
        *prose(
            "Half of the MACs by the magnitude of filters, residual streams included, nothing fitted. *To a module*: "
            "Torch-Pruning from the module in memory to the pruned module, over xdonnx (`--method l1-norm "
            "--residual`) from the ONNX model in memory to the pruned ONNX model; both work out which channels go "
            "together. *To an ONNX file*: the same with the export that Torch-Pruning's module still needs."
        ),
        *grid(("network", "MACs kept: xdonnx, Torch-Pruning", "to a module", "to an ONNX file"), rows),
        "",
    ]


def page(sections: Iterable[Sequence[str]], about: Sequence[str], command: str, missing: Sequence[str] = ()) -> str:
    """Return the whole page, of a run that may not have finished."""
    lines = [
        "# Benchmarks",
        "",
        *prose(
            "Ratios of processor time of a single thread, which other work on the machine changes little. What is "
            "compared was measured in turns: the median of the repeats, and in brackets the least and the most. "
            "Written by one run of"
        ),
        "```bash",
        command,
        "```",
        "",
        *about,
        *(prose(f"The run was ended before these parts were measured: {', '.join(missing)}.") if missing else ()),
    ]
    for section in sections:
        lines += section
    return "\n".join(lines).rstrip() + "\n"
