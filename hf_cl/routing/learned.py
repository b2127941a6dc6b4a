"""A linear classifier on the bare base's features, learned from all texts of all tasks without keeping any.

    W = (N S + sum_c n_c m_c m_c^T)^-1 [n_c m_c]_c

is the least-squares fit of every class's 0 and 1 to the features (with a constant beside them) of all N texts, and what
it is made of is what `nearest_mean` keeps: class means m_c with their counts n_c, and the covariance S, whose shrinkage
is the ridge. So it grows by a task exactly as if all texts were still there, takes no step, no seed and no bytes of
its own, and a dropped task leaves with its means. One forward of the base chooses; the confidence is the largest fit
among a task's classes, in [0, 1]. Over all classes the fits sum to 1, far away from all texts too: to find texts that
belong to no task, `nearest_mean` is the better one.

Source: EideticNet, arXiv 2502.09500, learns a classifier over tasks on frozen features; the closed form is ours, after
recursive least squares. A network of one hidden layer on draws of the same Gaussians chose worse (docs/log.md).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_cl.routing import Inputs, Tasks
from hf_cl.routing.nearest_mean import unit


class Learned:
    """Asks its classifier."""

    def __init__(self, tasks: Tasks) -> None:
        """Take the tasks and solve.

        Raises:
            BankError: A task has no state, or another base's.
        """
        self._tasks, state = tasks, tasks.gaussians()
        means = pad(torch.cat(list(state.means)).double(), (0, 1), value=1.0)
        counts = torch.cat(list(state.counts)).double().unsqueeze(1)
        gram = pad(state.covariance * counts.sum(), (0, 1, 0, 1)) + (means * counts).T @ means
        self._weight = torch.linalg.solve(gram, (means * counts).T)
        self._sizes = [len(part) for part in state.means]

    def confidences(self, inputs: Inputs) -> Tensor:
        """Return the largest fit among each task's classes, (n, k)."""
        fits = pad(unit(self._tasks.features(inputs)), (0, 1), value=1.0) @ self._weight
        return torch.stack([part.amax(1) for part in fits.split(self._sizes, 1)], 1).clamp(0, 1).float()


def build(tasks: Tasks) -> Learned:
    """Return the router."""
    return Learned(tasks)
