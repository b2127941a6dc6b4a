"""A task's part of a masked linear as a sparse matrix: its product with rows of inputs, and gradients at its entries.

With `delta` a task's weight is the base's plus few entries. Tasks then share the product with the base's weight, and
each adds its own entries' product for its own rows; docs/log.md has what was measured before compressed rows (CSR)
were chosen over coordinates, scattered sums and a composed weight a group.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

SAMPLED_BELOW = 24
"""Gradients are taken at the entries alone where fewer than one of so many trains; else one dense product is faster."""


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


def is_sampled(x: Tensor, weight: Tensor, count: int) -> bool:
    """Return whether the gradients of so many entries are taken one by one: float32 on a CPU, and few of them.

    An accelerator, or a CPU with bfloat16, makes the dense product in less time than it takes to pick from rows.
    """
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return plain and 0 < count * SAMPLED_BELOW < weight.numel()


class SampledLinear(torch.autograd.Function):
    """`x W^T + b`, of which few entries of W train: the dense gradient of W, a third of a step's work, is not made."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        scores: Tensor,
        matrix: Tensor,
        stored: bool,
    ) -> Tensor:
        """Return (..., out), float32.

        Args:
            ctx: Autograd's.
            x: (..., in), float32.
            weight: The composed weight as it is stored, float32: (out, in), or (in, out).
            bias: (out,), which does not train, or None.
            values: float32; the first of them train, at the entries in storage order.
            scores: At rest, and not read; they are in the graph because DDP waits for all that requires a gradient.
            matrix: Where these are: CSR of the stored shape, float32; its values are not read.
            stored: The weight is stored (in, out), as GPT-2's `Conv1D` does.
        """
        context: Any = ctx
        context.save_for_backward(x, weight)
        context.matrix, context.stored, context.size = matrix, stored, values.shape[0]
        return F.linear(x, weight.t() if stored else weight, bias)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients for (x, values); no other input trains."""
        context: Any = ctx
        x, weight = context.saved_tensors
        back = grads[0] @ (weight.t() if context.stored else weight) if context.needs_input_grad[0] else None
        given, out = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        left, right = (given, out) if context.stored else (out, given)
        found = torch.sparse.sampled_addmm(context.matrix, left.t(), right, beta=0.0).values()
        picked = torch.zeros(context.size, dtype=torch.float32)
        picked[: found.shape[0]] = found
        return back, None, None, picked, None, None, None


class SparseProduct(torch.autograd.Function):
    """`x S^T` for rows (n, in) and a CSR matrix S (out, in); float32, and a gradient for the rows alone."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, matrix: Tensor) -> Tensor:
        """Return (n, out), float32, laid out by columns as the product makes it."""
        context: Any = ctx
        context.matrix, context.dtype = matrix, x.dtype
        return times(matrix, x)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the rows, in their dtype."""
        context: Any = ctx
        return times(context.matrix.t().to_sparse_csr(), grads[0]).to(context.dtype), None


def sparse_product(x: Tensor, matrix: Tensor) -> Tensor:
    """Return what `SparseProduct` does, without autograd's call where nothing asks for a gradient."""
    if torch.is_grad_enabled() and x.requires_grad:
        found: Tensor = SparseProduct.apply(x, matrix)
        return found
    return times(matrix, x)


def times(matrix: Tensor, x: Tensor) -> Tensor:
    """Return `x S^T` in float32, whatever autocast is on."""
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return times(matrix, x)
    return torch.sparse.mm(matrix, x.float().t()).t()
