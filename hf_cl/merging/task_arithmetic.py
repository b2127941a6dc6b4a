"""Task arithmetic: add the tasks' directions to the base.

    theta = base + scale * sum_t w_t (theta_t - base)

A task is forgotten on purpose by a negative weight or scale. With scale = 1/T it is the mean of the models. All models
must have been trained from the same base: a model trained from another one adds that one's direction too.
scale 0 gives the bits of the base; one model with scale 1 gives that model up to rounding, as base + (model - base) is
not always the model. PEFT's and mergekit's `task_arithmetic` divide by nothing, as here.

Source: Editing models with task arithmetic, arXiv 2212.04089.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_cl.config import option, read
from hf_cl.merging._check import Tensors, require_models, require_weights
from hf_cl.merging._rule import InMemory, Piece, Rule, merge_tensors, run


@dataclass(frozen=True)
class Options:
    """Options of `task_arithmetic`."""

    scale: float = option(0.3, help="Factor of the summed directions; negative to unlearn, 0 is the base.")
    weights: tuple[float, ...] = option((), help="One a model, may be negative. None: all 1.")


def task_arithmetic(
    base: Tensors, models: Sequence[Tensors], scale: float, weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Return the base plus the scaled sum of the models' directions.

    Args:
        base: What every model was trained from.
        models: At least one; each has the tensors of the base.
        scale: Factor of the sum; any finite number.
        weights: One a model; any finite numbers. None: all 1.

    Raises:
        MergeError: A model does not fit the base, or holds NaN or infinity, or the result overflows.
        ConfigError: A coefficient is not finite, or there is no model.

    Example:
        >>> import torch
        >>> base = {"w": torch.tensor([1.0])}
        >>> task_arithmetic(base, [{"w": torch.tensor([3.0])}, {"w": torch.tensor([0.0])}], scale=0.5)
        {'w': tensor([1.5000])}
    """
    options = read(Options, {"scale": scale, "weights": tuple(weights or ())}, "task_arithmetic")
    return merge_tensors(build(options, len(models)), base, models)


def build(options: Options, models: int) -> Rule:
    """Return the rule for so many models."""
    require_models(models, "task_arithmetic")
    return _Arithmetic(options.scale, require_weights(options.weights, models, "task_arithmetic", signed=True))


class TaskSum:
    """Task arithmetic one model at a time: only the base and one sum are in memory, however many tasks there are.

    Adding models one after another gives the bits that `task_arithmetic` gives for all of them in that order.
    """

    def __init__(self, base: Tensors) -> None:
        """Start at the base."""
        self.base = base
        self.sum: dict[str, Tensor] = {}

    def add(self, model: Tensors, weight: float = 1.0) -> None:
        """Add a model's direction.

        Raises:
            MergeError: It does not fit the base, or holds NaN or infinity; nothing is added then.
            ConfigError: The weight is not finite.
        """
        weights = require_weights((weight,), 1, "task_arithmetic", signed=True)
        for piece, direction in run(_Direction(weights[0]), InMemory(("base", self.base), [("model", model)], ())):
            held = self.sum.get(piece.name)
            self.sum[piece.name] = direction if held is None else held.add_(direction)

    def merged(self, scale: float) -> dict[str, Tensor]:
        """Return the base plus the scaled sum so far.

        Raises:
            MergeError: The result overflows.
            ConfigError: `scale` is not finite.
        """
        return merge_tensors(_Added(read(Options, {"scale": scale}, "task_arithmetic").scale, self.sum), self.base, ())


class _Arithmetic(Rule):
    def __init__(self, scale: float, weights: Sequence[float]) -> None:
        self.scale, self.weights = scale, weights

    def merge(self, piece: Piece) -> Tensor:
        """Return the base's piece plus the scaled sum of the directions."""
        total = _direction(piece.models[0], piece.base, self.weights[0])
        for model, weight in zip(piece.models[1:], self.weights[1:], strict=True):
            total += _direction(model, piece.base, weight)
        return moved(piece.base, total, self.scale)


class _Direction(Rule):
    def __init__(self, weight: float) -> None:
        self.weight = weight

    def merge(self, piece: Piece) -> Tensor:
        """Return the one model's weighted direction."""
        return _direction(piece.models[0], piece.base, self.weight)


class _Added(Rule):
    def __init__(self, scale: float, total: Tensors) -> None:
        self.scale, self.total = scale, total

    def merge(self, piece: Piece) -> Tensor:
        """Return the base's piece plus the scaled sum that was gathered."""
        return moved(piece.base, self.total.get(piece.name, torch.zeros_like(piece.base)).clone(), self.scale)


def _direction(model: Tensor, base: Tensor, weight: float) -> Tensor:
    return (model - base).mul_(weight)


def moved(base: Tensor, direction: Tensor, scale: float) -> Tensor:
    """Return `base + scale * direction`, in the memory of `direction`; at scale 0 the very bits of the base."""
    return direction.mul_(scale).add_(base) if scale else base.clone()
