"""The report's keys are a promise: they survive JSON, validate, and read across versions."""

from __future__ import annotations

import io
import json
from html import unescape
from pathlib import Path

import jsonschema
import pytest
from pydantic import ValidationError
from reports import PIXEL, full_report, layer
from rich.console import Console

from xdonnx.errors import JobError, MachineError
from xdonnx.limits import compared, doubtful
from xdonnx.page import page
from xdonnx.publication import write_report
from xdonnx.report import FileInfo, Files, Report, gist, preset_of, read_report, schema, tool
from xdonnx.summary import summary
from xdonnx_cli.show import show

# As the documentation of the command line lists them.
PROMISED = {
    "": "schema_version status exit_code reasons started seconds tool command job seed device files teacher student"
    " fidelity gates layers interface warnings",
    "/tool": "name version onnx onnxruntime torch",
    "/files": "teacher student shots",
    "/files/teacher": "path sha256 bytes",
    "/student": "bytes params nonzero macs latency_ms",
    "/student/latency_ms": "median q1 q3 provider threads",
    "/fidelity": "samples held_out top1_agreement accuracy_teacher accuracy_student drop outputs",
    "/fidelity/drop": "value low high confidence",
    "/fidelity/outputs/0": "name relative_l2 max_abs cosine",
    "/gates/0": "name value bound limit unit level passed",
    "/layers/0": "layer op kept units params_before params_after macs_before macs_after objective_before"
    " objective_after seconds note",
    "/interface": "inputs outputs opset metadata",
}


@pytest.fixture(autouse=True)
def no_step_summary(monkeypatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


def test_a_report_survives_the_disk(tmp_path: Path) -> None:
    report = full_report()
    write_report(report, tmp_path / "out.report")
    assert read_report(tmp_path / "out.report" / "report.json") == report
    assert read_report(tmp_path / "out.report") == report
    assert sorted(file.name for file in (tmp_path / "out.report").iterdir()) == [
        "junit.xml",
        "report.html",
        "report.json",
        "summary.md",
    ]


def test_a_report_is_printed_without_its_pictures() -> None:
    """Each worst sample printed some 3 kB of base64."""
    report = full_report()
    assert PIXEL in report.model_dump_json()
    assert "base64" not in repr(report) and "base64" not in str(report.fidelity) and "cat/7.png" in repr(report)


def test_the_outcome_of_zeroed_weights_names_what_it_counts() -> None:
    """It said '10.5 % of the weights' above a row 'weights' of 99.2 %."""
    teacher = full_report().teacher
    zeroed = teacher.model_copy(update={"params": 396, "nonzero": 42, "bytes": 500})
    report = full_report(student=zeroed)
    assert gist(report).startswith("10.5 % of the weights not zero, 25.0 % of the bytes, accuracy")


def unlabelled(**changes) -> Report:
    """Return a report on samples without labels whose compared output holds coordinates."""
    facts = {"accuracy_teacher": None, "accuracy_student": None, "classifier": "box", "classes": 4}
    fidelity = full_report().fidelity.model_copy(update={**facts, **changes})
    return full_report(fidelity=fidelity, gates=())


def test_every_form_says_whose_largest_number_is_compared_without_labels() -> None:
    """The argmax of coordinates was given as an agreement of 99.00 %, of nothing in particular."""
    report, words = unlabelled(), "largest of 'box', (N, 4)"
    text = Console(file=io.StringIO(), width=80, highlight=False)
    show(text, report)
    said = " ".join(text.file.getvalue().split())

    assert f"| top-1 agreement |  | 94.00 % | {words} |" in summary(report) and f">{words}<" in unescape(page(report))
    assert "agreement 94.00 % largest of box, (N, 4)" in said
    assert "'box', (N, 4), is taken for scores of classes: if it holds none, judge by --max-error" in said


@pytest.mark.parametrize(
    ("changes", "words", "doubted"),
    [
        ({}, "largest of 'box', (N, 4)", True),
        ({"classes": 10}, "largest of 'box', (N, 10)", False),
        ({"probable": True}, "largest of 'box', (N, 4)", False),
        ({"accuracy_teacher": 90.0, "accuracy_student": 88.0}, "", False),
        ({"classes": None}, "largest of 'box'", False),
        ({"classifier": None, "classes": None, "top1_agreement": None, "drop": None}, "", False),
    ],
    ids=["coordinates", "ten classes", "probabilities", "labels", "an older report", "no scores"],
)
def test_only_a_few_numbers_without_labels_are_doubted_to_be_scores(changes: dict, words: str, doubted: bool) -> None:
    report = unlabelled(**changes)
    assert compared(report.fidelity) == words and bool(doubtful(report)) is doubted
    judged = full_report().gates[0].model_copy(update={"name": "max_error"})
    assert not doubtful(report.model_copy(update={"gates": (judged,)}))


def test_of_several_outputs_the_compared_one_is_named_with_labels_too() -> None:
    fidelity = full_report().fidelity
    two = (*fidelity.outputs, fidelity.outputs[0].model_copy(update={"name": "box"}))
    found = fidelity.model_copy(update={"outputs": two, "classifier": "logits", "classes": 5})
    assert compared(found) == "largest of 'logits', (N, 5)" and not doubtful(full_report(fidelity=found))


def test_the_written_report_has_the_promised_keys_and_keeps_its_schema(tmp_path: Path) -> None:
    write_report(full_report(), tmp_path)
    raw = json.loads((tmp_path / "report.json").read_text())

    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(raw, schema())
    for place, keys in PROMISED.items():
        part = raw
        for step in place.split("/")[1:]:
            part = part[int(step) if step.isdigit() else step]
        assert set(keys.split()) <= set(part), place
    assert raw["interface"]["inputs"] == "same" and raw["interface"]["opset"] == ["opset 18, the teacher has 17"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw.pop("status"),
        lambda raw: raw.update(status="fine"),
        lambda raw: raw["gates"][0].update(passed="perhaps"),
        lambda raw: raw["teacher"].pop("bytes"),
    ],
)
def test_a_damaged_report_neither_validates_nor_reads(tmp_path: Path, damage) -> None:
    raw = json.loads(full_report().model_dump_json())
    damage(raw)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(raw, schema())
    (tmp_path / "report.json").write_text(json.dumps(raw))
    with pytest.raises(JobError, match="is damaged"):
        read_report(tmp_path)


