"""Every mistake has its exit code and one readable message, and leaves no file behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from program import SAMPLES, SHOTS, TEACHER, call, listing

Arguments = Sequence[str]
OUT = ["-o", "student.onnx"]


def teacher(*more: str) -> Callable[[Path], Arguments]:
    """Return a job on a good teacher and good shots, with something wrong added."""
    return lambda here: [TEACHER, *SHOTS, *more, *([] if "-o" in more else OUT)]


def not_onnx(here: Path) -> Arguments:
    (here / "model.onnx").write_text("this is a letter to my aunt")
    return ["model.onnx", *SHOTS, *OUT]


def truncated(here: Path) -> Arguments:
    whole = Path(TEACHER).read_bytes()
    (here / "model.onnx").write_bytes(whole[: len(whole) // 2])
    return ["model.onnx", *SHOTS, *OUT]


def external_data_missing(here: Path) -> Arguments:
    model = onnx.load(TEACHER)
    onnx.save(model, here / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    (here / "weights.bin").unlink()
    return ["model.onnx", *SHOTS, *OUT]


def no_convolution(here: Path) -> Arguments:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[N,1,16,16] x) => (float[N,1,16,16] y) { y = Relu (x) }'
    onnx.save(onnx.parser.parse_model(text), here / "model.onnx")
    return ["model.onnx", *SHOTS, *OUT]


def rank_that_no_image_fills(here: Path) -> Arguments:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[N,128] x) => (float[N,128] y) { y = Relu (x) }'
    onnx.save(onnx.parser.parse_model(text), here / "model.onnx")
    return ["model.onnx", *SHOTS, *OUT]


def empty_folder(here: Path) -> Arguments:
    (here / "shots").mkdir()
    return [TEACHER, "--shots", "shots", *OUT]


def one_bad_image(here: Path) -> Arguments:
    shutil.copytree(SAMPLES / "shots" / "1", here / "shots")
    (here / "shots" / "broken.png").write_bytes(b"\x89PNG and no more")
    return [TEACHER, "--shots", "shots", *OUT]


def arrays(**named: np.ndarray) -> Callable[[Path], Arguments]:
    def write(here: Path) -> Arguments:
        np.savez(here / "shots.npz", **named)
        return [TEACHER, "--shots", "shots.npz", *OUT]

    return write


def pickled(here: Path) -> Arguments:
    np.savez(here / "shots.npz", images=np.array([{"a": 1}], dtype=object))
    return [TEACHER, "--shots", "shots.npz", *OUT]


def one_shot(here: Path) -> Arguments:
    shutil.copy(SAMPLES / "shots" / "1" / "00.png", here / "one.png")
    return [TEACHER, "--shots", "one.png", *OUT]


def out_is_model(here: Path) -> Arguments:
    shutil.copy(TEACHER, here / "model.onnx")
    return ["model.onnx", *SHOTS, "-o", "model.onnx", "--force"]


def out_exists(here: Path) -> Arguments:
    (here / "student.onnx").write_text("mine")
    return [TEACHER, *SHOTS, *OUT]


def fixed_batch(here: Path) -> Arguments:
    model = onnx.load(TEACHER)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 32
    onnx.save(model, here / "model.onnx")
    return ["model.onnx", *SHOTS, *OUT]


def report_is_a_file(here: Path) -> Arguments:
    (here / "notes").write_text("mine")
    return [TEACHER, *SHOTS, *OUT, "--report-dir", "notes"]


def labels_for_samples(here: Path) -> Arguments:
    (here / "labels.txt").write_text("0\n1\n2\n")
    return [TEACHER, "--shots", "labels.txt", *OUT]


def torch_file(here: Path) -> Arguments:
    (here / "model.pt").write_bytes(b"PK\x03\x04" + bytes(50))
    return ["model.pt", *SHOTS, *OUT]


RANDOM = np.random.default_rng(0).random((10, 1, 16, 16)).astype(np.float32)
HOLES = np.where(RANDOM > 0.5, RANDOM, np.float32(np.nan))

MISTAKES: list[tuple[str, Callable[[Path], Arguments], int, str]] = [
    ("no model", lambda here: ["none.onnx", *SHOTS, *OUT], 4, "no model at 'none.onnx'"),
    ("not ONNX", not_onnx, 4, "'model.onnx' is not an ONNX file"),
    ("truncated", truncated, 4, "'model.onnx'"),
    ("external data missing", external_data_missing, 4, "Copy 'weights.bin'"),
    ("no convolution", no_convolution, 4, "no convolution"),
    ("rank", rank_that_no_image_fills, 5, "images cannot fill"),
    ("no shots at all", lambda here: [TEACHER, *OUT], 5, "Pass --shots PATH"),
    ("shots that are not there", lambda here: [TEACHER, "--shots", "none", *OUT], 5, "no shots at 'none'"),
    ("empty folder", empty_folder, 5, "'shots' is an empty folder"),
    ("one bad image", one_bad_image, 5, "broken.png"),
    ("wrong keys", arrays(pictures=RANDOM), 5, "'pictures'"),
    ("not finite", arrays(images=HOLES), 5, "not finite"),
    ("wrong size", arrays(images=RANDOM[:, :, :8]), 5, "(N, 1, 16, 16)"),
    ("pickled", pickled, 5, "pickled"),
    ("one shot", one_shot, 5, "fewer shots than the hold-out needs"),
    ("too few for the batch", fixed_batch, 5, "32 samples at once, and 20 judge"),
    ("too few of a class", teacher("--per-class", "11"), 5, "--per-class asks for 11"),
    ("keep nothing", teacher("--keep", "0"), 2, "--keep is 0"),
    ("keep more than all", teacher("--keep", "1.5"), 2, "per cent with its sign"),
    ("50 without per cent", teacher("--macs", "50"), 2, "50%"),
    ("no number", teacher("--macs", "half"), 2, "'half' is no number"),
    ("two targets", teacher("--macs", "50%", "--params", "50%"), 2, "Give one target"),
    ("no out", lambda here: [TEACHER, *SHOTS], 2, "--out"),
    ("no such flag", teacher("--shot", "x"), 2, "--shots"),
    ("out in no folder", teacher("-o", "none/student.onnx"), 2, "mkdir -p 'none'"),
    ("out is a folder", teacher("-o", "."), 2, "is a folder"),
    ("out is the model", out_is_model, 2, "OUT is MODEL"),
    ("out exists", out_exists, 2, "--force"),
    ("report is a file", report_is_a_file, 2, "--report-dir"),
    ("json in no folder", teacher("--json", "none/run.json"), 2, "--json"),
    ("include nothing", teacher("--include", "layer9*"), 2, "--include 'layer9*' matches no layer"),
    ("exclude nothing", teacher("--exclude", "logit"), 2, "'logits'"),
    ("method", teacher("--method", "cros"), 2, "Did you mean 'cross'?"),
    ("solver", teacher("--solver", "greed"), 2, "Did you mean 'greedy'?"),
    ("connection", teacher("--connection", "sofd"), 2, "Did you mean 'soft'?"),
    ("structure", teacher("--structure", "chanel"), 2, "Did you mean 'channel'?"),
    ("effort", teacher("--preset-effort", "fastt"), 2, "Did you mean 'fast'?"),
    ("preset", teacher("--preset", "imagnet"), 2, "Did you mean 'imagenet'?"),
    ("external data", teacher("--external-data", "alway"), 2, "Did you mean 'always'?"),
    ("greedy over weights", teacher("--solver", "greedy", "--structure", "element", "--keep", "0.5"), 2, "greedy"),
    ("mu of another connection", teacher("--mu", "0.9"), 2, "--connection cross"),
    ("option of no method", teacher("--method", "l1-norm", "--ridge", "0.1"), 2, "--ridge is no option"),
    ("removal behind removal", teacher("--method", "cross", "--method", "l1-norm"), 2, "behind cross it would undo"),
    ("layers behind training", teacher("--method", "l1-norm", "--method", "bp", "--method", "fskd"), 2, "behind bp it"),
    ("adversary of another", teacher("--no-adversarial"), 2, "add --method squeeze"),
    ("MACs of single weights", teacher("--structure", "element", "--macs", "50%"), 2, "--macs does not go"),
    ("mean that is no list", teacher("--mean", "0.5;0.5"), 2, "--mean"),
    ("shape that is none", teacher("--input-shape", "image=1x3"), 2, "image:1x3x224x224"),
    ("shape of no input", teacher("--input-shape", "picture:1x1x16x16"), 2, "no input 'picture'"),
    ("shape that is fixed", teacher("--input-shape", "image:1x1x32x32"), 2, "not what the graph takes"),
    ("shots and noise", teacher("--synthetic-shots", "5"), 2, "--synthetic-shots"),
    ("gate of no name", teacher("--warn-only", "max-dorp"), 2, "max_drop"),
    ("device that is absent", teacher("--device", "cuda:9"), 8, "cuda:9"),
    ("device of no kind", teacher("--device", "gpu"), 2, "cuda:0"),
    ("seed of no generator", teacher("--seed", str(2**64)), 2, f"--seed is {2**64}.\n  It is a whole number from 0"),
    ("out of reach", teacher("--macs", "0.1%"), 7, "out of reach"),
    ("out of hardly any reach", teacher("--macs", "0.01%"), 7, "--macs 0.01% is out of reach"),
    ("out of another kind", teacher("-o", "student.pt"), 2, "-o student.onnx"),
    ("preset far from all", teacher("--preset", "mnist"), 2, "unknown --preset 'mnist'.\n"),
    ("samples without their flag", lambda here: [TEACHER, "shots", *OUT], 2, "Samples go behind --shots."),
    ("labels for samples", labels_for_samples, 5, "Pass --labels 'labels.txt'"),
    ("PyTorch", torch_file, 4, "torch.onnx.export"),
    ("a folder as the model", lambda here: [str(SAMPLES), *SHOTS, *OUT], 4, "is a folder"),
    ("nothing asked", teacher("--keep", "0.99", "--include", "/gate/gate.1/*"), 7, "every layer would keep"),
    ("patterns that leave nothing", teacher("--include", "/gate/gate.3/*"), 7, "Widen --include"),
]


@pytest.mark.parametrize(("prepare", "code", "says"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_has_its_exit_code_and_one_message_and_leaves_nothing(
    here: Path, prepare: Callable[[Path], Arguments], code: int, says: str
) -> None:
    arguments = prepare(here)
    before = listing(here)

    ended = call("compress", *arguments)

    assert (ended.code, ended.out) == (code, ""), ended.err
    assert ended.err.startswith("error: ") and ended.err.count("error: ") == 1 and says in ended.err
    assert "Traceback" not in ended.err and len(ended.err.splitlines()) <= 4
    assert listing(here) == before


@pytest.mark.parametrize("text", ["[]", "no JSON", '{"schema_version": "1.0", "status": "fine"}'])
def test_a_file_that_is_no_report_is_told_which_one_is(here: Path, text: str) -> None:
    (here / "other.json").write_text(text)

    ended = call("gate", "other.json", "--max-drop", "1", width=200)

    assert ended.code == 2 and "Name the folder or the report.json" in ended.err.splitlines()[1]


def test_a_file_that_may_not_be_read_is_told_from_a_damaged_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "held.npz").write_bytes(b"1")
    whole, access = Path.open, os.access

    def locked(path: Path, *arguments: Any, **how: Any) -> Any:
        if path.name == "held.npz":
            raise PermissionError(13, "Permission denied")
        return whole(path, *arguments, **how)

    monkeypatch.setattr(Path, "open", locked)
    shots = call("verify", TEACHER, TEACHER, "--shots", "held.npz", width=200)
    assert shots.code == 5 and "cannot be read: Permission denied.\n  Look at its permissions." in shots.err

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "held.npz" and access(path, mode))
    monkeypatch.setattr("onnx.load", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    model = call("inspect", "held.npz", width=200)
    assert model.code == 4 and "'held.npz' cannot be read: Permission denied." in model.err


def test_a_damaged_report_is_no_report(here: Path) -> None:
    (here / "report.json").write_text('{"schema_version": "1.0", "status": "fine"}')

    ended = call("gate", "report.json", "--max-drop", "1")

    assert ended.code == 2 and "damaged" in ended.err


def test_a_defect_of_ours_says_so_and_shows_its_traceback_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr("xdonnx.model.read_proto", broken)

    short, long = call("inspect", TEACHER), call("inspect", TEACHER, "-v")

    assert short.code == long.code == 1
    assert "internal: KeyError" in short.err and "report it" in short.err and "Traceback" not in short.err
    assert "Traceback" in long.err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"), "out of memory"),
        (OSError(28, "No space left on device"), "disk is full"),
    ],
)
def test_what_the_machine_lacks_is_told_apart(monkeypatch: pytest.MonkeyPatch, error: Exception, says: str) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("xdonnx.model.read_proto", broken)

    ended = call("inspect", TEACHER)

    assert ended.code == 8 and says in ended.err


@pytest.mark.parametrize("verb", ["plan", "match", "verify"])
def test_every_command_refuses_a_seed_that_no_generator_takes(verb: str, here: Path) -> None:
    where = {"plan": ["-o", "plan.toml"], "match": [TEACHER], "verify": [TEACHER]}[verb]

    ended = call(verb, TEACHER, *where, *SHOTS, "--seed", str(2**64))

    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"error: --seed is {2**64}.") and listing(here) == {}
