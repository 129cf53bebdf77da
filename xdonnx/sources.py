"""What lies where shots are read from: image files, arrays, labels; nothing is decoded here."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xdonnx.errors import ShotsError

if TYPE_CHECKING:
    # For the annotations only: reading shots must not cost the import of onnx.
    from xdonnx.model import Port

Array = NDArray[Any]

_IMAGES = ("bmp", "gif", "jpeg", "jpg", "pbm", "pgm", "png", "ppm", "tif", "tiff", "webp")
_TENSOR = re.compile(r"input_(\d+)\.pb")
IMAGE_SUFFIXES = frozenset(f".{ending}" for ending in _IMAGES)
ARRAY_SUFFIXES = frozenset((".npy", ".npz"))
FORMATS = (
    "a folder of images (sub-folders are classes), an image, .npz, .npy, a .txt list of image paths, "
    "or test_data_set_* folders of input_0.pb"
)


@dataclass(frozen=True, eq=False)
class Listing:
    """Image files, none of them opened yet.

    Parameters
    ----------
    paths : tuple of Path
        In a fixed order: folders and files sorted by name, lists as written.
    ids : tuple of str
        How each is named in messages and reports: 'cat/001.png'.
    labels : (n,) int64, optional
        Class of each.
    classes : tuple of str, optional
        Name of each class, where folders name them by words.
    ignored : tuple of str
        Files that are no images by their suffix.
    """

    paths: tuple[Path, ...]
    ids: tuple[str, ...]
    labels: Array | None = None
    classes: tuple[str, ...] | None = None
    ignored: tuple[str, ...] = ()


def assign(sources: Sequence[str], ports: Sequence[Port]) -> list[tuple[Path, tuple[Port, ...]]]:
    """Say which inputs each source fills.

    Parameters
    ----------
    sources : sequence of str
        'PATH', alone, for all inputs; or 'NAME=PATH' for each.
    ports : sequence of Port
        The graph's inputs.

    Raises
    ------
    ShotsError
        A name is no input, an input has no source or two, or several sources do not say what they fill.
    """
    if not sources:
        raise ShotsError(f"no shots.\n  Give --shots PATH: {FORMATS}.")
    by_name = {port.name: port for port in ports}
    every = some(by_name)
    named: dict[str, Path] = {}
    for source in sources:
        name, equals, path = source.partition("=")
        if name not in by_name or not equals:
            # A path may hold an equals sign, so only what is no path either is a wrong name.
            if equals and not Path(source).exists():
                close = difflib.get_close_matches(name, by_name, 1)
                hint = f" Did you mean '{close[0]}'?" if close else ""
                raise ShotsError(f"'{name}' is no input of the graph.{hint}\n  Inputs: {every}.")
            if len(sources) == 1:
                return [(Path(source), tuple(ports))]
            raise ShotsError(
                f"'{source}' does not say which input it fills, and there are {len(sources)} sources.\n"
                f"  Give --shots NAME=PATH for each input: {every}."
            )
        if name in named:
            raise ShotsError(f"input '{name}' has two sources, '{named[name]}' and '{path}'.\n  Give one.")
        named[name] = Path(path)
    if missing := [name for name in by_name if name not in named]:
        raise ShotsError(f"no shots for input {some(missing)}.\n  Give --shots NAME=PATH for it too.")
    return [(path, (by_name[name],)) for name, path in named.items()]


def list_images(path: Path) -> Listing:
    """List the image files of a folder, of a text file, or the one image that `path` is.

    The class of a file is the sub-folder that it lies in, however deep. Where every sub-folder is called by a
    number, that number is the class; otherwise the class is the sub-folder's place in sorted order.

    Raises
    ------
    ShotsError
        Nothing there, no image among the files, or classes that contradict one another.
    """
    if path.is_dir():
        return _list_folder(path)
    if path.suffix.lower() == ".txt":
        return _list_text(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return Listing((path,), (path.name,))
    raise ShotsError(f"'{path}' is nothing that shots are read from.\n  Give {FORMATS}.")


def load_arrays(path: Path, wanted: Collection[str]) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Return the wanted arrays of an `.npz`, or the one of an `.npy` under the key ''; and the other keys.

    Pickled objects are never loaded: they can run code.

    Raises
    ------
    ShotsError
        The file is damaged, or holds pickled objects under a wanted key.
    """
    if path.stat().st_size == 0:
        raise ShotsError(f"'{path}' has 0 bytes.\n  Write or copy it again.")
    try:
        # Opened here, since numpy leaves a damaged file open.
        with path.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"": loaded}, ()
            arrays = {key: loaded[key] for key in loaded.files if key in wanted}
            return arrays, tuple(key for key in loaded.files if key not in wanted)
    except Exception as error:
        # zipfile, zlib and the header parser each have errors of their own for a damaged file.
        if "pickle" in str(error):
            raise ShotsError(
                f"'{path}' holds pickled Python objects, which are never loaded: they can run code.\n"
                "  Save plain numbers, np.savez(path, images=..., labels=...), none of dtype object."
            ) from error
        raise ShotsError(
            f"'{path}' cannot be read: {error}.\n  It is no array file, or cut short; write or copy it again."
        ) from error


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


