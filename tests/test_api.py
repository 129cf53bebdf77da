"""The library does what the commands do: same options, same defaults, same students; and takes samples from memory."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import xdonnx
import xdonnx.api
import xdonnx.job
import xdonnx.memory
import xdonnx.verification
from xdonnx.events import Event
from xdonnx.keywords import CompressOptions, SharedOptions, VerifyOptions
from xdonnx.model import Port, fingerprint
from xdonnx_cli.app import run
from xdonnx_cli.compress import compress as compress_command
from xdonnx_cli.grouping import grouped
from xdonnx_cli.judging import verify as verify_command

SAMPLES = Path(__file__).parents[1] / "samples"
TEACHER = str(SAMPLES / "digits_mobile.onnx")
OTHER = str(SAMPLES / "digits_vgg.onnx")
# What a terminal needs; Python has the report itself, `progress`, and `xdonnx.job.prepared` for a dry run.
OF_THE_TERMINAL = {"json", "quiet", "verbose", "no_progress", "dry_run", "context", "config", "help"}
POSITIONAL = {"model", "out", "teacher", "student", "shots"}
# Python's own, each for several flags at once.
WHOLE = {"preprocess", "gate"}

# Of each option a value that is not its default, and how it is typed.
EXAMPLES: dict[str, tuple[Any, list[str]]] = {
    "labels": ("labels.txt", ["labels.txt"]),
    "per_class": (2, ["2"]),
    "max_shots": (30, ["30"]),
    "holdout": (0.5, ["50%"]),
    "skip_bad": (True, []),
    "synthetic_shots": (7, ["7"]),
    "preset": ("unit", ["unit"]),
    "mean": (0.25, ["0.25"]),
    "std": ([0.5], ["0.5"]),
    "scale": (127.0, ["127"]),
    "color": ("gray", ["gray"]),
    "layout": ("nhwc", ["nhwc"]),
    "resize": (20, ["20"]),
    "crop": (16, ["16"]),
    "input_shape": ({"image": (1, 1, 16, 16)}, ["image:1x1x16x16"]),
    "max_drop": (1, ["1"]),
    "max_error": (0.5, ["0.5"]),
    "min_shrink": (0.1, ["10%"]),
    "max_latency_ratio": (2, ["2"]),
    "confidence": (0.9, ["90%"]),
    "warn_only": ("max-drop", ["max-drop"]),
    "strict": (True, []),
    "device": ("cuda:0", ["cuda:0"]),
    "seed": (3, ["3"]),
    "macs": (0.4, ["40%"]),
    "params": (0.4, ["0.4"]),
    "keep": (0.25, ["0.25"]),
    "plan": ("plan.toml", ["plan.toml"]),
    "structure": ("2:4", ["2:4"]),
    "include": (["a*", "b"], ["a*", "b"]),
    "exclude": ("c", ["c"]),
    "round_to": (8, ["8"]),
    "residual": (True, []),
    "allocation": ("uniform", ["uniform"]),
    "method": (["l1-norm", "tune"], ["l1-norm", "tune"]),
    "connection": ("soft", ["soft"]),
    "mu": (0.3, ["0.3"]),
    "alpha": (0.2, ["0.2"]),
    "beta": (0.1, ["0.1"]),
    "solver": ("pgd", ["pgd"]),
    "ridge": (0.01, ["0.01"]),
    "views": (5, ["5"]),
    "steps": (4, ["4"]),
    "preset_effort": ("fast", ["fast"]),
    "force": (True, []),
    "external_data": ("never", ["never"]),
}  # fmt: skip


class Stop(Exception):
    """Ends a command where its work would begin; carries what it was about to do."""


def flags(command: Any) -> set[str]:
    return set(inspect.signature(grouped(command)).parameters) - OF_THE_TERMINAL - POSITIONAL


def typed(name: str) -> list[str]:
    """Return an option as it is typed: a switch alone, several values each behind the flag."""
    flag, texts = f"--{name.replace('_', '-')}", EXAMPLES[name][1]
    return [part for text in texts for part in (flag, text)] or [flag]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    with np.load(SAMPLES / "held_out.npz") as held:
        return held["images"], held["labels"]


# The same options


@pytest.mark.parametrize(("command", "kind"), [(compress_command, CompressOptions), (verify_command, VerifyOptions)])
def test_every_flag_has_a_keyword_of_its_name_and_no_keyword_is_without_a_flag(command: Any, kind: type) -> None:
    keywords = set(kind.__annotations__) - WHOLE

    assert keywords == flags(command)
    assert keywords - {"report_dir"} <= set(EXAMPLES), "give the new option an example"


def test_every_field_of_a_job_can_be_given() -> None:
    assert set(xdonnx.Job.model_fields) <= set(CompressOptions.__annotations__) | POSITIONAL


@pytest.mark.parametrize("kind", [CompressOptions, VerifyOptions])
def test_every_keyword_is_described(kind: type) -> None:
    text = (inspect.getdoc(SharedOptions) or "") + "\n" + (inspect.getdoc(kind) or "")

    described = {
        word.strip(" ,")
        for line in text.splitlines()
        if not line.startswith(" ")
        for word in line.partition(" :")[0].split(", ")
    }
    assert set(kind.__annotations__) <= described


@pytest.fixture
def jobs(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the jobs that are about to run, none of which does."""
    found: list[Any] = []

    def caught(job: Any, *_: Any, **__: Any) -> None:
        found.append(job.model_dump())
        raise Stop

    monkeypatch.setattr(xdonnx.job, "run", caught)
    monkeypatch.setattr(xdonnx.job, "read_planfile", lambda _: SimpleNamespace(structure="channel"))
    return found


