"""What is typed wins over a file, also where the two answer one question under different names."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from program import SAMPLES, SHOTS, TEACHER, Compressed, call

import xdonnx.job
from xdonnx.methods import METHODS
from xdonnx_cli.app import FLAGS
from xdonnx_cli.configuration import from_file

# Options of methods, each with a value that is not its default; those of cross need their connection.
OPTIONS = {
    "connection": '"soft"', "mu": "0.3", "alpha": "0.8", "beta": "0.4", "solver": '"pgd"', "ridge": "0.02",
    "views": "7", "steps": "9", "preset-effort": '"fast"',
    "adversarial": "false",
}  # fmt: skip


@pytest.fixture
def jobs(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the jobs whose options go together; none of them runs."""
    found: list[Any] = []

    def caught(job: Any, *_: Any, **__: Any) -> None:
        job.budget(), job.methods(), job.measured()
        found.append(job)
        raise KeyboardInterrupt

    monkeypatch.setattr(xdonnx.job, "run", caught)
    monkeypatch.setattr(xdonnx.job, "prepared", caught)
    return found


def job_of(jobs: list[Any], text: str, *typed: str) -> Any:
    """Return the job that a file and what is typed come to."""
    Path("xdonnx.toml").write_text(text)
    ended = call("compress", TEACHER, "-o", "s.onnx", *typed)
    assert jobs, ended.err
    return jobs.pop()


@pytest.mark.parametrize(
    ("text", "typed", "job"),
    [
        ("per-class = 3", ["--max-shots", "30"], {"per_class": None, "max_shots": 30}),
        ("max-shots = 30", ["--per-class", "3"], {"per_class": 3, "max_shots": None}),
        ('shots = "s"\nlabels = "l"\nper-class = 3', ["--synthetic-shots", "9"], {"labels": None, "per_class": None}),
        ('macs = "40%"', ["--structure", "2:4"], {"macs": None, "structure": "2:4"}),
        ('structure = "2:4"', ["--macs", "40%"], {"macs": 0.4, "structure": "channel"}),
        ('structure = "element"', ["--macs", "40%"], {"macs": 0.4, "structure": "element"}),
        ('allocation = "measured"', ["--keep", "0.5"], {"keep": 0.5, "allocation": "auto"}),
        ('allocation = "measured"\nmacs = 0.4', ["--structure", "element"], {"macs": 0.4, "allocation": "auto"}),
        ('solver = "greedy"\nkeep = 0.5', ["--structure", "element"], {"solver": "auto", "keep": 0.5}),
        ('connection = "soft"\nalpha = 0.8', ["--connection", "cross"], {"connection": "cross", "alpha": None}),
        ('connection = "cross"\nmu = 0.3', ["--alpha", "0.8"], {"connection": "auto", "mu": None, "alpha": 0.8}),
        ('connection = "cross"\nmu = 0.3', ["--mu", "0.5"], {"connection": "cross", "mu": 0.5}),
        ('steps = 9\npreset-effort = "best"', ["--method", "cross"], {"steps": 9, "preset_effort": "best"}),
        ("residual = true\nforce = true", ["--no-residual", "--no-force"], {"residual": False, "force": False}),
        ("residual = false", ["--residual"], {"residual": True}),
        ("skip-bad = true\nno-progress = true", ["--no-skip-bad", "--progress"], {"skip_bad": False}),
        ('[compress]\nmax-shots = 3\n[gate]\nmax-drop = 1', [], {"max_shots": 3}),
        ("per-class = 3\n[compress]\nmax-shots = 5", [], {"per_class": None, "max_shots": 5}),
    ],
)  # fmt: skip
def test_what_is_typed_replaces_what_does_not_go_with_it(
    jobs: list[Any], text: str, typed: list[str], job: dict[str, Any]
) -> None:
    shots = [] if "--synthetic-shots" in typed else SHOTS

    found = job_of(jobs, text, *shots, *typed)

    assert {name: getattr(found, name) for name in job} == job


