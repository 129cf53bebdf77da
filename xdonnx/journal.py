"""What a job has done so far, kept beside OUT so that a job which was stopped can go on: `--resume`.

Every finished piece of work - the plan, a layer, a method - is a file of its own, written whole or not at all. A job
that goes on walks the network again, which is cheap, and takes from here what was dear.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from xdonnx.errors import JobError
from xdonnx.events import Event, Log, ignore
from xdonnx.files import put

IDENTITY = "job.json"
_FACTS = "facts"
# By which a folder is known as ours, and the names of all that we write into it.
_MARK = "what xdonnx compress --resume goes on with"
_OURS = re.compile(r"[0-9a-f]{32}\.npz|\.[0-9a-f]{32}\.\d+\.npz|\.job\.json\.\d+")


@dataclass(frozen=True)
class Entry:
    """A finished piece of work.

    Parameters
    ----------
    arrays : {name: array}
    facts : dict
        What JSON can hold.
    """

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Journal:
    """The folder of one job.

    Parameters
    ----------
    folder : Path
    identity : dict
        What the job rests on, as JSON can hold it: work of another job is never taken.
    prefix : str
        Of all keys.
    log : callable
        Told where nothing can be written: the job goes on without.
    resumed : bool
        Whether there was something to go on with.

    Notes
    -----
    Made by :func:`open_journal`. The folder is made with the first entry.
    """

    folder: Path
    identity: Mapping[str, Any]
    prefix: str = ""
    log: Log = ignore
    resumed: bool = False

    def under(self, prefix: str) -> Journal:
        """Return the same journal for a part of the job."""
        return replace(self, prefix=f"{self.prefix}{prefix}/")

    def entry(self, key: str) -> Entry | None:
        """Return a finished piece of work, None where it is not there or not whole."""
        try:
            with self._path(key).open("rb") as file, np.load(file, allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
            facts = json.loads(str(arrays.pop(_FACTS)))
            return Entry({name: arrays[str(at)] for at, name in enumerate(facts["names"])}, facts["facts"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None

    def keep(self, key: str, entry: Entry) -> None:
        """Write a finished piece of work."""
        path = self._path(key)
        draft = path.with_name(f".{path.stem}.{os.getpid()}.npz")
        try:
            if not (self.folder / IDENTITY).exists():
                self.folder.mkdir(exist_ok=True)
                put(self.folder / IDENTITY, json.dumps({"is": _MARK, "of": dict(self.identity)}, indent=2))
            arrays = {str(at): array for at, array in enumerate(entry.arrays.values())}
            facts = json.dumps({"names": list(entry.arrays), "facts": dict(entry.facts)})
            np.savez(draft, **{_FACTS: np.array(facts)}, **arrays)  # type: ignore[arg-type]
            os.replace(draft, path)
        except OSError as error:
            draft.unlink(missing_ok=True)
            text = f"--resume will not find all of this job: cannot write into '{self.folder}': {error.strerror}."
            self.log(Event("fit", text, level="warning"))

    def close(self) -> None:
        """Remove what was kept, and the folder where nothing else is in it."""
        if (self.folder / IDENTITY).exists():
            _cleared(self.folder)

    def _path(self, key: str) -> Path:
        # Names of values may hold anything; digests are names of files everywhere. With the job's own in it no other
        # job's work can be taken for this one's, whatever lies in the folder.
        whole = json.dumps([dict(self.identity), self.prefix, key], sort_keys=True)
        return self.folder / f"{hashlib.sha256(whole.encode()).hexdigest()[:32]}.npz"


def open_journal(folder: Path, identity: Mapping[str, Any], log: Log = ignore, *, resume: bool) -> Journal:
    """Open the journal of a job; without `resume` what an earlier job left is removed.

    Raises
    ------
    JobError
        The folder is something else, or holds the work of another job.
    """
    known = json.loads(json.dumps(dict(identity)))
    found = _identity(folder)
    if found is None and folder.is_dir() and all(_OURS.fullmatch(path.name) for path in folder.iterdir()):
        _cleared(folder)  # what a removal left that was cut short
    elif found is None and (folder.exists() or folder.is_symlink()):
        raise JobError(f"'{folder}' is in the way: what --resume needs is kept there.\n  Move it, or name another OUT.")
    if found is not None and not resume:
        _cleared(folder)
    elif resume:
        if found is None:
            log(Event("read", "--resume: there is nothing to go on with; the job starts anew.", level="warning"))
        elif differing := sorted(key for key in {*known, *found} if known.get(key) != found.get(key)):
            verb = "differs" if len(differing) == 1 else "differ"
            raise JobError(
                f"'{folder}' holds the work of another job: {', '.join(differing)} {verb}.\n"
                "  Repeat that job's command, or leave --resume out to start anew."
            )
    return Journal(folder, known, log=log, resumed=resume and found is not None)


def _identity(folder: Path) -> dict[str, Any] | None:
    """Return the identity of the job that a folder is of, None where it is not one of ours."""
    try:
        found = json.loads((folder / IDENTITY).read_text())
    except (OSError, ValueError):
        return None
    ours = isinstance(found, dict) and found.get("is") == _MARK and isinstance(found.get("of"), dict)
    return found["of"] if ours else None


def _cleared(folder: Path) -> None:
    """Remove our own files, the one that says whose they are last, and the folder if that was all."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name):
                path.unlink(missing_ok=True)
        (folder / IDENTITY).unlink(missing_ok=True)
        folder.rmdir()
