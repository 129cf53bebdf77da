"""`xdonnx match`: which layers of a student are which of a teacher's, as a table and as a file to correct."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from xdonnx_cli.flags import SWITCH, Data, Pixels, Sizes, Talk, output, running
from xdonnx_cli.output import put_json, tables
from xdonnx_cli.progress import told
from xdonnx_cli.terminal import beside, heading, headline, plain_table, room, say, shortened, stderr

if TYPE_CHECKING:
    from xdonnx.given import GivenStudent
    from xdonnx.graph import Net


@dataclass(frozen=True)
class MatchFiles:
    """Where the matching goes, and the rest of the run."""

    out: Annotated[Path | None, output("--out", "OUT", "A TOML file for compress --match. Default: none.", "-o")] = None
    force: Annotated[bool, output("--force", SWITCH, "Replace an OUT that exists.")] = False
    seed: Annotated[int, running("--seed", "N", "Of every draw.", min=0)] = 0


def match(
    teacher: Annotated[
        Path, typer.Argument(metavar="TEACHER", readable=False, help="An ONNX file.", show_default=False)
    ],
    student: Annotated[
        Path,
        typer.Argument(metavar="STUDENT", readable=False, help="What another tool made of it.", show_default=False),
    ],
    data: Data,
    pixels: Pixels,
    sizes: Sizes,
    files: MatchFiles,
    talk: Talk,
) -> int:
    """Find which layers of a pruned or decomposed student are which of the teacher's.

    Names have no say: structure, weights and activations have. OUT is a file to read and to correct: xdonnx compress
    TEACHER --student STUDENT --match OUT goes by it. The exit code is 4 where the student is another teacher's.
    """
    from xdonnx.events import hearing
    from xdonnx.given import check_matching, match_results
    from xdonnx.matching import ENOUGH
    from xdonnx.model import check_file
    from xdonnx.paths import check_plan

    for path in (teacher, student):
        check_file(path)
    if files.out is not None:
        check_plan(files.out, teacher, force=files.force, usual="match.toml")
        check_plan(files.out, student, force=files.force, usual="match.toml", what="STUDENT")
    heard: list[str] = []
    with told(talk) as log:
        net, found = _found(teacher, student, data, pixels, sizes, files.seed, hearing(log, heard))
    if files.out is not None:
        _write(files.out, (teacher, student), net, found)
    results = [result.model_dump() for result in match_results(found.matching, net)]
    whole = {"teacher": str(teacher), "student": str(student), "confidence": round(found.matching.confidence, 4)}
    lists = {"absent": found.matching.absent, "alone": found.matching.alone, "warnings": heard}
    put_json(talk.json, json.dumps({**whole, "matches": results, **lists}, indent=2))
    _show(tables(talk), found, net, quiet=talk.quiet)
    for text in heard if not talk.verbose else ():
        say(stderr(), f"warning: {text}", "yellow")
    if files.out is not None and not talk.quiet:
        use = f"xdonnx compress {teacher} --student {student} --match {files.out} …"
        refused = found.matching.confidence < ENOUGH
        how = f", to be corrected, since it is obeyed as it stands by {use}" if refused else f": {use}"
        say(tables(talk), f"Wrote {beside(files.out)}{how}")
    check_matching(found, net, (teacher, student))
    return 0


def _found(
    teacher: Path, student: Path, data: Data, pixels: Pixels, sizes: Sizes, seed: int, log: Any
) -> tuple[Net, GivenStudent]:
    """Read models and samples, and match; the samples are those that would fit."""
    from xdonnx.given import matched
    from xdonnx.graph import read_net
    from xdonnx.model import interface, read_proto, sized
    from xdonnx.runtime import open_session
    from xdonnx.samples import Request, apart

    shapes = sizes.shapes()
    proto = read_proto(teacher)
    open_session(teacher)
    held = data.held_out("0") if data.holdout else None
    asked = Request(**{**vars(data), "holdout": held}, preprocess=pixels.preprocess(), seed=seed)
    whole, judging = asked.read(sized(interface(proto).inputs, shapes), log)
    fit, _ = apart(whole, judging, asked, log=log, stream=True)
    found = {**{name: array.shape for name, array in fit.inputs.items()}, **shapes}
    net = read_net(proto, found)
    return net, matched((teacher, student), net, fit.inputs, found, log=log)


def _write(out: Path, paths: tuple[Path, Path], net: Net, found: GivenStudent) -> None:
    from xdonnx.matchfile import write_matchfile, written
    from xdonnx.model import model_fingerprint

    hashes = model_fingerprint(paths[0]), model_fingerprint(paths[1])
    names = str(paths[0]), str(paths[1]), str(out)
    write_matchfile(written(found.matching, (net, found.net), hashes, names), out)


def _show(console: Console, found: GivenStudent, net: Net, *, quiet: bool) -> None:
    matching = found.matching
    head = Text(f"MATCH  confidence {matching.confidence:.2f}", "bold")
    rows = sum(len(pair.student) > 1 for pair in matching.pairs)
    text = f", {len(matching.pairs)} of {len(net.layers)} layers of the teacher"
    head.append(text + (f", {rows} of them decomposed" if rows else ""), "default not bold")
    headline(console, head)
    if quiet:
        return
    heading(console, "Layers")
    width = room(console, 44, names=2)
    theirs = shortened((pair.teacher for pair in matching.pairs), width)
    ours = shortened((name for pair in matching.pairs for name in pair.student), width)
    table = plain_table("  teacher", "student<", "kept", "of", "confidence", "by<")
    for pair in matching.pairs:
        units = len(net.layers[pair.teacher].out_ids)
        for at, name in enumerate(pair.student):
            last = at == len(pair.student) - 1
            cells = [str(len(pair.channels)), str(units), f"{pair.confidence:.2f}", pair.by] if last else [""] * 4
            table.add_row(f"  {theirs[pair.teacher]}" if at == 0 else "", ours[name] + " →" * (not last), *cells)
    console.print(table)
    for title, names in (
        ("Layers of the teacher without one in the student", matching.absent),
        ("Layers of the student that are like none of the teacher's", matching.alone),
    ):
        if names:
            heading(console, title)
            for name in names:
                say(console, f"  {name}")