@pytest.mark.parametrize(("name", "value"), OPTIONS.items())
def test_options_of_another_method_give_way_to_the_method_that_is_typed(jobs: list[Any], name: str, value: str) -> None:
    """A connection in the file made --method l1-norm a usage error, and no flag could have undone it."""
    needed = {"mu": 'connection = "cross"\n'}.get(name, "")
    field = name.replace("-", "_")
    for method in METHODS:
        chain = ["cross", method] if method in ("tune", "squeeze") else [method]
        typed = itertools.chain(*(("--method", one) for one in chain))

        found = job_of(jobs, f"{needed}{name} = {value}", *SHOTS, *typed)

        made = {option for one in found.methods() for option in vars(one)}
        kept = str(getattr(found, field)).lower() == value.strip('"')
        assert kept is (("effort" if field == "preset_effort" else field) in made), method


def test_a_variable_replaces_in_a_file_what_typing_would(jobs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDONNX_METHOD", "l1-norm")
    monkeypatch.setenv("XDONNX_MAX_SHOTS", "30")

    found = job_of(jobs, 'connection = "soft"\nviews = 9\nper-class = 3', *SHOTS)

    assert (found.method, found.connection, found.views) == (("l1-norm",), "auto", None)
    assert (found.per_class, found.max_shots) == (None, 30)


def test_what_one_place_says_twice_is_still_an_error(here: Path) -> None:
    (here / "xdonnx.toml").write_text('connection = "soft"\nmethod = "l1-norm"')
    ended = call("compress", TEACHER, *SHOTS, "-o", "s.onnx")
    assert ended.code == 2 and "--connection is no option of --method l1-norm" in ended.err
    ended = call("compress", TEACHER, *SHOTS, "-o", "s.onnx", "--macs", "0.5", "--structure", "2:4", "--config", "none")
    assert ended.code == 2 and "--structure 2:4 keeps what its pattern says" in ended.err


def test_every_switch_that_a_file_may_turn_on_can_be_typed_off(here: Path) -> None:
    typed = {
        "compress": ["a.onnx", "-o", "b.onnx"], "plan": ["a.onnx", "-o", "b.toml"], "verify": ["a.onnx", "b.onnx"],
        "gate": ["a.json"], "inspect": ["a.onnx"], "bench": ["a.onnx"],
    }  # fmt: skip
    for command, arguments in typed.items():
        switches = [name for name, flag in FLAGS[command].items() if flag.kind == "switch"]
        (here / "xdonnx.toml").write_text("\n".join([f"[{command}]", *(f"{name} = true" for name in switches)]))
        assert set(from_file(here / "xdonnx.toml", FLAGS, command)) == set(switches)
        off = [f"--{name[3:] if name.startswith('no_') else f'no-{name}'}".replace("_", "-") for name in switches]

        ended = call(command, *arguments, *off)

        # It comes as far as the files that are not there, and shows no traceback: verbose is off.
        assert switches and ended.code in (2, 4) and "No such option" not in ended.err, ended.err
        assert "Traceback" not in ended.err and "Traceback" in call(command, *arguments).err
        assert not any(f"{flag} " in call(command, "--help").out for flag in off), "two names for each would not fit"


def test_a_confidence_in_a_file_leaves_a_saved_verdict_alone(compressed: Compressed, here: Path) -> None:
    """A report that was judged by no limit was exit code 2 for whoever had a confidence in a file."""
    report, bare = compressed.folder / "student.report", here / "bare.json"
    arguments = ["verify", TEACHER, TEACHER, "--shots", str(SAMPLES / "held_out.npz"), "--preset", "unit"]
    assert call(*arguments, "--json", bare).code == 0
    (here / "xdonnx.toml").write_text('[gate]\nconfidence = 0.9\nwarn-only = ["max-drop"]\n')

    for saved in (report, bare):
        assert call("gate", saved).code == 0
    typed = call("gate", bare, "--confidence", "0.9")
    assert typed.code == 2 and "say how limits are judged, and there is none" in typed.err
    judged = call("gate", report, "--max-drop", "0")
    assert judged.code == 0 and "warning max_drop" in judged.out, "it holds for limits that are typed"
