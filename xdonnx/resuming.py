"""How a job that was stopped goes on: what its work rests on, and which of it is done already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from xdonnx.allocation import Curve
from xdonnx.budget import Plan
from xdonnx.contents import READ, content, read_by
from xdonnx.errors import MachineError
from xdonnx.graph import Net
from xdonnx.journal import IDENTITY, Entry, Journal
from xdonnx.machine import machines_fault
from xdonnx.methods.bench import Bench, Outcome, Trace
from xdonnx.patch import Patch
from xdonnx.report import plain, tool
from xdonnx.shots import Shots, Unread
from xdonnx.tries import Try
from xdonnx.verification import shots_facts
from xdonnx.wanted import Job

# What may differ between a job and the one that goes on with it: it changes nothing of the student.
_FREE = {"out", "gate", "force", "external_data", "resume", "memory"}


def identity(job: Job, fit: Shots, held_out: Shots, pool: Shots | Unread | None, device: str) -> dict[str, Any]:
    """Return all that the student rests on: options, what the files hold, samples, versions."""
    files = {
        name: [content(path) for path in paths if path.exists()]
        for name, paths in read_by(job).items()
        if name not in _SEEN
    }
    versions = tool()
    return {
        **{name: value for name, value in plain(job.model_dump()).items() if name not in {*_FREE, *READ}},
        **files,
        "samples": shots_facts(fit, "").sha256,
        "held out": shots_facts(held_out, "").sha256,
        "images of the pool": shots_facts(pool, "").sha256 if isinstance(pool, Shots) else "",
        "device": device,
        "versions": {name: getattr(versions, name) for name in ("version", "torch", "onnx", "onnxruntime")},
    }


# Of these the samples that came of them are told.
_SEEN = {"shots", "labels", "holdout"}


@contextmanager
def keeping(journal: Journal) -> Iterator[None]:
    """Keep the journal where the job is stopped or the machine fails it; remove it however else the job ends.

    That of a job which went on is kept until it is done: a mistake in between must not cost the work.
    """
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, (KeyboardInterrupt, SystemExit, MachineError)) or machines_fault(error)
        if (stopped or journal.resumed) and (journal.folder / IDENTITY).exists():
            error.add_note("What was done so far is kept. To go on: the same command with --resume.")
        else:
            journal.close()
        raise
    journal.close()


def staged(
    at: int, method: Any, net: Net, patch: Patch, fit: Shots, plan: Plan, bench: Bench, journal: Journal
) -> Outcome:
    """Return what a method makes of a patch: as an earlier run found it, or anew.

    Parameters
    ----------
    at : int
        Place of the method in the chain.
    """
    known = journal.entry(f"method {at}")
    if known:
        facts = known.facts
        state = torch.tensor(known.arrays[_STATE])
        bench.generator.set_state(state)
        tensors = {name: array for name, array in known.arrays.items() if name != _STATE}
        traces = tuple(Trace(*trace) for trace in facts["traces"])
        return Outcome(Patch(tensors, frozenset(facts["drop"])), traces)
    found: Outcome = method(net, patch, fit, plan, replace(bench, journal=journal.under(str(at))))
    arrays: Mapping[str, np.ndarray] = {**found.patch.tensors, _STATE: bench.generator.get_state().numpy()}
    traces_made = [
        [trace.layer, trace.objective_before, trace.objective_after, trace.seconds, trace.pool]
        for trace in found.traces
    ]
    journal.keep(f"method {at}", Entry(arrays, {"drop": sorted(found.patch.drop), "traces": traces_made}))
    return found


# No initializer is called so.
_STATE = ""


def recalled_curves(journal: Journal, measured: Callable[[], tuple[Curve, ...]]) -> tuple[Curve, ...]:
    """Return the error curves: as an earlier run measured them, or anew."""
    known = journal.entry("curves")
    if known:
        return tuple(Curve(group, tuple((k, e) for k, e in points)) for group, points in known.facts["curves"])
    found = measured()
    journal.keep("curves", Entry(facts={"curves": [[curve.group, curve.points] for curve in found]}))
    return found


def recalled_plan(journal: Journal, made: Callable[[], tuple[Plan, tuple[Try, ...]]]) -> tuple[Plan, tuple[Try, ...]]:
    """Return the plan and what was tried for it: as an earlier run found them, or anew."""
    known = journal.entry("plan")
    if known:
        facts = known.facts
        channels = {int(group): int(kept) for group, kept in facts["channels"]}
        plan = Plan(facts["structure"], channels, facts["weights"], tuple(facts["layers"]))
        return plan, tuple(Try.model_validate(one) for one in facts["tries"])
    plan, tries = made()
    facts = {"structure": plan.structure, "channels": sorted(plan.channels.items()), "weights": dict(plan.weights)}
    facts |= {"layers": list(plan.layers), "tries": [one.model_dump(mode="json") for one in tries]}
    journal.keep("plan", Entry(facts=facts))
    return plan, tries
