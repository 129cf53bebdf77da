"""Flags from files and variables: which one wins, what is understood, and where a slip is said to stand."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from program import SAMPLES, TEACHER, Compressed, call

from xdonnx.errors import JobError
from xdonnx_cli.app import FLAGS
from xdonnx_cli.configuration import from_environment, from_file
from xdonnx_cli.searching import nearest

JOB = f"""\
model = '{TEACHER}'
shots = '{SAMPLES / "shots"}'
preset = "unit"
max-shots = 20
macs = "40%"
preset-effort = "fast"
[compress]
out = "student.onnx"
"""


def dry(*more: str) -> Any:
    """Return what a dry run says, whose job stands in the file."""
    ended = call("compress", "--dry-run", "--json", "-", *more)
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def read(here: Path, text: str, command: str = "compress") -> dict[str, Any]:
    """Return what a file says to a command, as the parsers of its flags are given it."""
    (here / "xdonnx.toml").write_text(text)
    return {name: setting.value for name, setting in from_file(here / "xdonnx.toml", FLAGS, command).items()}


def test_what_is_typed_wins_over_variable_file_and_default(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "xdonnx.toml").write_text(f"seed = 1\n{JOB}")
    monkeypatch.setenv("XDONNX_SEED", "2")
    monkeypatch.setenv("XDONNX_ROUND_TO", "4")

    found = dry("--round-to", "2")

    job, sources = found["job"], found["sources"]
    assert (job["seed"], job["macs"], job["round_to"], job["solver"]) == (2, 0.4, 2, "auto")
    assert sources["seed"] == {"source": "environment", "name": "XDONNX_SEED"}
    assert sources["macs"] == {"source": "file", "name": "macs", "path": str(here / "xdonnx.toml"), "line": 6}
    assert sources["out"]["name"] == "compress.out" and sources["out"]["line"] == 9
    assert sources["round_to"] == {"source": "command line", "name": "--round-to"}
    assert sources["solver"] == {"source": "default"}
    assert dry("--seed", "3")["job"]["seed"] == 3
    monkeypatch.setenv("XDONNX_SEED", "")
    assert dry()["job"]["seed"] == 1, "an empty variable says nothing"


def test_a_dry_run_shows_where_each_value_comes_from(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "xdonnx.toml").write_text(JOB)
    monkeypatch.setenv("XDONNX_METHOD", "cross,tune")

    ended = call("compress", "--dry-run", "--keep", "0.5", width=160)

    rows = {words[0]: words[1:] for line in ended.out.splitlines() if len(words := line.split()) > 1}
    assert rows["method"] == ["cross,", "tune", "XDONNX_METHOD"]
    assert rows["keep"] == ["0.5", "command", "line"] and rows["device"] == ["auto", "default"]
    assert rows["preset"] == ["unit", "xdonnx.toml:3"] and rows["out"] == ["student.onnx", "xdonnx.toml:8"]
    assert "macs" not in rows, "another target was typed"
    assert [path.name for path in here.iterdir()] == ["xdonnx.toml"]


def test_the_nearest_file_counts_and_the_search_ends_with_the_repository(here: Path) -> None:
    inner = here / "repo" / "a" / "b"
    inner.mkdir(parents=True)
    (here / "xdonnx.toml").write_text("seed = 1")
    assert nearest(inner) == here / "xdonnx.toml"
    (here / "repo" / "pyproject.toml").write_text("[project]\nname = 'x'\n[tool.xdonnx]\nseed = 2\n")
    assert nearest(inner) == here / "repo" / "pyproject.toml"
    (here / "repo" / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert nearest(inner) == here / "xdonnx.toml", "that project has nothing for us"
    (here / "repo" / ".git").mkdir()
    assert nearest(inner) is None
    (inner / "pyproject.toml").write_text("[tool.xdonnx]\nseed = 3\n")
    (inner / "xdonnx.toml").write_text("seed = 4")
    assert nearest(inner) == inner / "xdonnx.toml"


def test_the_search_ends_at_home(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "home" / "work").mkdir(parents=True)
    (here / "xdonnx.toml").write_text("seed = 1")
    monkeypatch.setenv("HOME", str(here / "home"))

    assert nearest(here / "home" / "work") is None and nearest(here) == here / "xdonnx.toml"


def test_a_project_file_says_the_same_in_its_own_table(here: Path) -> None:
    text = JOB.replace("[compress]", "[tool.xdonnx.compress]")
    (here / "pyproject.toml").write_text(f"[project]\nname = 'x'\n[tool.xdonnx]\n{text}")

    found = dry()

    assert found["job"]["macs"] == 0.4
    assert found["sources"]["macs"] == {
        "source": "file", "name": "macs", "path": str(here / "pyproject.toml"), "line": 8,
    }  # fmt: skip
    assert found["sources"]["out"]["line"] == 11


def test_another_file_is_named_by_flag_or_variable_and_none_by_none(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "xdonnx.toml").write_text(JOB)
    (here / "other.toml").write_text(JOB.replace("40%", "60%"))

    assert dry("--config", "other.toml")["job"]["macs"] == 0.6
    monkeypatch.setenv("XDONNX_CONFIG", "other.toml")
    assert dry()["job"]["macs"] == 0.6 and dry("--config", "xdonnx.toml")["job"]["macs"] == 0.4
    ended = call("compress", "--dry-run", "--config", "none")
    assert ended.code == 2 and "Missing" in ended.err
    missing = call("compress", "--config", "nothing.toml")
    assert missing.code == 2 and "no configuration at 'nothing.toml'" in missing.err


def test_paths_in_a_file_are_relative_to_the_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "deep" / "er").mkdir(parents=True)
    text = (
        "model = 'm.onnx'\nshots = ['a=one.npy', 'b=/two.npy']\nholdout = 'held'\nlabels = 'l.txt'\njson = '-'\n"
        "exclude = ['stem/*']\n[compress]\nout = 'o.onnx'"
    )
    assert read(here, text)["model"] == "m.onnx"

    monkeypatch.chdir(here / "deep" / "er")

    assert read(here, text) == {
        "model": f"{here}/m.onnx", "shots": [f"a={here}/one.npy", "b=/two.npy"], "holdout": f"{here}/held",
        "labels": f"{here}/l.txt", "json": "-", "exclude": ["stem/*"], "out": f"{here}/o.onnx",
    }  # fmt: skip
    (here / "run=1").mkdir()
    assert read(here, "shots = 'run=1'")["shots"] == [f"{here}/run=1"], "a path may hold an equals sign"
    assert read(here, "holdout = '20%'")["holdout"] == "20%"


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("macs = 0.5", "macs", "0.5"),
        ('macs = "50%"', "macs", "50%"),
        ("per-class = 5", "per_class", "5"),
        ("per_class = 5", "per_class", "5"),
        ("mean = [0.5, 0.25, 1]", "mean", "0.5,0.25,1"),
        ('mean = "0.5,0.25,1"', "mean", "0.5,0.25,1"),
        ("method = 'tune'", "method", ["tune"]),
        ("method = ['cross', 'tune']", "method", ["cross", "tune"]),
        ("skip-bad = true", "skip_bad", True),
        ("skip-bad = false", "skip_bad", False),
        ("input-shape = { image = [1, 3, 8, 8] }", "input_shape", ["image:1x3x8x8"]),
        ("input-shape = { image = '1x3x8x8' }", "input_shape", ["image:1x3x8x8"]),
        ("input-shape = 'image:1x3x8x8'", "input_shape", ["image:1x3x8x8"]),
        ("shots = { left = '/l.npy', right = '/r.npy' }", "shots", ["left=/l.npy", "right=/r.npy"]),
        ("holdout = 0.25", "holdout", "0.25"),
        ("round-to = 8", "round_to", "8"),
        ("round-to = 'auto'", "round_to", "auto"),
        ("max-drop = 1", "max_drop", "1"),
        ("[gate]\nmax-drop = 1", "max_drop", "1"),
        ("[compress]\nmax-drop = 1", "max_drop", "1"),
        ("max-drop = 3\ngate.max-drop = 1", "max_drop", "1"),
        ("[gate]\nmax-drop = 3\n[compress]\nmax-drop = 1", "max_drop", "1"),
    ],
)
def test_values_are_those_that_toml_has_for_them(here: Path, line: str, name: str, value: object) -> None:
    assert read(here, line) == {name: value}


def test_a_key_is_for_every_command_that_has_it_and_a_table_for_one(here: Path) -> None:
    text = (
        "macs = 0.5\nseed = 3\njson = 'r.json'\n[gate]\nmax-drop = 1\nquiet = true\n[verify]\nseed = 4\n"
        "[plan]\nmacs = 0.3\n[inspect]\njson = true"
    )
    assert read(here, text, "compress") == {"macs": "0.5", "seed": "3", "json": "r.json", "max_drop": "1"}
    assert read(here, text, "plan") == {"macs": "0.3", "seed": "3", "json": "r.json"}
    assert read(here, text, "verify") == {"seed": "4", "json": "r.json", "max_drop": "1"}
    assert read(here, text, "gate") == {"json": "r.json", "max_drop": "1", "quiet": True}
    assert read(here, text, "inspect") == {"json": True}, "its --json is a switch, and the key on top is none"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = 1\nmac = 0.5", "xdonnx.toml, line 2: unknown key 'mac'. Did you mean 'macs'?"),
        ("[compres]\nmacs = 0.5", "xdonnx.toml, line 1: unknown key 'compres'. Did you mean 'compress'?"),
        ("[doctor]\njson = true", "unknown key 'doctor'"),
        ("[gate]\n\nmax-dorp = 1", "xdonnx.toml, line 3: unknown key 'max-dorp' in [gate]. Did you mean 'max-drop'?"),
        ("[verify]\nmacs = 0.5", "line 2: unknown key 'macs' in [verify]. xdonnx verify has no --macs."),
        ("out = 'x.onnx'", "line 1: 'out' means other files for other commands. Put it in the table of one"),
        ("config = 'x.toml'", "unknown key 'config'"),
        ("force = 'yes'", 'line 1: force is "yes", and a switch. Write true or false.'),
        ("force = 1", "line 1: force is 1, and a switch."),
        ("seed = true", "line 1: seed is true, and wants a whole number."),
        ("seed = 1.5", "line 1: seed is 1.5, and wants a whole number."),
        ("seed = '1'", 'line 1: seed is "1", and wants a whole number.'),
        ("scale = []", "line 1: scale is a list, and wants a number."),
        ("model = 3", "line 1: model is 3, and wants text."),
        ("preset = 3", "line 1: preset is 3, and wants text."),
        ("preset = ['unit']", "line 1: preset is a list, and wants text."),
        ("macs = { p = 1 }", "line 1: macs is a table, and wants a number or text."),
        ("method = [1]", "line 1: method is 1, and wants text."),
        ("max-drop = 1979-05-27", "max-drop is 1979-05-27, and wants a number or text."),
        ("seed = 1\nseed = 2", "is not TOML: Cannot overwrite a value"),
        ("macs = 50%", "is not TOML"),
        ("max-drop = 1\nmax_drop = 2", "'max_drop' is given twice, with - and with _."),
    ],
)
@pytest.mark.parametrize("command", ["compress", "verify"])
def test_a_slip_in_a_file_is_told_with_its_line_to_every_command(
    here: Path, command: str, text: str, message: str
) -> None:
    (here / "xdonnx.toml").write_text(text)

    ended = call(command, "a.onnx", "b.onnx") if command == "verify" else call(command, "a.onnx", "-o", "b.onnx")

    assert ended.code == 2 and message in " ".join(ended.err.split()), ended.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("macs = 1.5", "Invalid value for '--macs': 1.5 is above 1."),
        ("preset = 'imgnet'", "preset 'imgnet'. Did you mean 'imagenet'?"),
        ("shots = 'nowhere'", "no shots at 'nowhere'."),
        ("keep = 0.5", "--keep and --macs are both given."),
        ("max-drop = -1", "gate max_drop = -1.0 is no limit."),
    ],
)
def test_an_error_that_comes_from_a_file_says_so(here: Path, line: str, message: str) -> None:
    key = line.split()[0]
    rest = "\n".join(other for other in JOB.splitlines() if not other.startswith(key))
    (here / "xdonnx.toml").write_text(f"{line}\n{rest}")

    ended = call("compress", "--dry-run")

    assert ended.code in (2, 5) and message in ended.err
    assert f"--{key} is not typed but set, by the file: {here / 'xdonnx.toml'}, line 1." in ended.err.replace("\n", "")


def test_an_error_in_what_was_typed_is_not_blamed_on_the_file(here: Path) -> None:
    (here / "xdonnx.toml").write_text(JOB)
    for typed in (["--macs", "2.5"], ["--preset", "uint"], ["--shots", "nowhere"]):
        ended = call("compress", "--dry-run", *typed)
        assert ended.code in (2, 5) and "not typed" not in ended.err and "error: " in ended.err


def test_an_error_that_comes_from_a_variable_says_so(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDONNX_MACS", "much")
    ended = call("compress", TEACHER, "-o", "x.onnx")
    assert ended.code == 2 and "'much' is no number" in ended.err
    assert "--macs is not typed but set, by the variable: XDONNX_MACS." in ended.err
    monkeypatch.setenv("XDONNX_MACS", "50%")
    monkeypatch.setenv("XDONNX_FORCE", "perhaps")
    ended = call("compress", TEACHER, "-o", "x.onnx")
    assert ended.code == 2 and "XDONNX_FORCE is 'perhaps', and --force is a switch." in ended.err


def test_variables_are_understood(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "xdonnx.toml").write_text(JOB)
    for name, text in {"EXCLUDE": "/gate/*, /near/*", "RESIDUAL": "1", "FORCE": "off", "MAX_DROP": "2%"}.items():
        monkeypatch.setenv(f"XDONNX_{name}", text)

    job = dry()["job"]

    assert job["exclude"] == ["/gate/*", "/near/*"] and job["residual"] is True and job["force"] is False
    assert job["gate"]["max_drop"] == 2.0


def test_variables_that_are_no_options_are_no_errors_unless_they_nearly_are(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDONNX_DATA", "/somewhere")
    assert not call("inspect", TEACHER).err
    monkeypatch.setenv("XDONNX_SERVICE_HOST", "10.0.0.1")
    ended = call("inspect", TEACHER)
    assert ended.code == 0 and ended.err == "warning: XDONNX_SERVICE_HOST is no option of xdonnx, and does nothing.\n"
    monkeypatch.setenv("XDONNX_MAXDROP", "1")
    ended = call("inspect", TEACHER)
    assert ended.code == 2 and "unknown variable XDONNX_MAXDROP. Did you mean XDONNX_MAX_DROP?" in ended.err


def test_what_is_typed_replaces_what_answers_the_same_question(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "xdonnx.toml").write_text(f"exclude = ['/gate/*']\n{JOB}")

    job = dry("--params", "0.5")["job"]
    assert (job["macs"], job["params"]) == (None, 0.5)
    job = dry("--synthetic-shots", "20")["job"]
    assert (job["shots"], job["synthetic_shots"]) == ([], 20)
    assert call("plan", "-o", "plan.toml").code == 0
    found = dry("--plan", "plan.toml")
    assert (found["job"]["macs"], found["job"]["exclude"], found["split"]) == (None, [], "file")
    assert found["sources"]["exclude"] == {"source": "default"}
    monkeypatch.setenv("XDONNX_KEEP", "0.5")
    job = dry()["job"]
    assert (job["macs"], job["keep"]) == (None, 0.5), "a variable replaces the target of a file"


def test_a_gate_in_the_file_is_judged_by_all_that_judge(
    compressed: Compressed, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, report = compressed.folder / "student.onnx", compressed.folder / "student.report"
    verify = ["verify", TEACHER, str(student), "--shots", str(SAMPLES / "held_out.npz"), "--preset", "unit"]
    assert call("gate", report).code == call(*verify).code == 0

    (here / "xdonnx.toml").write_text("[gate]\nmin-shrink = '99%'\n")

    assert call("gate", report).code == call(*verify).code == 3
    assert call("gate", report, "--min-shrink", "1%").code == 0
    assert call("gate", report, "--config", "none").code == 0


@pytest.mark.parametrize("command", ["compress", "plan", "verify"])
def test_every_flag_may_stand_in_a_file_and_in_a_variable(
    here: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    from xdonnx_cli.configuration import Settings

    assert len(FLAGS[command]) > 20
    for name, flag in FLAGS[command].items():
        value = read(here, f"[{command}]\n{flag.key} = {flag.example}", command)[name]
        with monkeypatch.context() as patch:
            patch.setenv(f"XDONNX_{name.upper()}", str(tomllib.loads(f"x = {flag.example}")["x"]))
            found = from_environment(Settings(FLAGS), command)
        assert type(found[name].value) is type(value), name


def test_a_project_file_that_is_not_ours_may_be_broken(here: Path) -> None:
    (here / "pyproject.toml").write_text("[project\n")
    assert nearest(here) != here / "pyproject.toml"
    (here / "pyproject.toml").write_text("[project\n[tool.xdonnx]\n")
    with pytest.raises(JobError, match="is not TOML"):
        nearest(here)


def test_the_help_reads_no_file(here: Path) -> None:
    (here / "xdonnx.toml").write_text("this is no TOML")
    assert call("compress", "--help").code == 0
    assert call("compress", "x.onnx", "-o", "y.onnx").code == 2
