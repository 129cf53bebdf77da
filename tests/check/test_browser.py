"""The page in a real browser, where one is installed: no errors, no requests, no sideways scroll, and a live plot."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from reports import full_report
from test_page import large_report, tries

from xdonnx.page import page

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium is installed")

# Does what a reader does, and tells the console what the page then shows.
READER = """
<script>
addEventListener("load", () => {
  const plot = document.querySelector(".cols"), shown = () => document.querySelector(".readout b").textContent;
  const key = (name) => plot.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
  const at = (share) => {
    const place = plot.getBoundingClientRect(), x = place.left + share * plot.clientWidth;
    plot.dispatchEvent(new PointerEvent("pointermove", {clientX: x, clientY: place.top + 50, bubbles: true}));
    return shown();
  };
  const found = {page: document.documentElement.scrollWidth, window: innerWidth, first: shown()};
  plot.focus();
  found.focused = document.activeElement === plot;
  key("ArrowRight"); found.second = shown();
  key("End"); found.last = shown(); found.now = plot.getAttribute("aria-valuenow");
  key("ArrowRight"); found.beyond = shown();
  found.told = plot.getAttribute("aria-valuetext");
  plot.scrollLeft = 0; found.pointed = at(0.001);
  document.querySelector("[data-key=error]").click();
  key("Home"); found.worst = shown();
  found.row = document.querySelector(".layers tbody tr th").textContent;
  key("End"); found.best = shown();
  found.pressed = document.querySelector("[data-key=error]").getAttribute("aria-pressed");
  document.querySelectorAll("details").forEach((part) => { part.open = true; });
  found.unfolded = document.documentElement.scrollWidth;
  const inside = (part) => {
    const box = part.getBoundingClientRect(), card = part.closest("section").getBoundingClientRect();
    return !box.width || box.left >= card.left && box.right <= card.right;
  };
  // The headings of columns go where each number has its own.
  found.inside = [...document.querySelectorAll(".tried text, .tried circle, .layers td")].every(inside);
  found.reached = [...document.querySelectorAll(".scroll")].every((part) => part.tabIndex === 0);
  const drawn = document.querySelector("svg.tried"), card = drawn.closest("section");
  found.filled = drawn.getBoundingClientRect().width / card.clientWidth;
  console.log("FOUND " + JSON.stringify(found));
});
</script></body>"""


def browse(folder: Path, html: str, width: int) -> list[str]:
    """Open a page in a frame of some width and return what the console said."""
    (folder / "page.html").write_text(html, encoding="utf-8")
    (folder / "frame.html").write_text(
        f'<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe>'
    )
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--hide-scrollbars",
        "--virtual-time-budget=2000", f"--user-data-dir={folder / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--disable-component-update",
        "--window-size=1400,1000", "--dump-dom",
        (folder / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [390, 1280])
def test_two_hundred_layers_can_be_read_by_key_pointer_and_order(tmp_path: Path, width: int) -> None:
    report = large_report().model_copy(update={"tries": tries()})
    names = [layer.layer for layer in report.layers]
    errors = [layer.objective_after for layer in report.layers]

    (line,) = browse(tmp_path, page(report).replace("</body>", READER), width)

    found = json.loads(re.search(r'FOUND ({.*})"?, source', line)[1].replace('\\"', '"'))
    assert found["page"] <= found["window"] == width and found["unfolded"] <= width
    assert found["inside"] and found["reached"] and 0.75 < found["filled"] < 1
    assert found["focused"] and (found["first"], found["second"], found["pointed"]) == (names[0], names[1], names[0])
    assert found["last"] == found["beyond"] == names[-1] and found["now"] == "200"
    assert found["told"].startswith(names[-1]) and "kept 4 of 8" in found["told"]
    assert found["worst"] == found["row"] == names[errors.index(max(e for e in errors if e is not None))]
    assert found["best"] == names[max(at for at, error in enumerate(errors) if error is None)]
    assert found["pressed"] == "true"


def test_a_page_without_layers_has_no_errors_either(tmp_path: Path) -> None:
    assert browse(tmp_path, page(full_report(layers=())), 390) == []


def test_the_page_itself_forbids_requests_and_the_console_would_tell_of_one(tmp_path: Path) -> None:
    html = page(full_report()).replace("</main>", '<img src="https://example.org/a.png"></main>')
    (line,) = browse(tmp_path, html, 390)
    assert "example.org/a.png" in line and "Content Security Policy" in line
