"""Trials on Ray: the same students as anywhere, files that travel, workers that die."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from recipes import GRID, SAMPLES, students, swept, write

from xdonnx.contents import content, read_by
from xdonnx.errors import MachineError
from xdonnx.sweep import cluster
from xdonnx.sweep.description import read_sweep
from xdonnx.sweep.measuring import Done, Task, measure
from xdonnx.sweep.results import SweepResults
from xdonnx.sweep.trials import grid
from xdonnx.wanted import Job

ray = pytest.importorskip("ray", reason="Ray is not installed: python -m pip install ray")
pytestmark = [
    # Ray leaves files and sockets to the end of its processes, and warns of what its next version does.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    """Return the address of a cluster of two nodes on this machine, each with room for one trial."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        made.add_node(num_cpus=1)
        made.wait_for_nodes()
        yield made.address
        ray.shutdown()
        made.shutdown()


def busy_worker() -> int | None:
    """Return the process of a trial under way, which Ray names after what it does."""
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdecimal() and (place / "cmdline").read_bytes().startswith(b"ray::there"):
                return int(place.name)
        except OSError:
            continue
    return None


def test_two_nodes_of_which_a_worker_is_killed_find_what_one_process_finds(
    tiny: tuple[Path, SweepResults], two_nodes: str, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            if pid := busy_worker():
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.02)

    threading.Thread(target=kill, daemon=True).start()
    results = swept(tmp_path, GRID.replace("[0, 1]", "[1]"), run={"backend": "ray", "address": two_nodes})

    assert killed and results.exit_code == 0 and results.taken == 2
    assert students(results).items() <= students(tiny[1]).items()


def test_files_that_a_node_does_not_have_are_sent_to_it_once(
    two_nodes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, hidden = tmp_path / "here", tmp_path / "hidden"
    here.mkdir()
    shutil.copy(SAMPLES / "digits_vgg.onnx", here)
    shutil.copytree(SAMPLES / "shots", here / "shots")
    shutil.copy(SAMPLES / "held_out.npz", here)
    path = write(here, GRID.replace(str(SAMPLES), ".").replace("seeds = [0, 1]", "seeds = [0]"))
    listed = [trial for trial in grid(read_sweep(path), tmp_path / "out") if trial.choices["method"] == "l1-norm"]
    (task,) = [Task(trial.key, trial.job, 1, True) for trial in listed]
    known = {path: content(path) for paths in read_by(task.job).values() for path in paths}
    expected, packed, pack = measure(task, tmp_path), [], cluster.pack

    def seen_from_here_only(path: Path) -> bytes:
        hidden.rename(here)
        try:
            packed.append(path)
            return pack(path)
        finally:
            here.rename(hidden)

    monkeypatch.setattr(cluster, "pack", seen_from_here_only)
    here.rename(hidden)
    try:
        with cluster.cluster(2, 1, 0.0, two_nodes) as perform:
            (first,) = perform([task], lambda task: None)
            (second,) = perform([task], lambda task: None)
    finally:
        for name in known.values():
            shutil.rmtree(cluster._store() / name, ignore_errors=True)

    assert sorted(packed) == sorted(known) and len(known) == 3
    for done in (first, second):
        assert done.files.keys() == {"report.json", "student.rejected.onnx"}
        assert done.record["student"]["sha256"] == expected.record["student"]["sha256"]
        told = json.loads(done.files["report.json"])
        assert told["files"]["teacher"]["path"] == str(here / "digits_vgg.onnx") == str(task.job.model)
        assert told["job"]["holdout"] == str(here / "held_out.npz")
        assert "xdonnx-sweep" not in done.files["report.json"].decode()


def test_a_list_of_images_cannot_be_sent_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("".join(f"{image}\n" for image in sorted((SAMPLES / "shots").glob("*/00.png"))))
    with pytest.raises(MachineError, match=r"lists images.*\n  Give a folder or an .npz"):
        cluster.pack(path)


def test_what_is_packed_is_what_is_unpacked_with_the_weights_beside_a_model(tmp_path: Path) -> None:
    model = onnx.load(SAMPLES / "digits_vgg.onnx")
    path = tmp_path / "external.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    store = tmp_path / "store"
    store.mkdir()

    cluster.unpack(cluster.pack(path), store / "a")
    cluster.unpack(cluster.pack(SAMPLES / "shots"), store / "b")

    assert content(store / "a" / "external.onnx") == content(path)
    assert (store / "a" / "weights.bin").stat().st_size > 100_000
    assert content(store / "b" / "shots") == content(SAMPLES / "shots")
    assert [place.name for place in store.iterdir() if place.name.startswith(".")] == []


def test_a_node_with_another_xdonnx_is_named(tmp_path: Path) -> None:
    task = Task("k", Job(model=tmp_path / "m.onnx", out=tmp_path / "o.onnx"))
    done = cluster.there(task, "99.0", {}, {})
    assert isinstance(done, Done) and done.record["exit_code"] == 8 and not done.record["final"]
    assert "this is 99.0" in done.record["error"]


def test_a_trial_that_no_node_has_room_for_is_refused_at_once(two_nodes: str) -> None:
    says = r"no node has room for a trial of 3 CPUs and 0 GPUs.\n  Of 2 the largest has 1 CPUs"
    with pytest.raises(MachineError, match=says), cluster.cluster(None, 3, 0.0, two_nodes):
        pytest.fail("it began")


def test_a_cluster_that_is_not_there_is_an_error_of_the_environment() -> None:
    says = r"no Ray cluster at '127.0.0.1:1': .*refused\."
    with pytest.raises(MachineError, match=says), cluster.cluster(None, 1, 0.0, "127.0.0.1:1"):
        pytest.fail("it began")
