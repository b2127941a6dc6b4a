"""Digests: one sha256 over names, dtypes, shapes and bytes of tensors, in the order given.

Source: FIPS 180-4 (sha256). What a digest of a task covers is decided where its tensors are known.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, row-major, little endian, without copying where it lies on the CPU already."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    raw: Any = flat.view(torch.uint8).numpy()
    return memoryview(raw) if flat.numel() else memoryview(b"")


class Digest:
    """A sha256 that takes named tensors one after another."""

    def __init__(self, *parts: str) -> None:
        """Begin with texts."""
        self._state = hashlib.sha256()
        for part in parts:
            self._state.update(f"{len(part)}:{part}".encode())

    def update(self, name: str, tensor: Tensor) -> None:
        """Add a tensor with its name, dtype and shape."""
        self._state.update(f"{len(name)}:{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        self._state.update(tensor_bytes(tensor))

    def hexdigest(self) -> str:
        """Return the digest so far, hexadecimal."""
        return self._state.hexdigest()


def digest(tensors: Iterable[tuple[str, Tensor]], *parts: str) -> str:
    """Return the hexadecimal sha256 of named tensors, preceded by any text `parts`."""
    state = Digest(*parts)
    for name, tensor in tensors:
        state.update(name, tensor)
    return state.hexdigest()


def task_digest(parts: Mapping[str, str]) -> str:
    """Return one digest for all parts a task's forward reads."""
    return digest((), *(f"{part}={parts[part]}" for part in sorted(parts)))
