"""ONNX test data: folders of tensors `input_0.pb`, `input_1.pb`, ..., as they lie beside the models of a zoo."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xdonnx.errors import ShotsError
from xdonnx.sources import some

Array = NDArray[Any]

_TENSOR = re.compile(r"input_(\d+)\.pb")


def tensor_folders(path: Path) -> list[Path]:
    """Return the folders of ONNX test data, each with `input_0.pb` and so on: `path` itself or its sub-folders."""
    if not path.is_dir():
        return []
    if _tensor_files(path):
        return [path]
    below = [entry for entry in path.iterdir() if entry.is_dir() and _tensor_files(entry)]
    # By number where there is one: test_data_set_10 comes after test_data_set_9.
    return sorted(below, key=lambda entry: [(len(part), part) for part in re.findall(r"\d+|\D+", entry.name)])


def load_tensors(path: Path, folders: Sequence[Path], names: Sequence[str]) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Return ONNX test data as {input: rows of all folders}, and the name of each row.

    A tensor belongs to the input that it is named for or, where its name is no input's, to that at its number.

    Parameters
    ----------
    path : Path
        What the user gave, for messages.
    folders : sequence of Path
        From `tensor_folders`.
    names : sequence of str
        The inputs to be filled.

    Raises
    ------
    ShotsError
        A file is no tensor, an input has none or two, or sizes differ between folders or inputs.
    """
    found: list[dict[str, Array]] = []
    ids: list[str] = []
    for folder in folders:
        arrays = _tensors_in(folder, names)
        counts = {name: len(array) for name, array in arrays.items()}
        if len(set(counts.values())) > 1:
            raise ShotsError(f"the inputs in '{folder}' have different numbers of rows: {counts}.")
        odd = [name for name in names if found and arrays[name].shape[1:] != found[0][name].shape[1:]]
        if odd:
            shapes = f"{found[0][odd[0]].shape[1:]} and {arrays[odd[0]].shape[1:]}"
            raise ShotsError(
                f"the samples of '{path}' differ in size: input '{odd[0]}' has {shapes}.\n"
                "  Give one test_data_set folder, or some of one size."
            )
        found.append(arrays)
        ids += [f"{folder.name}[{row}]" for row in range(counts[names[0]])]
    return {name: np.concatenate([arrays[name] for arrays in found]) for name in names}, tuple(ids)


def _tensor_files(folder: Path) -> list[Path]:
    """Return the files `input_0.pb`, `input_1.pb`, ... of a folder, by number."""
    files = {int(match[1]): entry for entry in folder.iterdir() if (match := _TENSOR.fullmatch(entry.name))}
    return [files[number] for number in sorted(files)]


def _tensors_in(folder: Path, names: Sequence[str]) -> dict[str, Array]:
    """Return the tensors of one folder by input."""
    import onnx  # here, since reading shots must not cost its import

    found: dict[str, Array] = {}
    files = _tensor_files(folder)
    for place, file in enumerate(files):
        try:
            tensor = onnx.TensorProto.FromString(file.read_bytes())
            array = onnx.numpy_helper.to_array(tensor)
        except Exception as error:  # protobuf's errors have no other parent, and nonsense may parse
            raise ShotsError(f"'{file}' is no ONNX tensor: {error}.\n  Write or copy it again.") from error
        # A test of one input alone may stand for any; several without names are in the order of the inputs.
        name = tensor.name if tensor.name in names or len(files) != len(names) else names[place]
        if name in found:
            raise ShotsError(f"'{folder}' holds two tensors for input '{name}'.\n  Name them for their inputs.")
        found[name] = array if array.ndim else array[None]
    if missing := [name for name in names if name not in found]:
        raise ShotsError(
            f"'{folder}' has tensors for {some(found)}; wanted and not there: {some(missing)}.\n"
            "  Give an input_N.pb for each input, named for it or in the order of the inputs."
        )
    return {name: found[name] for name in names}
