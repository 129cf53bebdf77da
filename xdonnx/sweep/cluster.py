"""Trials on a Ray cluster, or on one that is started for them on this machine.

The nodes need xdonnx and what it needs, and no disk in common: files that a node does not have, to the byte, at the
same path are sent to it once, and kept below its temporary folder. What comes of a trial comes back through Ray, so
that only the process that asked writes results.
"""

from __future__ import annotations

import functools
import io
import os
import shutil
import socket
import tempfile
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xdonnx.contents import files_of, read_by, remembered
from xdonnx.errors import MachineError
from xdonnx.report import tool
from xdonnx.sweep.local import DEATHS, lost
from xdonnx.sweep.measuring import Done, Perform, Task, failure, measure


@dataclass(frozen=True)
class Missing:
    """What a node lacks for a task: hashes of files and folders."""

    contents: frozenset[str]


@contextmanager
def cluster(jobs: int | None, cpus: int, gpus: float, address: str | None) -> Iterator[Perform]:
    """Yield what does tasks on a Ray cluster.

    Parameters
    ----------
    jobs : int or None
        How many at a time, at most; None: as many as there is room for.
    cpus : int
        What Ray keeps free for each.
    gpus : float
        The same of GPUs.
    address : str or None
        'auto' or HOST:PORT of a cluster; None starts one here, which ends with the context.

    Raises
    ------
    MachineError
        Ray is not installed, there is no such cluster, or none of its nodes is large enough.
    """
    ray = _ray()
    with _connected(ray, jobs, cpus, gpus, address):
        _check_room(ray, cpus, gpus)
        # What a task lost with its worker is counted here: Ray's own count knows no end where memory is short.
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(there)
        yield functools.partial(_perform, ray, remote, jobs or 1 << 20)


def there(task: Task, version: str, contents: Mapping[Path, str], packed: Mapping[str, Any]) -> Done | Missing:
    """Do a task on the node where this runs.

    Parameters
    ----------
    task : Task
    version : str
        Of the xdonnx that asks.
    contents : mapping
        Hashes of what the job reads, by the paths that it has where it was asked for.
    packed : mapping
        Where that can be had, by hash: lists of one reference each, which Ray does not follow before it is asked to.

    Returns
    -------
    Done or Missing
    """
    ours = tool().version
    if ours != version:
        text = f"node '{os.uname().nodename}' has xdonnx {ours}, and this is {version}.\n  Install the same everywhere."
        return failure(task, text)
    moved = {path: found for path, known in contents.items() if (found := located(path, known, packed)) != path}
    lacking = frozenset(contents[path] for path, found in moved.items() if found is None)
    if lacking:
        return Missing(lacking)
    if task.job.device.startswith("cuda"):
        # Ray shows a task its own GPUs only, counted from 0.
        task = Task(task.key, task.job.model_copy(update={"device": "cuda:0"}), task.threads, task.student)
    return measure(task, _scratch(), {path: found for path, found in moved.items() if found is not None})


def located(path: Path, known: str, packed: Mapping[str, Any]) -> Path | None:
    """Return where this node has a file or folder, unpacked if need be; None where it has to be sent."""
    if path.exists() and remembered(path) == known:
        return path
    home = _store() / known
    if not home.is_dir():
        if known not in packed:
            return None
        import ray

        unpack(ray.get(packed[known][0]), home)
    return home / path.name


def pack(path: Path) -> bytes:
    """Return a file with what belongs to it, or a folder, as an archive; raises MachineError for a list of images."""
    files = files_of(path)
    if path.is_file() and any(Path(name).is_absolute() for name in files):
        raise MachineError(
            f"'{path}' lists images, and a node of the cluster does not have them.\n"
            "  Give a folder or an .npz, which can be sent, or keep the images on a disk that the nodes share."
        )
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as stream:
        for name, file in files.items():
            stream.write(file, f"{path.name}/{name}" if path.is_dir() else name)
    return archive.getvalue()


def unpack(archive: bytes, home: Path) -> None:
    """Unpack an archive whole or not at all; another worker of the node may be at it too."""
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".unpack-") as draft:
        inner = Path(draft) / "content"
        with zipfile.ZipFile(io.BytesIO(archive)) as stream:
            stream.extractall(inner)
        try:
            inner.rename(home)
        except OSError:
            if not home.is_dir():
                raise


