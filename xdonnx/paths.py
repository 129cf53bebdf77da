"""Where results may go: what is checked of OUT before any work, so that nothing of the user's is lost."""

from __future__ import annotations

import os
from pathlib import Path

from xdonnx.errors import JobError, MachineError, did_you_mean
from xdonnx.model import check_beside, data_path, model_files

# When weights lie beside the file.
EXTERNAL = ("auto", "always", "never")
# Endings that would tell whoever loads the file something else than that it is ONNX.
_NOT_ONNX = frozenset((".pt", ".pth", ".ckpt", ".pb", ".tflite", ".h5", ".engine", ".npz", ".npy", ".json", ".toml"))


def rejected_path(out: Path) -> Path:
    """Return where a candidate that failed its gate is kept."""
    return out.with_name(f"{out.stem}.rejected.onnx")


def partial_folder(out: Path) -> Path:
    """Return where the work of a job that was stopped is kept."""
    return out.with_name(f"{out.name}.partial")


def report_folder(out: Path, given: Path | None = None) -> Path:
    """Return where the report of OUT goes, by default beside it; raises JobError or MachineError where it cannot."""
    folder = given or out.parent / f"{out.stem}.report"
    if folder == out or (folder.exists() and not folder.is_dir()):
        raise JobError(f"the report cannot go to '{folder}': that is a file.\n  Name a folder: --report-dir DIR.")
    above = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    if not os.access(above, os.W_OK):
        if given is None:
            raise MachineError(f"cannot write into '{above}'.\n  Name an OUT in another folder.")
        raise MachineError(f"cannot write the report into '{above}'.\n  Name another folder: --report-dir DIR.")
    return folder


def check_student(out: Path, model: Path, *, force: bool, external: str) -> None:
    """Raise JobError or MachineError where the student cannot be written to OUT, or would replace what it must not."""
    if external not in EXTERNAL:
        near = did_you_mean(external, EXTERNAL)
        raise JobError(f"unknown --external-data '{external}'.{near}\n  Choices: {', '.join(EXTERNAL)}.")
    _check_place(out, "student.onnx")
    if out.suffix in _NOT_ONNX:
        raise JobError(f"OUT is ONNX, and '{out}' is called {out.suffix}.\n  Name it: -o {out.with_suffix('.onnx')}")
    if external == "always":
        check_beside(out)
    # A candidate that fails its gate, and weights kept outside, go to files of their own beside OUT.
    written = [out, rejected_path(out)]
    written += [data_path(path) for path in written]
    _check_spared(out, written, model)
    _check_free([out, written[2]], force=force)


def check_plan(out: Path, model: Path, *, force: bool, usual: str = "plan.toml", what: str = "MODEL") -> None:
    """Raise JobError or MachineError where a plan cannot be written to OUT, or would replace what it must not."""
    _check_place(out, usual)
    _check_spared(out, [out], model, what)
    _check_free([out], force=force)


def check_spared(out: Path, model: Path, name: str) -> None:
    """Raise JobError where a student at OUT would replace a model of that name in the command."""
    written = [out, rejected_path(out)]
    _check_spared(out, [*written, *(data_path(path) for path in written)], model, name)


def _check_place(out: Path, usual: str) -> None:
    if not out.parent.is_dir():
        raise JobError(f"the folder of '{out}' does not exist.\n  Make it: mkdir -p '{out.parent}'")
    if out.is_dir():
        raise JobError(f"'{out}' is a folder.\n  Name a file: -o {out / usual}")
    if not os.access(out.parent, os.W_OK):
        raise MachineError(f"cannot write into '{out.parent}'.")


def _check_spared(out: Path, written: list[Path], model: Path, name: str = "MODEL") -> None:
    teacher = {path.resolve() for path in model_files(model)} if model.is_file() else set()
    for path in written:
        if path.resolve() in teacher:
            what = f"OUT is {name}" if path == out else f"'{path}' would be written, and is part of {name}"
            spared = "The teacher" if name == "MODEL" else "It"
            raise JobError(f"{what}: '{out}'.\n  {spared} is never overwritten; name another file.")


def _check_free(written: list[Path], *, force: bool) -> None:
    for path in written:
        if path.exists() and not force:
            raise JobError(f"'{path}' exists.\n  Pass --force to replace it.")
