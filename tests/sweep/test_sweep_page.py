"""report.html of a sweep: everything in it, nothing loaded, and marks where the numbers say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from xdonnx.report import FileInfo, tool
from xdonnx.sweep.chart import SHAPES, TALL, TOP, chart
from xdonnx.sweep.page import page
from xdonnx.sweep.results import Mean, PointResult, SweepResults, TeacherResult, TrialResult

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
VOID = {"meta", "link", "br", "img"}
FILE = FileInfo(path="dir/<teacher>.onnx", sha256="0" * 64, bytes=1000)


def point(model: str, method: str, cost: float, quality: float, **more: Any) -> PointResult:
    facts = {"done": 2, "passed": 2, "optimal": False, "trials": (f"{model}{method}0", f"{model}{method}1")}
    return PointResult(
        model=model,
        choices={"method": method, "keep": cost},
        cost=Mean(mean=cost, std=0.01),
        quality=Mean(mean=quality, std=0.5),
        **facts | more,
    )


def trial(key: str, model: str, **more: Any) -> TrialResult:
    facts = {"status": "passed", "exit_code": 0, "macs": 0.5, "accuracy": 90.0, "seconds": 1.0, "command": "xdonnx …"}
    return TrialResult(key=key, folder=f"trials/{key}", model=model, choices={"method": "a"}, seed=0, **facts | more)


def results(**changes: Any) -> SweepResults:
    """Return two models, one of them with a method that fails altogether, one whose name wants to be a tag."""
    found = [
        point("one", "cross", 0.2, 90.0, optimal=True),
        point("one", "cross <b>", 0.5, 95.0, optimal=True),
        point("one", "thinet", 0.6, 94.0, passed=0),
        point("one", "l1-norm", 0.4, 10.0, passed=1),
        point("two", "cross", 0.3, 80.0, optimal=True),
    ]
    trials = [trial("a", "one"), trial("b", "two", status="failed", reason="out of reach: <i>", exit_code=7)]
    facts = {
        "title": "Title & more",
        "status": "complete",
        "exit_code": 0,
        "started": "2026-11-21T08:00:00+00:00",
        "seconds": 12.0,
        "taken": 2,
        "tool": tool(),
        "command": "xdonnx sweep 'my sweep.toml'",
        "file": FILE,
        "backend": "serial",
        "cost": "macs",
        "quality": "accuracy",
        "seeds": (0, 1),
        "search": None,
        "models": tuple(TeacherResult(name=name, file=FILE, macs=5000, accuracy=96.0) for name in ("one", "two")),
        "points": tuple(found),
        "trials": tuple(trials),
        "warnings": ("latency is unsure",),
    }
    return SweepResults(**facts | changes)


class Reader(HTMLParser):
    """Checks that every tag is closed, and keeps texts and what is referred to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.references: list[str] = []
        self.goes_on = False
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag == "wbr":
            self.goes_on = True
        elif tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del tag, attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            # Where a line may be broken a word goes on.
            self.words.append(self.words.pop() + data if self.goes_on and self.words else data)
        self.goes_on = False


def test_the_page_says_what_came_of_it_and_loads_nothing() -> None:
    html = page(results())
    read = Reader(html)
    text = " ".join(" ".join(read.words).split())

    order = ["Title & more", "Passed. 2 trials: 1 passed, 1 failed.", "one", "two", "No student", "Warnings", "Trials"]
    at = [text.index(part, text.index("Passed.") if part in ("one", "two") else 0) for part in order]
    assert at == sorted(at)
    for part in ("20.0 ± 1.0 %", "90.00 ± 0.50 %", "cross <b>", "out of reach: <i>", "xdonnx sweep 'my sweep.toml'"):
        assert part in text
    # A trial's own report lies beside the page; a reader may follow the link, the page itself does not.
    assert set(read.references) == {"data:,", "trials/a/report.json"}
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttp", html)
    assert "default-src 'none'" in html


def test_the_best_are_marked_and_the_cheapest_comes_first() -> None:
    html = page(results())
    rows = re.findall(r'<tr class="(best)?" data-cost="([\d.]+)" data-quality="([\d.]+)">', html)
    assert rows == [
        ("best", "0.2", "90.0"),
        ("", "0.4", "10.0"),
        ("best", "0.5", "95.0"),
        ("", "0.6", "94.0"),
        ("best", "0.3", "80.0"),
    ]
    assert html.count("★</span>") == 3


