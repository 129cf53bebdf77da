"""The examples run as they stand, each in a process of its own, and print what their first lines promise."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from xdonnx.report import read_report

SAMPLES = Path(__file__).parents[2] / "samples"
EXAMPLES = sorted(SAMPLES.glob("0*.py"))


def run(name, folder, *arguments):
    """Return what an example prints; it is started from elsewhere, and a warning ends it."""
    command = [sys.executable, "-W", "error", SAMPLES / name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def right(path):
    """Return how many of the held-out digits a model names rightly."""
    with np.load(SAMPLES / "held_out.npz") as data:
        images, labels = data["images"][:, None].astype(np.float32) / 255, data["labels"]
    (logits,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": images})
    return int((logits.argmax(1) == labels).sum())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder that the examples share, so that the last one serves what the first one made."""
    return tmp_path_factory.mktemp("examples")


def test_compress_halves_the_macs_and_prints_what_it_cost(folder):
    printed = run("01_compress.py", folder, folder)

    before, after = (int(x.replace(",", "")) for x in re.search(r"macs +([\d,]+) -> +([\d,]+)", printed).groups())
    assert before == 5_388_928 and after <= before / 2
    shown = re.search(r"accuracy +([\d.]+)% -> +([\d.]+)%", printed).groups()
    assert shown == tuple(
        f"{100 * right(path) / 450:.2f}" for path in (SAMPLES / "digits_vgg.onnx", folder / "student.onnx")
    )
    assert float(shown[0]) - float(shown[1]) <= 1
    assert f"passed: {folder / 'student.onnx'}" in printed
    assert read_report(folder / "student.report").student.macs == after


def test_gate_passes_what_was_measured_and_rejects_what_cannot_be_promised(folder):
    printed = run("02_gate.py", folder, folder)

    lost = right(SAMPLES / "digits_vgg.onnx") - right(SAMPLES / "digits_mobile.onnx")
    assert printed.count(f"max_drop: {100 * lost / 450:.2f} points") == 2
    assert "measured: passed, exit code 0" in printed
    assert "at 95 %: rejected, exit code 3" in printed


def test_inspect_lists_every_layer_and_why_it_stays_in_a_folder_that_it_makes(tmp_path):
    printed = run("03_inspect.py", tmp_path, tmp_path / "new" / "out")

    graph = onnx.load(SAMPLES / "digits_residual.onnx").graph
    rows = re.findall(r"^  (\S+) +(?:Conv|Gemm) +(\d+) of (\d+) .*?% of the MACs +(.*)$", printed, re.MULTILINE)
    assert len(rows) == sum(node.op_type in ("Conv", "Gemm") for node in graph.node) == 16
    assert all((int(free) == int(made)) == (why == "") for _, free, made, why in rows)
    whys = {name: why for name, _, _, why in rows}
    assert whys["logits"] == "it is graph output 'logits'"
    # The stem, and the last convolution of each of the six blocks with the two projections, end in an Add.
    assert sum("--residual" in why for why in whys.values()) == 1 + 6 + 2
    assert (tmp_path / "new" / "out" / "survey.json").is_file()


def test_a_method_of_ones_own_halves_the_macs_within_a_point_in_a_folder_that_it_makes(tmp_path):
    out = tmp_path / "new" / "out"
    printed = run("04_own_method.py", tmp_path, out)

    before, after = (
        int(x.replace(",", "")) for x in re.search(r"\| macs \| ([\d,]+) \| ([\d,]+) \|", printed).groups()
    )
    assert after <= before / 2
    assert printed.startswith("# xdonnx: digits_residual.onnx → median.onnx: passed (exit code 0)")
    assert right(SAMPLES / "digits_residual.onnx") - right(out / "median.onnx") <= 4.5


def test_serve_counts_the_digits_that_teacher_and_student_name_rightly(folder):
    printed = run("05_serve.py", folder, folder)

    for path in (SAMPLES / "digits_vgg.onnx", folder / "student.onnx"):
        assert f"{path.name}: {right(path)} of 450 right, {path.stat().st_size:,} bytes" in printed
    assert (folder / "student.onnx").stat().st_size < 0.6 * (SAMPLES / "digits_vgg.onnx").stat().st_size


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_that_writes_makes_its_folder(path):
    code = path.read_text()
    assert "mkdir(parents=True, exist_ok=True)" in code or "report_dir=" in code


def test_an_example_needs_no_folder(tmp_path):
    assert "exit code 0" in run("02_gate.py", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_the_folders_readme_names_it(path):
    assert len(path.read_text().splitlines()) <= 40
    assert f"`{path.name}`" in (SAMPLES / "README.md").read_text()


def pythons():
    """Return the blocks of Python of the README."""
    return re.findall(r"```python\n(.*?)```", (SAMPLES.parent / "README.md").read_text(), re.DOTALL)


def test_the_readmes_file_of_samples_is_one_that_can_be_read(tmp_path):
    (tmp_path / "code.py").write_text(pythons()[1])

    run(tmp_path / "code.py", tmp_path)

    with np.load(tmp_path / "held_out.npz") as data:
        images, labels = data["images"], data["labels"]
    assert (images.dtype, images.ndim, images.shape[3]) == (np.uint8, 4, 3) and len(labels) == len(images)


def test_the_commands_of_the_readme_that_name_samples_write_files_of_different_names():
    text = (SAMPLES.parent / "README.md").read_text()
    outs = re.findall(r"^.*xdonnx (?:compress|plan|decompose) samples/.* -o (\S+)$", text, re.MULTILINE)
    assert len(outs) >= 3 and len(set(outs)) == len(outs)


def test_the_python_of_the_readme_runs_as_it_stands(tmp_path):
    code = pythons()[0]
    (tmp_path / "samples").symlink_to(SAMPLES)
    (tmp_path / "code.py").write_text(code)

    status, macs, accuracy = run(tmp_path / "code.py", tmp_path).split()

    assert status == "passed" and float(macs) <= 0.5
    assert float(accuracy) == pytest.approx(100 * right(tmp_path / "smaller.onnx") / 450)
