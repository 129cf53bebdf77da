"""What lies where shots are read from: image files, arrays, labels; nothing is decoded here."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xdonnx.errors import ShotsError
from xdonnx.files import unfetched

if TYPE_CHECKING:
    # For the annotations only: reading shots must not cost the import of onnx.
    from xdonnx.model import Port

Array = NDArray[Any]

_IMAGES = ("bmp", "gif", "jpeg", "jpg", "pbm", "pgm", "png", "ppm", "tif", "tiff", "webp")
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
    empty : tuple of str
        Empty sub-folders that are counted as classes, and so decide the number of a class that has images.
    """

    paths: tuple[Path, ...]
    ids: tuple[str, ...]
    labels: Array | None = None
    classes: tuple[str, ...] | None = None
    ignored: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()


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


def list_images(path: Path, *, numbered: bool = True) -> Listing:
    """List the image files of a folder, of a text file, or the one image that `path` is.

    The class of a file is the sub-folder that it lies in, however deep. Where those that hold images are called by
    numbers, these are the classes; otherwise the class is the sub-folder's place in sorted order. One that holds
    other files alone is no class; an empty one is, among words.

    Parameters
    ----------
    path : Path
    numbered : bool
        Whether sub-folders are classes at all; not where labels come from elsewhere.

    Raises
    ------
    ShotsError
        Nothing there, no image among the files, or classes that contradict one another.
    """
    if path.is_dir():
        return _list_folder(path, numbered=numbered)
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
    if pointer := unfetched(path):
        raise ShotsError(pointer)
    try:
        # Opened here, since numpy leaves a damaged file open.
        with path.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"": loaded}, ()
            arrays = {key: loaded[key] for key in loaded.files if key in wanted}
            return arrays, tuple(key for key in loaded.files if key not in wanted)
    except PermissionError as error:
        raise ShotsError(f"'{path}' cannot be read: {error.strerror}.\n  Look at its permissions.") from error
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


def like_pixels(array: Array) -> bool:
    """Return whether floating values look like pixels that nobody has scaled: whole numbers of images, 0 to 255."""
    if array.ndim not in (3, 4) or array.dtype.kind != "f" or not array.size:
        return False
    some_rows = array[:8]
    return bool(some_rows.min() >= 0 and 64 < some_rows.max() <= 255 and not (some_rows % 1).any())


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


def _list_folder(folder: Path, *, numbered: bool) -> Listing:
    entries = sorted(entry for entry in folder.iterdir() if not _hidden(entry.name))
    if not entries:
        raise ShotsError(f"'{folder}' is an empty folder.\n  Put images into it, in a sub-folder for each class.")
    loose, ignored = _sift([entry for entry in entries if not entry.is_dir()])
    inside: dict[str, list[Path]] = {}
    for entry in entries:
        if entry.is_dir():
            inside[entry.name], others = _sift(_files_below(entry))
            ignored += others
            if others and not inside[entry.name]:
                # What holds files and no image is no class, and must not take the place of one.
                del inside[entry.name]
    filed = [image for images in inside.values() for image in images]
    if loose and filed and numbered:
        raise ShotsError(
            f"'{folder}' holds {len(filed)} images in sub-folders and {len(loose)} beside them, such as "
            f"'{loose[0].name}'.\n  Sub-folders are classes: move every image into one, or all of them out."
        )
    paths = [*loose, *filed]
    if not paths:
        raise ShotsError(
            f"'{folder}' holds {len(ignored)} files and no image"
            + (f", such as '{ignored[0].relative_to(folder)}'" if ignored else "")
            + f".\n  Images end in {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    found = Listing(
        paths=tuple(paths),
        ids=tuple(image.relative_to(folder).as_posix() for image in paths),
        ignored=tuple(other.relative_to(folder).as_posix() for other in ignored),
    )
    if not filed or not numbered:
        return found
    numbers = _class_numbers(folder, {name: len(images) for name, images in inside.items()})
    last = max(numbers[name] for name, images in inside.items() if images)
    return replace(
        found,
        labels=np.array([numbers[name] for name, images in inside.items() for _ in images], np.int64),
        classes=None if all(map(_numeric, numbers)) else tuple(numbers),
        empty=tuple(name for name, number in numbers.items() if not inside[name] and number < last),
    )


def _hidden(name: str) -> bool:
    # Never a shot: .DS_Store, ._cat.png, .ipynb_checkpoints, and what archives and servers leave.
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN")


def _numeric(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _class_numbers(folder: Path, images: Mapping[str, int]) -> dict[str, int]:
    """Return {sub-folder: class} from {sub-folder: its images}; an empty one keeps its place among words."""
    named = [name for name, count in images.items() if count]
    digits = [name for name in named if _numeric(name)]
    if not digits:
        return {name: place for place, name in enumerate(images)}
    if words := [name for name in named if name not in digits]:
        raise ShotsError(
            f"'{folder}' has images in sub-folders called by numbers, {some(digits)}, and by words, {some(words)}.\n"
            "  Classes are either the numbers or the places of the words: move out what is no class, or pass --labels."
        )
    for number, times in Counter(map(int, digits)).items():
        if times > 1:
            twins = [name for name in digits if int(name) == number]
            raise ShotsError(f"'{folder}' has {times} sub-folders for class {number}: {some(twins)}.\n  Merge them.")
        if number > np.iinfo(np.int64).max:
            raise ShotsError(f"'{folder}' has a sub-folder '{number}', which is too large for a class number.")
    return {name: int(name) for name in digits}


def _files_below(folder: Path) -> list[Path]:
    found = []
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _hidden(name))
        found += [Path(here) / name for name in sorted(files) if not _hidden(name)]
    return found


def _sift(files: list[Path]) -> tuple[list[Path], list[Path]]:
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    return images, [file for file in files if file.suffix.lower() not in IMAGE_SUFFIXES]


def _list_text(path: Path) -> Listing:
    paths: list[Path] = []
    ids: list[str] = []
    labels: list[int] = []
    lines = read_lines(path)
    if lines and all(line.isdecimal() and not (path.parent / line).is_file() for line in lines):
        raise ShotsError(f"'{path}' lists numbers, not images.\n  Are these labels? Pass --labels '{path}'.")
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