@pytest.mark.parametrize("name", [None, *sorted(set(EXAMPLES) & set(CompressOptions.__annotations__))])
def test_an_option_makes_the_job_that_its_flag_makes_and_so_does_none(name: str | None, jobs: list[Any]) -> None:
    given = {} if name is None else {name: EXAMPLES[name][0]}
    plain = name == "synthetic_shots"

    run(["compress", TEACHER, *([] if plain else ["--shots", "s"]), "-o", "s.onnx", *(typed(name) if name else [])])
    with contextlib.suppress(Stop):
        xdonnx.compress(TEACHER, None if plain else "s", "s.onnx", **given)

    typed_job, called_job = jobs
    assert called_job == typed_job


def test_gate_and_preprocess_stand_for_their_fields(jobs: list[Any]) -> None:
    for given in (
        {"preset": "tf", "color": "bgr", "max_drop": 2, "confidence": 0.9},
        {"preprocess": xdonnx.Preprocess("tf", color="bgr"), "gate": xdonnx.Gate(max_drop=2, confidence=0.9)},
    ):
        with pytest.raises(Stop):
            xdonnx.compress(TEACHER, "s", "s.onnx", **given)

    assert jobs[0] == jobs[1]


@pytest.fixture
def judged(here: Path, monkeypatch: pytest.MonkeyPatch, digits: tuple[np.ndarray, np.ndarray]) -> list[Any]:
    """Return what two models are about to be compared on; nothing is compared."""
    found: list[Any] = []

    def caught(_: Any, __: Any, shots: Any, gate: Any, *, device: str, seed: int, **___: Any) -> None:
        found.append((shots.inputs["image"].tobytes(), shots.labels, gate, device, seed))
        raise Stop

    np.savez(here / "s.npz", images=digits[0][:60], labels=digits[1][:60])
    (here / "labels.txt").write_text("\n".join(str(9 - label) for label in digits[1][:60]))
    for module, name in ((xdonnx.verification, "verify"), (xdonnx.api, "compare")):
        monkeypatch.setattr(module, name, caught)
    monkeypatch.setattr("xdonnx.doctor.usable", lambda _: True)
    return found


@pytest.mark.parametrize("name", [None, *sorted(set(EXAMPLES) & set(VerifyOptions.__annotations__))])
def test_an_option_judges_what_its_flag_judges_and_so_does_none(name: str | None, judged: list[Any]) -> None:
    given = {} if name is None else {name: EXAMPLES[name][0]}
    plain = name == "synthetic_shots"
    shots = ([], None) if plain else (["--shots", "s.npz"], "s.npz")

    run(["verify", OTHER, TEACHER, *shots[0], *(typed(name) if name else [])])
    with contextlib.suppress(Stop):
        xdonnx.verify(OTHER, TEACHER, shots[1], **given)

    (pixels, labels, *rest), (own_pixels, own_labels, *own_rest) = judged
    assert own_pixels == pixels and own_rest == rest
    assert np.array_equal(own_labels, labels) if labels is not None else own_labels is None


