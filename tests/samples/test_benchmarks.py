"""The script that measures xdonnx: its reference does what the solver does, its tables say what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import xdonnx
from xdonnx.columns import Geometry, to_matrix
from xdonnx.connection import cross, objective
from xdonnx.moments import measure
from xdonnx.solve import PGD
from xdonnx.structure import Channel

SAMPLES = Path(__file__).parents[2] / "samples"
sys.path.insert(0, str(SAMPLES / "benchmarks"))

import benchmark as script  # noqa: E402
import cutting  # noqa: E402
import dataspace  # noqa: E402
import solving  # noqa: E402
import walking  # noqa: E402
import writing  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.01234, "0.0123"),
        (0.9996, "1.00"),
        (1.0, "1.00"),
        (9.996, "10.0"),
        (21.34, "21.3"),
        (99.96, "100"),
        (145.4, "145"),
        (1234.0, "1,230"),
        (0.0, "0.00"),
        (1.234e-7, "1.23e-07"),
    ],
)
def test_a_number_has_three_digits_that_count(value, shown):
    assert writing.digits(value) == shown


def test_a_spread_is_the_median_with_the_least_and_the_most():
    assert writing.spread([5.61, 4.8, 5.1]) == "5.10 (4.80 to 5.61)"
    assert writing.spread([30.0, 10.0]) == "20.0 (10.0 to 30.0)"
    assert writing.spread([7.0]) == "7.00"
    assert writing.spread([]) == ""


def test_ratios_are_of_what_was_timed_in_one_turn():
    assert writing.ratios([10.0, 30.0], [5.0, 10.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="shorter"):
        writing.ratios([1.0, 2.0], [1.0])


def test_sums_are_turn_by_turn_and_a_missing_turn_is_no_zero():
    assert writing.summed([[1.0, 2.0], [10.0, 20.0]]) == [11.0, 22.0]
    with pytest.raises(ValueError, match="shorter"):
        writing.summed([[1.0, 2.0], [10.0]])


def cells(lines, first):
    """Return the cells of the row that begins so."""
    (line,) = (line for line in lines if line.startswith(f"| {first}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def solved_layers():
    narrow, wide = (16, 16, 3, 3), (64, 64, 3, 3)
    return [
        solving.Solved("a", narrow, 51200, True, [80.0, 100.0], [0.5, 1.0], 1.0000001, None, (75.0, 0.9995)),
        solving.Solved("b", narrow, 51200, False, [60.0, 50.0], [], None, 0.0),
        solving.Solved("c", wide, 3200, True, [40.0, 60.0], [4.0, 5.0], 0.9999),
    ]


def test_layers_are_summed_by_shape_before_the_ratio_is_taken():
    text = writing.layers(solved_layers(), 30)
    assert cells(text, "16 → 16 channels, 51,200")[1:] == ["1", "130", "1.000000 to 1.000000"]
    assert cells(text, "64 → 64")[1:] == ["1", "11.0", "0.999900 to 0.999900"]
    # 120 / 4.5 and 160 / 6; with the layer that loses nothing 180 / 4.5 and 210 / 6.
    assert cells(text, "all of these")[1:] == ["2", "26.7 (26.7 to 26.7)", "0.999900 to 1.000000"]
    assert cells(text, "all 3x3")[1:] == ["3", "37.5 (35.0 to 40.0)", ""]
    assert cells(text, "16 → 16 channels |")[1:] == ["100", "1.20", "0.999500"]
    assert "30 steps" in " ".join(text) and "the 1 convolutions too that lose nothing" in " ".join(text)


def test_the_spread_of_a_shape_is_that_between_its_layers():
    one, _, two = solved_layers()
    two.shape = one.shape
    text = writing.layers([one, two], 30)
    assert cells(text, "16 → 16 channels, 51,200")[1:] == ["2", "70.5 (11.0 to 130)", "0.999900 to 1.000000"]


def test_what_was_not_run_to_its_end_has_no_table():
    solved = solved_layers()
    solved[0].whole = None
    assert "once for the first layer" in " ".join(writing.layers(solved_layers(), 30))
    assert "once for the first layer" not in " ".join(writing.layers(solved, 30))


def test_efforts_are_shown_over_the_default_turn_by_turn():
    found = [solving.Effort("balanced", [2.0, 4.0], 89.6), solving.Effort("paper", [20.0, 20.0], 83.456)]
    text = writing.efforts(found, solved_layers(), 509)
    assert cells(text, "`balanced`")[1:] == ["1", "89.60"]
    assert cells(text, "`paper`")[1:] == ["7.50 (5.00 to 10.0)", "83.46"]
    # 120 and 160 over 3; with the layer that loses nothing 180 and 210.
    assert cells(text, "the published algorithm on activations")[1:] == ["46.7 (40.0 to 53.3)", ""]
    assert cells(text, "the same, all")[1:] == ["65.0 (60.0 to 70.0)", ""]
    assert "509 held-out" in " ".join(text)


def test_networks_are_shown_by_plan_and_fit_over_both_passes():
    one = {"plan": [2.0], "fit": [8.0], "teacher": [1.5], "student": [1.0], "macs": 4.1e9, "kept": 0.496}
    text = writing.networks({"resnet50": {**one, "passing": 2**30, "peak": 5 * 2**29}}, 64)
    assert cells(text, "`resnet50`")[1:] == ["4.10", "50%", "4.00", "20%", "0.667", "1.0, 2.5 GiB"]
    assert "the same 64 samples" in " ".join(text)


def test_cuts_are_shown_as_theirs_over_ours():
    text = writing.cuts([cutting.Cuts("vgg16", [2.0, 2.0], [1.0, 3.0], [5.0, 6.0], 0.499, 0.512)])
    assert cells(text, "`vgg16`")[1:] == ["50%, 51%", "1.00 (0.500 to 1.50)", "2.75 (2.50 to 3.00)"]


def test_a_page_says_how_to_make_it_again_and_on_what_it_was_made():
    text = writing.page([["## One", ""], ["## Two", ""]], writing.machine([2.0, 4.5]), "python x.py --quick")
    assert "```bash\npython x.py --quick\n```" in text and text.endswith("## Two\n")
    assert "load average 2.0 to 4.5 during the run" in text and "ended before" not in text
    assert f"torch {torch.__version__.split('+')[0]}" in text
    assert max(map(len, text.splitlines())) <= 120


# -------------------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize("steps", [150, pytest.param(solving.STEPS, marks=pytest.mark.bench)])
def test_the_reference_ends_where_the_solver_ends(steps):
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(3, 6, 4, 4, generator=generator, dtype=torch.float64).relu()
    student = (teacher + 0.5 * torch.randn(teacher.shape, generator=generator, dtype=torch.float64)).relu()
    weight = torch.randn(4, 6, 3, 3, generator=generator, dtype=torch.float64) / 5
    geometry = Geometry("conv", 1, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    layer = dataspace.Layer(teacher, student, weight, 1, 1)

    theirs = dataspace.fit(layer, 3, mu=0.9, steps=steps, rate=solving.RATE).weight

    matrix = to_matrix(weight, None, geometry)
    quadratic = objective(cross(0.9), measure([teacher], [student], geometry, bias=False), matrix)
    ours = PGD(iterations=steps, rate=solving.RATE, refit=False)(quadratic, matrix, Channel(torch.arange(54) // 9), 3)
    torch.testing.assert_close(to_matrix(theirs, None, geometry), ours.weight, rtol=1e-5, atol=1e-8)
    assert layer.error(theirs, 0.9) == pytest.approx(ours.objective, rel=1e-7)
    assert int((theirs.abs().sum((0, 2, 3)) > 0).sum()) == 3
    assert ours.objective < 0.9 * float(quadratic(matrix * ours.mask))


def test_every_layer_of_a_network_ends_in_both_ways_at_the_same_error(monkeypatch):
    monkeypatch.setattr(solving, "STEPS", 12)
    job = xdonnx.Job(
        model=SAMPLES / "digits_residual.onnx",
        out="student.onnx",
        shots=(str(SAMPLES / "shots"),),
        preprocess=xdonnx.Preprocess("unit"),
        per_class=1,
        keep=0.5,
        preset_effort="paper",
        device="cpu",
    )
    said = []
    solved = solving.solve_layers(job, said.append, repeats=2, steps=6, whole=True)
    losing, others = ([one for one in solved if one.loses is loses] for loses in (True, False))
    assert len(losing) >= 2 and others and f"layers: {len(solved)} of {len(solved)}" in said[-1]
    for one in losing:
        assert one.error == pytest.approx(1, abs=1e-4) and len(one.theirs) == len(one.ours) == 2
        assert min(one.theirs + one.ours) > 0
    for one in others:
        assert one.moved == 0 and not one.ours and one.error is None
    ended = [one.whole for one in losing if one.whole]
    assert len(ended) == len({one.shape for one in losing})
    assert all(error == pytest.approx(1, abs=1e-4) for _, error in ended)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 64, 3, stride=2), nn.ReLU()
        )
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def macs(first, second):
    """Multiply-accumulates of the network with so many channels, on a picture of 24 x 24."""
    return 24 * 24 * 27 * first + 11 * 11 * 9 * first * second + second * 5


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Return a small network and its file; pictures are small too."""
    monkeypatch.setattr(walking, "SIZE", 24)
    torch.manual_seed(0)
    module = Small().eval()
    walking.export(module, tmp_path / "small.onnx")
    return module, tmp_path / "small.onnx"