def read_labels(path: Path, ids: tuple[str, ...]) -> Array:
    """Return the class of each row from a file of its own.

    Parameters
    ----------
    path : Path
        Text with one integer a line in the order of the rows, or with `name label` lines in any order, where
        a name is a row's id or the last part of it; or an `.npy`, or an `.npz` with the key `labels`.
    ids : tuple of str
        Names of the rows.

    Returns
    -------
    (n,) int64

    Raises
    ------
    ShotsError
        No file, another number of labels, a row without one, or something that is no class number.
    """
    if not path.is_file():
        raise ShotsError(f"no labels at '{path}'.\n  Check the path.")
    if path.suffix.lower() in ARRAY_SUFFIXES:
        arrays, others = load_arrays(path, ("labels",))
        if not arrays:
            raise ShotsError(f"'{path}' has the keys {some(others)}.\n  Save the labels under 'labels'.")
        return check_labels(next(iter(arrays.values())), len(ids), f"'{path}'")
    lines = read_lines(path)
    pairs = [re.fullmatch(r"(?:(.*\S)[\s,]+|)(\d{1,18})", line) for line in lines]
    for number, (line, pair) in enumerate(zip(lines, pairs, strict=True), 1):
        if pair is None or bool(pair[1]) != bool(pairs[0] and pairs[0][1]):
            raise ShotsError(
                f"line {number} of '{path}' is '{line}'.\n"
                "  Every line is a class number, from 0, or every line is a name and a class number."
            )
    found = [(pair[1].rstrip(",") if pair[1] else "", int(pair[2])) for pair in pairs if pair]
    if not found or not found[0][0]:
        return check_labels(np.array([label for _, label in found], np.int64), len(ids), f"'{path}'")
    known = dict(found)
    for name, label in found:
        if known[name] != label:
            raise ShotsError(f"'{path}' labels '{name}' both {label} and {known[name]}.\n  Keep one line.")
    return _match_names(known, ids, path)


