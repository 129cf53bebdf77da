"""Unlabelled images beside the shots, related to the task or not, from which batches are drawn.

Images that look related to what the teacher was trained on are drawn more often: with a probability proportional to
exp(-score / TAU), where the score comes from the teacher alone (see `relatedness`) and is standardised over the pool.

References
----------
.. [1] Begon, Geurts, "Distillation from Heterogeneous Unlabeled Collections", 2022. arXiv:2201.06507
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xdonnx.errors import JobError, ShotsError, did_you_mean
from xdonnx.shots import Shots

Array = NDArray[Any]

DRAWS = ("preferential", "uniform")
# An image one standard deviation more related than another is drawn e^(1 / TAU) times as often: seven times.
TAU = 0.5
# Deviations beyond which scores count as equal, lest a few images be all that is drawn.
FARTHEST = 2.0
# What stands for the class of an image of the pool; cross entropy passes it over by default.
UNLABELLED = -100


@dataclass(frozen=True, eq=False)
class Pool:
    """Images to draw from.

    Parameters
    ----------
    images : Shots
        As the graph takes them; many are `rows.Rows`, which are read when they are drawn. Labels are of no account.
    scores : (n,) float, optional
        Of mean 0 and deviation 1; lower is more related. None where nothing could be measured.
    how : {'preferential', 'uniform'}
    """

    images: Shots
    scores: Array | None = None
    how: str = "preferential"

    def __post_init__(self) -> None:
        check_draw(self.how)
        assert len(self.images) and (self.scores is None or self.scores.shape == (len(self.images),))

    def __len__(self) -> int:
        return len(self.images)

    def chances(self) -> Array:
        """Return the probability of each image, (n,)."""
        scores = np.zeros(len(self)) if self.scores is None or self.how == "uniform" else self.scores
        weights = np.exp(-np.clip(scores, -FARTHEST, FARTHEST) / TAU)
        found: Array = weights / weights.sum()
        return found

    def draw(self, count: int, seed: int) -> dict[str, Array]:
        """Return so many images at once, {graph input: (count, ...)}; the same ones for the same seed."""
        return next(self.batches(count, seed))

    def batches(self, size: int, seed: int) -> Iterator[dict[str, Array]]:
        """Yield batches without end, every image of them drawn anew, {graph input: (size, ...)}.

        The same seed gives the same batches. An image may be drawn twice: views of it will differ.
        """
        generator, chances = np.random.default_rng(seed), self.chances()
        while True:
            rows = generator.choice(len(self), size, p=chances)
            yield {name: np.asarray(values[rows]) for name, values in self.images.inputs.items()}


def of_the_pool(error: ShotsError) -> ShotsError:
    """Return an error of reading samples as one of reading the pool."""
    text = str(error).replace("--shots", "--pool").replace("no shots at", "nothing at")
    # A pool has no classes.
    for classes in (", in a sub-folder for each class", " (sub-folders are classes)"):
        text = text.replace(classes, "")
    return ShotsError(f"--pool: {text}")


def check_draw(how: str) -> None:
    """Raise JobError for a draw that is none."""
    if how not in DRAWS:
        near = did_you_mean(how, DRAWS)
        raise JobError(f"unknown --pool-draw '{how}'.{near}\n  Choices: {', '.join(DRAWS)}.")
