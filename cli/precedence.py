"""Which settings of a lower place are void: those that answer a question which a higher place answers otherwise.

A value wins over another of the same name by itself. But where a file says `macs` and a user types `--keep`, or the
file an option of a method and the user another method, both would stand there, and the job could not be made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xdonnx_cli.options import Flag

# `--plan` brings these with it.
_OF_PLAN = ("structure", "include", "exclude", "round_to", "residual", "allocation")
# Options of methods, and the connection that some belong to.
_OF_METHODS = (
    "connection", "mu", "alpha", "beta", "solver", "ridge", "views", "steps", "adversarial", "preset_effort"
)  # fmt: skip
_OWNERS = {"mu": "cross", "alpha": "soft", "beta": "soft"}


def void(lower: Mapping[str, Any], higher: Mapping[str, Any], flags: Mapping[str, Flag]) -> set[str]:
    """Return the names of a lower place that those of a higher place replace, beside those of the same name.

    Parameters
    ----------
    lower, higher : mapping
        {name: value}, as text or as its parser made it.
    flags : mapping
        Those of the command.
    """
    return {name for name in _void(lower, higher, flags) if name in lower and name not in higher}


def _void(lower: Mapping[str, Any], higher: Mapping[str, Any], flags: Mapping[str, Flag]) -> Iterator[str]:
    targets = {name for name, flag in flags.items() if flag.is_target}
    whole = {**lower, **higher}
    if "synthetic_shots" in higher:
        # Noise has no classes.
        yield from ("shots", "labels", "per_class")
    if "shots" in higher:
        yield "synthetic_shots"
    if "per_class" in higher:
        yield "max_shots"
    if "max_shots" in higher:
        yield "per_class"
    if targets & set(higher):
        yield from targets
    if "plan" in higher or "student" in higher:
        yield from _OF_PLAN
    if targets & set(higher) and "student" not in higher:
        yield "match"
    yield from _of_structure(whole, higher, targets)
    if "method" in higher:
        yield from _of_other_methods(whole)
    yield from _of_other_connections(whole, higher)


def _of_structure(whole: Mapping[str, Any], higher: Mapping[str, Any], targets: set[str]) -> Iterator[str]:
    structure = str(whole.get("structure") or "channel")
    if ":" in structure:
        # A pattern says itself how much stays: whichever of the two stands higher decides.
        yield from targets if "structure" in higher else ()
        yield from ("structure",) if targets & set(higher) else ()
    if "structure" in higher and structure != "channel":
        yield from ("solver",) if whole.get("solver") == "greedy" else ()
    if whole.get("allocation") == "measured":
        uniform = "keep" in higher or ("structure" in higher and structure != "channel")
        yield from ("allocation",) if uniform else ()


def _of_other_methods(whole: Mapping[str, Any]) -> Iterator[str]:
    """Yield the options that none of the methods has."""
    from xdonnx.methods import METHODS, POOLED
    from xdonnx_cli.methods import options

    names: Sequence[str] = whole["method"]
    if whole.get("preset_effort") == "best" and list(names) == ["cross"]:
        names = ("cross", "tune")
    if not set(names) <= set(METHODS):
        return  # the options of other packages' methods are known once these are imported, and no sooner
    found = {option for name in names for option, _ in options(METHODS[name].target)}
    known = {"preset_effort" if name == "effort" else name for name in found}
    yield from (name for name in _OF_METHODS if name not in known)
    if not POOLED & set(names):
        yield from ("pool", "pool_draw")


def _of_other_connections(whole: Mapping[str, Any], higher: Mapping[str, Any]) -> Iterator[str]:
    typed = {_OWNERS[name] for name in _OWNERS if name in higher}
    if "connection" in higher:
        auto = "cross" if whole.get("preset_effort") == "paper" else "soft"
        typed = {auto if higher["connection"] == "auto" else str(higher["connection"])}
    if len(typed) != 1:
        return
    yield from (name for name, owner in _OWNERS.items() if owner not in typed)
    if whole.get("connection") not in typed:
        yield "connection"
