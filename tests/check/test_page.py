"""report.html: one file with everything in it, the verdict first, and nothing in it that a name could break."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser

import pytest
from reports import PIXEL, full_report, gate, layer, shot

from xdonnx.limits import limited
from xdonnx.matches import MatchResult
from xdonnx.page import page
from xdonnx.plot import curve
from xdonnx.report import Fidelity, FileInfo, LayerResult, OutputError, Report
from xdonnx.sheet import INDICATORS, PoolImage, PoolSheet
from xdonnx.summary import summary
from xdonnx.tries import Try

# Elements that have no end tag.
VOID = {"meta", "link", "img", "br"}


class Reader(HTMLParser):
    """Checks that every tag is closed, and keeps texts, tags and what is referred to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID and tag != "wbr":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            # Where a line may be broken a word goes on.
            goes_on = self.tags[-1][0] == "wbr" and self.words
            self.words.append(self.words.pop() + data if goes_on else data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def large_report(count: int = 200) -> Report:
    """Return a report of many layers with long names and the most worst samples."""
    layers = tuple(
        layer(number, None if number % 7 == 3 else 10.0 ** -(number % 5)).model_copy(
            update={"layer": f"/backbone/stages.{number}/a_long_name/BatchNormalization_output_{number}"}
        )
        for number in range(count)
    )
    fidelity = full_report().fidelity.model_copy(update={"worst": tuple(shot(row) for row in range(8))})
    return full_report(layers=layers, fidelity=fidelity)


def test_the_page_says_first_what_came_of_it_and_why() -> None:
    text = Reader(page(full_report())).text
    order = ["Rejected", "max_drop: 2.00 points, allowed at most 1 points", "Gates", "Before and after", "Layers"]
    order += ["Worst samples", "Interface", "Warnings", "The job", "Files"]
    at = [text.index(part, 0 if part == "Rejected" else text.index("Rejected")) for part in order]
    assert at == sorted(at)


def test_the_page_holds_the_numbers_of_the_report() -> None:
    text = Reader(page(full_report(fit_samples=30))).text
    for part in (
        "50.0 % of the MACs, 50.0 % of the bytes, accuracy 90.00 → 88.00 %",
        "fitted on 30, judged on 50 held-out samples",
        "2,000 1,000 50.0 %",
        "quartiles 1.800 to 2.200",
        "-3.10 to 8.20 at 95 % confidence",
        "50 samples can show 8.00 points at best",
        "lost 2, gained 1",
        "smallest drop, points that so many samples can tell from none",
        "largest difference 1.5; cosine 0.990000",
        "opset 18, the teacher has 17",
        "50 held-out samples can show a drop of 8.00 points at best",
        "xdonnx compress 'my model.onnx' -o out.onnx",
        '"method": [ "cross" ]',
        "xdonnx 0.1.0",
        "onnx 1, onnxruntime 2",
        "sha256 ab",
    ):
        assert part in text, part


def test_worst_samples_show_their_picture_and_both_answers() -> None:
    report = full_report()
    other = shot(3, label=None, thumbnail=None, relative_l2=None)
    report = full_report(fidelity=report.fidelity.model_copy(update={"worst": (shot(7), other)}))
    found = Reader(page(report))
    assert [attrs["src"] for tag, attrs in found.tags if tag == "img"] == [PIXEL]
    assert "only the teacher is right cat/7.png label cat teacher cat (4.5) student dog (2.5) error 0.5" in found.text
    assert "they disagree cat/3.png teacher cat (4.5) student dog (2.5) error no bound" in found.text


def test_layers_that_stayed_whole_are_listed_by_reason() -> None:
    def whole(name: str, note: str) -> LayerResult:
        return layer(0, None).model_copy(update={"layer": name, "kept": 8, "note": note})

    layers = (whole("a", "read by 'Resize'"), whole("b", ""), whole("c", "read by 'Resize'"), layer(9, 0.5))
    text = Reader(page(full_report(layers=layers))).text
    assert "3 of 4 layers read by 'Resize' (2) a, c left whole by the target (1) b" in text


def test_a_report_on_a_given_student_lists_nothing_as_whole_and_tells_both_students_apart() -> None:
    row = layer(0, None).model_copy(update={"kept": 8, "units": 8, "note": "0.98 sure by weights: 'a' of the student"})
    match = MatchResult(teacher=row.layer, student=("a",), kept=8, units=8, confidence=0.98, by="weights")
    read = {"student": FileInfo(path="given.onnx", sha256="ab", bytes=7)}
    report = full_report(layers=(row,), matches=(match,))
    text = Reader(page(report.model_copy(update={"files": report.files.model_copy(update={"read": read})}))).text
    assert "What stayed whole" not in text and "0.98 sure by weights: 'a' of the student" in text
    assert "given student given.onnx 7 bytes" in text


def test_the_plot_gives_its_script_every_layer_and_the_table_says_it_without() -> None:
    report = full_report()
    found = Reader(page(report))
    data = json.loads(next(script for script in found.scripts if script.lstrip().startswith("[")))
    assert [entry["name"] for entry in data] == [each.layer for each in report.layers]
    assert [entry["error"] for entry in data] == [each.objective_after for each in report.layers]
    assert [entry["kept"] for entry in data] == [0.5] * 7
    assert ["refitted", "70 %"] in data[2]["facts"]
    assert "conv|2 Conv 4 of 8 100 → 50 1.00 k 70 % 70 %" in found.text
    assert sum(attrs.get("class") == "col" for _, attrs in found.tags) == 7


def test_bars_and_marks_stand_where_their_numbers_say() -> None:
    layers = (
        layer(0, 0.01).model_copy(update={"kept": 2, "objective_before": 1.0}),
        layer(1, 0.1).model_copy(update={"kept": 8, "objective_before": 0.1}),
        layer(2, 0.0),
    )
    found = Reader(page(full_report(layers=layers)))

    def values(name: str, key: str) -> list[float]:
        return [float(attrs[key] or 0) for _, attrs in found.tags if attrs.get("class") == name]

    heights, (whole, *_) = values("kept", "height"), values("all", "height")
    assert heights == pytest.approx([whole / 4, whole, whole / 2])
    percent, tenth, top = (values("after", "y")[0], values("after", "y")[1], values("before", "y1")[0] - 2.5)
    # On a logarithmic scale the steps from 1 % to 10 % and from 10 % to 100 % are alike, and zero is at the bottom.
    assert percent - tenth == pytest.approx(tenth - top) and tenth > top
    assert values("after", "y")[2] == max(values("after", "y"))


def tries() -> tuple[Try, ...]:
    return (
        Try(asked="macs 50%", macs=0.5, drop=0.0, error=0.05, passed=True),
        Try(asked="macs 10%", macs=0.1, drop=1.5, error=0.3, passed=False),
        Try(asked="macs 20%", macs=0.2, drop=0.5, error=0.1, passed=True, chosen=True),
    )


def tried_places(found: Reader) -> tuple[list[tuple[float, float]], list[float]]:
    """Return the places of the tries that are drawn, from the fewest MACs on, and how high their limits are."""
    labels = [attrs.get("aria-label") or "" for _, attrs in found.tags]
    drawn = found.tags[next(at for at, label in enumerate(labels) if "of each try by its MACs" in label) :]
    circles = [attrs for tag, attrs in drawn if tag == "circle" and (attrs["cx"] or "").endswith("%")]
    limits = [float(attrs["y1"] or 0) for tag, attrs in drawn if tag == "line" and attrs.get("class") == "limit"]
    return [(float((one["cx"] or "").rstrip("%")), float(one["cy"] or 0)) for one in circles], limits


def test_tries_stand_where_their_numbers_say_beside_the_limit_they_were_made_for() -> None:
    """The plot was 460 pixels wide on every screen, ended at an odd number and drew no limit."""
    report = full_report(tries=tries(), job={"gate": {"max_drop": 1.0, "max_error": None}}, gates=())

    found = Reader(page(report))

    places, (limit,) = tried_places(found)
    (x1, y1), (x2, y2), (x3, y3) = places
    assert (x3 - x2) / (x2 - x1) == pytest.approx(3, abs=1e-3) and 0 < x1 < x3 < 100
    # 1.5, 0.5 and 0 points lost, and 1 allowed: half a point is as high everywhere.
    assert y3 - y2 == pytest.approx((y2 - y1) / 2, abs=0.02) and limit == pytest.approx((y1 + y2) / 2, abs=0.02)
    assert "limit: at most 1 points" in found.text
    assert "points lost 0 0.5 1 1.5 0 % 20 % 40 %" in found.text


@pytest.mark.parametrize(
    ("job", "limit"),
    [
        ({"gate": {"max_drop": None, "max_error": 0.1}}, "relative L2: at most 0.1 relative L2"),
        ({"latency": 0.6}, "latency, % of the teacher's: at most 60 %"),
        ({"latency": "1.2ms"}, "latency, % of the teacher's: at most 1.2 ms"),
        ({"latency": None, "gate": None}, "points lost: "),
        ({"latency": "quick", "gate": ["strict"]}, "latency, % of the teacher's: "),
    ],
)
def test_what_is_drawn_of_tries_is_what_the_job_limited(job: dict, limit: str) -> None:
    timed = tuple(each.model_copy(update={"latency": 2 * (each.macs or 0)}) for each in tries())
    report = full_report(tries=timed if job.get("latency") else tries(), job=job)
    drawn = curve(report)
    assert drawn is not None and f"{drawn['unit']}: {drawn['said']}" == limit
    if drawn["limit"] and job.get("latency"):  # the teacher takes 2 ms, the tries 20, 40 and 100 % of that
        one, other = drawn["points"][1]["y"], drawn["points"][2]["y"]
        assert drawn["limit"] == pytest.approx(one + (other - one) / 3, abs=0.02)


def test_names_are_broken_at_their_joints_only() -> None:
    html = page(full_report(layers=(layer(0, 0.5).model_copy(update={"layer": "/back.bone/Conv_output_0"}),)))
    assert "<wbr>/back.<wbr>bone<wbr>/Conv_<wbr>output_<wbr>0</th>" in html
    assert "&lt;" in page(full_report(layers=(layer(0, 0.5).model_copy(update={"layer": "<a/b>"}),)))


def test_names_cannot_break_out_of_the_page() -> None:
    nasty = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}"
    report = full_report(
        layers=(layer(0, 0.5).model_copy(update={"layer": nasty, "note": nasty, "kept": 8}),),
        warnings=(nasty,),
        reasons=(nasty,),
        command=nasty,
        job={nasty: nasty},
        gates=(gate(nasty),),
        fidelity=full_report().fidelity.model_copy(
            update={
                "worst": (shot(1, sample=nasty, label_name=nasty),),
                "outputs": (OutputError(name=nasty, relative_l2=1.0, max_abs=1.0, cosine=0.0),),
            }
        ),
    )
    found = Reader(page(report))
    assert [tag for tag, _ in found.tags].count("script") == 2
    assert not any("onerror" in attrs for _, attrs in found.tags)
    assert found.text.count("</script><script>alert(1)</script><img") >= 8 and "49" not in found.text