def test_a_stage_is_timed_between_two_passes(small):
    found = walking.stage(small[1], 6, 2)
    for name in ("plan", "fit", "teacher", "student"):
        assert len(found[name]) == 2 and min(found[name]) > 0
    assert found["macs"] == macs(16, 64)
    assert 0.3 < found["kept"] <= 0.5
    assert 0 < found["passing"] <= found["peak"]
    assert cells(writing.networks({"small": found}, 6), "`small`")


def test_a_stage_is_measured_in_a_process_of_its_own_that_prints_nothing_else(monkeypatch):
    asked = []

    def answer(command, **how):
        asked.append((command, how["env"]["OMP_NUM_THREADS"]))
        return subprocess.CompletedProcess(command, 0, json.dumps({"peak": 7}))

    monkeypatch.setattr(subprocess, "run", answer)
    assert walking.in_a_process(Path("net.onnx"), 64, 3) == {"peak": 7}
    assert asked == [([sys.executable, walking.__file__, "net.onnx", "64", "3"], "1")]


def test_both_tools_take_channels_and_nothing_happens_to_the_module(small, tmp_path):
    pytest.importorskip("torch_pruning")
    module, path = small
    found = cutting.compare("small", module, path, tmp_path, 2)
    # Ours is the widest in steps of 4 and 8 that stays within half; theirs keeps int(0.707 * width) of each.
    assert found.kept_by_ours == pytest.approx(macs(8, 40) / macs(16, 64))
    assert found.kept_by_theirs == pytest.approx(macs(11, 45) / macs(16, 64))
    assert all(both > alone > 0 for both, alone in zip(found.exported, found.theirs, strict=True))
    assert len(found.ours) == 2 and min(found.ours) > 0
    assert sum(p.numel() for p in module.parameters()) == 16 * 28 + 32 + 64 * 145 + 65 * 5


