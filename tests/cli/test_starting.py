"""`init`, `schema` and completion: made from the flags, so held against the flags; and the pipe that closes early."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import onnx
import pytest
from program import SAMPLES, TEACHER, Compressed, call

from xdonnx_cli.app import FLAGS
from xdonnx_cli.configuration import from_file

PROGRAM = [sys.executable, "-c", "from xdonnx_cli.app import main; main()"]


def uncommented(path: Path) -> str:
    """Return a file with every key taken in: those that '#' stands right before."""
    return re.sub(r"^#(?=\w)", "", path.read_text(encoding="utf-8"), flags=re.M)


def test_init_writes_a_file_that_changes_nothing(here: Path) -> None:
    ended = call("init")

    assert ended.code == 0 and "Wrote xdonnx.toml." in ended.out
    tables = ("gate", "compress", "plan", "match", "verify")
    assert tomllib.loads((here / "xdonnx.toml").read_text()) == {table: {} for table in tables}
    for command in FLAGS:
        assert from_file(here / "xdonnx.toml", FLAGS, command) == {}


def test_with_every_line_uncommented_it_holds_every_flag_and_reads(here: Path) -> None:
    assert call("init").code == 0
    (here / "xdonnx.toml").write_text(uncommented(here / "xdonnx.toml"))

    for command in ("compress", "plan", "match", "verify", "gate"):
        found = from_file(here / "xdonnx.toml", FLAGS, command)
        # On one level nothing replaces anything: the plan of [compress] does what comes with a plan.
        away = {"macs", "params", "size", "latency", "smallest", "keep", "structure", "include", "exclude"}
        away |= {"round_to", "residual", "allocation"}
        assert set(FLAGS[command]) - set(found) <= (away if command == "compress" else set())
    whole = tomllib.loads((here / "xdonnx.toml").read_text())
    for name, flag in FLAGS["compress"].items():
        tables = (whole, whole["compress"], whole["gate"] if flag.is_limit else {})
        found = [table[flag.key] for table in tables if flag.key in table]
        own = (whole["plan"], whole["match"])  # tables, where compress has flags of these names
        assert len([value for value in found if not any(value is table for table in own)]) == 1, name


@pytest.mark.parametrize("command", ["compress", "plan", "verify"])
def test_the_parser_of_each_flag_takes_the_value_that_the_file_shows(here: Path, command: str) -> None:
    import typer

    from xdonnx_cli.app import app

    assert call("init").code == 0
    (here / "xdonnx.toml").write_text(uncommented(here / "xdonnx.toml"))
    found = from_file(here / "xdonnx.toml", FLAGS, command)
    program: Any = typer.main.get_command(app)
    context = program.commands[command].make_context(
        command, [], resilient_parsing=True, default_map={name: setting.value for name, setting in found.items()}
    )
    parsed = {param.name: param for param in program.commands[command].params}
    for name, setting in found.items():
        assert parsed[name].process_value(context, setting.value) is not None or name == "round_to", name


def test_each_key_comes_with_the_help_of_its_flag_and_its_default(here: Path) -> None:
    assert call("init").code == 0
    text = (here / "xdonnx.toml").read_text()

    plain = " ".join(text.replace("\n# ", " ").split())
    for flag in FLAGS["compress"].values():
        assert " ".join(flag.help.split()) in plain, flag.name
    assert '#solver = "auto"  # the default' in text and '#macs = "50%"\n' in text


def test_init_replaces_a_file_only_by_force(here: Path) -> None:
    (here / "xdonnx.toml").write_text("seed = 3\n")

    refused = call("init")

    assert refused.code == 2 and "'xdonnx.toml' exists.\n  Pass --force" in refused.err
    assert (here / "xdonnx.toml").read_text() == "seed = 3\n"
    assert call("init", "--force").code == 0
    assert "#seed = 0" in (here / "xdonnx.toml").read_text()


def test_init_for_a_model_sets_what_the_model_says(here: Path) -> None:
    (here / "models").mkdir()
    (here / "models" / "m.onnx").write_bytes(Path(TEACHER).read_bytes())

    assert call("init", "project", "models/m.onnx").code == 0

    found = tomllib.loads((here / "project" / "xdonnx.toml").read_text())
    assert found["model"] == "../models/m.onnx" and "input-shape" not in found
    assert found["gate"] == {"max-drop": 1.0, "min-shrink": "10%"}
    assert found["compress"] == {"out": "m.small.onnx"}
    assert call("init", "models/m.onnx").code == 0, "the folder may be left out"
    os.chdir(here / "project")
    ended = call("compress", "--shots", SAMPLES / "shots", "--preset", "unit", "--dry-run", "--preset-effort", "fast")
    assert ended.code == 0, ended.err


def test_init_gives_a_size_to_what_the_graph_leaves_free(here: Path) -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[N,3,H,W] image) => (float[N,3,H,W] y) { y = Relu (image) }'
    onnx.save(onnx.parser.parse_model(text), here / "m.onnx")

    assert call("init", "m.onnx").code == 0

    found = tomllib.loads((here / "xdonnx.toml").read_text())
    assert found["input-shape"] == {"image": [1, 3, 224, 224]} and found["gate"]["max-error"] == 0.1
    assert from_file(here / "xdonnx.toml", FLAGS, "compress")["input_shape"].value == ["image:1x3x224x224"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["a", "b"], 2, "init takes one folder and one model"),
        (["none.onnx"], 4, "no model at 'none.onnx'"),
        (["file.txt/deep"], 8, "cannot write"),
    ],
)
def test_init_says_what_it_cannot_do(here: Path, arguments: list[str], code: int, message: str) -> None:
    (here / "file.txt").write_text("")
    ended = call("init", *arguments)
    assert ended.code == code and message in ended.err
    assert [path.name for path in here.iterdir()] == ["file.txt"]


def test_the_schema_of_a_report_is_one_and_fits_a_report(compressed: Compressed) -> None:
    found = json.loads(call("schema").out)

    jsonschema.Draft202012Validator.check_schema(found)
    report = json.loads((compressed.folder / "student.report" / "report.json").read_text())
    jsonschema.validate(report, found)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report | {"exit_code": "three"}, found)


def test_the_schema_of_a_file_takes_the_template_and_refuses_slips(here: Path) -> None:
    found = json.loads(call("schema", "--config").out)
    assert call("init").code == 0

    jsonschema.Draft202012Validator.check_schema(found)
    whole = tomllib.loads(uncommented(here / "xdonnx.toml"))
    jsonschema.validate(whole, found)
    jsonschema.validate({"plan": {"macs": 0.5}, "max_drop": 1, "shots": ["a", "b"], "mean": [0.5]}, found)
    for slip in ({"mac": 0.5}, {"seed": "1"}, {"out": "x"}, {"gate": {"macs": 1}}, {"force": 1}, {"solver": "pdg"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(slip, found)


def offered(line: str) -> list[str]:
    """Return what bash offers after Tab at the end of a line."""
    words = line.split(" ")
    asked = {"_XDONNX_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(PROGRAM, env=os.environ | asked, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("xdonnx comp", {"compress"}),
        ("xdonnx compress --max-", {"--max-drop", "--max-error", "--max-shots", "--max-latency-ratio"}),
        ("xdonnx compress --preset ", {"imagenet", "unit", "raw", "tf", "caffe"}),
        ("xdonnx compress --solver a", {"auto", "admm"}),
        ("xdonnx compress --method cr", {"cross"}),
        ("xdonnx compress --warn-only max-d", {"max-drop"}),
        ("xdonnx plan --structure el", {"element"}),
        ("xdonnx verify --color ", {"rgb", "bgr", "gray"}),
    ],
)
def test_a_shell_is_offered_commands_flags_and_values(here: Path, line: str, some: set[str]) -> None:
    (here / "xdonnx.toml").write_text("not TOML, and of no matter here")
    assert set(offered(line)) == some


def test_a_shell_gets_the_script_that_asks_for_it(here: Path) -> None:
    """Which shell it is, the program reads from the processes above it: here from a bash that waits for it."""
    asked = f'"{sys.executable}" -c "{PROGRAM[2]}" --show-completion; exit $?'

    ended = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=False)

    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    (here / "script").write_text(ended.stdout)
    taken = subprocess.run(["bash", "-c", "source ./script && complete -p xdonnx"], capture_output=True, text=True)
    assert taken.returncode == 0 and taken.stdout.split()[-3:] == ["-F", "_xdonnx_completion", "xdonnx"]
    # The script asks by the very variable that the answers above were asked by.
    assert "_XDONNX_COMPLETE=complete_bash" in ended.stdout
    assert "--install-completion" in call("--help").out and "--show-completion" in call("--help").out


@pytest.mark.parametrize(
    "arguments", [["inspect", TEACHER], ["inspect", TEACHER, "--json"], ["methods"], ["--help"], ["schema"]]
)
def test_a_reader_that_leaves_early_ends_the_program_quietly(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*PROGRAM, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)

    assert done.returncode == 141 and done.stderr == ""


def test_init_and_schema_load_nothing_heavy(tmp_path: Path) -> None:
    code = f"""
import sys
from xdonnx_cli.app import run
assert run(["init", "-v"]) == run(["schema", "--config"]) == 0
assert not {{"torch", "onnx", "onnxruntime", "numpy", "PIL"}} & set(sys.modules)
assert run(["schema"]) == run(["init", "deeper", {TEACHER!r}]) == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
