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


def digest(tensors: Iterable[tuple[str, Tensor]], *parts: str) -> str:
    """Return the hexadecimal sha256 of named tensors, preceded by any text `parts`."""
    state = hashlib.sha256()
    for part in parts:
        state.update(f"{len(part)}:{part}".encode())
    for name, tensor in tensors:
        state.update(f"{len(name)}:{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        state.update(tensor_bytes(tensor))
    return state.hexdigest()


def task_digest(parts: Mapping[str, str]) -> str:
    """Return one digest for all parts a task's forward reads."""
    return digest((), *(f"{part}={parts[part]}" for part in sorted(parts)))
