"""Mix all tasks' masks, and ask by one backward pass which of them makes the answer surer.

    W(a) = A + (sum_i a_i M_i) * V       H(a) = sum_i a_i H_i / log C_i       g_i = dH / da_i

Every task begins with the share a_i = 1/k; H_i is the entropy of the answer that task i's head gives on the mixed
network, and the task with the smallest g_i is chosen: more of it lowers the entropy most steeply. With `binary`
the better half is kept, shared out anew and asked again until one is left: log2 k passes.

Only learned tasks take part. A slot without a task has the slope 0, which is safe in a network of masked layers without
biases, where sum a_i g_i <= 0 says that some learned task is below it; attention, GELU, biases and norms break that. On
a transformer this is a heuristic. Tasks with heads of their own have no common answer, so each head's entropy
counts by its task's share; both are ours. Confidence is the softmax of -g.

Source: SupSup, arXiv 2006.14769, one-shot and binary inference (its objective H).
"""

import torch
from torch import Tensor

from hf_cl.routing import Inputs, Tasks

NEVER = 1e4
"""A slope that no softmax chooses, and that is finite."""


class Superposition:
    """Asks the mixed network."""

    def __init__(self, tasks: Tasks, *, binary: bool = False) -> None:
        """Take the tasks, and whether they are halved until one is left."""
        self._tasks, self._binary = tasks, binary

    def confidences(self, inputs: Inputs) -> Tensor:
        """Return the softmax of -g over the tasks that are left in the last pass, (n, k)."""
        texts, count = len(inputs["input_ids"]), len(self._tasks.classes)
        left = torch.ones(texts, count, dtype=torch.bool)
        while True:
            slopes = self._slopes(inputs, left)
            if not self._binary or int(left.sum(1).max()) <= 2:
                return (-slopes).softmax(1)
            left = better_half(slopes, left)

    def _slopes(self, inputs: Inputs, left: Tensor) -> Tensor:
        slopes = self._tasks.slopes(inputs, left / left.sum(1, keepdim=True)).float().cpu()
        return torch.where(left, slopes.nan_to_num(NEVER, NEVER, -NEVER), NEVER)


def better_half(slopes: Tensor, left: Tensor) -> Tensor:
    """Return which tasks stay: of each text's that are left, the half (rounded up) with the smallest slopes.

    Args:
        slopes: (n, k).
        left: (n, k) bool; every text has equally many.
    """
    keep = -(-int(left[0].sum()) // 2)
    order = torch.where(left, slopes, torch.inf).argsort(dim=1, stable=True)
    return torch.zeros_like(left).scatter_(1, order[:, :keep], True)


def build(tasks: Tasks) -> Superposition:
    """Return the one-shot router."""
    return Superposition(tasks)
