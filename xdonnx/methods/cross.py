"""Cross distillation (Bai, Wu, King, Lyu, AAAI 2020): layer by layer, teacher and student crossed.

For every convolution from front to back, earlier layers already compressed:
  1. take the layer's input in the teacher, h_T, and in the student, h_S, for all shots;
  2. find weights W with the wanted sparsity that make W * h_S or W * h_T close to W_T * h_T or W_T * h_S, W_T the
     teacher's weights. *Correction* compares both on h_T, *imitation* both on h_S; cross distillation weighs the two
     by mu (its "Ours"), or mixes the inputs themselves with alpha and beta ("Ours-S");
  3. write W into the student and go on.
Correction alone lets errors pile up, regression (each on its own input) fits the noise of a few shots; the crossing
stands between. The paper solves step 2 by proximal gradient; with the three moments of the layer it is one quadratic,
and ADMM or greedy removal with exact refits reach a lower error in a fraction of the time. Images of a pool, where
there is one, are further rows of a smaller weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from xdonnx.augment import VIEWS, widened
from xdonnx.budget import Plan
from xdonnx.connection import Connection, cross, named, regression, soft
from xdonnx.errors import JobError, did_you_mean
from xdonnx.events import Event
from xdonnx.graph import Net
from xdonnx.methods.bench import Bench, Outcome
from xdonnx.methods.layerwise import FOLDS, Rule, layerwise
from xdonnx.patch import Patch
from xdonnx.shots import Shots
from xdonnx.solve import ADMM, PGD, SOLVERS, Greedy, Solver
from xdonnx.walk import affordable

# Images of a pool that layers are fitted on besides the samples and their views.
POOLED = 128
# What 'auto' may refit a layer with instead, where folds of the samples say so.
ALTERNATIVES = ((soft(1.0, 0.5), 0.01), (regression(), 0.01), (soft(0.9, 0.5), 0.1))
EFFORTS = ("fast", "balanced", "best", "paper")


@dataclass(frozen=True)
class Cross:
    """Cross distillation with structured or unstructured pruning.

    Parameters
    ----------
    connection : {'auto', 'soft', 'cross', 'correction', 'imitation', 'regression'}, default='auto'
        'auto' is soft(0.9, 0.5), the best fixed choice that was measured (see the README's table), refitted layer by
        layer with less regularisation or more compensation where three folds of the samples say so.
    mu : float, optional
        Share of correction in 'cross'. Default: the paper's 0.9 for networks with residual additions, 0.6 for others.
    alpha, beta : float, optional
        Of 'soft'. Default: the paper's (0.9, 0.5) for networks with residual additions, (0.9, 0.3) for others.
    solver : {'auto', 'pgd', 'admm', 'greedy'}, default='auto'
        'auto' is greedy for channels and ADMM for single weights.
    ridge : float, optional
        Pull toward the teacher's weights, relative to the mean curvature. Default: 0.01.
    views : int, optional
        Rows that samples of images are brought to by mirrored, shifted and mixed views; 0 makes none. Default: 128,
        and none under the effort 'paper'.
    effort : {'fast', 'balanced', 'best', 'paper'}, default='balanced'
        'paper' runs what the published code runs: 3,000 Adam steps with the hard ramp of the kept fraction, biases
        frozen, no ridge, no refit, connection cross(mu) unless another is asked for. 'fast' makes no exchanges after
        greedy removal and fewer ADMM steps; 'best' makes more.

    References
    ----------
    .. [1] Bai et al., "Few Shot Network Compression via Cross Distillation", AAAI 2020. arXiv:1911.09450
    """

    connection: str = "auto"
    mu: float | None = None
    alpha: float | None = None
    beta: float | None = None
    solver: str = "auto"
    ridge: float | None = None
    views: int | None = None
    effort: str = "balanced"

    @property
    def pools(self) -> bool:
        """Whether it draws from a pool; the published procedure does not."""
        return self.effort != "paper"

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            near = did_you_mean(self.effort, EFFORTS)
            raise JobError(f"unknown effort '{self.effort}'.{near}\n  Efforts: {', '.join(EFFORTS)}.")
        if self.solver != "auto" and self.solver not in SOLVERS:
            near = did_you_mean(self.solver, SOLVERS)
            raise JobError(f"unknown solver '{self.solver}'.{near}\n  Solvers: auto, {', '.join(SOLVERS)}.")
        if self.views is not None and self.views < 0:
            raise JobError(f"--views is {self.views}.\n  It is a number of rows, such as 128; 0 makes no views.")
        if self.ridge is not None and not 0 <= self.ridge < float("inf"):
            raise JobError(
                f"--ridge is {self.ridge}.\n  It is a fraction of the mean curvature: 0 or more, such as 0.01."
            )
        if self.connection == "auto":
            soft(_or(self.alpha, 0.9), _or(self.beta, 0.5))
            cross(_or(self.mu, 0.5))
        else:
            named(self.connection, mu=_or(self.mu, 0.5), alpha=_or(self.alpha, 0.9), beta=_or(self.beta, 0.5))

    def __call__(self, net: Net, patch: Patch, shots: Shots, plan: Plan, bench: Bench) -> Outcome:
        """Compress the net from these shots; see `xdonnx.methods.layerwise`."""
        paper = self.effort == "paper"
        ridge = self.ridge if self.ridge is not None else (0.0 if paper else 0.01)
        solver = self._solver(plan)
        rule = Rule(
            self.connected(net),
            ridge,
            solver,
            not paper,
            not paper,
            compensate=not paper,
            rectify=self.effort in ("balanced", "best"),
            exact=paper,
        )
        open_choice = self.connection == "auto" and self.alpha is None and self.beta is None and self.ridge is None
        choices = ALTERNATIVES if open_choice and self.effort in ("balanced", "best") else ()
        rows = self.views if self.views is not None else 0 if paper else VIEWS
        inputs = widened(shots.inputs, affordable(net, rows), bench.generator, FOLDS)
        others = None if paper else _others(net, inputs, bench)
        if self.views and 2 * len(shots) <= self.views and len(next(iter(inputs.values()))) == len(shots):
            text = "no views were made: the samples are no images, or views of them would not fit into memory."
            bench.log(Event("fit", text, level="warning"))
        return layerwise(net, patch, inputs, plan, replace(rule, others=choices), bench, len(shots), others)

    def check(self, structure: str) -> None:
        """Raise JobError for combinations that make no sense."""
        chosen = self.connection
        if chosen == "auto":
            chosen = "cross" if self.effort == "paper" else "soft"
        for name, owner in (("mu", "cross"), ("alpha", "soft"), ("beta", "soft")):
            value = getattr(self, name)
            if value is not None and chosen != owner:
                raise JobError(
                    f"--{name} belongs to --connection {owner}; this job's connection is {chosen}.\n"
                    f"  Pass --connection {owner}, or leave --{name} out."
                )
        if self.solver == "greedy" and structure != "channel":
            raise JobError(
                f"--solver greedy removes whole channels and does not go with --structure {structure}.\n"
                "  Legal: greedy with channel; admm or pgd with any structure."
            )

    def connected(self, net: Net) -> Connection:
        """Return the connection for a teacher."""
        residual = any(group.stream for group in net.groups) or any(
            "added at" in reason for reason in net.pinned.values()
        )
        if self.connection == "auto" and self.effort != "paper":
            return soft(_or(self.alpha, 0.9), _or(self.beta, 0.5))
        name = "cross" if self.connection == "auto" else self.connection
        return named(
            name,
            mu=_or(self.mu, 0.9 if residual else 0.6),
            alpha=_or(self.alpha, 0.9),
            beta=_or(self.beta, 0.5 if residual else 0.3),
        )

    def _solver(self, plan: Plan) -> Solver:
        if self.effort == "paper" and self.solver in ("auto", "pgd"):
            return PGD(refit=False, single=True)
        name = self.solver
        if name == "auto":
            name = "greedy" if plan.structure == "channel" else "admm"
        if name == "greedy":
            return Greedy(swaps={"fast": 0, "best": 64}.get(self.effort, 16))
        if name == "admm":
            return ADMM(iterations={"fast": 100, "best": 600}.get(self.effort, 300))
        return PGD()


def _others(net: Net, inputs: Mapping[str, np.ndarray], bench: Bench) -> dict[str, np.ndarray] | None:
    """Return rows of the pool that a walk may be shown besides; None where there is no pool, or no room."""
    if bench.pool is None:
        return None
    own = len(next(iter(inputs.values())))
    count = (affordable(net, own + POOLED) - own) // net.batch * net.batch
    if count < 1:
        text = "layers are fitted without the pool: its images would not fit into memory beside the samples."
        bench.log(Event("fit", text, level="warning"))
        return None
    return bench.pool.draw(count, int(bench.generator.initial_seed()) % 2**63)


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value
