"""`xdonnx doctor`: what the machine has, what does not fit, what to type to mend it."""

from __future__ import annotations

import json as encoder
import platform
from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from xdonnx_cli.flags import SWITCH, output, running
from xdonnx_cli.terminal import bullets, say, stdout

_WORDS = {"well": ("ok", "green"), "note": ("note", "yellow"), "ill": ("BROKEN", "bold red")}


def doctor(
    json: Annotated[bool, output("--json", SWITCH, "Everything as JSON on stdout.")] = False,
    verbose: Annotated[bool, running("--verbose", SWITCH, "Tracebacks.", "-v")] = False,
) -> int:
    """Look at packages, devices and onnxruntime; say what to install. Exit code 8 if compress cannot run."""
    del verbose  # read where errors are reported
    from xdonnx.doctor import examine

    console = stdout()
    health = examine()
    if json:
        machine = {"python": platform.python_version(), "platform": platform.platform()}
        typer.echo(encoder.dumps({"well": health.well, **machine, **asdict(health)}, indent=2))
        return 0 if health.well else 8
    known = [f"{name} {version}" for name, version in health.versions.items() if version]
    facts = [f"Python {platform.python_version()} on {platform.platform()}", ", ".join(known)]
    facts += [f"--device {' or '.join(health.devices)}"] if health.devices else []
    facts += [f"onnxruntime runs with {', '.join(health.providers)}"] if health.providers else []
    bullets(console, facts)
    console.print()
    for finding in health.findings:
        word, style = _WORDS[finding.state]
        line = Text(f"{word:<7}", style)
        console.print(line.append(f"{finding.name}: {finding.text}", "default not bold"))
        if finding.cure:
            # On a line of its own, unbroken, so that it can be copied.
            say(console, f"       {finding.cure}", "bold")
    console.print()
    if health.well:
        console.print(Text("All that compress needs is here.", "bold green"))
        return 0
    console.print(Text("compress cannot run here until what is BROKEN is mended.", "bold red"))
    return 8
