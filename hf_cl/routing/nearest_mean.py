"""The task whose nearest class mean, in the bare base's features, is nearest to the text; and what is kept for that.

    d_c^2 = (x - m_c)^T S^-1 (x - m_c)          S = (1 - r) C + r (tr C / d) I

x is a text's feature of unit length, m_c a class's mean, C the covariance of texts about their class's mean, over all
tasks together, r the shrinkage of the oracle approximating estimator, a function of C and the number of texts alone.
A task adds its means and its sum to C, so earlier texts are never needed again. One forward of the base chooses.

Confidence is `1 / (1 + d^2 / e)`, e being the mean d^2 of a text to its own class: 1/2 for a text as far off as the
texts of a class usually are. It says how near a text is, not how much nearer than to another task, so a threshold on
it finds texts that belong to none.

Source: Lee et al. 2018, arXiv 1807.03888 (class means, one covariance); Chen et al. 2010, arXiv 0907.4698 (shrinkage).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_cl.routing import Inputs, Tasks

MEANS, COUNTS = "routing.means", "routing.counts"
SCATTER, FREEDOM = "routing.scatter", "routing.freedom"
TASK_TENSORS, SHARED_TENSORS = (MEANS, COUNTS), (SCATTER, FREEDOM)


def unit(features: Tensor) -> Tensor:
    """Return features (n, d) of unit length, float64: how many words a text repeats says nothing of its task."""
    return torch.nn.functional.normalize(features.double(), dim=1)


@dataclass(frozen=True, eq=False)
class TaskMeans:
    """A task's class means.

    Attributes:
        means: (classes, d) bfloat16.
        counts: (classes,) int32, texts that each was made of; the mean of none is 0 and nobody's.
    """

    means: Tensor
    counts: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return what a task's file holds of them."""
        return {MEANS: self.means, COUNTS: self.counts}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], classes: int) -> "TaskMeans":
        """Take them back.

        Raises:
            ValueError: They are not those of so many classes.
        """
        means, counts = tensors[MEANS], tensors[COUNTS]
        if means.dtype != torch.bfloat16 or means.ndim != 2 or means.shape[0] != classes or not means.shape[1]:
            raise ValueError(f"{MEANS} is {_kind(means)} for {classes} classes")
        if counts.dtype != torch.int32 or counts.shape != (classes,) or bool((counts < 0).any()) or not counts.any():
            raise ValueError(f"{COUNTS} is {_kind(counts)}, or counts no texts, for {classes} classes")
        return cls(means, counts)

    def seen(self) -> tuple[Tensor, Tensor]:
        """Return means (float32) and counts of the classes that texts were seen of."""
        some = self.counts > 0
        return self.means[some].float(), self.counts[some]


