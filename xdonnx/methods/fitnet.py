"""FitNets (Romero et al., ICLR 2015): hints at the middle, then the teacher's softened answers.

The student is the pruned teacher (`l1-norm`, unless an earlier method removed what the plan says), in two stages as in
the paper:
  1. the layers up to the hint, the middle one of the compared stages, learn the teacher's features there. The paper's
     regressor maps a thinner guided layer to the hint's width; here the student keeps a subset of the very channels,
     so it is compared with those and needs none;
  2. all layers learn the teacher's answers softened by a temperature.
No labels are used: where the paper adds cross entropy to stage 2, few-sample practice leaves it out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from xdonnx.budget import Plan
from xdonnx.graph import Net
from xdonnx.methods.bench import Bench, Outcome
from xdonnx.methods.l1_norm import L1Norm
from xdonnx.methods.training import Batch, check_schedule, relative_error, schedule, train
from xdonnx.patch import Patch
from xdonnx.shots import Shots
from xdonnx.student import Taps, find_taps

TEMPERATURE = 4.0


@dataclass(frozen=True)
class FitNet:
    """Magnitude pruning, then hints and softened answers.

    Answers are softened where they are scores of classes: samples have labels, or the graph ends in a softmax.

    Parameters
    ----------
    effort : {'fast', 'balanced', 'best', 'paper'}, default='balanced'
        Steps, as for `tune`; half for each stage.

    steps : int, optional
        Steps to make, whatever the effort.

    References
    ----------
    .. [1] Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets", ICLR 2015.
       arXiv:1412.6550
    """

    effort: str = "balanced"
    steps: int | None = None

    # Both its stages draw from a pool: they look at the teacher, not at labels.
    pools = True

    def __post_init__(self) -> None:
        check_schedule(self.effort, self.steps)

    def __call__(self, net: Net, patch: Patch, shots: Shots, plan: Plan, bench: Bench) -> Outcome:
        """Prune where nothing was pruned yet, and train in two stages."""
        if not patch.tensors and not patch.drop:
            patch = L1Norm()(net, patch, shots, plan, bench).patch
        taps = find_taps(net, bench.program)
        whole = schedule(net, self.effort, self.steps, mix=False)
        half = type(whole)(max(1, whole.steps // 2), whole.batch, False, whole.rates)
        for stage in (Taps(taps.stages[(len(taps.stages) - 1) // 2 :][:1], ()), Taps((), taps.answers)):
            if stage.all:
                classes = shots.labels is not None or not set(taps.answers) & {p.name for p in net.interface.outputs}
                loss = _hint if stage.stages or not classes else _softened
                patch = train(net, patch, shots, loss, half, bench, stage).patch
        return Outcome(patch)

    def check(self, structure: str) -> None:
        """Any structure will do: what is zero stays zero."""


def _hint(batch: Batch) -> Tensor:
    return torch.stack([relative_error(batch.student[name], batch.teacher[name]) for name in batch.student]).mean()


def _softened(batch: Batch) -> Tensor:
    """Return the divergence of the softened answers; squared error for answers that are no row of scores."""
    parts = []
    for name, scores in batch.student.items():
        teacher = batch.teacher[name]
        if scores.ndim == 2 and scores.shape[1] > 1:
            wanted = functional.log_softmax(teacher / TEMPERATURE, 1)
            found = functional.log_softmax(scores / TEMPERATURE, 1)
            kl = functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
            parts.append(kl * TEMPERATURE**2)
        else:
            parts.append(relative_error(scores, teacher))
    return torch.stack(parts).mean()
