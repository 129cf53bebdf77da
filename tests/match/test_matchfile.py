"""A matching survives its file, can be corrected there, and a slip of the pen in it is one clear error."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import foreign
import nets
import numpy as np
import onnx
import pytest

from xdonnx.budget import Budget, make_plan
from xdonnx.errors import JobError
from xdonnx.graph import read_net
from xdonnx.matchfile import given_by, write_matchfile, written
from xdonnx.matching import match, side
from xdonnx.patch import Patch, cut
from xdonnx_cli.app import run

SAMPLES = Path(__file__).parents[2] / "samples"
TEACHER = SAMPLES / "digits_mobile.onnx"
MODEL = nets.build("residual")
STUDENT, ROWS = foreign.decomposed(MODEL, foreign.tucker, 0.8, skip=["c0"])
NETS = read_net(MODEL), read_net(STUDENT)
HASHES = "ab" * 32, "cd" * 32


def text() -> str:
    inputs = nets.samples(MODEL, 8)
    matching = match(side(NETS[0], inputs), side(NETS[1], inputs))
    return written(matching, NETS, HASHES, ("t.onnx", "s.onnx", "match.toml"))


@pytest.fixture(scope="module")
def good() -> str:
    return text()


def saved(folder: Path, content: str) -> Path:
    path = folder / "match.toml"
    write_matchfile(content, path)
    return path


def test_a_matching_survives_its_file(good: str, tmp_path: Path) -> None:
    given = given_by(saved(tmp_path, good), NETS, HASHES)

    assert {name: one.row for name, one in given.items()} == {
        name: tuple(ROWS.get(name, [name])) for name in NETS[0].layers
    }
    assert all(one.channels is None for one in given.values())
    assert good.startswith("# Which layers of s.onnx stand for which layer of t.onnx")
    assert tomllib.loads(good)["layer"][1]["student"] == ROWS["c1"]


def test_edits_are_obeyed(good: str, tmp_path: Path) -> None:
    row = f"student = {json.dumps(ROWS['c2'])}"
    assert row in good
    given = given_by(saved(tmp_path, good.replace(row, "student = []")), NETS, HASHES)
    assert given["c2"].row == () and given["c1"].row == tuple(ROWS["c1"])

    order = [7, 6, 5, 4, 3, 2, 1, 0]
    given = given_by(saved(tmp_path, good.replace(row, f"{row}\nchannels = {order}")), NETS, HASHES)
    assert given["c2"].channels is not None and given["c2"].channels.tolist() == order

    head, *tables = good.split("\n[[layer]]")
    given = given_by(saved(tmp_path, head + "\n[[layer]]" + tables[0]), NETS, HASHES)
    assert [name for name, one in given.items() if one.row] == ["c0"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[[layer]]", "[[layer", "is not TOML"),
        ("schema_version = 1", "schema_version = 2", "'schema_version' is 2"),
        (HASHES[0], "ef" * 32, "made for another teacher: efefefefefef"),
        (HASHES[1], "ef" * 32, "made for another student"),
        ('teacher = "c1"', 'teacher = "c1x"', r"the teacher has no layer 'c1x'\. Did you mean"),
        ('"c1_part0"', '"c1_part7"', r"the student has no layer 'c1_part7'\. Did you mean"),
        ('teacher = "c1"', 'teacher = "c0"', "'c0' of the teacher stands there twice"),
        ('student = ["out"]', 'student = ["c0"]', "'c0' of the student stands there twice"),
        ('"c1_part0", "c1_part1", ', "", "sees a window"),
        ('"c1_part0", "c1_part1"', '"c1_part1", "c1_part0"', "do not stand in a row"),
        ('student = ["c0"]', 'student = ["out"]', "another kind"),
        ("confidence", "confidense", r"unknown key 'confidense' in \[\[layer\]\] number 1\. Did you mean 'confidence'"),
        ('teacher = "c0"\n', "", r"'teacher' is missing in \[\[layer\]\] number 1"),
        ('student = ["c0"]', 'student = "c0"', r"'student' in \[\[layer\]\] number 1 is 'c0'"),
        ('student = ["c0"]', 'student = ["c0"]\nchannels = [0, 1]', "They are 8 different numbers from 0 to 7"),
        ('student = ["c0"]', 'student = ["c0"]\nchannels = [0, 1, 2, 3, 4, 5, 6, 6]', "different numbers"),
        ('student = ["c0"]', "student = []\nchannels = [0]", "has channels, and no layer of the student"),
    ],
)
def test_a_slip_of_the_pen_is_one_clear_error(old: str, new: str, words: str, good: str, tmp_path: Path) -> None:
    assert old in good
    path = saved(tmp_path, good.replace(old, new, 1))

    with pytest.raises(JobError, match=words) as error:
        given_by(path, NETS, HASHES)
    assert error.value.exit_code == 2 and str(path) in str(error.value)


def test_a_file_that_matches_nothing_or_is_not_there_is_an_error(good: str, tmp_path: Path) -> None:
    head = good.split("\n[[layer]]")[0]
    with pytest.raises(JobError, match="'layer' is missing"):
        given_by(saved(tmp_path, head), NETS, HASHES)
    with pytest.raises(JobError, match="matches no layer"):
        given_by(saved(tmp_path, f"layer = []\n{head}"), NETS, HASHES)
    with pytest.raises(JobError, match="no matching at"):
        given_by(tmp_path / "none.toml", NETS, HASHES)


def shots() -> list[str]:
    return ["--shots", str(SAMPLES / "shots"), "--preset", "unit"]


def test_the_command_shows_writes_and_returns_a_matching_without_torch(here: Path) -> None:
    given, made = foreign.decomposed(onnx.load(TEACHER), foreign.spatial, 0.7)
    onnx.save(given, "given.onnx")
    asked = ["match", str(TEACHER), "given.onnx", *shots(), "-o", "match.toml", "--json", "found.json"]
    code = f"""