def check_labels(labels: Array, count: int, what: str) -> Array:
    """Return labels as int64 `(count,)`; raise `ShotsError` where they are not that many class numbers."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ShotsError(
            f"labels of {what} are {labels.dtype} {labels.shape}; wanted are integers ({count},).\n"
            "  Give one class number a row; for one-hot rows that is labels.argmax(1)."
        )
    if len(labels) != count:
        raise ShotsError(f"{what} has {len(labels)} labels for {count} rows.\n  Give one for each row.")
    classes = labels.astype(np.int64)
    if (classes < 0).any():
        raise ShotsError(f"{what} has the label {labels[classes.argmin()]}.\n  Classes count from 0.")
    return classes


def read_lines(path: Path) -> list[str]:
    """Return the stripped lines of a text file that are not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ShotsError(f"'{path}' is not text in UTF-8.\n  Save it as plain text.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def some(names: Collection[str]) -> str:
    """Return up to five names, quoted, and how many there are beyond."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"'{name}'" for name in names[:5]) + more


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


def _list_folder(folder: Path) -> Listing:
    # A hidden entry is never a shot: .DS_Store, ._cat.png, .ipynb_checkpoints.
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    if not entries:
        raise ShotsError(f"'{folder}' is an empty folder.\n  Put images into it, in a sub-folder for each class.")
    folders = [entry for entry in entries if entry.is_dir()]
    loose, ignored = _sift([entry for entry in entries if not entry.is_dir()])
    inside: list[tuple[Path, int]] = []
    numbers = _class_numbers(folder, [entry.name for entry in folders])
    for entry, number in zip(folders, numbers, strict=True):
        images, others = _sift(_files_below(entry))
        inside += [(image, number) for image in images]
        ignored += others
    if loose and inside:
        raise ShotsError(
            f"'{folder}' holds {len(inside)} images in sub-folders and {len(loose)} beside them, such as "
            f"'{loose[0].name}'.\n  Sub-folders are classes: move every image into one, or all of them out."
        )
    paths = loose or [image for image, _ in inside]
    if not paths:
        raise ShotsError(
            f"'{folder}' holds {len(ignored)} files and no image"
            + (f", such as '{ignored[0].relative_to(folder)}'" if ignored else "")
            + f".\n  Images end in {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    return Listing(
        paths=tuple(paths),
        ids=tuple(image.relative_to(folder).as_posix() for image in paths),
        labels=np.array([number for _, number in inside], np.int64) if inside else None,
        classes=tuple(entry.name for entry in folders) if inside and not _numeric(folders) else None,
        ignored=tuple(other.relative_to(folder).as_posix() for other in ignored),
    )


def _numeric(folders: list[Path]) -> bool:
    return all(entry.name.isascii() and entry.name.isdecimal() for entry in folders)


def _class_numbers(folder: Path, names: list[str]) -> list[int]:
    """Return the class of each sub-folder, empty ones included: an empty class must not shift the others."""
    if not all(name.isascii() and name.isdecimal() for name in names):
        return list(range(len(names)))
    numbers = [int(name) for name in names]
    for number, times in Counter(numbers).items():
        if times > 1:
            twins = [name for name in names if int(name) == number]
            raise ShotsError(f"'{folder}' has {times} sub-folders for class {number}: {some(twins)}.\n  Merge them.")
        if number > np.iinfo(np.int64).max:
            raise ShotsError(f"'{folder}' has a sub-folder '{number}', which is too large for a class number.")
    return numbers


def _files_below(folder: Path) -> list[Path]:
    found = []
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(here) / name for name in sorted(files) if not name.startswith(".")]
    return found


def _sift(files: list[Path]) -> tuple[list[Path], list[Path]]:
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    return images, [file for file in files if file.suffix.lower() not in IMAGE_SUFFIXES]


def _list_text(path: Path) -> Listing:
    paths: list[Path] = []
    ids: list[str] = []
    labels: list[int] = []
    lines = read_lines(path)
    for line in lines:
        name, label = _split_line(line, path.parent)
        paths.append(path.parent / name)
        ids.append(name)
        labels += [] if label is None else [label]
    if not paths:
        raise ShotsError(
            f"'{path}' lists nothing.\n  Write one image path a line, with a class number behind if known."
        )
    if labels and len(labels) != len(paths):
        raise ShotsError(
            f"'{path}' gives a label on {len(labels)} of {len(paths)} lines.\n  Label all of them or none."
        )
    return Listing(tuple(paths), tuple(ids), np.array(labels, np.int64) if labels else None)


def _split_line(line: str, folder: Path) -> tuple[str, int | None]:
    # Names may contain blanks and end in numbers ('shot 12'), so a file of that name wins over a label.
    match = re.fullmatch(r"(.*\S)\s+(\d{1,18})", line)
    if match is None or (folder / line).is_file():
        return line, None
    return match[1], int(match[2])


def _match_names(known: dict[str, int], ids: tuple[str, ...], path: Path) -> Array:
    tails = Counter(PurePosixPath(name).name for name in ids)
    labels = np.empty(len(ids), np.int64)
    missing = []
    for row, name in enumerate(ids):
        tail = PurePosixPath(name).name
        label = known.get(name, known.get(tail) if tails[tail] == 1 else None)
        if label is None:
            missing.append(name)
        else:
            labels[row] = label
    if missing:
        raise ShotsError(
            f"'{path}' has no label for {len(missing)} of {len(ids)} rows: {some(missing)}.\n"
            "  Names are those below the shots folder, or the file names alone where they are unique."
        )
    return labels
