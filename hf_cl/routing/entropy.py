"""Run every task; the one whose answer has the lowest entropy, as a share of its highest possible, is chosen.

Needs no state. Costs a forward a task; an answer that is sure for the wrong reason wins like any other.

Source: SupSup, arXiv 2006.14769, the exhaustive variant of its code; dividing by log(classes) is ours, so that tasks
with few labels do not win by that alone.
"""

import math

import torch
from torch import Tensor

from hf_cl.routing import Inputs, Tasks


def normalised_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of each row's softmax as a share of the highest possible, in [0, 1]; differentiable.

    Args:
        logits: (n, classes). A task with one label is never sure: 1.
    """
    if logits.shape[-1] < 2:
        return torch.ones(logits.shape[0], device=logits.device)
    log = logits.float().log_softmax(-1)
    # exp and log of one tensor: p log p is 0 where p underflows, and never 0 times infinity.
    return -(log.exp() * log).sum(-1).clamp_max(0) / math.log(logits.shape[-1])


class Entropy:
    """Asks every task."""

    def __init__(self, tasks: Tasks) -> None:
        """Take the tasks."""
        self._tasks = tasks

    def confidences(self, inputs: Inputs) -> Tensor:
        """Return 1 - entropy / log(classes) of each task's answer, (n, k)."""
        with torch.no_grad():
            found = [1 - normalised_entropy(logits) for logits in self._tasks.logits(inputs)]
        return torch.stack(found, 1).clamp(0, 1).cpu()


def build(tasks: Tasks) -> Entropy:
    """Return the router."""
    return Entropy(tasks)
