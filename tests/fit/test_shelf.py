"""Values that have no room in memory lie in files, and come back as they were."""

from __future__ import annotations

import errno
import gc
from pathlib import Path

import nets
import numpy as np
import pytest
import torch

from xdonnx.convert import convert
from xdonnx.errors import MachineError
from xdonnx.graph import read_net
from xdonnx.shelf import Kept, Room, Shelf, alike, lengths
from xdonnx.walk import walk


@pytest.fixture(autouse=True)
def spills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that temporary files go to."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


COUNTED = torch.arange(24.0).reshape(2, 3, 4)
TENSORS = {
    "plain": COUNTED,
    "permuted": COUNTED.permute(2, 0, 1),
    "with gaps": COUNTED[:, ::2],
    "expanded": COUNTED[:, :1].expand(2, 3, 4),
    "channels last": torch.arange(144.0).reshape(2, 8, 3, 3).contiguous(memory_format=torch.channels_last),
    "integers": torch.arange(6).reshape(2, 3),
    "truths": COUNTED > 5,
    "half": COUNTED.half(),
    "bfloat16": COUNTED.bfloat16(),
    "empty": torch.zeros(0, 3),
    "a number": torch.tensor(2.5),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_chunk_comes_back_from_its_file_as_it_was(name: str, spills: Path) -> None:
    expected = TENSORS[name]
    with Shelf(-1) as shelf:
        value = Kept([shelf.put(expected.as_strided(expected.size(), expected.stride()), "x", 0)])
        gc.collect()
        assert len(written(spills)) == 1

        found = value[0]

    assert found is not expected and found.dtype == expected.dtype and torch.equal(found, expected)
    if name in ("plain", "permuted", "channels last", "integers", "truths", "half", "bfloat16"):
        assert found.stride() == expected.stride()


def test_strides_of_a_permuted_chunk_are_kept() -> None:
    tensor = torch.rand(4, 3, 2).permute(2, 0, 1)
    strides = tensor.stride()
    with Shelf(0) as shelf:
        value = Kept([shelf.put(tensor, "x", 0)])
        del tensor
        assert value[0].stride() == strides != value[0].contiguous().stride()


def test_what_is_read_last_is_written_first_and_no_more_than_has_to_be(spills: Path) -> None:
    with Shelf(100, {"soon": [3], "late": [1, 9], "dead": [1]}) as shelf:
        shelf.now = 2
        late, soon = shelf.put(torch.zeros(10), "late", 0), shelf.put(torch.zeros(10), "soon", 0)
        assert (shelf.resident, shelf.spilled) == (80, 0)

        more = shelf.put(torch.zeros(10), "soon", 1)

        assert (shelf.resident, shelf.spilled) == (80, 40) and len(written(spills)) == 1
        assert late._tensor is None and soon._tensor is not None and more._tensor is not None


def test_a_value_that_is_freed_takes_its_file_and_its_room_with_it(spills: Path) -> None:
    with Shelf(50) as shelf:
        held, spilled = Kept([shelf.put(torch.zeros(10), "a", 0)]), Kept([shelf.put(torch.zeros(12), "b", 1)])
        assert len(written(spills)) == 1
        del held, spilled
        assert shelf.resident == 0 and not written(spills)


def test_a_chunk_is_one_object_while_anyone_holds_it() -> None:
    with Shelf(0) as shelf:
        value = Kept([shelf.put(torch.zeros(10), "a", 0)])
        assert all(a is b for a, b in zip(value, value, strict=True))


def test_likeness_and_lengths_are_told_without_reading(spills: Path) -> None:
    with Shelf(0) as shelf:
        places = [shelf.put(torch.zeros(rows, 2), "a", at) for at, rows in enumerate((4, 3))]
        one, same, other = Kept(places), Kept(places), Kept([places[0], shelf.put(torch.zeros(3, 2), "b", 1)])
        for path in written(spills):
            path.unlink()
        assert alike(one, same) and not alike(one, other) and lengths(one) == [4, 3]
    assert alike([places], [places]) and not alike([torch.zeros(1)], [torch.zeros(1)])


def test_a_full_disk_is_told_and_leaves_nothing(spills: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("xdonnx.shelf._written", full)
    with Shelf(0) as shelf, pytest.raises(MachineError, match=r"disk is full[^\n]*\n.*TMPDIR"):
        shelf.put(torch.zeros(10), "a", 0)
    assert not written(spills)


@pytest.mark.parametrize("name", ["residual", "concat", "depthwise", "flatten"])
def test_a_walk_without_room_gives_the_same_and_frees_all(name: str, spills: Path) -> None:
    net = read_net(nets.build(name))
    program = convert(net, torch.device("cpu"))
    inputs = nets.samples(nets.build(name), 150)
    seen: dict[str, list[list[np.ndarray]]] = {"all": [], "none": []}

    def through(key: str, room: Room) -> list[np.ndarray]:
        def visit(stop):  # type: ignore[no-untyped-def]
            seen[key].append([torch.cat(list(chunks)).numpy() for chunks in (stop.teacher, stop.student)])
            return stop.weight * 0.9, stop.bias

        made = walk(net, program, inputs, visit, room)
        return [torch.cat(chunks).numpy() for values in made for chunks in values.values()]

    room = Room(0)
    for whole, spilled in zip(through("all", Room()), through("none", room), strict=True):
        np.testing.assert_array_equal(whole, spilled)
    np.testing.assert_equal(seen["all"], seen["none"])
    assert room.spilled > 0 and not written(spills)
