"""`xdonnx methods`: what there is to choose from, read from the sources so that torch need not be imported."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import get_type_hints

from rich.table import Table
from rich.text import Text

from xdonnx.methods import POOLED, REFITTING, REFITTING_EFFORTS, available
from xdonnx_cli.flags import Recipe
from xdonnx_cli.terminal import stdout

# Flags whose names differ from those of the options that they set.
_FLAGS = {"effort": "preset_effort"}


def methods() -> int:
    """List the methods: the paper, what each needs and can be given besides, its options and when to choose it."""
    console, told = stdout(), _told()
    for at, (name, entry) in enumerate(available().items()):
        if at:
            console.print()
        console.print(Text(name, "bold green").append(f"  {entry.advice}", "default not bold"))
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("  paper", entry.paper)
        if entry.needs:
            table.add_row("  needs", entry.needs)
        own = options(entry.target)
        for option, values in own:
            flag = _FLAGS.get(option, option)
            table.add_row(f"  --{flag.replace('_', '-')}", told.get(flag, values))
        if name in REFITTING:
            efforts = f", by effort {' or '.join(REFITTING_EFFORTS)}" if "effort" in dict(own) else ""
            table.add_row("  --student", f"refits what another tool made{efforts}")
        if name in POOLED:
            table.add_row("  --pool", "learns from unlabelled images too")
        console.print(table)
    return 0


def _told() -> dict[str, str]:
    """Return what `compress --help` says of each option, by the name of its field."""
    return {name: kind.__metadata__[0].help for name, kind in get_type_hints(Recipe, include_extras=True).items()}


def options(target: str) -> list[tuple[str, str]]:
    """Return the options of a method as its docstring describes them; none where its source cannot be read.

    Parameters
    ----------
    target : str
        'module:Class'. The module is found but not imported.
    """
    module, _, name = target.partition(":")
    try:
        spec = importlib.util.find_spec(module)
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8")) if spec and spec.origin else ast.Module([], [])
    except (ImportError, OSError, SyntaxError, ValueError):
        return []
    kind = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if kind is None:
        return []
    fields = {
        node.target.id for node in kind.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    described = re.findall(r"^(\w+(?:, \w+)*) : (.+)$", ast.get_docstring(kind) or "", re.M)
    return [(name, values) for names, values in described for name in names.split(", ") if name in fields]
