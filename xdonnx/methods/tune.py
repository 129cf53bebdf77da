"""Feature tuning: the whole student at once, held against the frozen teacher, without labels.

After layers were fitted one by one, what is left is the error of their interplay:
  1. show both networks views and mixtures of the shots, and of as many images of a pool where there is one;
  2. compare them at the end of every stage, at the features before global pooling and at the answers before the
     softmax, each error as a share of the teacher's energy there;
  3. move all weights that are left by Adam, masks frozen, and keep the average that held-out shots like best.
The features before pooling are the signal of MiR (Wang et al., CVPR 2022); stage ends and answers are added since a few
steps have to be enough for early layers and for models that do not classify.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xdonnx.budget import Plan
from xdonnx.graph import Net
from xdonnx.methods.bench import Bench, Outcome
from xdonnx.methods.training import Batch, check_schedule, relative_error, schedule, train
from xdonnx.patch import Patch
from xdonnx.shots import Shots


@dataclass(frozen=True)
class Tune:
    """Label-free tuning of features and answers, end to end.

    Parameters
    ----------
    effort : {'fast', 'balanced', 'best', 'paper'}, default='balanced'
        Steps at most: 200, 400, 2,000, 2,000; fewer for large networks.

    steps : int, optional
        Steps to make, whatever the effort.

    References
    ----------
    .. [1] Wang, Cao, Wang, Wu, "Compressing Models with Few Samples: Mimicking then Replacing", CVPR 2022.
       arXiv:2201.02620
    """

    effort: str = "balanced"
    steps: int | None = None

    # It fits what another method removed, and draws from a pool.
    follows = True
    pools = True

    def __post_init__(self) -> None:
        check_schedule(self.effort, self.steps)

    def __call__(self, net: Net, patch: Patch, shots: Shots, plan: Plan, bench: Bench) -> Outcome:
        """Tune the student of `patch`."""
        del plan  # what goes was decided before
        return train(net, patch, shots, matching, schedule(net, self.effort, self.steps, mix=True), bench)

    def check(self, structure: str) -> None:
        """Any structure will do: what is zero stays zero."""


def matching(batch: Batch) -> Tensor:
    """Mean over all taps of the student's error, relative to the teacher's energy."""
    return torch.stack([relative_error(batch.student[name], batch.teacher[name]) for name in batch.student]).mean()