def test_nothing_is_loaded_from_anywhere() -> None:
    html = page(large_report(20))
    found = Reader(html)
    for tag, attrs in found.tags:
        for key in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attrs.get(key) or "data:").startswith("data:"), (tag, attrs)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(|https?:", html)
    (policy,) = [attrs["content"] for _, attrs in found.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_two_hundred_layers_take_less_than_a_second_and_three_megabytes() -> None:
    report = large_report()
    started = time.process_time()
    html = page(report)
    assert time.process_time() - started < 1
    assert len(html.encode()) < 3_000_000
    Reader(html)


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "failed", "exit_code": 5, "teacher": None, "student": None, "fidelity": None, "gates": (),
         "layers": (), "interface": None, "warnings": (), "files": {}},
        {"status": "passed", "exit_code": 0, "gates": (), "reasons": (), "command": "", "job": {}, "started": "today"},
        {"layers": (layer(0, None),)},
        {"layers": (layer(0, 0.0),)},
        {"layers": (layer(0, 1e-30), layer(1, 3.0))},
        {"gates": (gate("max_error", value=None, bound=None, unit="relative L2"),)},
        {"gates": (gate("max_error", value=0.0, bound=0.0, limit=0.0, unit="relative L2", passed=True),)},
        {"gates": (gate("new_gate", unit="joules"),)},
        {"fidelity": Fidelity(samples=1, held_out=False, outputs=())},
        {"fidelity": Fidelity(samples=1, held_out=True, outputs=(
            OutputError(name="ids", relative_l2=None, max_abs=None, cosine=None, agreement=50.0),))},
        {"fidelity": Fidelity(samples=2, held_out=True, outputs=tuple(
            OutputError(name=f"o{k}", relative_l2=k / 9, max_abs=1.0, cosine=None) for k in range(9)))},
    ],
    ids=["failed early", "no limit", "no error known", "zero error", "errors far apart", "no bound", "limit zero",
         "unknown gate", "nothing compared", "whole numbers", "many outputs"],
)  # fmt: skip
def test_a_page_of_any_report_is_whole(changes: dict) -> None:
    report = full_report(**changes)
    text = Reader(page(report)).text
    judged = limited(report)
    assert {"passed": "Passed" if judged else "Done", "failed": "Failed", "rejected": "Rejected"}[report.status] in text
    assert "nan" not in text.lower().split() and "None" not in text