def _store() -> Path:
    """Return where this node keeps what it was sent, a folder that nobody else can write to."""
    user = os.getuid()
    store = Path(tempfile.gettempdir()) / f"xdonnx-sweep-{user}"
    store.mkdir(mode=0o700, exist_ok=True)
    if store.stat().st_uid != user or store.is_symlink():
        raise MachineError(f"'{store}' belongs to somebody else.\n  Set TMPDIR on the node to another folder.")
    return store


def _scratch() -> Path:
    """Return where this process puts temporary files, and delete what processes left that were killed."""
    mine = _store() / f"work-{os.getpid()}"
    mine.mkdir(exist_ok=True)
    for other in mine.parent.glob("work-*"):
        try:
            os.kill(int(other.name.removeprefix("work-")), 0)
        except ProcessLookupError:
            shutil.rmtree(other, ignore_errors=True)
    return mine


def _perform(ray: Any, remote: Any, most: int, tasks: Sequence[Task], begin: Callable[[Task], None]) -> Iterator[Done]:
    """Do tasks, at most so many at a time, and yield what comes of each."""
    waiting, deaths, version = deque(tasks), Counter[str](), tool().version
    busy: dict[Any, Task] = {}
    packed: dict[str, list[Any]] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < most:
                task = waiting.popleft()
                paths = {path: remembered(path) for its in read_by(task.job).values() for path in its}
                mine = {known: packed[known] for known in paths.values() if known in packed}
                busy[remote.remote(task, version, paths, mine)] = task
                begin(task)
            (ready, *_), _ = ray.wait(list(busy), num_returns=1)
            task = busy.pop(ready)
            try:
                found = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                # The trial itself raises nothing: the node could not even begin.
                yield failure(task, f"a node of the cluster cannot do it: {_last(error)}\n  Is xdonnx installed there?")
            except ray.exceptions.RayError as error:
                deaths[task.key] += 1
                if deaths[task.key] < DEATHS:
                    waiting.appendleft(task)
                else:
                    yield lost(task, _last(error))
            else:
                if isinstance(found, Missing):
                    _send(ray, task, found, packed)
                    waiting.appendleft(task)
                else:
                    yield found
    finally:
        for reference in busy:
            ray.cancel(reference, force=True)


def _send(ray: Any, task: Task, missing: Missing, packed: dict[str, list[Any]]) -> None:
    """Put what a node lacks where all of them can have it."""
    for paths in read_by(task.job).values():
        for path in paths:
            if remembered(path) in missing.contents and remembered(path) not in packed:
                packed[remembered(path)] = [ray.put(pack(path))]


def _last(error: Exception) -> str:
    """Return the last line of an error, where Ray says what it was."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(error).__name__


def _ray() -> Any:
    """Import Ray."""
    # Nothing is sent anywhere, unless somebody asked for it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MachineError(
            "the backend ray needs Ray.\n"
            "  Install it: python -m pip install 'ray>=2.9'   (it is the extra `ray` of xdonnx)"
        ) from error
    return ray


@contextmanager
def _connected(ray: Any, jobs: int | None, cpus: int, gpus: float, address: str | None) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address:
            _check_door(address)
            ray.init(address=address, **quiet)
        else:
            ray.init(num_cpus=jobs and jobs * cpus, include_dashboard=False, **quiet)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        where = f"no Ray cluster at '{address}'" if address else "Ray does not start here"
        raise MachineError(
            f"{where}: {_last(error)}.\n  Start one with ray start --head, or use --backend processes."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_door(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _check_room(ray: Any, cpus: int, gpus: float) -> None:
    """Raise MachineError where no node could ever take a trial: Ray would wait for one without end."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        largest = max((node.get("CPU", 0) for node in nodes), default=0)
        most = max((node.get("GPU", 0) for node in nodes), default=0)
        raise MachineError(
            f"no node has room for a trial of {cpus} CPUs and {gpus:g} GPUs.\n"
            f"  Of {len(nodes)} the largest has {largest:g} CPUs, the most GPUs {most:g}: set cpus or gpus under [run]."
        )
