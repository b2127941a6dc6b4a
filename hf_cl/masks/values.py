"""Rounding of trained values to what is stored, and int8 values with one scale a row.

A scale is the row's largest magnitude over 127, rounded to bfloat16: eight significant bits times seven are exact in
float32, so a rounded value's scale is read off the values themselves and nothing has to be kept beside them.
"""

import torch
from torch import Tensor

DTYPES = ("float32", "bfloat16", "int8")
MOST = 127


def round_values(values: Tensor, where: Tensor, width: int, dtype: str) -> Tensor:
    """Return values as they will be stored, in float32.

    Args:
        values: float32, one a position.
        where: Flat positions, rising.
        width: Entries a row.
        dtype: `float32`, `bfloat16` or `int8`.
    """
    if dtype != "int8":
        return values.to(getattr(torch, dtype)).float()
    row = _rows(where, width)
    most = values.new_zeros(_count(row)).scatter_reduce_(0, row, values.abs(), "amax")
    scale = (most / MOST).bfloat16().float()
    whole = (values / scale[row].where(scale[row] > 0, torch.ones(()).to(scale))).round_().clamp_(-MOST, MOST)
    return whole * scale[row]


def to_int8(values: Tensor, where: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return rounded values as int8 and the scales, bfloat16, of the rows that have any."""
    row = _rows(where, width)
    most = values.new_zeros(_count(row)).scatter_reduce_(0, row, values.abs(), "amax")
    scale = most / MOST
    whole = (values / scale[row].where(scale[row] > 0, torch.ones(()).to(scale))).round_()
    return whole.to(torch.int8), scale.bfloat16()


def from_int8(whole: Tensor, scales: Tensor, where: Tensor, width: int) -> Tensor:
    """Return the float32 values that `to_int8` stored.

    Raises:
        ValueError: There are not as many scales as rows that have values.
    """
    row = _rows(where, width)
    if scales.shape[0] != _count(row):
        raise ValueError(f"{scales.shape[0]:,} scales for {_count(row):,} rows with values")
    return whole.float() * scales.float()[row]


def _rows(where: Tensor, width: int) -> Tensor:
    """Return, for each position, the number of its row among the rows that have any."""
    return torch.unique_consecutive(where // width, return_inverse=True)[1]


def _count(row: Tensor) -> int:
    return int(row[-1]) + 1 if row.numel() else 0