@pytest.mark.parametrize(("low", "lost"), [(40.0, True), (-3.1, False)])
def test_no_form_says_passed_where_no_limit_was_set_and_all_say_when_much_is_lost(low: float, lost: bool) -> None:
    fidelity = full_report().fidelity
    worse = fidelity.model_copy(update={"drop": fidelity.drop.model_copy(update={"value": 60.0, "low": low})})
    asked = tuple(gate(name, value=0.5, bound=0.5, limit=1.0, passed=True) for name in ("smaller", "removed"))
    report = full_report(status="passed", exit_code=0, reasons=(), gates=asked, fidelity=worse)

    drawn, text = Reader(page(report)).text, summary(report)

    assert "Done" in drawn.split()[:4] and "No limit was set on what may be lost" in drawn
    assert "done, no limit was set (exit code 0)" in text.splitlines()[0]
    assert ("Much is lost" in drawn) == ("**Much is lost**" in text) == lost
    limit = gate("max_drop", value=60.0, bound=60.0, limit=99.0, passed=True)
    passed = report.model_copy(update={"gates": (*asked, limit)})
    assert "No limit was set" not in Reader(page(passed)).text and "passed (exit code 0)" in summary(passed)


def test_both_ends_of_a_pool_are_shown_whatever_its_images_are_called() -> None:
    def image(name: str, score: float) -> PoolImage:
        return PoolImage(sample=name, score=score, chance=0.1, thumbnail=PIXEL if score < 0 else None)

    sheet = PoolSheet(
        images=1200,
        used=1190,
        twins=10,
        unreadable=("bad.png",),
        draw="preferential",
        indicators=("mp", "dms"),
        quantiles=(-2.0, -0.5, 0.0, 0.5, 3.0),
        effective=321.4,
        most_related=(image("cats/<b>1</b>.png", -2.0),),
        least_related=(image("noise.png", 3.0),),
    )

    weights = [None, 0.3, 0.3, 0.0, 0.3, 1.0, None]
    layers = [layer(at, 0.1).model_copy(update={"pool_weight": weight}) for at, weight in enumerate(weights)]
    found = Reader(page(full_report(pool=sheet, fit_samples=10, layers=tuple(layers))))

    for words in (
        "1,190 images, preferential draw; 10 left out as samples; 1 unreadable",
        "Most related cats/<b>1</b>.png score -2.00",
        "Least related no image noise.png score 3.00",
        "of 321 images drawn evenly",
        "fitted on 10 and a pool of 1190",
        "lower is more related",
        "What a score sums Each is measured from what uniform noise scores",
        f"mp {INDICATORS['mp']} dms {INDICATORS['dms']}",
        "where all samples together have 1: 0.3 in 3 layers, 0 in 1 layer, 1 in 1 layer. Folds of the samples chose it",
    ):
        assert words in found.text, words
    assert INDICATORS["ang"] not in found.text
    assert "Weight of the pool" not in Reader(page(full_report(pool=sheet))).text
    uniform = sheet.model_copy(update={"quantiles": (), "most_related": (), "least_related": ()})
    assert "Nothing of this model says" in Reader(page(full_report(pool=uniform))).text
