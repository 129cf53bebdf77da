"""Back-propagation alone: the baseline that a practitioner with a few labelled samples tries first.

Filters (or weights) of smallest magnitude go, as in `l1-norm`; what is left is trained end to end by cross entropy
against the labels of the shots. With so few labels it learns them by heart, which is what the other methods avoid.
After another method (`--method cross --method bp`) nothing more is removed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional

from xdonnx.budget import Plan
from xdonnx.errors import JobError, ShotsError
from xdonnx.graph import Net
from xdonnx.methods.bench import Bench, Outcome
from xdonnx.methods.l1_norm import L1Norm
from xdonnx.methods.training import Batch, check_schedule, schedule, train
from xdonnx.patch import Patch
from xdonnx.shots import Shots
from xdonnx.student import Taps, find_taps


@dataclass(frozen=True)
class BP:
    """Magnitude pruning, then cross entropy on the labels of the shots.

    Parameters
    ----------
    effort : {'fast', 'balanced', 'best', 'paper'}, default='balanced'
        Steps, as for `tune`.

    steps : int, optional
        Steps to make, whatever the effort.

    References
    ----------
    .. [1] Rumelhart, Hinton, Williams, "Learning representations by back-propagating errors", Nature 323, 1986.
    .. [2] Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets", ICLR 2017. arXiv:1608.08710
    """

    effort: str = "balanced"
    steps: int | None = None

    # It learns from labels.
    labelled = True

    def __post_init__(self) -> None:
        check_schedule(self.effort, self.steps)

    def __call__(self, net: Net, patch: Patch, shots: Shots, plan: Plan, bench: Bench) -> Outcome:
        """Prune where nothing was pruned yet, and train on the labels.

        Raises
        ------
        ShotsError
            The samples have no labels, or labels that the model has no class for.
        JobError
            The model's first output is no row of scores.
        """
        taps = find_taps(net, bench.program)
        labels, classes = shots.labels, _classes(net, taps)
        if labels is None:
            raise ShotsError("--method bp needs labelled samples.\n  Pass --labels FILE, or folders named by class.")
        if int(labels.max()) >= classes:
            raise ShotsError(f"label {int(labels.max())} is none of the model's {classes} classes.\n  Mend the labels.")
        if not patch.tensors and not patch.drop:
            patch = L1Norm()(net, patch, shots, plan, bench).patch
        scores = taps.answers[0]

        def loss(batch: Batch) -> Tensor:
            assert batch.labels is not None
            return functional.cross_entropy(batch.student[scores].flatten(1), batch.labels)

        plan_of_steps = schedule(net, self.effort, self.steps, mix=False)
        # Images of a pool have no labels to learn.
        return train(net, patch, shots, loss, plan_of_steps, replace(bench, pool=None), Taps((), (scores,)))

    def check(self, structure: str) -> None:
        """Any structure will do: what is zero stays zero."""


def _classes(net: Net, taps: Taps) -> int:
    """Return how many classes the first output scores."""
    shape = net.shapes.get(taps.answers[0], ()) if taps.answers else ()
    classes = 1
    for size in shape[1:]:
        classes *= size
    if len(shape) < 2 or max(shape[1:]) != classes or classes < 2:
        raise JobError(
            "--method bp trains on classes, and the model's first output is no row of scores.\n"
            "  Use --method cross --method tune, which needs no labels."
        )
    return classes