def test_pictures_are_the_same_each_time_and_smooth():
    pictures = walking.images(2)
    assert (pictures == walking.images(2)).all() and pictures.shape == (2, 3, 224, 224)
    steps = abs(pictures[..., 1:] - pictures[..., :-1]).mean()
    assert steps < abs(pictures[..., 112:] - pictures[..., :112]).mean()


# ------------------------------------------------------------------------------------------------- the command line


def test_a_run_writes_the_page_after_each_part(tmp_path, monkeypatch, capsys):
    out, heads = tmp_path / "page.md", []
    solved = solved_layers()
    monkeypatch.setattr(script.solving, "job_of", lambda *_: None)
    monkeypatch.setattr(script.solving, "solve_layers", lambda *_, **__: solved)
    monkeypatch.setattr(script.solving, "held_out", lambda _: 509)

    def efforts(*_, **__):
        heads.append([line for line in out.read_text().splitlines() if line.startswith("## ")])
        return [solving.Effort("balanced", [2.0, 4.0], 89.6), solving.Effort("paper", [20.0, 20.0], 83.4)]

    monkeypatch.setattr(script.solving, "run_efforts", efforts)
    monkeypatch.setattr(script.walking, "in_a_process", lambda *_: 1 / 0)
    monkeypatch.setattr(script, "exported", lambda *_: None)
    words = ["--only", "solving,walking", "--data", str(tmp_path), "-o", str(out)]
    with pytest.raises(ZeroDivisionError):
        script.start(words)
    assert "The run was ended before these parts were measured: walking." in out.read_text()
    script.start([words[0], "solving", *words[2:]])

    assert heads == [["## The published algorithm in moment space"]] * 2
    text = out.read_text()
    assert "| `paper`: the published algorithm on moments | 7.50 (5.00 to 10.0) | 83.40 |" in text
    assert "ended before" not in text
    assert f"benchmark.py --only solving --data {tmp_path} -o {out}" in text
    assert f"wrote {out}" in capsys.readouterr().err


