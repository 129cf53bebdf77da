"""Trials that Optuna chooses, each batch from the results of all before it.

What is chosen depends on the seed of the search, on the batch and on what was found, and on nothing else: not on the
backend, nor on where a search was interrupted. So the sampler is made anew for every point, from the seed and the
point's number, on a study in memory that holds the points before its batch; the study in the folder keeps finished
points only, and a batch of which some are missing is asked for again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdonnx.contents import digest
from xdonnx.errors import MachineError
from xdonnx.sweep.description import Choice, Description, Range, Search, Teacher
from xdonnx.sweep.front import known_quality, points
from xdonnx.sweep.options import is_whole
from xdonnx.sweep.records import Record
from xdonnx.sweep.trials import Trial, trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study, StudyDirection
    from optuna.trial import FrozenTrial

STORAGE = "search.db"


def explore(
    sweep: Description, out: Path, records: Mapping[str, Record], do: Callable[[Sequence[Trial]], None]
) -> None:
    """Search on each model of a sweep.

    Parameters
    ----------
    sweep : Description
    out : Path
        Its folder, which keeps the studies.
    records : mapping
        What is known of trials, by their keys; `do` adds to it.
    do : callable
        Does the trials of a batch that are not done yet.

    Raises
    ------
    MachineError
        Optuna is not installed, or the folder cannot hold its study.
    """
    _optuna()
    for teacher in sweep.models:
        _explore(sweep, teacher, out, records, do)


def _explore(
    sweep: Description,
    teacher: Teacher,
    out: Path,
    records: Mapping[str, Record],
    do: Callable[[Sequence[Trial]], None],
) -> None:
    search = sweep.search
    assert search is not None

    def made(asked: Sequence[Mapping[str, Any]]) -> list[list[Trial]]:
        return [[trial(sweep, teacher, _picks(sweep, params), seed, out) for seed in sweep.seeds] for params in asked]

    from optuna.study import StudyDirection

    # Of nothing, Optuna draws at random, whichever way is up.
    first = _asked(sweep, [], range(min(search.batch, search.trials)), [StudyDirection.MINIMIZE] * 2)
    trials = made([params for params, _ in first])
    do([one for its in trials for one in its])
    quality = sweep.quality or known_quality([records[one.key] for its in trials for one in its if one.key in records])
    with _study(sweep, trials[0][0], out, quality) as study:
        directions = study.directions
        for start in range(0, search.trials, search.batch):
            numbers = range(start, min(start + search.batch, search.trials))
            history = study.get_trials(deepcopy=False)
            known = [(dict(one.params), one) for one in history[start : numbers.stop]]
            asked = first if start == 0 else known
            if len(asked) < len(numbers):
                asked = _asked(sweep, history[:start], numbers, directions)
            trials = made([params for params, _ in asked])
            do([one for its in trials for one in its])
            for (params, chosen), its in list(zip(asked, trials, strict=True))[len(known) :]:
                study.add_trial(_finished(params, chosen, _values(its, records, sweep.cost, quality)))


def distributions(sweep: Description) -> dict[str, BaseDistribution]:
    """Return what Optuna chooses from: choices by their names, ranges as they are."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for name, space in {**sweep.axes, **sweep.space}.items():
        if not isinstance(space, Range):
            if len(space) > 1:
                found[name] = CategoricalDistribution([choice.name for choice in space])
        elif is_whole(name):
            step = int(space.step or 1)
            found[name] = IntDistribution(int(space.low), int(space.high), log=space.log, step=step)
        else:
            found[name] = FloatDistribution(space.low, space.high, log=space.log, step=space.step)
    return found


def _picks(sweep: Description, params: Mapping[str, Any]) -> dict[str, Choice | float | int]:
    """Return what is varied as trials take it: choices by name become themselves, a lone one needs no choosing."""
    picks: dict[str, Choice | float | int] = {}
    for name, space in {**sweep.axes, **sweep.space}.items():
        if isinstance(space, Range):
            picks[name] = params[name]
        else:
            picks[name] = next(choice for choice in space if choice.name == params.get(name, space[0].name))
    return picks


def _asked(
    sweep: Description, history: Sequence[FrozenTrial], numbers: range, directions: Sequence[StudyDirection]
) -> list[tuple[dict[str, Any], FrozenTrial]]:
    """Return the parameters of a batch of points, and Optuna's own notes on them."""
    import optuna

    assert sweep.search is not None
    mirror = optuna.create_study(directions=list(directions))
    mirror.add_trials(history)
    space = distributions(sweep)
    asked = []
    for number in numbers:
        mirror.sampler = _sampler(sweep.search, number)
        asked.append(dict(mirror.ask(space).params))
    return list(zip(asked, mirror.get_trials()[len(history) :], strict=True))


def _sampler(search: Search, number: int) -> Any:
    from optuna.samplers import NSGAIISampler, TPESampler

    seed = int(digest([f"{search.seed} {number}".encode()])[:8], 16)
    if search.sampler == "tpe":
        return TPESampler(seed=seed)
    return NSGAIISampler(population_size=search.population, seed=seed)


def _values(
    trials: Sequence[Trial], records: Mapping[str, Record], cost: str, quality: str
) -> tuple[float, float] | None:
    """Return what a point is worth; None where no seed gave a student of which both are known."""
    (point,) = points(trials, records, cost, quality)
    return (point.cost.mean, point.quality.mean) if point.cost and point.quality else None


def _finished(params: Mapping[str, Any], chosen: FrozenTrial, values: tuple[float, float] | None) -> FrozenTrial:
    from optuna.trial import TrialState, create_trial

    return create_trial(
        state=TrialState.FAIL if values is None else TrialState.COMPLETE,
        values=values,
        params=dict(params),
        distributions=dict(chosen.distributions),
        # The generation of a genetic search.
        system_attrs=dict(chosen.system_attrs),
    )


@contextmanager
def _study(sweep: Description, first: Trial, out: Path, quality: str) -> Iterator[Study]:
    """Yield the study of a model; another space, sampler or teacher has another one in the same file."""
    import optuna
    import sqlalchemy

    assert sweep.search is not None
    # More points go on with the study that there is. The key of a trial stands for what all of them share.
    how = sweep.search.model_dump(exclude={"trials", "space"})
    what = [how, sweep.axes, sweep.space, sweep.seeds, sweep.cost, quality, first.key]
    name = f"{first.model} {digest([repr(what).encode()])[:8]}"
    url = sqlalchemy.URL.create("sqlite", database=str(out / STORAGE))
    try:
        storage = optuna.storages.RDBStorage(url.render_as_string(hide_password=False))
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise MachineError(f"'{out / STORAGE}' cannot hold the search: {error}.\n  Name another folder: -o") from error
    try:
        yield optuna.create_study(
            storage=storage,
            study_name=name,
            directions=["minimize", "minimize" if quality == "error" else "maximize"],
            load_if_exists=True,
        )
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise MachineError(f"'{out / STORAGE}' cannot be written: {error}.\n  Free space, then go on.") from error
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _optuna() -> None:
    """Import Optuna, and keep it quiet."""
    try:
        import optuna
    except ImportError as error:
        raise MachineError(
            "a sweep with [search] needs Optuna.\n"
            "  Install it: python -m pip install 'optuna>=4'   (it is the extra `optuna` of xdonnx)"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
