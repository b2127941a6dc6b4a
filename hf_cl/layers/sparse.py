"""A task's part of a masked linear as a sparse matrix, and its product with rows of inputs.

With `delta` a task's weight is the base's plus few entries. Tasks then share the product with the base's weight, and
each adds its own entries' product for its own rows; docs/log.md has what was measured before compressed rows (CSR)
were chosen over coordinates, scattered sums and a composed weight a group.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def compressed(where: Tensor, values: Tensor, shape: tuple[int, int], *, transposed: bool) -> Tensor:
    """Return entries of a weight as a CSR matrix (out, in), float32 values and int32 indices.

    Args:
        where: Flat positions in the stored weight, int64, rising.
        values: Their values, float32.
        shape: Of the stored weight.
        transposed: The layer stores (in, out), as GPT-2's `Conv1D` does.
    """
    rows, columns = where // shape[1], where % shape[1]
    if transposed:
        order = torch.argsort(columns, stable=True)
        rows, columns, values, shape = columns[order], rows[order], values[order], (shape[1], shape[0])
    edges = torch.zeros(shape[0] + 1, dtype=torch.int32, device=where.device)
    edges[1:] = torch.bincount(rows, minlength=shape[0]).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(edges, columns.int(), values.float(), shape, check_invariants=True)


class SparseProduct(torch.autograd.Function):
    """`x S^T` for rows (n, in) and a CSR matrix S (out, in); float32, and a gradient for the rows alone."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, matrix: Tensor) -> Tensor:
        """Return (n, out), float32, laid out by columns as the product makes it."""
        context: Any = ctx
        context.matrix, context.dtype = matrix, x.dtype
        return _times(matrix, x)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the rows, in their dtype."""
        context: Any = ctx
        return _times(context.matrix.t().to_sparse_csr(), grads[0]).to(context.dtype), None


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return torch.sparse.mm(matrix, x.float().t()).t()
