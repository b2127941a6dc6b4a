"""One integer an entry: the task that owns it, or FREE.

An entry has one cell, so it cannot have two owners: exclusivity needs no check. The owner is the first
task whose committed mask holds the entry; a later task may read the entry's value and never change it.

Source: EideticNet, arXiv 2502.09500 (owner map); ExSSNeT, arXiv 2210.10209 (exclusive masks).
"""

import torch
from torch import Tensor

from hf_cl.errors import OwnershipError

FREE = -1
FOREIGN = -2
"""Owned by an earlier task that is not loaded here; its value came along with a later task."""
MOST_TASKS = torch.iinfo(torch.int16).max


def all_free(shape: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """Return an owner map without owners: int16, FREE everywhere."""
    return torch.full(shape, FREE, dtype=torch.int16, device=device)


def claim(owner: Tensor, mask: Tensor, task: int) -> Tensor:
    """Give the free entries of `mask` to `task`; return the new map, the old one stays as it is.

    Args:
        owner: int16 owner map.
        mask: bool, of the map's shape.
        task: The task's number in its bank, from 0.

    Raises:
        OwnershipError: The number does not fit the map.
    """
    if not 0 <= task <= MOST_TASKS:
        raise OwnershipError(f"task number {task}: an owner map holds 0 to {MOST_TASKS}. Start a new bank.")
    return torch.where(mask & (owner == FREE), torch.tensor(task, dtype=owner.dtype), owner)


def free_share(owner: Tensor) -> float:
    """Return the share of entries that no task owns."""
    return int((owner == FREE).count_nonzero()) / owner.numel()