# The same students


def test_arrays_and_a_model_in_memory_make_the_student_that_files_make_to_the_byte(
    here: Path, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = digits[0][:60], digits[1][:60]
    np.savez(here / "s.npz", images=images, labels=labels)
    how = ["--preset", "unit", "--method", "l1-norm", "--keep", "0.7", "--max-drop", "90", "--warn-only", "not-slower"]
    assert run(["compress", TEACHER, "--shots", "s.npz", "-o", "typed.onnx", *how, "-q"]) == 0

    heard: list[Event] = []
    options = {"preset": "unit", "method": "l1-norm", "keep": 0.7, "max_drop": 90, "warn_only": "not-slower"}
    report = xdonnx.compress(onnx.load(TEACHER), (images, labels), "called.onnx", progress=heard.append, **options)

    assert fingerprint("called.onnx") == fingerprint("typed.onnx")
    assert report.files.student and report.files.student.path == "called.onnx"
    assert report.files.teacher and report.files.teacher.path == "(in memory)"
    assert {event.stage for event in heard} >= {"read", "shots", "fit", "cut", "verify", "latency"}
    # Both leave a report beside the student, and these agree in all but times and names.
    typed_report, saved = xdonnx.read_report("typed.report"), xdonnx.read_report("called.report")
    assert saved == report
    assert saved.fidelity and typed_report.fidelity
    assert {**dict(saved.fidelity), "worst": ()} == {**dict(typed_report.fidelity), "worst": ()}
    assert [layer.kept for layer in saved.layers] == [layer.kept for layer in typed_report.layers]
    assert "xdonnx.compress(<ModelProto>, <tuple>, 'called.onnx', preset='unit'" in saved.command
    assert "/tmp" not in json.dumps(saved.model_dump(exclude={"warnings"}))


def test_a_student_can_stay_in_memory_and_a_rejected_one_goes_nowhere(
    here: Path, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    student, kept = onnx.ModelProto(), {"method": "l1-norm", "keep": 0.7, "preset": "unit", "warn_only": "not-slower"}

    passed = xdonnx.compress(TEACHER, digits, student, max_shots=20, **kept)
    again = xdonnx.verify(TEACHER, student, digits, preset="unit", max_drop=100)
    rejected = onnx.ModelProto()
    failed = xdonnx.compress(TEACHER, digits, rejected, max_shots=20, min_shrink=0.99, **kept)
    only_asked = xdonnx.compress(TEACHER, digits, max_shots=20, **kept)

    assert passed.exit_code == 0 and passed.student and again.student
    assert len(student.SerializeToString()) == passed.student.bytes < Path(TEACHER).stat().st_size
    assert again.student.macs == passed.student.macs
    assert failed.exit_code == 3 and failed.reasons and not rejected.graph.node
    assert only_asked.student and only_asked.student.macs == passed.student.macs
    assert list(here.iterdir()) == []
    with pytest.raises(xdonnx.JobError, match="holds a graph already"):
        xdonnx.compress(TEACHER, digits, student, **kept)


def test_verify_writes_a_report_only_where_it_is_told_to(here: Path, digits: tuple[np.ndarray, np.ndarray]) -> None:
    report = xdonnx.verify(OTHER, TEACHER, digits, xdonnx.Gate(min_shrink=0.999), preset="unit")
    assert (report.status, report.exit_code) == ("rejected", 3) and list(here.iterdir()) == []

    report = xdonnx.verify(OTHER, TEACHER, digits, max_drop=1, preset="unit", report_dir="verdict")

    assert report.exit_code == 0 and xdonnx.read_report("verdict") == report
    assert report.fidelity and report.fidelity.samples == 450 and report.fidelity.held_out


# Samples from memory

PORT = (Port("image", "float32", (None, 1, 16, 16)),)
UNIT = xdonnx.Preprocess("unit")


def batches(images: np.ndarray, labels: np.ndarray, size: int = 4) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(images), size):
        yield images[start : start + size], labels[start : start + size]


def loader(images: np.ndarray, labels: np.ndarray) -> Any:
    pixels = torch.tensor(images[:, None] / 255.0, dtype=torch.float32, requires_grad=True)
    data = torch.utils.data.TensorDataset(pixels, torch.tensor(labels))
    return torch.utils.data.DataLoader(data, batch_size=4)


FORMS = {
    "tuple": lambda images, labels: (images, labels),
    "dict": lambda images, labels: {"image": images, "labels": labels},
    "dict of another name": lambda images, labels: {"pixels": images, "label": labels},
    "batches": batches,
    "last batch smaller": lambda images, labels: batches(images, labels, 7),
    "gray batches without labels": lambda images, labels: (part for part, _ in batches(images, labels, 19)),
    "batches as dicts": lambda images, labels: ({"images": i, "labels": n} for i, n in batches(images, labels)),
    "single samples": lambda images, labels: list(zip(images[:, None], labels, strict=True)),
    "pictures": lambda images, labels: [(Image.fromarray(i), int(n)) for i, n in zip(images, labels, strict=True)],
    "coloured pictures": lambda images, labels: [
        (Image.fromarray(i).convert("RGB"), int(n)) for i, n in zip(images, labels, strict=True)
    ],
    "torch loader": loader,
    "torch dataset": lambda images, labels: loader(images, labels).dataset,
}


@pytest.mark.parametrize("form", FORMS)
def test_samples_are_the_same_in_whatever_form_they_come(form: str, digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits[0][:22], digits[1][:22]

    found = xdonnx.memory.gather(FORMS[form](images, labels), PORT, UNIT, labels=labels if "without" in form else None)

    expected = images[:, None].astype(np.float32) / 255
    assert found.inputs["image"].dtype == np.float32
    assert np.allclose(found.inputs["image"], expected, rtol=0, atol=1e-7)
    assert found.labels is not None and np.array_equal(found.labels, labels) and len(set(found.ids)) == 22


@pytest.mark.parametrize("give", [lambda x: x, list, iter, lambda x: {"image": x}, torch.tensor], ids=str)
def test_samples_need_no_labels(give: Any, digits: tuple[np.ndarray, np.ndarray]) -> None:
    values = digits[0][:6, None].astype(np.float32)

    found = xdonnx.memory.gather(give(values), PORT, UNIT)

    assert found.labels is None and np.array_equal(found.inputs["image"], values)


def test_several_inputs_come_as_tuples_or_dicts() -> None:
    ports = (Port("a", "float32", (None, 3)), Port("b", "int64", (None, 2)))
    generator = np.random.default_rng(0)
    a, b, labels = generator.random((6, 3), np.float32), generator.integers(0, 9, (6, 2)), np.arange(6)

    forms = [(a, b, labels), {"a": a, "b": b, "labels": labels}, list(zip(a, b, labels, strict=True))]
    for form in forms:
        found = xdonnx.memory.gather(form, ports, UNIT)
        assert np.array_equal(found.inputs["a"], a) and np.array_equal(found.inputs["b"], b)
        assert found.labels is not None and np.array_equal(found.labels, labels)


def test_an_endless_loader_is_asked_for_no_more_than_the_job_needs(
    here: Path, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    asked = []

    def endless() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for at in itertools.count():
            asked.append(at)
            yield digits[0][at : at + 1], digits[1][at : at + 1]

    report = xdonnx.compress(TEACHER, endless(), preset="unit", method="l1-norm", keep=0.8, max_shots=12, holdout=0.4)

    # So many fit, and two fifths of all judge.
    assert report.fit_samples == 12 and report.fidelity and report.fidelity.samples == 8 and len(asked) == 20


def test_an_endless_loader_ends_with_a_warning_where_nobody_says_how_many(
    monkeypatch: pytest.MonkeyPatch, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    heard: list[Event] = []
    forever = ((digits[0][at % 450][None], digits[1][at % 450][None]) for at in itertools.count())

    monkeypatch.setattr(xdonnx.memory, "MOST_ROWS", 50)
    rows = xdonnx.memory.gather(forever, PORT, UNIT, log=heard.append)
    monkeypatch.setattr(xdonnx.memory, "MOST_BYTES", 10 * 256)
    bytes_ = xdonnx.memory.gather(forever, PORT, UNIT, log=heard.append)

    assert len(rows) == 50 and len(bytes_) == 10
    warned = [event.text for event in heard if event.level == "warning"]
    assert ["first 50 samples" in warned[0], "first 10 samples" in warned[1]] == [True, True]


def test_others_can_judge_from_memory_and_shots_can_be_read_before(
    here: Path, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = digits
    ports = xdonnx.read_net(xdonnx.read_proto(TEACHER)).interface.inputs
    before = xdonnx.read_shots([str(SAMPLES / "shots")], ports, UNIT)

    report = xdonnx.compress(
        TEACHER, before, holdout=(images[:40], labels[:40]), method="l1-norm", keep=0.8, preset="unit", report_dir="r"
    )

    assert report.fit_samples == 100 and report.fidelity and report.fidelity.samples == 40
    assert report.job["holdout"] == "tuple in memory" and report.job["shots"] == ["Shots in memory"]
    assert [path.name for path in here.iterdir()] == ["r"]


def test_labels_come_separately_too(judged: list[Any], digits: tuple[np.ndarray, np.ndarray]) -> None:
    turned = 9 - digits[1][:60]
    for shots, labels in (("s.npz", "labels.txt"), ("s.npz", turned), (digits[0][:60], turned)):
        with pytest.raises(Stop):
            xdonnx.verify(OTHER, TEACHER, shots, labels=labels, preset="unit")

    assert all(np.array_equal(labels, turned) for _, labels, *_ in judged) and len(judged) == 3


# Mistakes

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 16, 16), np.uint8)


@pytest.mark.parametrize(
    ("shots", "options", "kind", "words"),
    [
        (IMAGES, {"max_drp": 1}, xdonnx.JobError, "unknown option 'max_drp'. Did you mean 'max_drop'?"),
        (IMAGES, {"macs": "half"}, xdonnx.JobError, "macs is 'half'"),
        (IMAGES, {"max_drop": "1%"}, xdonnx.JobError, "max_drop is '1%'"),
        (IMAGES, {"seed": 0.5}, xdonnx.JobError, "seed is 0.5"),
        (IMAGES, {"max_drop": 1, "gate": xdonnx.Gate()}, xdonnx.JobError, "gate and max_drop are both given"),
        (IMAGES, {"preset": "unit", "preprocess": UNIT}, xdonnx.JobError, "preprocess and preset are both given"),
        (IMAGES, {"synthetic_shots": 3}, xdonnx.JobError, "both given"),
        (IMAGES, {"labels": "labels.txt"}, xdonnx.JobError, "labels is a file"),
        (IMAGES, {"labels": [1, 2]}, xdonnx.ShotsError, "labels"),
        (IMAGES, {"macs": 0.5, "keep": 0.5}, xdonnx.JobError, "--keep and --macs are both given"),
        (None, {}, xdonnx.JobError, "no samples"),
        ("nowhere", {}, xdonnx.ShotsError, "no shots at 'nowhere'"),
        (iter(()), {}, xdonnx.ShotsError, "yields no samples"),
        (5, {}, xdonnx.ShotsError, "int in memory holds no samples"),
        ({1, 2}, {}, xdonnx.ShotsError, "set in memory gives single numbers"),
        (["a.png", IMAGES], {}, xdonnx.ShotsError, "holds no numbers"),
        (np.zeros((8, 3, 3), np.float32), {}, xdonnx.ShotsError, r"wants \(N, 1, 16, 16\)"),
        ((IMAGES, IMAGES, IMAGES), {}, xdonnx.ShotsError, "gives 3 things at once"),
        ((IMAGES, np.arange(5)), {}, xdonnx.ShotsError, "5"),
        ({"a": IMAGES, "b": IMAGES}, {}, xdonnx.ShotsError, "wanted and not there: 'image'"),
        ([(IMAGES, np.arange(8)), IMAGES], {}, xdonnx.ShotsError, "labels some of its batches"),
    ],
)
def test_a_mistake_is_an_error_of_the_library(
    shots: Any, options: dict[str, Any], kind: type[Exception], words: str, here: Path
) -> None:
    with pytest.raises(kind, match=words):
        xdonnx.compress(TEACHER, shots, "student.onnx", **options)
    assert list(here.iterdir()) == []


def test_verify_costs_no_torch(tmp_path: Path) -> None:
    code = f"""
import sys, numpy as np, xdonnx
images = np.random.default_rng(0).integers(0, 256, (9, 16, 16), np.uint8)
report = xdonnx.verify({TEACHER!r}, {TEACHER!r}, images, preset="unit", max_drop=0)
assert report.exit_code == 0 and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, check=True)
