"""The contract with pipelines: every exit code by a real command, and every gate at, above and below its limit."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from program import SHOTS, TEACHER, Ended, call, listing

from xdonnx.report import Latency, Report, read_report

JOB = ["compress", TEACHER, *SHOTS, "--method", "l1-norm", "--keep", "0.6", "--max-shots", "30", "-o", "student.onnx"]
VERIFY = ["verify", TEACHER, TEACHER, *SHOTS]
Patch = pytest.MonkeyPatch


def same(*command: str) -> Callable[[Patch], Sequence[str]]:
    return lambda _: command


def unreadable(_: Patch) -> Sequence[str]:
    Path("letter.onnx").write_text("to my aunt")
    return ["compress", "letter.onnx", *SHOTS, "-o", "student.onnx"]


def renamed_output(_: Patch) -> Sequence[str]:
    model = onnx.load(TEACHER)
    model.graph.output[0].name = model.graph.node[-1].output[0] = "scores"
    onnx.save(model, "renamed.onnx")
    return ["verify", TEACHER, "renamed.onnx", *SHOTS]


def answers_that_are_no_numbers(_: Patch) -> Sequence[str]:
    model = onnx.load(TEACHER)
    bias = model.graph.initializer[-1]
    bias.raw_data = np.full(np.prod(bias.dims, dtype=int), np.nan, np.float32).tobytes()
    onnx.save(model, "nan.onnx")
    return ["verify", TEACHER, "nan.onnx", *SHOTS]


def miscut(patch: Patch) -> Sequence[str]:
    """Plant a defect: the cut graph answers otherwise than the masked one."""
    import xdonnx.job

    cut = xdonnx.job.cut

    def wrong(*arguments: object) -> onnx.ModelProto:
        model = cut(*arguments)
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                values = onnx.numpy_helper.to_array(tensor) * 1.5
                tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), tensor.name))
        return model

    patch.setattr(xdonnx.job, "cut", wrong)
    return JOB


def blank_images(_: Patch) -> Sequence[str]:
    np.save("blank.npy", np.full((9, 1, 16, 16), np.nan, np.float32))
    return ["verify", TEACHER, TEACHER, "--shots", "blank.npy"]


def raises(where: str, error: BaseException, command: Sequence[str] = VERIFY) -> Callable[[Patch], Sequence[str]]:
    """Return a command in which a function of ours fails."""

    def plant(patch: Patch) -> Sequence[str]:
        def fail(*_: object, **__: object) -> None:
            raise error

        patch.setattr(where, fail)
        return command

    return plant


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("code", "prepare", "says"),
    [
        (0, same(*VERIFY, "--max-drop", "0"), "PASSED"),
        (0, same(*JOB, "--max-drop", "100"), "PASSED"),
        (1, raises("xdonnx.verification.measure_cost", ZeroDivisionError("planted")), "ZeroDivisionError: planted"),
        (1, raises("xdonnx.job.cut", AssertionError("planted"), JOB), "defect of xdonnx"),
        (2, same("verify", TEACHER), "STUDENT"),
        (2, same("compres", TEACHER), "compress"),
        (2, same(*VERIFY, "--max-dropp", "1"), "--max-drop"),
        (2, same(*VERIFY, "--max-drop", "-1"), "no limit"),
        (2, same(*VERIFY, "--warn-only", "max-drops"), "Did you mean 'max_drop'?"),
        (2, same(*JOB, "--macs", "30%"), "Give one target"),
        (2, same("gate", "none"), "no report at 'none'"),
        (3, same(*JOB, "--min-shrink", "99%"), "min_shrink"),
        (3, same(*VERIFY, "--min-shrink", "1%"), "min_shrink"),
        (4, unreadable, "letter.onnx"),
        (4, same("verify", TEACHER, "none.onnx", *SHOTS), "no model at 'none.onnx'"),
        (5, same("compress", TEACHER, "--shots", "none", "-o", "student.onnx"), "no shots at 'none'"),
        (5, blank_images, "finite"),
        (6, renamed_output, "'scores"),
        (6, answers_that_are_no_numbers, "not finite"),
        (6, miscut, "differ"),
        (7, same(*JOB, "--exclude", "*"), "no channel may go"),
        (7, same("compress", TEACHER, *SHOTS, "--macs", "0.1%", "-o", "student.onnx"), "reach"),
        (8, same(*VERIFY, "--device", "cuda:9"), "xdonnx doctor"),
        (8, same(*JOB, "--device", "cuda:9"), "cuda:9"),
        (8, raises("xdonnx.delivery.write_proto", FULL, JOB), "the disk is full"),
        (8, raises("os.replace", FULL, JOB), "No space left"),
        (8, raises("xdonnx.verification.compare", MemoryError("planted")), "out of memory"),
        (130, raises("xdonnx.verification.compare", KeyboardInterrupt()), "interrupted"),
    ],
)
def test_every_exit_code_is_what_the_command_ends_with(
    here: Path, monkeypatch: Patch, code: int, prepare: Callable[[Patch], Sequence[str]], says: str
) -> None:
    command = prepare(monkeypatch)

    ended = call(*command, width=200)

    assert ended.code == code, ended.err
    assert says in ended.out + ended.err and "Traceback" not in ended.err
    passed = code == 0 and command[0] == "compress"
    assert (here / "student.onnx").exists() is passed, "only a student that passed may be shipped"
    assert not [name for name in listing(here) if name.startswith(".")], "nothing half-written stays"


def test_a_process_ends_with_the_code_of_the_command(here: Path) -> None:
    program = [sys.executable, "-c", "from xdonnx_cli.app import main; main()"]
    done = subprocess.run(
        [*program, *VERIFY, "--min-shrink", "1%"], cwd=here, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3 and done.stdout.startswith("REJECTED"), done.stderr


def test_an_interrupt_from_the_keyboard_is_130(here: Path) -> None:
    program = [sys.executable, "-c", "from xdonnx_cli.app import main; main()"]
    job = [*JOB[:4], "--preset", "unit", "--preset-effort", "best", "-v", "-o", "student.onnx"]
    with subprocess.Popen([*program, *job], cwd=here, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = next((line for line in process.stderr if line.startswith("shots")), "")
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=120)

    assert first and process.returncode == 130 and "Traceback" not in rest
    assert listing(here) == {}


@dataclass(frozen=True)
class Saved:
    """A student that lost something in every respect, and the job that made it."""

    folder: Path
    report: Report
    values: dict[str, float]


# The flag, the key of the report, and a step that is far less than what is usually shown.
GATES = [
    ("--max-drop", "max_drop", 1e-7),
    ("--max-error", "max_error", 1e-9),
    ("--min-shrink", "min_shrink", 1e-9),
    ("--max-latency-ratio", "max_latency_ratio", 1e-8),
]
LIMITS = ["--max-drop", "100", "--max-error", "100", "--min-shrink", "0", "--max-latency-ratio", "100"]


def timed(median: float) -> Latency:
    return Latency(median=median, q1=median, q3=median, provider="CPUExecutionProvider", threads=1, runs=200, batch=1)


@pytest.fixture(scope="module")
def clock() -> Iterator[None]:
    """Stop the time: the teacher takes 2 ms and the student 1.8."""
    with Patch.context() as patch:
        patch.setattr("xdonnx.verification.latency", lambda *_, **__: [timed(2.0), timed(1.8)])
        yield


@pytest.fixture(scope="module")
def saved(clock: None, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("saved")
    ended = call(*JOB[:-1], folder / "student.onnx", *LIMITS)
    assert ended.code == 0, ended.err
    report = read_report(folder / "student.report")
    values = {gate.name: gate.value for gate in report.gates if gate.value is not None}
    assert values["max_drop"] > 1 and values["max_error"] > 0.01 and values["max_latency_ratio"] == 0.9
    assert 0.1 < values["min_shrink"] < 0.9
    return Saved(folder, report, values)


def limit(saved: Saved, key: str, step: float) -> str:
    return f"{saved.values[key] + step:.10f}"


# The limit's distance from what was measured, in steps, and whether an upper limit is kept there.
@pytest.mark.parametrize(("off", "kept"), [(-1, False), (0, True), (1, True)], ids=["below", "at", "above"])
@pytest.mark.parametrize(("flag", "key", "step"), GATES, ids=[key for _, key, _ in GATES])
@pytest.mark.parametrize("command", ["compress", "verify", "gate"])
def test_a_gate_is_kept_at_its_limit_and_broken_by_the_least_beyond(
    saved: Saved, here: Path, command: str, flag: str, key: str, step: float, off: int, kept: bool
) -> None:
    passed = off <= 0 if key == "min_shrink" else kept
    asked = [flag, limit(saved, key, off * step)]

    ended = judged(command, saved, [*asked, "--json", "report.json"])

    assert ended.code == (0 if passed else 3), ended.err
    assert ended.out.startswith("PASSED" if passed else "REJECTED")
    report = json.loads((here / "report.json").read_text())
    (result,) = (gate for gate in report["gates"] if gate["name"] == key)
    assert result["value"] == result["bound"] == saved.values[key] and result["passed"] is passed
    assert [line.partition(":")[0] for line in report["reasons"]] == ([] if passed else [key])
    if command == "compress":
        assert (here / "student.onnx").exists() is passed
        assert (here / "student.rejected.onnx").exists() is not passed


def judged(command: str, saved: Saved, limits: Sequence[str]) -> Ended:
    """Run a command that judges the same student."""
    if command == "compress":
        return call(*JOB, "--force", *limits)
    if command == "gate":
        return call("gate", saved.folder / "student.report", *limits)
    draw = ["--max-shots", "30", "--holdout", "0.2"]
    return call("verify", TEACHER, saved.folder / "student.onnx", *SHOTS, *draw, *limits)


@pytest.mark.parametrize("command", ["compress", "verify", "gate"])
def test_with_a_confidence_the_bound_is_judged_by_every_command(saved: Saved, here: Path, command: str) -> None:
    assert saved.report.fidelity and saved.report.fidelity.drop
    drop = saved.report.fidelity.drop
    high, inside = f"{drop.high:.10g}", f"{(drop.value + drop.high) / 2:.2f}"

    assert judged(command, saved, ["--max-drop", inside]).code == 0
    assert judged(command, saved, ["--max-drop", inside, "--confidence", "95%"]).code == 3
    assert judged(command, saved, ["--max-drop", high, "--confidence", "0.95"]).code == 0


@pytest.mark.parametrize("command", ["compress", "verify", "gate"])
def test_a_gate_that_only_warns_breaks_nothing(saved: Saved, here: Path, command: str) -> None:
    ended = judged(command, saved, ["--max-drop", "0.5", "--warn-only", "max-drop"])
    assert ended.code == 0 and ended.out.startswith("PASSED") and "warning max_drop" in ended.out


@pytest.mark.parametrize(
    ("flag", "name", "figures", "says"),
    [
        ("smaller", "smaller", {"bytes": 10**9}, "the file did not shrink"),
        ("removed", "removed", {"params": 10**9, "nonzero": 10**9}, "nothing was removed"),
        ("not-slower", "not_slower", {"latency_ms": timed(2.2)}, "slower than the teacher"),
    ],
)
def test_compress_rejects_a_student_that_is_better_for_nothing_unless_that_is_meant(
    saved: Saved, here: Path, monkeypatch: Patch, flag: str, name: str, figures: dict[str, object], says: str
) -> None:
    import xdonnx.verification

    timed_costs = xdonnx.verification._timed

    def worse(*arguments: object, **how: object) -> list[object]:
        teacher, student = timed_costs(*arguments, **how)
        return [teacher, student.model_copy(update=figures)]

    monkeypatch.setattr(xdonnx.verification, "_timed", worse)

    rejected = call(*JOB, width=200)
    assert rejected.code == 3 and says in rejected.out and f"--warn-only {flag}" in rejected.out
    assert (here / "student.rejected.onnx").exists() and not (here / "student.onnx").exists()
    (reason,) = read_report(here / "student.report").reasons
    assert reason.startswith(f"{name}: ")

    allowed = call(*JOB, "--warn-only", flag)
    assert allowed.code == 0 and f"warning {name}" in allowed.out and (here / "student.onnx").exists()
    # A saved report is asked the same again, and what only warned only warns.
    again = call("gate", here / "student.report", "--max-drop", "100")
    assert again.code == 0 and f"warning {name}" in again.out
