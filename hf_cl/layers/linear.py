"""The kinds of linear that can be masked: torch's, and GPT-2's `Conv1D`, which stores its weight transposed.

A mask, its owners and its signs follow the stored layout; only fan-in and application know the kind.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D


def is_maskable(module: nn.Module) -> bool:
    """Return whether a module is one of these kinds, and no subclass with a forward of its own."""
    return type(module) in (nn.Linear, Conv1D)


def fan_in(layer: Any) -> int:
    """Return how many inputs a linear's outputs sum over."""
    return int(layer.weight.shape[0 if isinstance(layer, Conv1D) else 1])


def apply_weight(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Return what the linear `layer` gives for `x` (..., in) with another weight in its own layout."""
    if isinstance(layer, Conv1D):
        flat = torch.addmm(layer.bias, x.reshape(-1, x.shape[-1]), weight)
        return flat.view(*x.shape[:-1], weight.shape[1])
    return F.linear(x, weight, layer.bias)
