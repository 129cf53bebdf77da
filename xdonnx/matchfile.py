"""A matching as a TOML file that people read and correct, and the check of what they wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from xdonnx.errors import JobError, MachineError, did_you_mean
from xdonnx.files import put
from xdonnx.graph import Net
from xdonnx.matching import Given, Matching, misfit
from xdonnx.tomlfile import quoted, read_toml
from xdonnx.wiring import wired

HEADER = """\
# Which layers of {student} stand for which layer of {teacher}, by the values that they make.
# Edit it: 'student' lists the layers, several in a row for one that was decomposed; [] leaves the teacher's layer
# without one. 'channels' may say which of the teacher's channels each channel of the last one is, counted from 0;
# left out it is found. A table that is left out leaves its layers as they are. Then:
# xdonnx compress {teacher} --student {student} --match {name} …
"""
_STRICT = ConfigDict(frozen=True, extra="forbid")


class MatchedLayer(BaseModel):
    """One layer of the teacher, and the student's in its place."""

    model_config = _STRICT
    teacher: str
    student: tuple[str, ...]
    channels: tuple[int, ...] | None = None
    confidence: float | None = None


class MatchFile(BaseModel):
    """What such a file holds; the two models are known by the SHA-256 of their files."""

    model_config = _STRICT
    schema_version: Literal[1] = 1
    teacher: str
    student: str
    layer: tuple[MatchedLayer, ...]


def written(matching: Matching, nets: tuple[Net, Net], hashes: tuple[str, str], names: tuple[str, str, str]) -> str:
    """Return the text of a file.

    Parameters
    ----------
    matching : Matching
    nets : (teacher, student)
    hashes : (teacher, student)
        From :func:`xdonnx.model.model_fingerprint`.
    names : (teacher, student, file)
        Paths as they are typed.
    """
    plain = [quoted(name)[1:-1] for name in names]
    lines = [HEADER.format(teacher=plain[0], student=plain[1], name=plain[2]), "schema_version = 1"]
    lines += [f"teacher = {quoted(hashes[0])}", f"student = {quoted(hashes[1])}"]
    pairs = {pair.teacher: pair for pair in matching.pairs}
    for name, layer in nets[0].layers.items():
        lines += ["", "[[layer]]"]
        if name in pairs:
            pair = pairs[name]
            about = f"{len(pair.channels)} of {len(layer.out_ids)} channels, by {pair.by}"
            row = ", ".join(quoted(part) for part in pair.student)
            lines += [f"# {about}", f"teacher = {quoted(name)}", f"student = [{row}]"]
            lines += [f"confidence = {pair.confidence:.3f}"]
        else:
            lines += ["# nothing in the student is like it", f"teacher = {quoted(name)}", "student = []"]
    for name in matching.alone:
        lines += ["", f"# {quoted(name)} of the student has no layer of the teacher: it stays as it is."]
    return "\n".join(lines) + "\n"


def write_matchfile(text: str, path: Path) -> None:
    """Write a file so that `path` either holds all of it or is untouched; raises MachineError where it cannot."""
    try:
        put(path, text)
    except OSError as error:
        raise MachineError(f"cannot write '{path}': {error.strerror}.") from error


def given_by(path: str | Path, nets: tuple[Net, Net], hashes: tuple[str, str]) -> dict[str, Given]:
    """Read a file for two models, and return what it says of each of the teacher's layers.

    Raises
    ------
    JobError
        There is no such file, it is not TOML, it is of other models, or it says what cannot be.
    """
    file = _read(Path(path))
    for what, said, found in (("teacher", file.teacher, hashes[0]), ("student", file.student, hashes[1])):
        if said != found:
            raise JobError(
                f"'{path}' was made for another {what}: {said[:12]}….\n"
                f'  Make one with xdonnx match. If it is the same network saved again: {what} = "{found}".'
            )
    given: dict[str, Given] = {name: Given(()) for name in nets[0].layers}
    named: set[str] = set()
    for entry in file.layer:
        _check_names(path, entry, nets, named)
        named.update((f"t {entry.teacher}", *(f"s {name}" for name in entry.student)))
        if entry.student:
            why = misfit(nets[0], entry.teacher, nets[1], wired(nets[1]), entry.student)
            if why:
                raise JobError(f"'{path}': teacher = {quoted(entry.teacher)}: {why}")
        given[entry.teacher] = Given(entry.student, _channels(path, entry, nets))
    if not any(one.row for one in given.values()):
        raise JobError(f"'{path}' matches no layer.\n  Write one with xdonnx match, or leave --match out.")
    return given


def _check_names(path: str | Path, entry: MatchedLayer, nets: tuple[Net, Net], named: set[str]) -> None:
    sides = (("teacher", (entry.teacher,), nets[0]), ("student", entry.student, nets[1]))
    for what, names, net in sides:
        for name in names:
            if name not in net.layers:
                near = did_you_mean(name, net.layers)
                raise JobError(f"'{path}': the {what} has no layer '{name}'.{near}\n  xdonnx inspect lists its layers.")
            if f"{what[0]} {name}" in named or names.count(name) > 1:
                raise JobError(f"'{path}': layer '{name}' of the {what} stands there twice.\n  Leave one of the two.")


def _channels(path: str | Path, entry: MatchedLayer, nets: tuple[Net, Net]) -> np.ndarray | None:
    if entry.channels is None:
        return None
    if not entry.student:
        raise JobError(f"'{path}': teacher = {quoted(entry.teacher)} has channels, and no layer of the student.")
    has, of = len(nets[1].layers[entry.student[-1]].out_ids), len(nets[0].layers[entry.teacher].out_ids)
    wrong = len(entry.channels) != has or len(set(entry.channels)) != has
    if wrong or not all(0 <= channel < of for channel in entry.channels):
        raise JobError(
            f"'{path}': channels of teacher = {quoted(entry.teacher)} do not fit.\n"
            f"  They are {has} different numbers from 0 to {of - 1}: the teacher's, for each of the student's."
        )
    return np.array(entry.channels, np.int64)


def _read(path: Path) -> MatchFile:
    how = f"xdonnx match TEACHER STUDENT --shots PATH -o {path.name}"
    found = read_toml(path, "matching", "xdonnx match", how)
    try:
        return MatchFile.model_validate_json(json.dumps(found, default=str))
    except ValidationError as error:
        raise JobError(f"'{path}': {_told(error, found)}") from error


def _told(error: ValidationError, found: Mapping[str, object]) -> str:
    # A key that is misspelt is missing too: the spelling is the news.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    place, known, where = first["loc"], tuple(MatchFile.model_fields), ""
    if place[0] == "layer" and len(place) > 1:
        known, where = tuple(MatchedLayer.model_fields), f" in [[layer]] number {int(place[1]) + 1}"
    key = place[2] if where and len(place) > 2 else place[0]
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'{where}.{did_you_mean(str(key), known)}\n  Keys: {', '.join(known)}."
    if first["type"] == "missing":
        return f"'{key}' is missing{where}.\n  Put it back, or write the file again: xdonnx match."
    return f"'{key}'{where} is {first['input']!r}.\n  {first['msg']}."
