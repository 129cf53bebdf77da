"""`xdonnx inspect`: what a model is made of, how much of it can go, and why the rest cannot."""

from __future__ import annotations

import json as encoder
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from xdonnx.figures import amount
from xdonnx_cli.flags import SWITCH, Sizes, output, running
from xdonnx_cli.terminal import bullets, heading, plain_table, room, say, shortened, stdout

if TYPE_CHECKING:
    from xdonnx.survey import LayerSurvey, Survey

# Reasons that are listed at most; --json has all.
_REASONS = 20
# Below this the layers' table leaves out what can be done without.
_WIDE = 100


def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL", readable=False, help="An ONNX file.", show_default=False)],
    sizes: Sizes,
    json: Annotated[bool, output("--json", SWITCH, "Everything as JSON on stdout.")] = False,
    verbose: Annotated[bool, running("--verbose", SWITCH, "Tracebacks.", "-v")] = False,
) -> int:
    """Say what a model is made of, which channels may go, and why the others may not.

    Needs no samples and no torch.
    """
    del verbose  # read where errors are reported
    shapes = sizes.shapes()
    from xdonnx.graph import read_net
    from xdonnx.model import file_bytes, interface, read_proto, sized
    from xdonnx.survey import survey

    proto = read_proto(model)
    sized(interface(proto).inputs, shapes)
    found = survey(read_net(proto, shapes))
    size = file_bytes(model)
    if json:
        typer.echo(encoder.dumps({"model": str(model), "bytes": size, **found.to_dict()}, indent=2))
        return 0
    console = stdout()
    _show_model(console, model, size, found)
    _show_operators(console, found)
    _show_layers(console, found)
    _show_groups(console, found)
    _show_reasons(console, found)
    _show_verdict(console, found)
    return 0


def _show_model(console: Console, model: Path, size: int, found: Survey) -> None:
    console.print(Text(str(model), "bold"), soft_wrap=True)
    opset = ", ".join(f"{domain or 'onnx'} {version}" for domain, version in found.opset.items())
    say(console, f"  {amount(size, 'B')}, {amount(found.params)} weights in layers, {amount(found.macs)} MACs a sample")
    say(console, f"  by {found.producer or 'an unnamed producer'}; opset {opset}; IR version {found.ir_version}")
    for kind, ports in (("in ", found.inputs), ("out", found.outputs)):
        for port in ports:
            say(console, f"  {kind} {port}")
    if found.assumed:
        say(console, f"  assumed: {', '.join(found.assumed)} (choose with --input-shape)")


def _show_operators(console: Console, found: Survey) -> None:
    heading(console, "Operators")
    for runs, what in (
        ("torch", "in torch"),
        ("onnxruntime", "in onnxruntime, slower, as torch has none"),
        ("folded", "folded on reading"),
    ):
        mine = [f"{use.op}\N{NO-BREAK SPACE}{use.count}" for use in found.operators if use.runs == runs]
        if mine:
            bullets(console, [f"{what}: {', '.join(mine)}"])


def _show_layers(console: Console, found: Survey) -> None:
    heading(console, f"Layers ({len(found.layers)})")
    wide = console.width >= _WIDE
    names = shortened((layer.layer for layer in found.layers), room(console, 80 if wide else 45))
    extra = ("op<", "kernel", "makes", "weights") if wide else ()
    table = plain_table("  layer", *extra[:3], "channels", *extra[3:], "MACs", "share", "free")
    for layer in found.layers:
        cells = [f"  {names[layer.layer]}"]
        cells += [layer.op, _kernel(layer), "×".join(map(str, layer.size))] if wide else []
        cells += [f"{layer.inputs} → {layer.outputs}"]
        cells += [amount(layer.params)] if wide else []
        cells += [amount(layer.macs), f"{100 * layer.share:.1f} %"]
        cells += [f"{layer.free} of {layer.outputs}" if layer.free else "-"]
        table.add_row(*cells)
    console.print(table)


def _kernel(layer: LayerSurvey) -> str:
    size = "×".join(map(str, layer.kernel))
    if layer.groups == 1:
        return size
    return f"{size} dw" if layer.groups == layer.inputs else f"{size} g{layer.groups}"


def _show_groups(console: Console, found: Survey) -> None:
    if not found.groups:
        return
    heading(console, f"Channels that go or stay together ({len(found.groups)})")
    table = plain_table("  made by", "units", "read by<")
    most = room(console, 24, names=2)
    names = shortened((name for group in found.groups for name in (*group.producers, *group.readers)), most)
    for group in found.groups:
        made = _some(group.producers, names)
        table.add_row(f"{'+' if group.stream else ' '} {made}", str(group.units), _some(group.readers, names))
    console.print(table)
    if any(group.stream for group in found.groups):
        console.print(Text("+ several layers add into these: they go with --residual only", "dim"))


def _some(layers: tuple[str, ...] | list[str], names: dict[str, str]) -> str:
    return names[layers[0]] + (f" +{len(layers) - 1}" if len(layers) > 1 else "")


def _show_reasons(console: Console, found: Survey) -> None:
    """Print why layers stay whole: each reason with how many channels it holds, and in which layers."""
    layers: dict[str, list[str]] = {}
    channels: Counter[str] = Counter()
    for layer in found.layers:
        if layer.whole:
            layers.setdefault(layer.whole, []).append(layer.layer)
            channels[layer.whole] += layer.outputs - layer.free
    if not layers:
        return
    heading(console, "Channels that stay")
    names = shortened((layer.layer for layer in found.layers), room(console, 30))
    lines = [f"{count}: {reason} ({_some(layers[reason], names)})" for reason, count in channels.most_common(_REASONS)]
    if len(layers) > _REASONS:
        lines.append(f"{len(layers) - _REASONS} more reasons: see --json")
    bullets(console, lines)


def _show_verdict(console: Console, found: Survey) -> None:
    plain, residual = found.plain, found.residual
    style = "bold green" if plain.share > 0 else "bold yellow"
    console.print()
    text = f"{_share(plain.share)} of the MACs can be compressed"
    if not plain.share:
        text = "Nothing can be compressed" if not residual.share else "Nothing can be compressed without --residual"
    line = Text(text, style)
    if plain.share:
        line.append(f", down to {_share(plain.floor)} of them at the least", "default not bold")
    line.append(".", "default not bold")
    console.print(line)
    if residual.floor < plain.floor:
        console.print(f"With --residual: {_share(residual.share)}, down to {_share(residual.floor)}.")


def _share(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"
