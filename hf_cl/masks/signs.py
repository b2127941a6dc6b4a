"""Random signs that are a function of (seed, layer, position), so a store needs no bytes.

A counter-based hash, not a generator: no library version, device or order of calls can change it.
Word `w` of a layer is splitmix64's output for state `key + (w + 1) * GOLDEN`, where `key` is the first
eight bytes (little endian) of sha256("<seed>:<path>"); entry `i` in the stored layout reads bit `i % 64`
(from the lowest) of word `i // 64`: 1 is +1, 0 is -1.

Source of the mixing constants: Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014 (splitmix64).
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((30, np.uint64(0xBF58476D1CE4E5B9)), (27, np.uint64(0x94D049BB133111EB)))


def sign_tensor(seed: int, path: str, shape: tuple[int, ...]) -> Tensor:
    """Return the signs of one layer: float32, +1.0 or -1.0, of the given shape.

    Args:
        seed: The seed of the store, the same for all layers.
        path: The layer's module path below the model's `base_model_prefix`.
        shape: Shape of the weight in its stored layout (row-major positions are hashed).
    """
    size = int(np.prod(shape, dtype=np.int64))
    bits = np.unpackbits(_words(seed, path, -(-size // 64)).view(np.uint8), bitorder="little")[:size]
    return torch.from_numpy(bits.astype(np.float32)).mul_(2).sub_(1).reshape(shape)


def _words(seed: int, path: str, count: int) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    key = np.frombuffer(digest[:8], dtype="<u8")[0]
    with np.errstate(over="ignore"):
        state = key + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
        for shift, factor in _MIX:
            state = (state ^ (state >> np.uint64(shift))) * factor
        state ^= state >> np.uint64(31)
    return state.astype("<u8")