@dataclass(frozen=True, eq=False)
class Spread:
    """How texts scatter about their class's mean, over all tasks together.

    Attributes:
        scatter: (d (d + 1) / 2,) float32, the upper triangle by rows of the sum of outer products.
        freedom: (tasks, 2) int32: the numbers of the tasks that it was summed over, rising, and of each the texts
            less its classes.
    """

    scatter: Tensor
    freedom: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return what the file holds that all tasks share."""
        return {SCATTER: self.scatter, FREEDOM: self.freedom}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> "Spread":
        """Take it back.

        Raises:
            ValueError: It is no such sum.
        """
        scatter, freedom = tensors[SCATTER], tensors[FREEDOM]
        if scatter.dtype != torch.float32 or scatter.ndim != 1 or not scatter.numel() or not _is_triangle(scatter):
            raise ValueError(f"{SCATTER} is {_kind(scatter)}, no triangle")
        if freedom.dtype != torch.int32 or freedom.ndim != 2 or freedom.shape[1] != 2 or bool((freedom < 0).any()):
            raise ValueError(f"{FREEDOM} is {_kind(freedom)}, no pairs")
        if not freedom.shape[0] or bool((freedom[1:, 0] <= freedom[:-1, 0]).any()):
            raise ValueError(f"{FREEDOM} names no task, or its tasks do not rise")
        return cls(scatter, freedom)

    @property
    def width(self) -> int:
        """Numbers a feature has."""
        return _side(self.scatter.numel())

    def covariance(self) -> tuple[Tensor, float]:
        """Return the shrunk covariance (d, d), float64, and the mean squared distance of a text to its class's mean.

        Raises:
            ValueError: It is the sum of no texts: a direction has a variance below 0.
        """
        d = self.width
        count = max(1, int(self.freedom[:, 1].sum()))
        upper = torch.zeros(d, d, dtype=torch.float64)
        upper[tuple(torch.triu_indices(d, d))] = self.scatter.double() / count
        plain = upper + upper.triu(1).T
        trace, squares = float(plain.trace()), float(plain.square().sum())
        if bool((plain.diagonal() < 0).any()):
            raise ValueError(f"{SCATTER} has a variance below 0")
        if not trace:  # no class has two different texts
            return torch.eye(d, dtype=torch.float64), float(d)
        over = (count + 1 - 2 / d) * (squares - trace**2 / d)
        share = min(1.0, ((1 - 2 / d) * squares + trace**2) / over) if over > 0 else 1.0
        shrunk = (1 - share) * plain + share * trace / d * torch.eye(d, dtype=torch.float64)
        factor, failed = torch.linalg.cholesky_ex(shrunk)
        if bool(failed):
            raise ValueError(f"{SCATTER} is the sum of no texts")
        return shrunk, float(torch.cholesky_solve(plain, factor).trace())


def measure(features: Tensor, labels: Tensor, classes: int) -> tuple[TaskMeans, Tensor, int]:
    """Return a task's means, and what it adds to the common sum: its scatter, float32, and its degrees of freedom.

    Args:
        features: (n, d), the bare base's.
        labels: (n,) int64.
        classes: Number of labels.
    """
    x = unit(features)
    sums = torch.zeros(classes, x.shape[1], dtype=torch.float64).index_add_(0, labels, x)
    counts = torch.bincount(labels, minlength=classes)
    means = sums / counts.clamp_min(1).unsqueeze(1)
    about = x - means[labels]
    scatter = (about.T @ about)[tuple(torch.triu_indices(x.shape[1], x.shape[1]))].float()
    freedom = len(labels) - int((counts > 0).sum())
    return TaskMeans(means.bfloat16(), counts.int()), scatter, freedom


def added(spread: Spread | None, index: int, scatter: Tensor, freedom: int) -> Spread:
    """Return the common sum with a task's; one that is in it already, since its run was interrupted, is not again."""
    entry = torch.tensor([[index, freedom]], dtype=torch.int32)
    if spread is None:
        return Spread(scatter, entry)
    if index in spread.freedom[:, 0].tolist():
        return spread
    return Spread(spread.scatter + scatter, torch.cat([spread.freedom, entry]))


class NearestMean:
    """Compares a text with every class's mean."""

    def __init__(self, tasks: Tasks) -> None:
        """Take the tasks.

        Raises:
            BankError: A task has no state, or another base's.
        """
        self._tasks, state = tasks, tasks.gaussians()
        self._typical = state.typical
        factor = torch.linalg.cholesky(state.covariance)
        self._whiten = torch.linalg.inv(factor).T
        self._means = [means.double() @ self._whiten for means in state.means]

    def confidences(self, inputs: Inputs) -> Tensor:
        """Return `1 / (1 + d^2 / e)` with the distance to the nearest class of each task, (n, k)."""
        x = unit(self._tasks.features(inputs)) @ self._whiten
        squares = [torch.cdist(x, means).amin(1).square() for means in self._means]
        return (1 / (1 + torch.stack(squares, 1) / max(self._typical, 1e-30))).float()


def build(tasks: Tasks) -> NearestMean:
    """Return the router."""
    return NearestMean(tasks)


def _side(size: int) -> int:
    return int(((8 * size + 1) ** 0.5 - 1) / 2)


def _is_triangle(tensor: Tensor) -> bool:
    side = _side(tensor.numel())
    return side * (side + 1) // 2 == tensor.numel()


def _kind(tensor: Any) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
