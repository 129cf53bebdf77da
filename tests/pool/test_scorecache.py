"""What is kept between jobs: whole whatever happens, and never more than a convenience."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xdonnx.scorecache import folder, load, place, save


def entries(first: int, count: int, width: int = 3) -> dict[bytes, np.ndarray]:
    return {bytes([at % 256] * 32): np.full(width, float(at)) for at in range(first, first + count)}


def test_what_was_kept_is_found_again_beside_what_was_there(cache: Path) -> None:
    path = place(["teacher", "1"])

    assert path.parent == cache and load(path, 3) == {}
    assert save(path, entries(0, 5), 3) and save(path, entries(3, 4), 3)

    found = load(path, 3)
    assert {digest: row.tolist() for digest, row in found.items()} == {
        digest: row.tolist() for digest, row in entries(0, 7).items()
    }
    assert [file.name for file in cache.iterdir()] == [path.name]


def test_another_teacher_or_definition_has_a_file_of_its_own() -> None:
    names = {place(parts) for parts in (["a", "1"], ["a", "2"], ["b", "1"], ["a1", ""])}

    assert len(names) == 4


def test_a_damaged_file_is_as_good_as_none(cache: Path) -> None:
    path = place(["teacher"])
    for content in (b"", b"no archive", b"PK\x03\x04 cut short"):
        path.write_bytes(content)
        assert load(path, 3) == {}
    assert save(path, entries(0, 2), 3) and len(load(path, 3)) == 2
    # Numbers of another width are of another definition.
    assert load(path, 4) == {}


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    assert not save(tmp_path / "file" / "pool.npz", entries(0, 1), 3)


def test_only_the_newest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xdonnx.scorecache.MOST", 4)
    path = place(["teacher"])
    save(path, entries(0, 3), 3)
    save(path, entries(3, 3), 3)

    assert sorted(float(row[0]) for row in load(path, 3).values()) == [2, 3, 4, 5]


def test_the_folder_is_the_users_own_where_nothing_names_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDONNX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder() == tmp_path / "xdonnx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert folder() == tmp_path / "home" / ".cache" / "xdonnx"


_WRITER = """
import sys
from pathlib import Path
import numpy as np
from xdonnx.scorecache import load, save
first, path = int(sys.argv[1]), Path(sys.argv[2])
for at in range(first, first + 40):
    assert save(path, {bytes([at] * 32): np.full(3, float(at))}, 3)
    assert bytes([at] * 32) in load(path, 3) or load(path, 3)
"""


def test_two_jobs_may_write_at_once() -> None:
    path = place(["teacher"])
    jobs = [subprocess.Popen([sys.executable, "-c", _WRITER, str(first), str(path)]) for first in (0, 100)]
    seen = 0
    while any(job.poll() is None for job in jobs):
        # Never half a file: once there is something, there always is.
        found = len(load(path, 3))
        assert found >= min(seen, 1)
        seen = max(seen, found)

    assert [job.returncode for job in jobs] == [0, 0]
    found = load(path, 3)
    assert found and all((row == float(digest[0])).all() for digest, row in found.items())
    assert [file.name for file in path.parent.iterdir()] == [path.name]
