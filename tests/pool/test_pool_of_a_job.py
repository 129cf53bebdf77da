"""--pool from the command line, a file of settings, Python and in a sweep: what comes of it, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import xdonnx
from xdonnx.contents import read_by
from xdonnx.errors import JobError
from xdonnx.page import page
from xdonnx.sweep.identity import key
from xdonnx.sweep.measuring import relocated
from xdonnx.wanted import Job

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
from program import SAMPLES, call

Array = NDArray[Any]
TEACHER = str(SAMPLES / "digits_mobile.onnx")
HOW = ("--shots", SAMPLES / "shots", "--preset", "unit", "--max-shots", "10", "--holdout", "0.1")
FAST = ("--preset-effort", "fast", "--views", "20", "--warn-only", "not-slower", "--warn-only", "smaller")


@pytest.fixture
def pool(here: Path, digits: tuple[Array, Array]) -> Path:
    """Return a folder of thirty digits, ten images of noise and one broken file."""
    random = np.random.default_rng(0)
    images = np.concatenate([digits[0][200:230], random.integers(0, 256, (10, 16, 16), np.uint8)])
    Path("pool").mkdir()
    for at, image in enumerate(images):
        Image.fromarray(image).save(f"pool/{at:02}.png")
    Path("pool/bad.png").write_bytes(b"")
    return Path("pool")


def test_a_job_with_a_pool_reports_what_it_drew_from_and_one_seed_gives_one_file(pool: Path) -> None:
    line = (
        "compress",
        TEACHER,
        *HOW,
        *FAST,
        "--pool",
        pool,
        "--skip-bad",
        "--method",
        "cross",
        "--method",
        "tune",
        "--steps",
        "4",
    )

    ended = [call(*line, "-o", f"{name}.onnx") for name in "ab"]

    assert [one.code for one in ended] == [0, 0], ended[0].err
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()
    raw = json.loads(Path("a.report/report.json").read_text())
    jsonschema.validate(raw, xdonnx.schema())
    found = raw["pool"]
    assert (found["images"], found["used"], found["draw"], found["unreadable"]) == (40, 40, "preferential", ["bad.png"])
    assert all(int(image["sample"][:2]) < 30 for image in found["most_related"])
    assert all(int(image["sample"][:2]) >= 30 for image in found["least_related"][:10])
    # The first layer, whose input is the teacher's, is left as it is; the effort fast makes no folds.
    assert {layer["pool_weight"] for layer in raw["layers"]} == {0.3, None}
    assert any(text.startswith("pool: left out 1 of 41 images: 'bad.png'") for text in raw["warnings"])
    assert raw["job"]["pool"] == ["pool"]
    html = Path("a.report/report.html").read_text()
    assert "What a score sums" in html and "all samples together have 1: 0.3 in " in html
    assert "Most related" in html and "40 images, preferential draw; 1 unreadable" in html
    assert html.count('<figure><img src="data:image/png;base64,') == 24 and len(html) < 200_000
    # Without a pool nothing of it is said.
    report = xdonnx.read_report("a.report").model_copy(update={"pool": None})
    assert "Most related" not in page(report)


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--pool", "none"), 5, "--pool: nothing at 'none'"),
        (("--pool", "pool"), 5, "--pool: 1 of 41 images of 'pool' cannot be used: 'bad.png' (0 bytes)"),
        (("--pool", "pool", "--pool-draw", "preferental"), 2, "Did you mean 'preferential'?"),
        (("--pool-draw", "uniform"), 2, "Pass --pool PATH."),
        (("--pool", "pool", "--method", "l1-norm"), 2, "--pool is of no use to --method l1-norm"),
        (("--pool", "pool", "--preset-effort", "paper"), 2, "--method cross with --preset-effort paper"),
        (("--pool", "a=pool", "--pool", "b=pool"), 5, "'a' is no input of the graph"),
    ],
)
def test_mistakes_are_one_error_and_nothing_is_written(
    pool: Path, flags: tuple[str, ...], code: int, words: str
) -> None:
    ended = call("compress", TEACHER, *HOW, *flags, "-o", "s.onnx", width=300)

    assert ended.code == code and words in ended.err
    assert ended.err.count("error:") == 1 and not Path("s.onnx").exists()


def test_a_pool_of_few_images_is_a_warning(pool: Path) -> None:
    for images, warned in (("pool/01.png", True), (pool, False)):
        line = ("compress", TEACHER, *HOW, *FAST, "--pool", images, "--skip-bad", "--method", "cross", "-o", "out.onnx")
        ended = call(*line, "--force")
        assert ended.code == 0, ended.err
        words = "the pool has 1 image only, drawn over and over"
        assert (words in " ".join(ended.out.split())) is warned


def test_a_dry_run_finds_the_pool_and_scores_nothing(pool: Path, cache: Path) -> None:
    assert call("compress", TEACHER, *HOW, "--pool", pool, "-o", "s.onnx", "--dry-run").code == 0
    assert call("compress", TEACHER, *HOW, "--pool", "none", "-o", "s.onnx", "--dry-run").code == 5
    assert not list(cache.iterdir())


def test_a_pool_of_a_file_goes_with_a_method_that_draws_from_one_alone(pool: Path) -> None:
    Path("deep").mkdir()
    Path("deep/xdonnx.toml").write_text('[compress]\npool = "../pool"\npool-draw = "uniform"\n')
    line = ("compress", TEACHER, *HOW, "-o", "s.onnx", "--dry-run", "--json", "-", "--config", "deep/xdonnx.toml")

    whole, plain = (json.loads(call(*line, *more).out) for more in ((), ("--method", "l1-norm")))

    assert [Path(path).resolve() for path in whole["job"]["pool"]] == [pool.resolve()]
    assert whole["job"]["pool_draw"] == "uniform" and not plain["job"]["pool"]


def test_from_python_a_pool_may_lie_in_memory(digits: tuple[Array, Array]) -> None:
    events: list[xdonnx.events.Event] = []  # type: ignore[name-defined]
    report = xdonnx.compress(
        TEACHER,
        digits[0][:12],
        pool=(digits[0][at : at + 5] for at in range(100, 130, 5)),
        pool_draw="uniform",
        preset="unit",
        holdout=digits[0][300:310],
        preset_effort="fast",
        views=0,
        warn_only=["smaller", "not-slower"],
        progress=events.append,
    )

    assert report.pool is not None and (report.pool.used, report.pool.draw) == (30, "uniform")
    assert report.job["pool"] == ["generator in memory"]
    ticks = [(event.done, event.total) for event in events if event.stage == "pool" and event.total]
    assert ticks and ticks[-1] == (30, 30)
    with pytest.raises(JobError, match="pool_draw is 3"):
        xdonnx.compress(TEACHER, digits[0][:12], pool_draw=3)  # type: ignore[arg-type]


def test_a_sweep_knows_a_result_by_what_the_pool_holds(pool: Path, here: Path) -> None:
    def job(**more: Any) -> Job:
        return Job(model=Path(TEACHER), out=Path("s.onnx"), shots=(str(SAMPLES / "shots"),), **more)

    alone, one, other = job(), job(pool="pool"), job(pool="image=pool")

    assert len({key(each) for each in (alone, one, other, job(pool="pool", pool_draw="uniform"))}) == 4
    assert read_by(one)["pool"] == (pool,) and "pool" not in read_by(alone)
    assert relocated(other, {pool: here / "moved"}).pool == (f"image={here / 'moved'}",)
