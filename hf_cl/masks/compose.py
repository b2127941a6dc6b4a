"""The one formula: `W = A + M * V`, and the straight-through gradients of what trains.

    compose   A    V at the start
    delta     W0   random sign x scale * std(W0)
    prune     0    W0
    random    0    random sign x scale * sqrt(2 / fan_in)

Only a share of the entries differs from A, so W lives in a buffer of its own and each change writes
just those entries. The buffer changes between steps, never between a forward and its backward: torch's
version check on saved tensors turns a violation into an error.

Source: SupSup, arXiv 2006.14769 (scores, straight-through); ExSSNeT, arXiv 2210.10209 (values on the mask).
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from hf_cl.masks.signs import sign_tensor

COMPOSES = ("delta", "prune", "random")
REACH = 0.01
"""Density times scale in the form `delta`: what a mask can move in a row's sum stays the same at every density."""


def fitting_scale(compose: str, density: float) -> float:
    """Return the scale that fits a density, where none is asked for.

    `delta`: `REACH / density`; the best scale of a sweep over densities .001 to .05 lay near it (docs/log.md).
    `random`: `density ** -.5`, which keeps the variance of what a layer gives, as the "scaled" starts of supermasks do
    (Ramanujan et al., arXiv 1911.13299, section 3.2). `prune` has none: 1.
    """
    return REACH / density if compose == "delta" else density**-0.5 if compose == "random" else 1.0


def layer_scale(compose: str, weight: Tensor, scale: float, fan_in: int | None = None) -> float:
    """Return the magnitude of a layer's start values, a float32 number; `prune` has none and returns 1.

    Args:
        compose: `delta`, `prune` or `random`.
        weight: The pretrained weight (out, in), any float dtype.
        scale: In units of the weight's standard deviation (`delta`) or of sqrt(2 / fan_in) (`random`).
        fan_in: Inputs an output sums over; None is the weight's second dimension.
    """
    if compose == "delta":
        return float((weight.double().std(correction=0) * scale).float())
    if compose == "random":
        return float(torch.tensor(scale * math.sqrt(2 / (fan_in or weight.shape[1]))))
    return 1.0


def start_store(compose: str, weight: Tensor, seed: int, path: str, scale: float) -> Tensor:
    """Return V as it is before any task: float32, of the weight's shape and device.

    Args:
        compose: `delta`, `prune` or `random`.
        weight: The pretrained weight.
        seed: Seed of the signs.
        path: The layer's name for the signs, see `masks.signs`.
        scale: The layer's stored magnitude, from `layer_scale`.
    """
    if compose == "prune":
        return weight.detach().float().clone()
    return sign_tensor(seed, path, tuple(weight.shape)).mul_(scale).to(weight.device)


def positions(flat: Tensor) -> Tensor:
    """Return the positions of a flat bool tensor's True entries, int64."""
    if flat.device.type == "cpu":  # three times as fast as torch's
        return torch.from_numpy(np.flatnonzero(flat.numpy()))
    return flat.nonzero().squeeze(1)


def pick(tensor: Tensor, where: Tensor) -> Tensor:
    """Return a tensor's entries at flat positions."""
    flat = tensor.detach().view(-1)
    return torch.from_numpy(flat.numpy()[where.numpy()]) if _plain(flat) else flat[where]


def put(tensor: Tensor, where: Tensor, values: Tensor) -> None:
    """Write a tensor's entries at flat positions, rounded to its dtype; torch counts it as one change."""
    flat = tensor.detach().view(-1)
    if _plain(flat) and values.dtype == flat.dtype:
        flat.numpy()[where.numpy()] = values.detach().numpy()
        torch.autograd.graph.increment_version(tensor)
    else:
        flat[where] = values.to(flat.dtype)


def _plain(flat: Tensor) -> bool:
    """Whether numpy reads the tensor; its indexing is two to four times as fast as torch's on a CPU."""
    return flat.device.type == "cpu" and flat.dtype == torch.float32


class JointWeight(torch.autograd.Function):
    """Hand the composed weight to the linear, and its gradient to scores and values at once (WSN).

    dL/dscore = dL/dW * V, times sign(score) where the magnitude ranks; dL/dvalue = dL/dW where the mask holds a free
    entry, and 0 elsewhere: what an earlier task owns is read from the store, never from the values that train.

    Source: WSN, ICML 2022 (scores and values in one step); the private values are ours.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, scores: Tensor, values: Tensor, weight: Tensor, read: Tensor, own: Tensor, magnitude: bool
    ) -> Tensor:
        """Return `weight`, (out, in); `read` is V as this task reads it, `own` (bool) the free entries of its mask."""
        context: Any = ctx
        context.magnitude = magnitude
        context.save_for_backward(scores, read, own)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients for (scores, values); the other inputs are no parameters."""
        context: Any = ctx
        scores, read, own = context.saved_tensors
        grad = grads[0].float()
        to_scores = grad * read
        if context.magnitude:
            to_scores.mul_(scores.sign())
        return to_scores, grad * own, None, None, None, None


class TrainedWeight(torch.autograd.Function):
    """Hand the composed weight to the linear, and its gradient to what trains in this phase.

    Mask phase: dL/dscore = dL/dW * V, times sign(score) where the magnitude ranks; the count's threshold
    is passed straight through. Weight phase: dL/dvalue is dL/dW at the value's position.
    The phase that is off gets no gradient at all rather than a zero one: it never enters the clipping
    norm, and an optimizer does not step on None.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        scores: Tensor,
        values: Tensor,
        weight: Tensor,
        store: Tensor,
        where: Tensor | None,
        magnitude: bool,
    ) -> Tensor:
        """Return `weight`, (out, in) in the base's dtype; `where` (int64, flat) is None in the mask phase."""
        context: Any = ctx
        context.magnitude, context.in_mask_phase, context.size = magnitude, where is None, values.shape[0]
        saved = (store, scores) if where is None else (where,)
        context.save_for_backward(*saved)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients for (scores, values); the other inputs are no parameters."""
        context: Any = ctx
        grad = grads[0]
        if context.in_mask_phase:
            store, scores = context.saved_tensors
            # The linear made this gradient for us alone; a second tensor of the weight's size would cost
            # more than the product.
            grad = grad.float().mul_(store) if grad.dtype == store.dtype else grad.float() * store
            if context.magnitude:
                grad.mul_(scores.sign())
            return grad, None, None, None, None, None
        (where,) = context.saved_tensors
        picked = torch.zeros(context.size, dtype=torch.float32, device=grad.device)
        picked[: where.shape[0]] = grad.reshape(-1)[where].float()
        return None, picked, None, None, None, None
