"""The TOML file of a sweep: what it may say, and what is said of what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes import DATA, GRID, MODEL, SAMPLES, described, write

from xdonnx.errors import JobError
from xdonnx.sweep.description import Range, read_sweep
from xdonnx.sweep.trials import grid, trial

SEARCH = f"""
{DATA}{MODEL}
[search]
trials = 4

[search.space]
keep = {{ low = "10%", high = 0.9 }}
"""


def lists(folder: Path, text: str) -> list[str]:
    """Return the trials of a sweep, a line each."""
    return [str(one) for one in grid(described(folder, text), folder / "out")]


def test_trials_are_all_combinations_with_seeds_outermost(tmp_path: Path) -> None:
    text = GRID.replace('{ keep = "20%" }', '{ keep = "20%" }, { macs = 0.3 }')
    assert lists(tmp_path, text) == [
        f"digits_vgg | {method} | {target} | seed {seed}"
        for seed in (0, 1)
        for method in ("l1-norm", "refitted")
        for target in ("keep 20%", "macs 30%")
    ]


def test_flags_reach_the_job_and_what_is_nearer_wins(tmp_path: Path) -> None:
    text = GRID.replace('name = "refitted"\n', 'name = "refitted"\nper_class = 3\nmin-shrink = "10%"\n')
    jobs = {one.choices["method"]: one.job for one in grid(described(tmp_path, text), tmp_path / "out")}

    plain, refitted = jobs["l1-norm"], jobs["refitted"]
    assert (plain.per_class, refitted.per_class) == (2, 3)
    assert (plain.method, refitted.method) == (("l1-norm",), ("cross",)), "a method's name means that method"
    assert plain.keep == 0.2 and plain.preprocess.preset == "unit" and plain.gate.max_drop == 20
    assert refitted.gate.min_shrink == 0.1 and refitted.include == ("*features.3*",)
    assert plain.shots == (str(SAMPLES / "shots"),) and plain.holdout == str(SAMPLES / "held_out.npz")


def test_a_target_of_a_method_takes_the_place_of_the_one_that_all_share(tmp_path: Path) -> None:
    text = GRID.replace('targets = [{ keep = "20%" }]', "").replace("[options]", "[options]\nmacs = 0.5")
    text = text.replace('name = "l1-norm"\n', 'name = "l1-norm"\nkeep = 0.9\n')
    jobs = {one.choices["method"]: one.job for one in grid(described(tmp_path, text), tmp_path / "out")}
    assert (jobs["l1-norm"].keep, jobs["l1-norm"].macs) == (0.9, None)
    assert (jobs["refitted"].keep, jobs["refitted"].macs) == (None, 0.5)


def test_a_pattern_stands_once_where_others_stand_for_each_target(tmp_path: Path) -> None:
    text = GRID.replace("targets =", 'structures = ["element", "2:4"]\ntargets =').replace(
        '{ keep = "20%" }', "{ keep = 0.5 }, { params = 0.3 }"
    )
    found = [one for one in lists(tmp_path, text) if "l1-norm" in one and "seed 0" in one]
    assert [one.split(" | ")[2:-1] for one in found] == [["element", "keep 50%"], ["element", "params 30%"], ["2:4"]]


def test_what_makes_no_sense_together_is_refused_trial_by_trial(tmp_path: Path) -> None:
    text = GRID.replace("targets =", 'structures = ["channel", "element"]\ntargets =').replace("cross", "thinet")
    text = text.replace("views = 0\n", "").replace('preset-effort = "fast"\n', "")
    found = grid(described(tmp_path, text), tmp_path / "out")
    refused = {(one.choices["method"], one.choices["structure"]) for one in found if one.refused}
    assert refused == {("refitted", "element")}


def test_paths_are_relative_to_the_file_wherever_the_sweep_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = read_sweep(SAMPLES / "sweep.toml")
    assert [teacher.model for teacher in sweep.models] == [
        SAMPLES / "digits_vgg.onnx",
        SAMPLES / "digits_residual.onnx",
    ]
    assert sweep.models[1].options["shots"] == (str(SAMPLES / "shots"),) and sweep.models[1].options["residual"]


def test_samples_of_several_inputs_are_a_table_or_named(tmp_path: Path) -> None:
    (tmp_path / "a.npy").touch()
    for said in ('{ x = "a.npy", y = "a.npy" }', '["x=a.npy", "y=a.npy"]'):
        sweep = described(tmp_path, GRID.replace(f'"{SAMPLES}/shots"', said))
        assert sweep.models[0].options["shots"] == (f"x={tmp_path}/a.npy", f"y={tmp_path}/a.npy")


def test_a_space_is_ranges_and_choices_and_what_the_file_lists(tmp_path: Path) -> None:
    text = SEARCH + 'round-to = { low = 1, high = 8 }\nmethod = ["cross", ["cross", "tune"]]\n'
    sweep = described(tmp_path, text)
    assert sweep.space["keep"] == Range(low=0.1, high=0.9)
    picks = {"keep": 0.25, "round_to": 4, "method": sweep.space["method"][1]}  # type: ignore[index]
    job = trial(sweep, sweep.models[0], picks, 3, tmp_path).job
    assert (job.keep, job.round_to, job.method, job.seed) == (0.25, 4, ("cross", "tune"), 3)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            'title = "Tiny"',
            'titel = "Tiny"',
            r"'tiny.toml', line 2, titel: unknown key. Did you mean 'title'\?\n  Keys",
        ),
        ('title = "Tiny"', "keep = 0.5", r"keep: unknown key.*\n  It is a flag of xdonnx compress: put it into \[opt"),
        ("seeds = [0, 1]", "seeds = [0, -1]", r"line 3, seeds, 1: Input should be greater than or equal to 0"),
        (
            "seeds = [0, 1]",
            f"seeds = [{2**64}]",
            r"line 3, seeds, 0: Input should be less than or equal to 18446744",
        ),
        ("seeds = [0, 1]", "seeds = []", r"seeds: .* at least 1 item"),
        (
            "seeds = [0, 1]",
            'cost = "flops"',
            r"cost: Input should be 'macs', 'bytes', 'weights' or 'latency'.\n  It says",
        ),
        ("per-class = 2", "per-clas = 2", r"line 10, \[options\]: unknown key: 'per-clas'. Did you mean 'per-class'\?"),
        ("per-class = 2", "per-class = 2\nper_class = 2", r"'per_class' is given twice, with - and with _"),
        ("per-class = 2", "seed = 2", r"'seed' is said by seeds = \[0, 1\]"),
        ("per-class = 2", 'per-class = "few"', r"\[options\]: per_class is 'few'.\n  It takes a whole number"),
        ('preset = "unit"', 'preset = "unt"', r"\[options\]: unknown --preset 'unt'"),
        ("max-drop = 20", "max-drop = -1", r"gate max_drop = -1.0 is no limit"),
        ('"20%"', '"half%"', r"targets 1, keep: 'half%' is no number"),
        ("{ keep", "{ keeps", r"targets 1: unknown key: 'keeps'. Did you mean 'keep'\?"),
        ("{ keep", '{ structure = "element", keep', r"targets 1: does not stand here: 'structure'"),
        ('name = "l1-norm"', 'nam = "l1-norm"', r"\[\[method\]\] 1: no name"),
        (
            'name = "l1-norm"',
            'name = "l1norm"',
            r"\[\[method\]\] 1: 'l1norm' is no method, and nothing else is said. Did you mean 'l1-norm'\?\n  Say",
        ),
        (
            '"20%"',
            '"20%" }, { keep = "250%"',
            r"target 'keep 250%': --keep is 2.5.\n  It is a fraction above",
        ),
        ('name = "refitted"', 'name = "l1-norm"', r"two methods named 'l1-norm'"),
        ('method = "cross"', 'method = "corss"', r"there is no method 'corss'. Did you mean 'cross'\?"),
        ('method = "cross"', 'keep = 0.3\nmethod = "cross"', r"'keep' is said by \[\[method\]\] and by targets"),
        ('method = "cross"', 'macs = 0.3\nmethod = "cross"', r"two targets: 'macs' by \[\[method\]\] and 'keep' by"),
        ('method = "cross"', 'mu = 0.5\nmethod = "cross"', r"method 'refitted': --mu belongs to --connection cross"),
        ("digits_vgg", "digits_vvg", r"\[\[model\]\] 1: no model at '.*digits_vvg.onnx'.\n  Paths are relative"),
        ("held_out.npz", "held.npz", r"holdout: nothing at '.*held.npz'"),
        ("[[model]]", "[model]", r"'tiny.toml', line 15, model: it takes a list.\n  Write \[\[model\]\], with two"),
        ("[[model]]", "[[model", r"is no TOML"),
        ("[[model]]", '[run]\nbackend = "slurm"\n[[model]]', r"run, backend: Input should be 'serial', 'processes' or"),
        (
            "[[model]]",
            "[run]\ncpu = 2\n[[model]]",
            r"run, cpu: unknown key. Did you mean 'cpus'\?\n  Keys: backend, jobs",
        ),
        ("[[model]]", "[run]\njobs = 2.5\n[[model]]", r"run, jobs: Input should be a valid integer"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place_and_the_nearest_key(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    assert old in GRID
    with pytest.raises(JobError, match=says):
        lists(tmp_path, GRID.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("trials = 4", "trial = 4", r"search, trial: unknown key. Did you mean 'trials'\?"),
        ("trials = 4", "trials = 0", r"search, trials: Input should be greater than or equal to 1"),
        ("trials = 4", 'sampler = "grid"', r"search, sampler: Input should be 'tpe' or 'nsga2'"),
        ("keep =", "kep =", r"\[search.space\], kep: unknown key: 'kep'. Did you mean 'keep'\?"),
        (
            "high = 0.9",
            "hihg = 0.9",
            r"\[search.space\], keep: high: Field required.\n  A range has low, high, step, log",
        ),
        ("high = 0.9", "high = 0.05", r"keep: 0.1 to 0.05 is no range"),
        ("high = 0.9", "high = 0.9, log = true, step = 0.1", r"keep: 0.1 to 0.9 is no range.*\n  .*log takes no step"),
        ('keep = { low = "10%", high = 0.9 }', "", r"nothing to search"),
        ('{ low = "10%", high = 0.9 }', "[0.5, 0.5]", r"'keep' has no choices, or two that are the same"),
        ('{ low = "10%", high = 0.9 }', "0.5", r"keep is 0.5.\n  Write \{ low = 0.1, high = 0.9 \}, or a list"),
        ("keep =", "residual =", r"residual is 0.9|'residual' has no range|residual is '10%'"),
        ("keep =", 'solver = ["admm", "adm"]\nkeep =', ""),
        (
            "keep =",
            "per-class = { low = 1, high = 5 }\nkeep =",
            r"'per-class' is said by \[options\] or \[\[model\]\] and",
        ),
        (
            "keep =",
            "steps = { low = 1, high = 5, step = 0.5 }\nkeep =",
            r"steps: it counts, and the range is of fracti",
        ),
        ("[search]", "[options.x]\n[search]", r"unknown key: 'x'"),
        ("keep =", "params = { low = 0.1, high = 0.5 }\nkeep =", r""),
    ],
)
def test_a_wrong_search_is_refused_with_the_place(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in SEARCH
    text = SEARCH.replace(old, new, 1)
    if not says:
        # What only some points would say is for these points to fail by.
        assert described(tmp_path, text).search
        return
    with pytest.raises(JobError, match=says):
        described(tmp_path, text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"no sweep at '.*none.toml': No such file"):
        read_sweep(tmp_path / "none.toml")


def test_the_example_of_the_readme_reads(tmp_path: Path) -> None:
    whole = (SAMPLES.parent / "README.md").read_text().split("## Sweeps")[1].split("\n## ")[0]
    texts = [part.split("```")[0] for part in whole.split("```toml\n")[1:]]
    (tmp_path / "samples").symlink_to(SAMPLES)
    sweeps = [read_sweep(write(tmp_path, text)) for text in texts]
    assert [bool(sweep.search) for sweep in sweeps] == [False, True]
    found = grid(sweeps[0], tmp_path)
    assert len(found) == 3 * 2 * 2 and not any(one.refused for one in found)
    search = sweeps[1]
    for method in search.space["method"]:  # type: ignore[union-attr]
        picks = {"macs": 0.3, "ridge": 0.1, "method": method}
        assert not trial(search, search.models[0], picks, 0, tmp_path).refused