def test_a_page_names_the_networks_that_a_run_did_not_reach(tmp_path, monkeypatch):
    one = {"plan": [2.0], "fit": [8.0], "teacher": [1.5], "student": [1.0], "macs": 4.1e9, "kept": 0.5}
    pages = []

    def measure(model, *_):
        pages.append(tmp_path.joinpath("page.md").read_text() if pages else "")
        return {**one, "passing": 1, "peak": 1}

    monkeypatch.setattr(script.walking, "in_a_process", measure)
    monkeypatch.setattr(script, "exported", lambda *_: None)
    script.start(["--only", "walking", "--networks", "vgg16,resnet50", "-o", str(tmp_path / "page.md")])
    assert "The run was ended before these parts were measured: walking resnet50." in pages[1]
    assert "ended before" not in tmp_path.joinpath("page.md").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "solve"], "no 'solve'; choices: solving, walking, cutting"),
        (["--networks", "vgg61"], "no 'vgg61'; choices: mobilenet_v2, "),
        (["--repeats", "0"], "'0' is no number of at least 1"),
        (["--samples", "many"], "'many' is no number of at least 1"),
    ],
)
def test_a_mistake_on_the_command_line_is_told(words, says, capsys):
    with pytest.raises(SystemExit) as ended:
        script.arguments(words)
    assert ended.value.code == 2 and says in capsys.readouterr().err


def test_what_is_missing_is_told_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("XDONNX_DATA", raising=False)
    for words, code, says in (
        (["--only", "solving"], 2, "--only solving needs a real network"),
        (["--only", "solving", "--data", str(tmp_path)], 2, f"nothing at '{tmp_path}/teachers/resnet56"),
        (["--only", "cutting"], 8, "--only cutting needs Torch-Pruning"),
        (["--only", "walking", "-o", str(tmp_path / "none" / "page.md")], 8, "no folder"),
    ):
        monkeypatch.setattr(cutting, "available", lambda: False)
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
        with pytest.raises(SystemExit) as ended:
            script.main()
        assert ended.value.code == code and says in capsys.readouterr().err


def test_the_page_that_lies_here_is_the_scripts_and_is_named():
    text = (SAMPLES / "benchmarks.md").read_text()
    assert "python samples/benchmarks/benchmark.py " in text and "load average" in text
    for part in ("## The published algorithm in moment space", "## The layer-wise stage", "## Cutting alone"):
        assert part in text
    assert "samples/benchmarks.md" in (SAMPLES.parent / "README.md").read_text()
    assert "benchmarks.md" in (SAMPLES / "README.md").read_text()