def test_what_a_newer_minor_version_adds_is_passed_over(tmp_path: Path) -> None:
    raw = json.loads(full_report().model_dump_json())
    raw["schema_version"] = "1.7"
    raw["energy"] = {"joules": 3}
    raw["gates"][0]["colour"] = "red"
    raw["fidelity"]["drop"]["p_value"] = 0.1
    jsonschema.validate(raw, schema())
    (tmp_path / "report.json").write_text(json.dumps(raw))
    assert read_report(tmp_path) == full_report(schema_version="1.7")


OLD = """{
  "schema_version": "1.0", "status": "rejected", "exit_code": 3,
  "reasons": ["max_drop: 2.00 points, allowed at most 1 points"],
  "started": "2026-03-01T08:00:00+00:00", "seconds": 12.3,
  "tool": {"name": "xdonnx", "version": "0.1.0", "onnx": "1.17", "onnxruntime": "1.20", "torch": null},
  "command": "xdonnx verify a.onnx b.onnx --shots c", "job": {}, "seed": 3, "device": "cpu",
  "files": {"teacher": {"path": "a.onnx", "sha256": "ab", "bytes": 2000}, "student": null, "shots": null},
  "teacher": {"bytes": 2000, "params": 400, "nonzero": 399, "macs": 5000, "latency_ms": null},
  "student": {"bytes": 1000, "params": 200, "nonzero": 200, "macs": 2500, "latency_ms": null},
  "fidelity": {
    "samples": 50, "held_out": true, "top1_agreement": 94.0, "accuracy_teacher": 90.0, "accuracy_student": 88.0,
    "drop": {"value": 2.0, "low": -3.1, "high": 8.2, "confidence": 0.95, "of": "accuracy", "method": "tango",
             "lost": 2, "gained": 1},
    "smallest_drop": 8.0,
    "outputs": [{"name": "logits", "relative_l2": 0.12, "low": null, "high": null, "confidence": null,
                 "max_abs": 1.5, "cosine": 0.99, "agreement": null}]
  },
  "gates": [{"name": "max_drop", "value": 2.0, "bound": 2.0, "limit": 1.0, "unit": "points", "level": "fail",
             "passed": false}],
  "layers": [], "interface": {"inputs": "same", "outputs": "same", "opset": "same", "metadata": "same"},
  "warnings": [], "fit_samples": null
}"""


