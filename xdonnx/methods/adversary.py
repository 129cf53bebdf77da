"""An adversary that tells teacher from student, and the class with it; kept such that it can do no harm.

Layers FC-ReLU-FC-ReLU-FC, with 1 + C answers: a verdict, high for the teacher, and the scores of the classes, whose
target is the teacher's arg-max for both networks. What keeps it stable:
  - what it reads is standardised by the teacher's numbers, and needs no BatchNormalization;
  - after every step each layer is projected to a spectral norm of 1 at most, so it neither explodes nor saturates
    (Miyato et al., ICLR 2018, who divide by the norm instead);
  - the verdict learns by the hinge loss and rests while it is right too often, so that the student can catch up;
  - once anything about it is no finite number it retires, and nothing of it reaches the student any more.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from xdonnx.methods.attention import random

WIDTH = 128
RATE = 1e-3
# The share of right verdicts above which it rests, and how much of that share one step replaces.
STRONG, NEWS = 0.9, 0.2
# How much of the teacher's mean and spread one step replaces, and the least spread as a share of the mean one.
_DRIFT, _LEAST = 0.1, 0.1


class Adversary:
    """The discriminator of one run.

    Parameters
    ----------
    inputs : int
        Numbers that it reads of each sample.
    classes : int
        0 where the model does not classify: there is only the verdict then.
    generator : torch.Generator
    device : torch.device
    """

    def __init__(self, inputs: int, classes: int, generator: torch.Generator, device: torch.device) -> None:
        sizes = list(pairwise((inputs, WIDTH, WIDTH, 1 + classes)))
        self.weights = [random(rows, columns, generator, device).requires_grad_() for columns, rows in sizes]
        self.biases = [torch.zeros(rows, device=device, requires_grad=True) for _, rows in sizes]
        self.retired = False
        self.right = 0.5
        self.rests = 0
        self._known: tuple[Tensor, Tensor] | None = None
        self._optimizer = torch.optim.Adam([*self.weights, *self.biases], lr=RATE, betas=(0.5, 0.9))
        self._project()

    def verdict(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the verdict (n,) and the scores of the classes (n, C) on rows (n, inputs)."""
        assert self._known is not None, "the first step makes its scale known"
        mean, spread = self._known
        seen = (rows - mean) / spread
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            seen = functional.relu(functional.linear(seen, weight, bias))
        seen = functional.linear(seen, self.weights[-1], self.biases[-1])
        return seen[:, 0], seen[:, 1:]

    def push(self, rows: Tensor, classes: Tensor | None) -> Tensor | None:
        """Return the gradient, at the student's rows (n, inputs), of passing for the teacher and for the right class.

        None where it has nothing to say: before its first step, and once it retired.
        """
        if self.retired or self._known is None:
            return None
        leaf = rows.detach().requires_grad_()
        verdict, scores = self.verdict(leaf)
        loss = -verdict.mean()
        if classes is not None:
            loss = loss + functional.cross_entropy(scores, classes)
        (found,) = torch.autograd.grad(loss, leaf)
        self.retired = not bool(found.isfinite().all())
        return None if self.retired else found

    def learn(self, teacher: Tensor, student: Tensor, classes: Tensor | None) -> None:
        """Make one step on rows (n, inputs) of both networks."""
        if self.retired:
            return
        self._watch(teacher)
        (high, here), (low, there) = self.verdict(teacher), self.verdict(student)
        right = float(((high > 0).float().mean() + (low < 0).float().mean()) / 2)
        self.right += NEWS * (right - self.right)
        loss = functional.relu(1 - high).mean() + functional.relu(1 + low).mean()
        if self.right > STRONG:
            self.rests += 1
            loss = 0 * loss
        if classes is not None:
            loss = loss + functional.cross_entropy(here, classes) + functional.cross_entropy(there, classes)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.retired = not all(bool(tensor.isfinite().all()) for tensor in (loss, *self.weights, *self.biases))
        if not self.retired:
            self._project()

    @torch.no_grad()
    def _watch(self, teacher: Tensor) -> None:
        """Learn the size of the teacher's numbers."""
        mean, spread = teacher.mean(0), teacher.std(0, unbiased=False)
        # A number that hardly moves in the teacher would make any other of the student's a give-away.
        spread = spread.clamp(min=max(_LEAST * float(spread.mean()), 1e-6))
        if self._known is not None:
            mean, spread = (old.lerp(new, _DRIFT) for old, new in zip(self._known, (mean, spread), strict=True))
        self._known = mean, spread

    @torch.no_grad()
    def _project(self) -> None:
        """Bring each layer to a spectral norm of 1 at most."""
        for weight in self.weights:
            norm = float(torch.linalg.eigvalsh(weight @ weight.T)[-1].clamp(min=0).sqrt())
            weight.div_(max(1.0, norm))
