"""A mask as bits in memory: eight entries a byte, the form an adapter keeps while its task is finished."""

import math

import numpy as np
import torch
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """Return a bool tensor's bits, eight a byte from the lowest, uint8, on the mask's device."""
    bits = np.packbits(mask.detach().cpu().view(-1).numpy(), bitorder="little")
    return torch.from_numpy(bits).to(mask.device)


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the bool tensor of the given shape that `pack` packed."""
    size = math.prod(shape)
    flat = np.unpackbits(bits.cpu().numpy(), count=size, bitorder="little").view(np.bool_)
    return torch.from_numpy(flat).to(bits.device).view(shape)
