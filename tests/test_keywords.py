"""Every flag of a command is a keyword of the library, and does what the flag does."""

from __future__ import annotations

import contextlib
import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import xdonnx
import xdonnx.job
import xdonnx.judging
from xdonnx.keywords import CompressOptions, DecomposeOptions, SharedOptions, VerifyOptions
from xdonnx_cli.app import run
from xdonnx_cli.compress import compress as compress_command
from xdonnx_cli.decomposing import decompose as decompose_command
from xdonnx_cli.grouping import grouped
from xdonnx_cli.judging import verify as verify_command
from xdonnx_cli.options import flags_of

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
    "input_shape": ({"image": (1, 3, 16, 16)}, ["image:1x3x16x16"]),
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
    "size": ("10 MB", ["10MB"]),
    "latency": (0.7, ["70%"]),
    "smallest": (True, []),
    "keep": (0.25, ["0.25"]),
    "energy": (0.8, ["80%"]),
    "rank": (3, ["3"]),
    "scheme": ("channel", ["channel"]),
    "plan": ("plan.toml", ["plan.toml"]),
    "student": (OTHER, [OTHER]),
    "match": ("match.toml", ["match.toml"]),
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
    "adversarial": (False, []),
    "preset_effort": ("fast", ["fast"]),
    "pool": (["p", "q"], ["p", "q"]),
    "pool_draw": ("uniform", ["uniform"]),
    "force": (True, []),
    "external_data": ("never", ["never"]),
    "resume": (True, []),
    "memory": ("2GB", ["2GB"]),
}  # fmt: skip


class Stop(Exception):
    """Ends a command where its work would begin; carries what it was about to do."""


def flags(command: Any) -> set[str]:
    # Of verify an argument, of compress a flag.
    positional = POSITIONAL - {"student"} if command is compress_command else POSITIONAL
    return set(flags_of(grouped(command))) - OF_THE_TERMINAL - positional


def typed(name: str) -> list[str]:
    """Return an option as it is typed: a switch alone, several values each behind the flag."""
    off = "no-" if EXAMPLES[name][0] is False else ""
    flag, texts = f"--{off}{name.replace('_', '-')}", EXAMPLES[name][1]
    return [part for text in texts for part in (flag, text)] or [flag]


@pytest.mark.parametrize(
    ("command", "kind"),
    [(compress_command, CompressOptions), (verify_command, VerifyOptions), (decompose_command, DecomposeOptions)],
)
def test_every_flag_has_a_keyword_of_its_name_and_no_keyword_is_without_a_flag(command: Any, kind: type) -> None:
    keywords = set(kind.__annotations__) - WHOLE

    assert keywords == flags(command)
    assert keywords - {"report_dir"} <= set(EXAMPLES), "give the new option an example"


def test_every_field_of_a_job_can_be_given() -> None:
    assert set(xdonnx.Job.model_fields) <= set(CompressOptions.__annotations__) | POSITIONAL


@pytest.mark.parametrize("kind", [CompressOptions, VerifyOptions, DecomposeOptions])
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
    monkeypatch.setattr("xdonnx.wanted.read_planfile", lambda _: SimpleNamespace(structure="channel"))
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
    with contextlib.suppress(Stop):
        xdonnx.compress(TEACHER, "s", "s.onnx")
    assert (called_job == jobs[2]) is (name is None), "an example that changes nothing shows nothing"


