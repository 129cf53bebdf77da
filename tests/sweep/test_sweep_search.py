"""Searches: what Optuna chooses depends on seeds and results, and on nothing that happens on the way."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes import DATA, MODEL, described, students, swept

from xdonnx.sweep.search import distributions, explore
from xdonnx.sweep.trials import Trial

optuna = pytest.importorskip("optuna", reason="Optuna is not installed: python -m pip install optuna")

SEARCH = f"""
seeds = [0, 1]
{DATA}{MODEL}
[search]
trials = 26
batch = 4
population = 6

[search.space]
keep = {{ low = "5%", high = "95%" }}
ridge = {{ low = 1e-3, high = 1.0, log = true }}
round-to = {{ low = 1, high = 8 }}
solver = ["admm", "greedy"]
"""


def worth(trial: Trial) -> dict[str, Any]:
    """Return made-up figures of a trial: more channels are better and cost more, and some ridge is best."""
    job = trial.job
    assert job.keep is not None and job.ridge is not None and job.round_to is not None
    noise = np.random.default_rng(job.seed).normal()
    good = 100 * job.keep**0.3 - 5 * abs(np.log10(job.ridge) + 2) - (job.solver == "admm") + noise
    if job.keep < 0.1:
        return {"status": "failed", "error": "out of reach", "final": True}
    return {"status": "passed", "macs": job.keep**2, "accuracy": good, "agreement": good, "final": True}


def searched(folder: Path, text: str, *, stop: int | None = None) -> list[Trial]:
    """Search by made-up figures and return the trials in their order; `stop` interrupts after so many."""
    records: dict[str, dict[str, Any]] = {}
    listed: list[Trial] = []

    def do(trials: Sequence[Trial]) -> None:
        for trial in trials:
            if stop is not None and len(records) == stop and trial.key not in records:
                raise KeyboardInterrupt
            records.setdefault(trial.key, worth(trial))
            listed.append(trial)

    folder.mkdir(exist_ok=True)
    explore(described(folder, text), folder, records, do)
    return list({(one.point, one.seed): one for one in listed}.values())


def keys(trials: Sequence[Trial]) -> list[str]:
    return [trial.key for trial in trials]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_search_is_repeated_by_its_seed_and_goes_on_where_it_was_interrupted(tmp_path: Path, sampler: str) -> None:
    text = SEARCH.replace("trials = 26", f'trials = 26\nsampler = "{sampler}"')
    whole = searched(tmp_path / "whole", text)
    again = searched(tmp_path / "again", text)
    other = searched(tmp_path / "other", text.replace("batch = 4", "batch = 4\nseed = 1"))
    # In the middle of a batch, with one seed of a point done; then with fewer points, then with all.
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "cut", text, stop=29)
    shorter = searched(tmp_path / "cut", text.replace("trials = 26", "trials = 18"))
    resumed = searched(tmp_path / "cut", text)

    # A genetic search may ask for a point again, which then costs nothing.
    assert len(set(keys(whole))) == len(whole) and (40 if sampler == "nsga2" else 52) <= len(whole) <= 52
    assert keys(again) == keys(whole) and keys(resumed) == keys(whole)
    assert keys(shorter) == keys(whole)[: len(shorter)] and 29 <= len(shorter) <= 36
    assert not set(keys(other)) & set(keys(whole))


def test_points_of_both_seeds_are_chosen_within_their_ranges(tmp_path: Path) -> None:
    found = searched(tmp_path, SEARCH)
    assert [trial.seed for trial in found[:4]] == [0, 1, 0, 1]
    for trial in found:
        job = trial.job
        assert 0.05 <= (job.keep or 0) <= 0.95 and 1e-3 <= (job.ridge or 0) <= 1
        assert isinstance(job.round_to, int) and 1 <= job.round_to <= 8 and job.solver in ("admm", "greedy")
        assert trial.choices["keep"] == job.keep and trial.choices["solver"] == job.solver


def test_what_a_search_learns_leads_it(tmp_path: Path) -> None:
    found = searched(tmp_path, SEARCH.replace("trials = 26", "trials = 60").replace("[0, 1]", "[0]"))
    ridges = [abs(np.log10(trial.job.ridge or 1) + 2) for trial in found]
    assert np.mean(ridges[30:]) < 0.75 * np.mean(ridges[:10]), "the best ridge is 0.01"


def test_the_study_keeps_the_means_and_which_points_failed(tmp_path: Path) -> None:
    found = searched(tmp_path, SEARCH)
    (name,) = optuna.get_all_study_names(f"sqlite:///{tmp_path}/search.db")
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{tmp_path}/search.db")

    assert len(study.trials) == 26 and name.startswith("digits_vgg ")
    for at, point in enumerate(study.trials):
        records = [worth(trial) for trial in found[2 * at : 2 * at + 2]]
        if records[0]["status"] == "failed":
            assert point.state.name == "FAIL"
            continue
        means = [np.mean([record[key] for record in records]) for key in ("macs", "accuracy")]
        assert point.values == pytest.approx(means)
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MAXIMIZE"]


def test_another_space_is_another_study_in_the_same_file(tmp_path: Path) -> None:
    searched(tmp_path, SEARCH.replace("trials = 26", "trials = 4"))
    searched(tmp_path, SEARCH.replace("trials = 26", "trials = 4").replace('"5%"', '"6%"'))
    searched(tmp_path, SEARCH.replace("trials = 26", "trials = 8"))
    with sqlite3.connect(tmp_path / "search.db") as connection:
        ((count,),) = connection.execute("select count(*) from studies")
    connection.close()
    assert count == 2


def test_lists_of_the_file_are_choices_of_the_search(tmp_path: Path) -> None:
    text = SEARCH.replace("[search]", '[[method]]\nname = "cross"\n[[method]]\nname = "thinet"\n[search]')
    text = text.replace("seeds = [0, 1]", 'structures = ["channel"]')
    space = distributions(described(tmp_path, text))
    assert space["method"].choices == ("cross", "thinet") and "structure" not in space
    assert (space["keep"].low, space["ridge"].log, space["round_to"].high) == (0.05, True, 8)


def test_a_real_search_is_the_same_on_every_backend(tmp_path: Path) -> None:
    text = f"""
{DATA}{MODEL}
[search]
trials = 2
batch = 1
[search.space]
keep = {{ low = 0.3, high = 0.9 }}
method = ["l1-norm"]
"""
    serial = swept(tmp_path, text, out="serial")
    processes = swept(tmp_path, text, out="processes", run={"backend": "processes", "jobs": 1})
    assert students(serial) == students(processes) and len(students(serial)) == 2
    assert swept(tmp_path, text, out="serial").taken == 0
    assert serial.search and serial.search["trials"] == 2 and len(serial.points) == 2