def test_marks_stand_where_their_numbers_say() -> None:
    whole = results()
    drawn = chart(whole, whole.models[0])
    assert drawn is not None
    marks = drawn["marks"]

    # Per cent of the axis between two known points is linear in the cost; pixels fall as the quality rises.
    xs = {mark["facts"][1][1]: mark["x"] for mark in marks}
    assert (xs["0.5"] - xs["0.2"]) / (xs["0.6"] - xs["0.2"]) == pytest.approx(0.75, abs=1e-3)
    assert all(0 < mark["x"] < 100 and TOP <= mark["y"] <= TOP + TALL for mark in marks)
    ys = [mark["y"] for mark in marks]
    assert ys[2] < ys[3] < ys[0] and drawn["teacher"] < ys[2]
    # What fails altogether would hide the rest, and stands at the edge.
    assert [mark["beyond"] for mark in marks] == [False, True, False, False] and TOP + TALL - 20 < ys[1] < TOP + TALL
    assert [mark["passed"] for mark in marks] == [True, True, True, False]
    low, high = marks[0]["tall"]
    assert low > marks[0]["y"] > high and low - marks[0]["y"] == pytest.approx(marks[0]["y"] - high, abs=0.02)
    ends = [(step["x1"], step["y1"], step["x2"], step["y2"]) for step in drawn["front"]]
    assert ends == [
        (xs["0.2"], TOP + TALL, xs["0.2"], ys[0]),
        (xs["0.5"], ys[2], 100.0, ys[2]),
        (xs["0.2"], ys[0], xs["0.5"], ys[0]),
        (xs["0.5"], ys[0], xs["0.5"], ys[2]),
    ]
    assert len({(one["colour"], one["shape"]) for one in drawn["series"]}) == len(drawn["series"]) == 4
    assert all(shape.startswith("M") for shape in SHAPES)


def test_an_error_is_the_better_the_lower() -> None:
    found = tuple(point("one", name, cost, error) for name, cost, error in (("a", 0.2, 0.5), ("b", 0.5, 0.1)))
    found = tuple(each.model_copy(update={"optimal": True}) for each in found)
    whole = results(quality="error", points=found)
    drawn = chart(whole, whole.models[0])
    assert drawn is not None and drawn["teacher"] is None
    assert [mark["beyond"] for mark in drawn["marks"]] == [False, False]
    assert drawn["marks"][0]["y"] < drawn["marks"][1]["y"]


def test_a_sweep_of_which_nothing_is_done_has_a_page_too() -> None:
    waiting = trial("a", "one", status="waiting", exit_code=None, macs=None, accuracy=None, seconds=None, command="")
    empty = results(points=(), trials=(waiting,), exit_code=130, status="interrupted", search={"sampler": "tpe",
                    "trials": 3, "batch": 1, "seed": 0})  # fmt: skip
    text = " ".join(Reader(page(empty)).words)
    assert "Interrupted. 1 trial: 1 to be done." in text and "No trial gave a student yet." in text


READER = """
<script>
addEventListener("load", () => {
  const model = document.querySelector(".model"), shown = () => model.querySelector(".readout b").textContent;
  const found = {page: document.documentElement.scrollWidth, window: innerWidth};
  document.querySelectorAll("details").forEach((part) => { part.open = true; });
  found.unfolded = document.documentElement.scrollWidth;
  found.hidden = model.querySelector(".readout").hidden;
  const mark = model.querySelector(".mark.optimal");
  mark.dispatchEvent(new MouseEvent("click", {bubbles: true}));
  found.first = shown(); found.row = model.querySelector("tr.on").dataset.cost;
  model.querySelector("tbody tr:last-child").click(); found.last = shown();
  model.querySelector("[data-key=quality]").click();
  found.sorted = [...model.querySelectorAll("tbody tr")].map((row) => row.dataset.quality).join();
  const wide = model.querySelector(".pareto").getBoundingClientRect();
  const marks = [...model.querySelectorAll(".mark path")].map((part) => part.getBoundingClientRect());
  found.inside = marks.every((box) => box.left >= wide.left - 8 && box.right <= wide.right + 8);
  console.log("FOUND " + JSON.stringify(found));
});
</script></body>"""


@pytest.mark.skipif(not BROWSER, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_works_in_a_browser_without_errors_or_requests(tmp_path: Path, width: int) -> None:
    (tmp_path / "page.html").write_text(page(results()).replace("</body>", READER), encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        f'<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe>'
    )
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--hide-scrollbars",
        "--virtual-time-budget=2000", f"--user-data-dir={tmp_path / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking",
        "--disable-component-update", "--window-size=1400,1000", "--dump-dom",
        (tmp_path / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    (line,) = [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    match = re.search(r'FOUND ({.*})"?, source', line)
    assert match, line
    found = json.loads(match[1].replace('\\"', '"'))
    assert found["page"] <= found["window"] == width and found["unfolded"] <= width
    assert found["hidden"] and found["inside"]
    assert found["first"] == "method cross, keep 0.2" and found["row"] == "0.2"
    assert found["last"] == "method thinet, keep 0.6"
    assert found["sorted"] == "95.0,94.0,90.0,10.0"
