"""The script that runs tables: what it measures, writes and draws, how it goes on where it stopped, what it refuses."""

import csv
import json
import multiprocessing
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

import xdonnx
from xdonnx.contents import remembered

SAMPLES = Path(__file__).parents[2] / "samples"
PAPERS = SAMPLES / "papers"
sys.path.insert(0, str(PAPERS))

import description  # noqa: E402
import drawing  # noqa: E402
import table as script  # noqa: E402

# Only one layer loses channels, but many: the runs are short, and seeds differ.
ROW = f"""
[[row]]
name = "VGG"
model = "{SAMPLES}/digits_vgg.onnx"
shots = "{SAMPLES}/shots"
holdout = "{SAMPLES}/held_out.npz"
preset = "unit"
per_class = [1, 2]
options = {{ keep = 0.05, include = ["*features.3*"] }}
"""
METHODS = """
[[method]]
name = "cross"

[[method]]
name = "smallest"
options = { method = ["l1-norm"] }

[[method]]
name = "muddled"
options = { connection = "cross", alpha = 0.5 }
"""


def write(folder, text):
    """Return a table file in a folder."""
    path = folder / "tiny.toml"
    path.write_text(text, encoding="utf-8")
    return path


def command(*words):
    """Return a command line for the script; a warning ends it."""
    return [sys.executable, "-W", "error", PAPERS / "table.py", *map(str, words)]


def records(out):
    """Return the lines of runs.jsonl."""
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