@pytest.mark.parametrize("name", [None, *sorted(DecomposeOptions.__annotations__)])
def test_an_option_decomposes_as_its_flag_does_and_so_does_none(
    name: str | None, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    def caught(model: Path, out: Path, wish: Any, *, sizes: Any, log: Any, **how: Any) -> None:
        defaults = {"force": False, "external_data": "auto", "writes": True}
        found.append((model, out, wish, dict(sizes or {}), defaults | how))
        raise Stop

    for module in ("xdonnx.api", "xdonnx.decomposition"):
        monkeypatch.setattr(f"{module}.decomposed", caught)

    run(["decompose", TEACHER, "-o", "s.onnx", *(typed(name) if name else [])])
    for given in ({} if name is None else {name: EXAMPLES[name][0]}, {}):
        with contextlib.suppress(Stop):
            xdonnx.decompose(TEACHER, "s.onnx", **given)

    typed_one, called_one, called_none = found
    assert called_one == typed_one
    assert (called_one == called_none) is (name is None), "an example that changes nothing shows nothing"


def test_gate_and_preprocess_stand_for_their_fields(jobs: list[Any]) -> None:
    for given in (
        {"preset": "tf", "color": "bgr", "max_drop": 2, "confidence": 0.9},
        {"preprocess": xdonnx.Preprocess("tf", color="bgr"), "gate": xdonnx.Gate(max_drop=2, confidence=0.9)},
    ):
        with pytest.raises(Stop):
            xdonnx.compress(TEACHER, "s", "s.onnx", **given)

    assert jobs[0] == jobs[1]


def outcome(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what two models were compared on in a form that can be compared itself."""
    shots, gate, device, seed = given
    labels = None if shots.labels is None else tuple(shots.labels)
    pixels = np.asarray(shots.inputs["image"])
    return pixels.shape, pixels.tobytes(), labels, shots.ids, gate, device, seed


@pytest.fixture(scope="module")
def verdict(digits: tuple[np.ndarray, np.ndarray]) -> xdonnx.Report:
    return xdonnx.verify(TEACHER, TEACHER, (digits[0][:9], digits[1][:9]), preset="unit")


@pytest.fixture
def judged(here: Path, monkeypatch: pytest.MonkeyPatch, verdict: xdonnx.Report) -> list[Any]:
    """Return what models are compared on from here on; each time the same is found."""
    found: list[Any] = []

    def caught(_: Any, __: Any, shots: Any, gate: Any, *, device: str, seed: int, **___: Any) -> xdonnx.Report:
        found.append(outcome((shots, gate, device, seed)))
        return verdict

    monkeypatch.setattr(xdonnx.judging, "verify", caught)
    monkeypatch.setattr("xdonnx.doctor.usable", lambda _: True)
    return found


@pytest.fixture
def scenes(here: Path, digits: tuple[np.ndarray, np.ndarray]) -> dict[str, tuple[str, str | None]]:
    """Return teacher and samples on which an option makes a difference; under '' those for most of them."""
    images, labels = digits[0][:60], digits[1][:60]
    np.savez("s.npz", images=images, labels=labels)
    Path("labels.txt").write_text("\n".join(str(9 - label) for label in labels))
    Path("bad").mkdir()
    for at, image in enumerate(images[:12]):
        Image.fromarray(image).save(f"bad/{at:02}.png")
        if at % 2:
            Path(f"bad/{at:02}.png").write_bytes(b"")
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[N,3,H,W] image) => (float[N,3,H,W] y) { y = Relu (image) }'
    onnx.save(onnx.parser.parse_model(text), "free.onnx")
    colours = np.random.default_rng(0).integers(0, 256, (8, 20, 24, 3), np.uint8)
    np.savez("colours.npz", images=colours)
    np.save("last.npy", colours.astype(np.float32))
    free = ("free.onnx", "colours.npz")
    return {
        "": (OTHER, "s.npz"), "skip_bad": (OTHER, "bad"), "synthetic_shots": (OTHER, None), "color": free, "crop": free,
        "input_shape": free, "layout": ("free.onnx", "last.npy"),
    }  # fmt: skip


def of_both(
    name: str | None, scene: tuple[str, str | None], judged: list[Any], capsys: pytest.CaptureFixture[str]
) -> tuple[Any, Any]:
    """Return what an option comes to when it is typed and when it is called: what was compared, or what went wrong."""
    ends: list[Any] = []
    teacher, shots = scene
    judged.clear()
    given = [] if shots is None else ["--shots", shots]
    code = run(["verify", teacher, TEACHER, *given, "--json", "-", *(typed(name) if name else [])])
    shown = capsys.readouterr()
    ends.append((*judged, json.loads(shown.out)["warnings"]) if judged else (code, shown.err))
    judged.clear()
    try:
        report = xdonnx.verify(teacher, TEACHER, shots, **({} if name is None else {name: EXAMPLES[name][0]}))
        ends.append((*judged, list(report.warnings)))
    except xdonnx.XdonnxError as error:
        ends.append((error.exit_code, f"error: {error}\n"))
    return ends[0], ends[1]


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) & set(VerifyOptions.__annotations__)))
def test_an_option_judges_what_its_flag_judges_and_that_is_not_what_none_judges(
    name: str, scenes: dict[str, tuple[str, str | None]], judged: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    scene = scenes.get(name, scenes[""])

    typed_one, called_one = of_both(name, scene, judged, capsys)
    typed_none, called_none = of_both(None, scene, judged, capsys)

    assert called_one == typed_one and called_none == typed_none
    assert typed_one != typed_none, "an example that changes nothing shows nothing"
    assert isinstance(typed_one[0], tuple), f"the example is an error: {typed_one}"


def test_all_that_reading_warns_of_is_in_the_report_as_it_is_from_the_command(
    scenes: dict[str, tuple[str, str | None]], judged: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The other preset fits better; six files were left out; noise says little: the commands alone said so."""
    np.savez("twice.npz", **{k: np.concatenate([v, v]) for k, v in np.load("s.npz").items()})
    scenes |= {"preset": (TEACHER, str(SAMPLES / "held_out.npz")), "holdout": (OTHER, "twice.npz")}
    said = {"preset": "may not reach the teacher", "skip_bad": "left out 6 of 12", "synthetic_shots": "random noise",
            "holdout": "held-out samples are also among those that fit"}  # fmt: skip
    for name, words in said.items():
        typed_one, called_one = of_both(None if name == "preset" else name, scenes[name], judged, capsys)
        assert called_one == typed_one and any(words in text for text in typed_one[-1]), (name, typed_one[-1])


def test_labels_come_separately_too(judged: list[Any], scenes: Any, digits: tuple[np.ndarray, np.ndarray]) -> None:
    turned = 9 - digits[1][:60]
    for shots, labels in (("s.npz", "labels.txt"), ("s.npz", turned), (digits[0][:60], turned)):
        xdonnx.verify(OTHER, TEACHER, shots, labels=labels, preset="unit")

    assert [found[2] for found in judged] == [tuple(turned)] * 3


def test_labels_are_of_the_rows_before_any_is_left_out(judged: list[Any], scenes: Any) -> None:
    """Twenty labels for twenty files, seven of them unreadable, were '20 labels for 13 rows'."""
    for labels in (list(range(12)), np.arange(12), torch.arange(12)):
        xdonnx.verify(OTHER, TEACHER, "bad", skip_bad=True, labels=labels)
        assert judged[-1][2:4] == ((0, 2, 4, 6, 8, 10), tuple(f"{at:02}.png" for at in range(0, 12, 2)))
    with pytest.raises(xdonnx.ShotsError, match="6 labels for 12 rows"):
        xdonnx.verify(OTHER, TEACHER, "bad", skip_bad=True, labels=range(6))
