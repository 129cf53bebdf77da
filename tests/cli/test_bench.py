"""`bench` times models in turns and says what the difference is worth."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from program import SAMPLES, SHOTS, TEACHER, call
from rich.console import Console
from scipy import stats

from xdonnx_cli import benching

VGG = str(SAMPLES / "digits_vgg.onnx")


def save(path: Path, inputs: dict[str, tuple[int, list[int | str | None]]]) -> str:
    """Write a model that adds up all that it is fed."""
    zero, nodes = numpy_helper.from_array(np.float32(0), "s0"), []
    for at, name in enumerate(inputs):
        nodes.append(helper.make_node("Cast", [name], [f"c{at}"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("ReduceSum", [f"c{at}"], [f"r{at}"], keepdims=0))
        nodes.append(helper.make_node("Add", [f"s{at}", f"r{at}"], [f"s{at + 1}"]))
    nodes[-1].output[0] = "y"
    ports = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    graph = helper.make_graph(nodes, "g", ports, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])], [zero])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return str(path)


def batched(path: Path, batch: int) -> str:
    """Write the teacher with a fixed batch."""
    model = onnx.load(TEACHER)
    for port in (*model.graph.input, *model.graph.output):
        port.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]
    onnx.save(model, path)
    return path.name


def test_a_model_with_less_to_do_is_faster_and_the_numbers_agree(here: Path) -> None:
    ended = call("bench", VGG, TEACHER, "--rounds", "60", "--threads", "1", "--json", "-")

    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    first, second = found["models"]
    assert (found["runs"], found["threads"], found["batch"], found["inputs"]) == (60, 1, 1, "random numbers")
    assert first["verdict"] == "first" and first["ratio"] == first["low"] == first["high"] == 1
    assert second["ratio"] == pytest.approx(second["median"] / first["median"])
    assert second["low"] <= second["ratio"] <= second["high"]
    for model in (first, second):
        assert 0 < model["q1"] <= model["median"] <= model["q3"] and model["provider"] == "CPUExecutionProvider"
    # 5.4 M against 1.9 M multiplications.
    assert second["verdict"] == "faster" and second["high"] < 1
    assert second["bytes"] == Path(TEACHER).stat().st_size
    assert "60 runs each" in ended.err and "random numbers: image float32 (1, 1, 16, 16)" in ended.err


def test_the_slower_of_two_is_called_so_and_the_table_fits_a_terminal(here: Path) -> None:
    ended = call("bench", TEACHER, VGG, "--rounds", "60", "--threads", "1", width=80)

    assert ended.code == 0, ended.err
    table = ended.out.splitlines()[:3]
    assert table[0].split()[0] == "median" and table[1].split()[-1] == "1.000" and table[2].endswith("slower")
    assert float(table[2].split("ms")[1].split()[3]) > 1


@pytest.mark.parametrize("width", [60, 72, 80, 100])
def test_a_name_takes_the_width_that_is_there_and_no_cell_is_wrapped(width: int) -> None:
    """At 60 columns names were shortened and wrapped besides, at 80 cut to 12 letters beside 14 empty columns."""
    found = [
        benching.Timing(Path(f"exports/{name}_of_some_length.onnx"), 1, 0.12, 0.119, 0.128, "CPU", *ratio, 0.97)
        for name, ratio in (("teacher", (1.0, 1.0, 1.0)), ("student", (0.5, 0.49, 0.511)))
    ]
    console = Console(file=io.StringIO(), width=width, highlight=False)
    facts = {"threads": 1, "runs": 9, "inputs": "random numbers", "device": "cpu"}

    benching._show(console, found, facts, {}, "", quiet=True)

    lines = console.file.getvalue().splitlines()
    assert len(lines) == 3 and all(len(line) <= width for line in lines)
    assert max(len(line.rstrip()) for line in lines) >= min(width, 90) - 1, "there was room for more of the name"
    one, other = (line.split("  ")[0] for line in lines[1:])
    assert one != other and len(one) >= 16
    assert "0.490 to 0.511" in lines[2] and ("q1 to q3" in lines[0]) == (width > 60)


def test_the_band_holds_the_ratio_as_order_statistics_say() -> None:
    """Of simulated timings with drifts the band misses the true ratio in at most one of twenty cases."""
    from xdonnx_cli.benching import _timing

    generator, misses = np.random.default_rng(0), 0
    for _ in range(400):
        drift = np.repeat(generator.lognormal(0, 0.5, 20), 10)
        times = drift[:, None] * np.array([1.0, 1.1]) * generator.lognormal(0, 0.2, (200, 2))
        found = _timing(Path("m"), 0, times, 1, "CPU")
        misses += not found.low <= 1.1 <= found.high
    assert 0 < misses <= 20

    same = _timing(Path("m"), 0, np.ones((6, 2)), 1, "CPU")
    assert (same.ratio, same.low, same.high, same.verdict) == (1, 1, 1, "no difference")


@pytest.mark.parametrize("runs", [1, 3, 5, 6, 9, 10, 200])
def test_of_fewer_than_six_runs_nothing_is_concluded(runs: int) -> None:
    """The band of three runs, which holds the ratio in 75 cases of 100, was headed 95 % sure."""
    from xdonnx_cli.benching import _timing

    found = _timing(Path("m"), 0, np.ones((runs, 2)) * np.array([1.0, 2.0]), 1, "CPU")
    # The true median lies between the k-th smallest and largest unless all but k - 1 votes fall on one side.
    spans, trim = min(runs, 10), runs >= 10
    assert found.confidence == pytest.approx(1 - 2 * stats.binom.cdf(trim, spans, 0.5))
    assert found.verdict == ("slower" if runs >= 6 else "too few runs")


def test_three_runs_are_shown_and_not_called_sure(here: Path) -> None:
    few = call("bench", TEACHER, VGG, "--rounds", "3", width=80)
    assert few.code == 0 and "sure" not in few.out and few.out.splitlines()[2].endswith("too few runs")
    assert "95 % sure" in call("bench", TEACHER, VGG, "--rounds", "6", width=80).out


def test_real_samples_are_fed_in_the_batch_that_is_asked_for(here: Path) -> None:
    ended = call("bench", TEACHER, *SHOTS, "--batch", "7", "--rounds", "3", "--json", "-")

    found = json.loads(ended.out)
    assert ended.code == 0 and found["inputs"] == "samples" and found["runs"] == 3
    assert found["models"][0]["shapes"] == {"image": [7, 1, 16, 16]}
    assert "ratio" not in ended.err, "of one model there is none to show"

    few = call("bench", TEACHER, *SHOTS, "--batch", "101")
    assert few.code == 5 and "a run takes 101 samples, and there are 100" in few.err


def test_inputs_of_any_type_and_size_are_invented(here: Path) -> None:
    kinds = (TensorProto.INT64, TensorProto.UINT8, TensorProto.BOOL, TensorProto.FLOAT16)
    model = save(here / "m.onnx", {f"x{at}": (kind, ["n", 4]) for at, kind in enumerate(kinds)})
    fixed = save(here / "f.onnx", {"x0": (TensorProto.DOUBLE, [3, 2])})

    ended = call("bench", model, fixed, "--rounds", "5", "--batch", "3", "--json", "-")

    assert ended.code == 0, ended.err
    shapes = [model["shapes"] for model in json.loads(ended.out)["models"]]
    assert shapes == [{f"x{at}": [3, 4] for at in range(4)}, {"x0": [3, 2]}]


def test_a_size_that_the_graph_leaves_open_has_to_be_chosen(here: Path) -> None:
    model = save(here / "m.onnx", {"x": (TensorProto.FLOAT, ["n", "width"])})

    asked = call("bench", model)
    chosen = call("bench", model, VGG, "--input-shape", "x:2x5", "--rounds", "4", "--json", "-")

    assert asked.code == 2 and "--input-shape x:" in asked.err
    assert chosen.code == 0, chosen.err
    assert [model["shapes"] for model in json.loads(chosen.out)["models"]] == [{"x": [2, 5]}, {"image": [2, 1, 16, 16]}]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--input-shape", "picture:1x1x16x16"], 2, "no model has an input 'picture'"),
        (["--device", "tpu"], 2, "unknown device 'tpu'"),
        (["--rounds", "2"], 2, "--rounds"),
        (["--shots", "nowhere"], 5, "nowhere"),
        (["missing.onnx"], 4, "missing.onnx"),
    ],
)
def test_mistakes_end_before_anything_is_timed(flags: list[str], code: int, words: str, here: Path) -> None:
    ended = call("bench", TEACHER, *flags)

    assert ended.code == code and words in ended.err and ended.out == ""


@pytest.mark.parametrize("flags", [[], SHOTS])
def test_a_model_with_a_free_batch_takes_as_many_as_one_that_fixes_them(flags: list[str], here: Path) -> None:
    """The same network fed with one sample here and four there looked 9.5 times slower."""
    four = batched(here / "four.onnx", 4)

    for models in ([TEACHER, four], [four, TEACHER]):
        ended = call("bench", *models, *flags, "--rounds", "6", "--json", "-", width=160)

        found = json.loads(ended.out)
        assert ended.code == 0 and found["batch"] == 4, ended.err
        assert [model["shapes"] for model in found["models"]] == [{"image": [4, 1, 16, 16]}] * 2
        assert f"image float32 (4, 1, 16, 16), the batch that '{four}' fixes" in " ".join(ended.err.split())

    alone = call("bench", four, *flags, "--rounds", "3")
    assert alone.code == 0 and "(4, 1, 16, 16)" in alone.out and "the batch that" not in alone.out


def test_models_that_fix_different_batches_are_not_compared(here: Path) -> None:
    four, two = batched(here / "four.onnx", 4), batched(here / "two.onnx", 2)

    ended = call("bench", TEACHER, four, two, "--rounds", "3")

    assert ended.code == 2 and ended.out == ""
    said = " ".join(ended.err.split())
    assert f"'{four}' takes 4 samples at once and '{two}' 2: their times do not compare" in said
    assert "Time each alone, or export both for the same batch" in said


def test_a_batch_that_a_graph_does_not_take_is_refused(here: Path) -> None:
    model = batched(here / "m.onnx", 4)

    ended = call("bench", TEACHER, model, "--batch", "2")

    assert ended.code == 2 and ended.out == ""
    assert f"--batch 2: '{model}' takes 4 samples at once. Leave --batch out." in " ".join(ended.err.split())
    assert call("bench", TEACHER, model, "--batch", "4", "--rounds", "3").code == 0


def test_time_ends_a_measurement_and_torch_is_not_imported(here: Path) -> None:
    code = f"""
import sys
from xdonnx_cli.app import run
assert run(["bench", "--help"]) == 0 and "numpy" not in sys.modules
assert run(["bench", {TEACHER!r}, "--seconds", "0.2", "--rounds", "1000000"]) == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)

    assert done.returncode == 0, done.stderr
