"""The help says all there is, with an example, at once and in any width."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from program import call

from xdonnx.methods import POOLED, REFITTING
from xdonnx_cli.app import COMMANDS

DATA = "--shots --labels --per-class --max-shots --holdout --skip-bad --synthetic-shots"
PIXELS = "--preset --mean --std --scale --color --layout --resize --crop --input-shape"
LIMITS = "--max-drop --max-error --min-shrink --max-latency-ratio --confidence --warn-only"
FLAGS = {
    "compress": f"{DATA} {PIXELS} {LIMITS} --macs --params --keep --structure --include --exclude --round-to "
    "--plan --student --match --allocation --residual --method --connection --mu --alpha --beta --solver --ridge "
    "--adversarial --pool --pool-draw "
    "--preset-effort --out -o --force --external-data --report-dir --json --device --seed --dry-run --quiet -q "
    "--verbose -v --no-progress --config -h --help",
    "plan": f"{DATA} {PIXELS} --macs --params --keep --structure --include --exclude --round-to --residual "
    "--allocation --out -o --force --json --device --seed --quiet -q --verbose -v --no-progress",
    "decompose": "--macs --params --energy --rank --scheme --include --exclude --round-to --input-shape --out -o "
    "--force --external-data --dry-run --json --quiet -q --verbose -v --no-progress -h --help",
    "match": f"{DATA} {PIXELS} --out -o --force --json --seed --quiet -q --verbose -v --no-progress",
    "inspect": "--json --input-shape --config",
    "verify": f"{DATA} {PIXELS} {LIMITS} --report-dir --json --device --seed -q -v --no-progress",
    "gate": f"{LIMITS} --json -q --config",
    "bench": "--shots --input-shape --json --config",
    "report": "--html --junit --markdown -q -v",
    "sweep": "--out -o --dry-run --schema --json --backend --jobs --address --trials -q -v --no-progress",
    "methods": "",
    "doctor": "--json",
    "init": "--force",
    "schema": "--config",
}


def test_the_table_above_has_every_command() -> None:
    assert set(FLAGS) == {command.__name__ for command, _ in COMMANDS}


@pytest.mark.parametrize("width", [60, 160])
@pytest.mark.parametrize("command", FLAGS)
def test_help_names_every_flag_and_has_an_example(command: str, width: int) -> None:
    ended = call(command, "--help", width=width)

    assert ended.code == 0 and not ended.err
    for flag in FLAGS[command].split():
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", ended.out), flag
    assert f"xdonnx {command}" in ended.out.partition("Examples:")[2]
    assert not re.search(r"<bool>|_help", ended.out), "a switch takes no value"
    assert max(map(len, ended.out.splitlines())) <= width


def test_the_program_lists_its_commands_and_exit_codes() -> None:
    ended = call("--help")

    assert ended.code == 0
    for command in FLAGS:
        assert re.search(rf"^│ {command} ", ended.out, re.M), command
    assert "<bool>" not in ended.out
    assert "3 gate failed" in ended.out and "130 interrupted" in ended.out


def test_no_command_at_all_shows_the_help_and_is_a_usage_error() -> None:
    ended = call()

    assert ended.code == 2 and "compress" in ended.out and not ended.err


def test_version_is_that_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

    assert call("--version").out == f"xdonnx {project['version']}\n"


def test_brackets_of_a_section_are_shown_and_taken_for_no_markup() -> None:
    assert "[tool.xdonnx]" in call("compress", "--help", width=160).out


def test_methods_come_with_paper_needs_options_and_advice() -> None:
    ended = call("methods")

    assert ended.code == 0
    assert "Few Shot Network Compression via Cross Distillation, AAAI" in ended.out
    assert "The default." in ended.out and "samples, no labels" in ended.out
    for option in ("--connection", "--mu", "--alpha", "--beta", "--solver", "--ridge", "--preset-effort"):
        assert re.search(rf"^  {option} +\S", ended.out, re.M), option


def test_methods_say_who_refits_a_student_and_who_draws_from_a_pool() -> None:
    parts = {part.split("  ")[0]: part for part in call("methods", width=120).out.split("\n\n")}

    refits = {name for name, part in parts.items() if re.search(r"^  --student +refits", part, re.M)}
    assert refits == {"cross", "fskd"} == set(REFITTING)
    assert {name for name, part in parts.items() if re.search(r"^  --pool +learns", part, re.M)} == POOLED
    assert "by effort balanced or fast" in parts["cross"] and "effort" not in parts["fskd"]


def test_options_listed_are_those_that_the_methods_have() -> None:
    from dataclasses import fields

    from xdonnx.methods.cross import Cross
    from xdonnx_cli.methods import options

    assert [name for name, _ in options("xdonnx.methods.cross:Cross")] == [field.name for field in fields(Cross)]
    assert options("no.such.module:Method") == [] and options("xdonnx.methods.cross:Nothing") == []