def lines(out):
    """Return the lines of table.csv by method and shots per class."""
    with (out / "table.csv").open(newline="") as stream:
        return {(line["method"], line["shots_per_class"]): line for line in csv.DictReader(stream)}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Return a table that was run, where it went, and what it printed."""
    folder = tmp_path_factory.mktemp("table")
    path, out = write(folder, 'title = "Tiny"\nseeds = [0, 1]\n' + ROW + METHODS), folder / "out"
    words = command(path, "-o", out)
    ran = subprocess.run(words, capture_output=True, text=True, cwd=folder, check=False)
    assert ran.returncode == 0, ran.stderr
    return path, out, ran


@pytest.fixture
def copied(done, tmp_path):
    """Return the table that was run and a copy of its results."""
    path, out, _ = done
    for name in ("runs.jsonl", "table.csv"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    return path, tmp_path


def test_it_takes_every_run_once_with_seeds_outermost_and_is_silent_without_a_terminal(done):
    _, out, ran = done
    taken = [(record["seed"], record["per_class"], record["method"]) for record in records(out)]
    assert taken == [(s, k, m) for s in (0, 1) for k in (1, 2) for m in ("cross", "smallest", "muddled")]
    assert ran.stderr == "12 runs taken, 0 were there.\n"
    assert sorted(path.name for path in out.iterdir()) == ["runs.jsonl", "table.csv", "table.md", "table.png"]


def test_the_csv_has_the_mean_and_the_sample_standard_deviation_of_the_runs(done):
    _, out, _ = done
    for (method, shots), line in lines(out).items():
        found = [r for r in records(out) if r["method"] == method and str(r["per_class"]) == shots and not r["error"]]
        if method == "muddled":
            assert not found
            continue
        values = [record["accuracy"] for record in found]
        assert [float(line["seed_0"]), float(line["seed_1"])] == values
        assert float(line["mean"]) == pytest.approx(np.mean(values)) and int(line["n"]) == 2
        assert float(line["std"]) == pytest.approx(np.std(values, ddof=1))
        assert method != "cross" or values[0] != values[1]
        for name in ("macs", "bytes", "nonzero", "seconds"):
            assert float(line[name]) == pytest.approx(np.mean([record[name] for record in found]))


def test_a_run_is_what_onnxruntime_counts_on_the_student_of_its_job(done, tmp_path):
    _, out, _ = done
    record = next(r for r in records(out) if (r["method"], r["per_class"], r["seed"]) == ("cross", 2, 1))
    options = {**record["options"], "preprocess": xdonnx.Preprocess("unit"), "out": tmp_path / "student.onnx"}
    xdonnx.run(xdonnx.Job(**options))

    with np.load(SAMPLES / "held_out.npz") as held:
        images, labels = held["images"][:, None].astype(np.float32) / 255, held["labels"]
    right = {}
    for path in (SAMPLES / "digits_vgg.onnx", tmp_path / "student.onnx"):
        (logits,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": images})
        right[path.name] = logits.argmax(1)
    assert record["accuracy"] == pytest.approx(100 * np.mean(right["student.onnx"] == labels), abs=0.25)
    assert record["teacher"] == pytest.approx(100 * np.mean(right["digits_vgg.onnx"] == labels))
    agree = 100 * np.mean(right["student.onnx"] == right["digits_vgg.onnx"])
    assert record["agreement"] == pytest.approx(agree, abs=0.25)
    size = (tmp_path / "student.onnx").stat().st_size / (SAMPLES / "digits_vgg.onnx").stat().st_size
    assert record["bytes"] == pytest.approx(size, rel=0.01) and 0.6 < record["macs"] < 0.7
    assert record["judged"] == 450 and record["fitted"] == 20


def test_the_command_of_a_run_is_the_command_line_of_its_job(done):
    _, out, _ = done
    told = {(r["method"], r["seed"]): r["command"] for r in records(out) if r["per_class"] == 2}
    start = f"xdonnx compress {SAMPLES}/digits_vgg.onnx --shots {SAMPLES}/shots --per-class 2"
    rest = f"--holdout {SAMPLES}/held_out.npz --preset unit --keep 0.05 --include '*features.3*'"
    assert told["cross", 0] == f"{start} {rest} --seed 0 -o student.onnx"
    assert told["smallest", 1] == f"{start} {rest} --method l1-norm --seed 1 -o student.onnx"


def test_a_method_that_refuses_is_not_available_and_says_why(done):
    _, out, ran = done
    line = lines(out)["muddled", "1"]
    assert (line["mean"], line["n"], line["seed_0"]) == ("n/a", "0", "")
    assert "--alpha belongs to --connection soft" in line["reason"]
    assert "| muddled | n/a | n/a |" in (out / "table.md").read_text()
    assert "n/a, muddled: --alpha belongs to" in ran.stdout


def test_the_markdown_marks_the_best_and_names_teacher_and_n(done):
    _, out, _ = done
    text, csv_lines = (out / "table.md").read_text(), lines(out)
    shown = []
    for shots in "12":
        line = csv_lines["cross", shots]
        assert float(line["mean"]) > float(csv_lines["smallest", shots]["mean"])
        shown.append(f"**{float(line['mean']):.2f} ± {float(line['std']):.2f}**")
    assert f"| cross | {' | '.join(shown)} |" in text and text.count("**") == 4
    assert text.startswith("# Tiny\n\n## VGG\n") and "n = 2. Teacher: 99.56 % accuracy." in text


def test_the_picture_opens_and_shows_a_line_for_each_method(done):
    _, out, _ = done
    with Image.open(out / "table.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(pixels) > 300 * 300 and 0.5 < (pixels == 255).all(axis=1).mean() < 0.99
    for colour in drawing.COLOURS[:2]:
        wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        assert (pixels == wanted).all(axis=1).sum() > 200
    # The method that was refused has no line.
    wanted = [int(drawing.COLOURS[2][at : at + 2], 16) for at in (1, 3, 5)]
    assert not (pixels == wanted).all(axis=1).any()


def test_a_second_start_takes_no_runs(copied, capsys, monkeypatch):
    path, out = copied
    monkeypatch.setattr(xdonnx, "run", lambda job, **_: pytest.fail("a run was taken"))
    before, table = (out / "runs.jsonl").read_bytes(), (out / "table.csv").read_bytes()

    assert script.start([str(path), "-o", str(out)]) == 0

    assert capsys.readouterr().err == "0 runs taken, 12 were there.\n"
    assert (out / "runs.jsonl").read_bytes() == before and (out / "table.csv").read_bytes() == table


def test_a_torn_last_line_is_run_again_and_no_other(copied, capsys):
    path, out = copied
    whole = (out / "runs.jsonl").read_bytes().splitlines(keepends=True)
    torn = next(line for line in whole if b'"smallest"' in line and b'"per_class": 2' in line)
    whole.remove(torn)
    (out / "runs.jsonl").write_bytes(b"".join([*whole, torn[:-40]]))

    assert script.start([str(path), "-o", str(out), "--draw"]) == 0
    assert lines(out)["smallest", "2"]["n"] == "1"
    assert script.start([str(path), "-o", str(out)]) == 0

    assert "1 runs taken, 11 were there." in capsys.readouterr().err
    after = records(out)
    assert len(after) == 12
    timed = ("seconds", "started")
    again = {key: value for key, value in after[-1].items() if key not in timed}
    assert again == {key: value for key, value in json.loads(torn).items() if key not in timed}


def test_a_damaged_line_before_the_last_is_named(copied):
    path, out = copied
    whole = (out / "runs.jsonl").read_bytes().splitlines(keepends=True)
    (out / "runs.jsonl").write_bytes(b"".join([whole[0], b"{half\n", *whole[2:]]))
    with pytest.raises(xdonnx.JobError, match=r"line 2 is no record of a run"):
        script.start([str(path), "-o", str(out)])


def test_the_list_says_what_is_done_and_what_would_run(copied, capsys):
    path, out = copied
    whole = (out / "runs.jsonl").read_bytes().splitlines(keepends=True)
    first = [line for line in whole if b'"per_class": 1' in line]
    (out / "runs.jsonl").write_bytes(b"".join(first))

    assert script.start([str(path), "-o", str(out), "--list", "--seeds", "1", "--methods", "[sm]*"]) == 0

    assert capsys.readouterr().out.splitlines() == [
        "done  VGG | 1 per class | smallest | seed 1",
        "n/a   VGG | 1 per class | muddled | seed 1",
        "todo  VGG | 2 per class | smallest | seed 1",
        "todo  VGG | 2 per class | muddled | seed 1",
        "2 of 4 runs done",
    ]


def test_an_interrupt_says_what_is_done(copied, capsys, monkeypatch):
    path, out = copied
    whole = (out / "runs.jsonl").read_bytes().splitlines(keepends=True)
    (out / "runs.jsonl").write_bytes(b"".join(whole[:7]))

    def interrupted(job, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(xdonnx, "run", interrupted)
    assert script.start([str(path), "-o", str(out)]) == 130
    assert "interrupted: 7 of 12 runs are done" in capsys.readouterr().err and len(records(out)) == 7


def test_processes_find_what_one_process_found_and_an_interrupt_ends_them_at_once(done, tmp_path, monkeypatch):
    path, out, _ = done
    known = {record["key"]: record for record in records(out)}
    every = description.runs(description.read_table(path), path, None)
    cheap = [run for run in every if run.method != "cross"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    found = script.measured([*cheap, *every * 20], 2, lambda run: None)
    some = [next(found) for _ in range(3)]
    with pytest.raises(KeyboardInterrupt):
        found.throw(KeyboardInterrupt())

    assert not multiprocessing.active_children() and not list(tmp_path.iterdir())
    assert len({record["key"] for record in some}) == 3
    for record in some:
        for name in ("accuracy", "agreement", "macs", "nonzero", "error"):
            assert record.get(name) == known[record["key"]].get(name)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("per_class =", "per_clas =", r"'tiny.toml', row 1 'VGG', per_clas: unknown key. Did you mean 'per_class'\?"),
        ("[1, 2]", "[1, 0]", r"row 1 'VGG', per_class: Input should be greater than or equal to 1"),
        ('preset = "unit"\n', 'judge = "loss"\n', r"row 1 'VGG', judge: Input should be 'accuracy' or 'agreement'"),
        ('shots = "', '# "', r"row 1 'VGG', shots: missing"),
        ("keep =", "kep =", r"row 'VGG', options: 'kep' is no field of a Job. Did you mean 'keep'\?"),
        ("keep = 0.05", "seed = 3", r"row 'VGG', options: 'seed' is said outside of options"),
        ("keep = 0.05", 'keep = "much"', r"row 'VGG', method 'cross': keep is 'much'\.\n  It takes a number"),
        ('preset = "unit"', 'preset = "unt"', r"row 'VGG', method 'cross': unknown --preset 'unt'"),
        ('"l1-norm"', '"l1-nrom"', r"method 'smallest': this xdonnx has no method 'l1-nrom'. Did you mean 'l1-norm'\?"),
        ("digits_vgg", "digits_vvg", r"row 'VGG', model: nothing at '.*digits_vvg.onnx'.\n  --data DIR or XDONNX_DATA"),
        ('name = "muddled"', 'name = "cross"', r"two methods named 'cross'"),
        ('name = "muddled"', 'name = "muddled"\nrows = ["VG"]', r"method 'muddled', rows: there is no 'VG'. Did you"),
        ("[[row]]", "[row]", r"'tiny.toml', row: Input should be a valid"),
        ("[[row]]", "[[row", r"is no TOML"),
        ("[[row]]", "sed = 1\n[[row]]", r"'tiny.toml', sed: unknown key. Did you mean 'seeds'\?"),
    ],
)
def test_a_wrong_table_is_refused_before_any_run(tmp_path, old, new, says):
    text = ROW + METHODS
    assert old in text
    with pytest.raises(xdonnx.JobError, match=says):
        script.start([str(write(tmp_path, text.replace(old, new, 1))), "-o", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_mistake_ends_with_exit_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["table.py", str(tmp_path / "none.toml")])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: no table at '{tmp_path}/none.toml': No such file")


@pytest.mark.parametrize(("flag", "value"), [("--only", "ResNet*"), ("--methods", "thi*"), ("--seeds", "7")])
def test_a_choice_that_names_nothing_is_refused(done, flag, value):
    path, out, _ = done
    with pytest.raises(xdonnx.JobError, match=rf"{flag} '.*' matches nothing in 'tiny.toml'.\n  Choices: "):
        script.start([str(path), "-o", str(out), flag, value])


def test_methods_and_rows_can_be_limited_to_each_other(tmp_path):
    rows = ROW.replace('"VGG"', '"A"').replace("[1, 2]", "[5]") + ROW.replace('"VGG"', '"B"\nmethods = ["cross"]')
    path = write(tmp_path, "seeds = [3]\n" + rows + METHODS.replace('"muddled"', '"muddled"\nrows = ["B"]'))
    listed = description.runs(description.read_table(path), path, None)
    assert [(run.row, run.method, run.per_class) for run in listed] == [
        ("A", "cross", 5),
        ("A", "smallest", 5),
        ("B", "cross", 1),
        ("B", "cross", 2),
    ]


def test_a_run_is_known_by_its_options_and_the_contents_of_its_files(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "digits_vgg.onnx").write_bytes((SAMPLES / "digits_vgg.onnx").read_bytes())
        (tmp_path / name / "held_out.npz").write_bytes((SAMPLES / "held_out.npz").read_bytes())
    path = write(tmp_path, ROW.replace(f"{SAMPLES}/digits", "digits").replace(f"{SAMPLES}/held", "held") + METHODS)
    table = description.read_table(path)

    def keys(folder, **more):
        remembered.cache_clear()
        return [run.key for run in description.runs(table, path, tmp_path / folder, **more)]

    first = keys("one")
    assert len(set(first)) == len(first) == 30
    assert keys("two") == first
    assert not set(keys("one", strict=True)) & set(first)
    held = tmp_path / "two" / "held_out.npz"
    held.write_bytes(held.read_bytes() + b"\0")
    assert not set(keys("two")) & set(first)


def test_paths_that_begin_with_a_dot_are_beside_the_table_whatever_the_data(tmp_path):
    path = PAPERS / "digits.toml"
    listed = description.runs(description.read_table(path), path, tmp_path)
    assert {run.job.model for run in listed} == {
        SAMPLES / f"digits_{name}.onnx" for name in ("vgg", "residual", "mobile")
    }


def test_agreement_is_shown_where_a_row_is_judged_by_it(done, tmp_path):
    path, out, _ = done
    text = path.read_text().replace('preset = "unit"', 'preset = "unit"\njudge = "agreement"')
    (tmp_path / "runs.jsonl").write_bytes((out / "runs.jsonl").read_bytes())

    assert script.start([str(write(tmp_path, text)), "-o", str(tmp_path), "--draw"]) == 0

    values = [r["agreement"] for r in records(out) if (r["method"], r["per_class"]) == ("cross", 1)]
    assert float(lines(tmp_path)["cross", "1"]["mean"]) == pytest.approx(np.mean(values))
    assert "Top-1 agreement with the teacher in per cent" in (tmp_path / "table.md").read_text()


def test_a_run_that_fails_by_the_machine_is_told_and_tried_again(copied, capsys, monkeypatch):
    path, out = copied
    (out / "runs.jsonl").write_bytes(b"")

    def full(job, **_):
        raise xdonnx.MachineError("the disk is full")

    monkeypatch.setattr(xdonnx, "run", full)
    words = [str(path), "-o", str(out), "--seeds", "0", "--methods", "smallest"]
    assert script.start(words) == 1
    assert (out / "runs.jsonl").read_bytes() == b"" and "2 runs failed" in capsys.readouterr().err
    assert lines(out)["smallest", "1"]["reason"] == "the disk is full"
    monkeypatch.undo()
    assert script.start(words) == 0
    assert [record["error"] for record in records(out)] == ["", ""]


@pytest.mark.parametrize("path", sorted(PAPERS.glob("*.toml")), ids=lambda path: path.name)
def test_a_table_that_is_shipped_reads_and_the_readme_names_it(path):
    table = description.read_table(path)
    assert table.title and all(table.methods_of(row) for row in table.row)
    assert f"`{path.name}`" in (PAPERS / "README.md").read_text()


def test_the_table_of_the_readme_reads(tmp_path):
    (text,) = (part.split("```")[0] for part in (PAPERS / "README.md").read_text().split("```toml\n")[1:])
    table = description.read_table(write(tmp_path, text))
    assert [method.name for method in table.method] == ["cross", "smallest filters"]


@pytest.mark.corpus
@pytest.mark.parametrize(("name", "many"), [("cifar10", 5 * (3 + 3 + 4 + 1 + 4) * 10), ("imagenet", 9)])
def test_the_tables_of_real_teachers_find_their_models_and_methods(data, name, many, capsys, tmp_path):
    assert script.start([str(PAPERS / f"{name}.toml"), "--data", str(data), "-o", str(tmp_path), "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"0 of {many} runs done"
