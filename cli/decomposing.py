"""`xdonnx decompose`: layers taken apart into smaller ones, from the weights alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from xdonnx.figures import amount
from xdonnx_cli.flags import SWITCH, Sizes, Talk, fraction, method, multiple, output, target
from xdonnx_cli.output import put_json, tables
from xdonnx_cli.progress import told
from xdonnx_cli.terminal import beside, bullets, heading, headline, percent, plain_table, room, say, shortened, stderr

if TYPE_CHECKING:
    from xdonnx.decomposition import Decomposition
    from xdonnx.ranks import LowRank

_SCHEME = (
    "auto, spatial or channel: what becomes of a kernel. spatial: a column, then a row. channel: 1x1, the kernel "
    "between fewer channels, 1x1. auto, the default: in each layer what keeps more at the same cost."
)
_ENERGY = "Of each layer's weight, as its sum of squares, at least: 90% or 0.9."
_INCLUDE = "Only these layers, as 'stage3*'. The first convolution stays whole unless it is among them."
_ROUND = "Ranks are multiples of N. auto, the default: of 8 or 4, which onnxruntime is fast at."
_EXTERNAL = "auto, always or never: weights in OUT.data beside the file. auto: past 2 GiB."
# Below this the table of layers leaves out what can be done without.
_WIDE = 100
# Layers of one reason that are named at most.
_NAMED = 3


@dataclass(frozen=True)
class Ranks:
    """What may stay, and where."""

    macs: Annotated[
        float | None,
        target("--macs", "P", "MACs of the student, at most: 50% or 0.5. The default target, at 50%.", parser=fraction),
    ] = None
    params: Annotated[float | None, target("--params", "P", "Weights of the student, at most.", parser=fraction)] = None
    energy: Annotated[float | None, target("--energy", "P", _ENERGY, parser=fraction)] = None
    rank: Annotated[int | None, target("--rank", "N", "Of each layer that saves something so.")] = None
    scheme: Annotated[str, method("--scheme", "NAME", _SCHEME)] = "auto"
    include: Annotated[list[str] | None, method("--include", "PATTERN", _INCLUDE)] = None
    exclude: Annotated[list[str] | None, method("--exclude", "PATTERN", "All layers but these.")] = None
    round_to: Annotated[int | None, method("--round-to", "N|auto", _ROUND, parser=multiple)] = None

    def wanted(self) -> LowRank:
        """Return them as the library takes them; raises JobError for what makes no sense."""
        from xdonnx.decomposition import wanted

        return wanted(**{**vars(self), "include": self.include or (), "exclude": self.exclude or ()})


@dataclass(frozen=True)
class Files:
    """Where the student goes."""

    out: Annotated[Path, output("--out", "OUT", "The student.", "-o")]
    force: Annotated[bool, output("--force", SWITCH, "Replace an OUT that exists.")] = False
    external_data: Annotated[str, output("--external-data", "WHEN", _EXTERNAL)] = "auto"
    dry_run: Annotated[bool, output("--dry-run", SWITCH, "Do all but write.")] = False


def decompose(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", readable=False, help="The teacher: an ONNX file.", show_default=False)
    ],
    ranks: Ranks,
    sizes: Sizes,
    files: Files,
    talk: Talk,
) -> int:
    """Take the layers of a CNN apart into smaller ones, from the weights alone: a student of low rank.

    Needs no samples and no torch. Nothing is fitted: see what it costs with xdonnx verify.
    """
    wish, shapes = ranks.wanted(), sizes.shapes()
    from xdonnx.decomposition import decomposed

    with told(talk) as log:
        found = decomposed(
            model,
            files.out,
            wish,
            sizes=shapes,
            force=files.force,
            external_data=files.external_data,
            writes=not files.dry_run,
            log=log,
        )
    written = None if files.dry_run else str(files.out)
    put_json(talk.json, json.dumps({"model": str(model), "out": written, **found.to_dict()}, indent=2))
    console = tables(talk)
    _show_head(console, found, dry=files.dry_run)
    if not talk.quiet:
        _show_costs(console, found)
        _show_layers(console, found)
        _show_whole(console, found)
        if written is not None:
            console.print()
            say(console, f"Wrote {beside(files.out)}. See what that cost: xdonnx verify {model} {files.out} --shots …")
    for text in found.warnings:
        say(stderr(), f"warning: {text}", "yellow")
    return 0


def _show_head(console: Console, found: Decomposition, *, dry: bool) -> None:
    before, after = found.teacher, found.student
    head = Text("DRY RUN  " if dry else "DECOMPOSED  ", "bold")
    head.append(
        f"{percent(after.macs, before.macs)} of the MACs, {percent(after.params, before.params)} of the weights; "
        f"{len(found.layers)} layers, {found.target}",
        "default not bold",
    )
    headline(console, head)


def _show_costs(console: Console, found: Decomposition) -> None:
    console.print()
    table = plain_table("", "teacher", "student", "")
    rows: tuple[tuple[str, Callable[[float], str]], ...] = (
        ("bytes", lambda number: amount(number, "B")), ("params", amount), ("macs", amount),
    )  # fmt: skip
    for (name, shown), title in zip(rows, ("file size", "weights", "MACs"), strict=True):
        before, after = getattr(found.teacher, name), getattr(found.student, name)
        table.add_row(title, shown(before), shown(after), percent(after, before))
    console.print(table)


def _show_layers(console: Console, found: Decomposition) -> None:
    heading(console, f"Taken apart ({len(found.layers)})")
    wide = console.width >= _WIDE
    names = shortened((layer.layer for layer in found.layers), room(console, 67 if wide else 46))
    table = plain_table("  layer", "as<", "rank", "of", "energy", *(("MACs", "to") if wide else ()), "MACs")
    for layer in found.layers:
        macs = (amount(layer.macs_before), amount(layer.macs_after)) if wide else ()
        ranks = ("→".join(map(str, numbers)) for numbers in (layer.ranks, layer.of))
        share = percent(layer.macs_after, layer.macs_before)
        table.add_row(f"  {names[layer.layer]}", layer.scheme, *ranks, f"{100 * layer.kept:.1f} %", *macs, share)
    console.print(table)


def _show_whole(console: Console, found: Decomposition) -> None:
    """Print why layers stay whole, each reason with how many of them and the first."""
    if not found.whole:
        return
    heading(console, f"Whole ({len(found.whole)})")
    reasons: dict[str, list[str]] = {}
    for name, why in found.whole.items():
        reasons.setdefault(why, []).append(name)
    names = shortened(found.whole, room(console, 30))
    bullets(
        console,
        [
            f"{why}: {', '.join(names[name] for name in layers[:_NAMED])}"
            + (f" and {len(layers) - _NAMED} more" if len(layers) > _NAMED else "")
            for why, layers in reasons.items()
        ],
    )