import sys
from xdonnx_cli.app import run
assert run({asked!r}) == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    found = json.loads(Path("found.json").read_text())
    assert done.stdout.startswith("MATCH  confidence ") and "1 of them decomposed" in done.stdout
    assert sum(len(one["student"]) == 2 for one in found["matches"]) == len(made) == 1
    assert found["alone"] == found["absent"] == [] and found["confidence"] > 0.9
    assert len(tomllib.loads(Path("match.toml").read_text())["layer"]) == len(found["matches"])

    # What was written is obeyed, also where it says that a layer is to be left alone.
    lines = Path("match.toml").read_text()
    Path("match.toml").write_text(lines.replace('student = ["logits"]', "student = []"))
    job = ["compress", str(TEACHER), "--student", "given.onnx", "--match", "match.toml", *shots(), "--method", "fskd"]
    relaxed = [part for name in ("smaller", "not-slower", "removed") for part in ("--warn-only", name)]
    assert run([*job, "-o", "out.onnx", *relaxed, "--json", "report.json", "-q"]) == 0
    report = json.loads(Path("report.json").read_text())
    assert [one["by"] for one in report["matches"]] == ["file"] * (len(found["matches"]) - 1)
    assert "logits" not in [one["teacher"] for one in report["matches"]]
    old, new = (
        {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(name).graph.initializer}
        for name in ("given.onnx", "out.onnx")
    )
    weight = next(node.input[1] for node in onnx.load("out.onnx").graph.node if node.output[0] == "logits")
    assert np.array_equal(old[weight], new[weight])


def test_the_command_refuses_a_stranger_and_still_writes_what_it_guessed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(SAMPLES / "digits_vgg.onnx")

    assert run(["match", str(TEACHER), other, *shots(), "-o", "match.toml"]) == 4
    told = capsys.readouterr()
    assert "does not look like a student" in told.err and Path("match.toml").exists()
    assert "Wrote match.toml, to be corrected" in told.out
    assert run(["compress", str(TEACHER), "--student", other, *shots(), "-o", "out.onnx"]) == 4
    assert not Path("out.onnx").exists()


def test_teacher_and_student_in_the_wrong_order_are_suspected_and_quiet_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = read_net(onnx.load(TEACHER))
    plan = make_plan(net, Budget("keep", 0.5)).channels
    drop = [int(label) for at, keep in plan.items() for label in net.groups[at].ids[keep:]]
    onnx.save(cut(net, Patch({}, frozenset(drop))), "small.onnx")

    assert run(["match", "small.onnx", str(TEACHER), *shots(), "-q"]) == 4
    assert "It is the larger of the two: is it the teacher?" in capsys.readouterr().err
    assert run(["match", str(TEACHER), "small.onnx", *shots(), "-q"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("MATCH  confidence ")


def test_bad_arguments_are_told_before_any_work(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("old.toml").touch()
    Path("text.onnx").write_text("no model")
    given = str(SAMPLES / "digits_mobile.onnx")
    (here / "copy.onnx").write_bytes(TEACHER.read_bytes())
    base = ["match", str(TEACHER)]
    job = ["compress", str(TEACHER), *shots(), "--student"]
    for arguments, code, words in (
        ([*base, "none.onnx", *shots()], 4, "no model at 'none.onnx'"),
        ([*base, "text.onnx", *shots()], 4, "text.onnx"),
        ([*base, given], 5, "no samples"),
        ([*base, given, *shots(), "-o", "old.toml"], 2, "'old.toml' exists"),
        ([*base, "copy.onnx", *shots(), "-o", "copy.onnx", "--force"], 2, "OUT is STUDENT"),
        ([*job, "none.onnx", "-o", "out.onnx"], 4, "no model at 'none.onnx'"),
        ([*job, given, "--macs", "40%", "-o", "out.onnx"], 2, "--macs has no say where --student is given"),
        ([*job, "copy.onnx", "-o", "copy.onnx", "--force"], 2, "OUT is --student"),
    ):
        assert run(arguments) == code, arguments
        assert words in capsys.readouterr().err, arguments
    assert not Path("out.onnx").exists()
