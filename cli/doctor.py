"""`xdonnx doctor`: what the machine has, what does not fit, what to type to mend it."""

from __future__ import annotations

import platform

from rich.text import Text

from xdonnx_cli.terminal import bullets, say, stdout

_WORDS = {"well": ("ok", "green"), "note": ("note", "yellow"), "ill": ("BROKEN", "bold red")}


def doctor() -> int:
    """Look at packages, devices and onnxruntime; say what to install. Exit code 8 if compress cannot run."""
    from xdonnx.doctor import examine

    console = stdout()
    health = examine()
    known = [f"{name} {version}" for name, version in health.versions.items() if version]
    bullets(console, [f"Python {platform.python_version()} on {platform.platform()}", ", ".join(known)])
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