def test_a_report_of_the_first_schema_reads_and_is_drawn_in_every_form(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(OLD)
    report = read_report(tmp_path)
    assert report.schema_version == "1.0" and report.fidelity.worst == () and report.fidelity.drop.lost == 2
    jsonschema.validate(json.loads(OLD), schema())
    drawn = write_report(report, tmp_path / "again")
    assert [path.name for path in drawn] == ["report.json", "summary.md", "junit.xml", "report.html"]
    assert read_report(drawn[0]) == report and "Rejected" in drawn[3].read_text()


def test_a_report_of_another_major_version_names_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"schema_version": "2.1", "tool": {"version": "3.4.5"}}')
    with pytest.raises(JobError, match=r"has schema 2\.1, this xdonnx reads 1\.\d.\n.*pip install xdonnx==3\.4\.5"):
        read_report(tmp_path)


def test_a_report_that_cannot_be_drawn_leaves_what_was_there(tmp_path: Path, monkeypatch) -> None:
    write_report(full_report(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(MachineError, match="No space left"):
        write_report(full_report(seconds=99.0), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_older_report_without_the_optional_keys_reads(tmp_path: Path) -> None:
    raw = json.loads(full_report().model_dump_json())
    for optional in ("layers", "warnings", "interface", "reasons"):
        del raw[optional]
    del raw["fidelity"]["smallest_drop"]
    (tmp_path / "report.json").write_text(json.dumps(raw))
    assert read_report(tmp_path).fidelity.drop.high == 8.2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no report at"),
        ("not json", "it is not JSON"),
        ("[1, 2]", "names no schema_version"),
        ('{"a": 1}', "names no schema_version"),
        ('{"schema_version": "2.0"}', r"has schema 2\.0"),
        ('{"schema_version": "1.0"}', "is damaged"),
        (b"\xff\xfe\x00", "it is not JSON"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(JobError, match=message):
        read_report(path)


def test_a_report_that_json_could_not_hold_is_never_made() -> None:
    with pytest.raises(ValidationError, match="finite"):
        full_report(seconds=float("nan"))
    with pytest.raises(ValidationError, match="Extra inputs"):
        full_report(statsu="passed")


def test_nothing_in_a_report_can_be_changed() -> None:
    report = full_report()
    with pytest.raises(ValidationError, match="frozen"):
        report.status = "passed"
    with pytest.raises(ValidationError, match="frozen"):
        report.gates[0].passed = True


def test_the_summary_says_verdict_gates_figures_worst_layers_and_command() -> None:
    text = summary(full_report())
    assert text.startswith("# xdonnx: a.onnx: rejected (exit code 3)\n")
    assert "| max_drop | 2.00 points | 2.00 points | 1 points | **failed** |" in text
    assert "| bytes | 2,000 | 1,000 | 50.0 % |" in text
    assert "| top-1 accuracy | 90.00 % | 88.00 % |" in text
    assert "2.00 (-3.10 to 8.20 at 95 %)" in text
    assert "50 held-out samples can show" in text
    assert "```\nxdonnx compress 'my model.onnx' -o out.onnx\n```" in text
    listed = [line.split(" ")[1] for line in text.splitlines() if line.startswith("| conv")]
    # A bar in a layer's name would open another column.
    assert listed == [f"conv\\|{number}" for number in (2, 5, 6, 3, 4)]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        (r"a\|b", r"a\\\|b"),
        ("<img src=x onerror=alert(1)>", r"\<img src=x onerror=alert(1)\>"),
        ("a&lt;b", r"a\&lt;b"),
        ("[x](http://y)", r"\[x\](http://y)"),
        ("`a` *b* __init__", r"\`a\` \*b\* \_\_init\_\_"),
        ("max_pool_2", "max_pool_2"),
    ],
)
def test_a_name_means_nothing_to_markdown(name: str, written: str) -> None:
    text = summary(full_report(layers=(layer(0, 0.5).model_copy(update={"layer": name}),), warnings=(name,)))
    assert f"| {written} | Conv | 4 of 8 |" in text and f"\n- {written}\n" in text


@pytest.mark.parametrize("preprocess", ["unit", ["unit"], {"preset": 3}, None])
def test_a_job_in_words_of_another_tool_is_drawn_all_the_same(tmp_path: Path, preprocess: object) -> None:
    report = full_report(job={"preprocess": preprocess})
    drawn = write_report(report, tmp_path)
    assert read_report(tmp_path) == report and "preset" not in drawn[3].read_text().split("</main>")[-1]
    assert preset_of(full_report(job={"preprocess": {"preset": "unit"}})) == "unit"


def test_a_report_with_a_byte_order_mark_reads(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(full_report().model_dump_json(), encoding="utf-8-sig")
    assert read_report(tmp_path) == full_report()


def test_the_summary_never_passes_sixty_lines() -> None:
    gate = full_report().gates[0]
    report = full_report(
        reasons=tuple(f"reason {number}\nwith a break" for number in range(100)),
        warnings=tuple(f"warning {number}" for number in range(100)),
        layers=tuple(layer(number, 1.0) for number in range(200)),
        gates=(gate,) * 4,
        given=full_report().fidelity,
        command="xdonnx " + "--exclude a\n" * 1000,
    )
    assert len(summary(report).splitlines()) <= 60
    assert "and 95 more" in summary(report)


def test_a_summary_says_which_models_and_what_to_try_next() -> None:
    pair = Files(
        teacher=FileInfo(path="in/teacher.onnx", sha256="a", bytes=1),
        student=FileInfo(path="out\\my|student.onnx", sha256="b", bytes=1),
    )
    text = summary(full_report(files=pair))
    assert text.startswith("# xdonnx: teacher.onnx → my\\|student.onnx: rejected (exit code 3)\n")
    assert (
        "Next: remove less, or give more samples; the most accurate is --method cross --preset-effort best.\n" in text
    )
    assert "Next:" not in summary(full_report(status="passed", exit_code=0))


def test_a_report_of_a_job_that_failed_early_has_a_summary() -> None:
    report = full_report(
        status="failed",
        exit_code=5,
        reasons=("no shots",),
        teacher=None,
        student=None,
        fidelity=None,
        gates=(),
        layers=(),
        interface=None,
        warnings=(),
    )
    assert "- no shots" in summary(report) and "|" not in summary(report)


def test_the_summary_is_appended_to_the_step_summary_that_github_names(tmp_path: Path, monkeypatch) -> None:
    step = tmp_path / "step.md"
    step.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(step))
    for _ in range(2):
        write_report(full_report(), tmp_path / "report")
    assert step.read_text() == "before\n" + 2 * summary(full_report())


def test_a_step_summary_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "nowhere" / "step.md"))
    events = []
    write_report(full_report(), tmp_path / "report", log=events.append)
    assert [event.level for event in events] == ["warning"]
    assert read_report(tmp_path / "report") == full_report()


def test_a_folder_that_cannot_be_written_is_the_machines_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot write the report"):
        write_report(full_report(), tmp_path / "file")


def test_the_tool_names_the_versions_in_use() -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    found = tool()
    assert (found.name, found.onnx, found.onnxruntime) == ("xdonnx", onnx.__version__, onnxruntime.__version__)
