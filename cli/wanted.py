"""What several commands say of a job: their flags as the library takes them, and the library itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xdonnx.errors import MachineError
from xdonnx_cli.flags import Data, Pixels, Sizes, Target


def library() -> Any:
    """Import the job, and torch with it."""
    try:
        import xdonnx.job
    except (ImportError, OSError, RuntimeError) as error:
        # A torch whose libraries are missing raises any of these.
        raise MachineError(f"torch does not import: {error}.\n  See what is wrong with it: xdonnx doctor") from error
    return xdonnx.job


def check_cheaply(model: Path, target: Target, methods: Sequence[str] = (), student: Path | None = None) -> None:
    """Raise what is wrong with names and numbers before torch is imported, which takes seconds."""
    from xdonnx.budget import KINDS, MEASURED, Budget, check_budget, pattern_of
    from xdonnx.methods import named
    from xdonnx.model import check_file

    check_file(model)
    if student is not None:
        check_file(student)
    structure = target.structure or "channel"
    pattern_of(structure)
    for kind in KINDS:
        amount = getattr(target, kind)
        if amount is not None and kind not in MEASURED:  # of which the parser made sure
            check_budget(Budget(kind, amount, structure, round_to=target.round_to))
    for name in methods:
        named(name)


def fields(data: Data, pixels: Pixels, sizes: Sizes, target: Target) -> dict[str, Any]:
    """Return the fields of a job that these flags give; what was not given is left out, and so has its default."""
    given = {
        **vars(data),
        "shots": tuple(data.shots or ()),
        "holdout": data.held_out("0.2"),
        "preprocess": pixels.preprocess(),
        "input_shape": sizes.shapes(),
        **vars(target),
        "include": tuple(target.include or ()),
        "exclude": tuple(target.exclude or ()),
    }
    return {name: value for name, value in given.items() if value is not None}
