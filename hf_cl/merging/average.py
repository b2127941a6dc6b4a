"""The weighted mean of models: a uniform model soup where all weights are equal.

    theta = sum_t w_t theta_t / sum_t w_t

Computed as a running mean, so a soup of identical models is that model exactly, and a weight of 0 leaves a model out
exactly. The order of models changes nothing but the last bit. mergekit's `linear` is this one with `normalize: true`.

Source: model soups, arXiv 2203.05482.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_cl.config import option, read
from hf_cl.merging._check import Tensors, require_models, require_weights
from hf_cl.merging._rule import Piece, Rule, merge_tensors


@dataclass(frozen=True)
class Options:
    """Options of `average`."""

    weights: tuple[float, ...] = option((), help="One a model, at least 0; they need not sum to 1. None: all equal.")


def average(models: Sequence[Tensors], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Return the weighted mean of models.

    Args:
        models: At least one; all have the same tensors. The first gives dtypes, integers and ties.
        weights: One a model, at least 0, not all 0; only their ratios count. None: all equal.

    Raises:
        MergeError: The models do not fit each other, or hold NaN or infinity.
        ConfigError: Weights are out of range, or there is no model.

    Example:
        >>> import torch
        >>> average([{"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}], weights=[1, 2])
        {'w': tensor([3.])}
    """
    rule = build(read(Options, {"weights": tuple(weights or ())}, "average"), len(models))
    return merge_tensors(rule, models[0], models, label="model 0")


def build(options: Options, models: int) -> Rule:
    """Return the rule for so many models."""
    require_models(models, "average")
    return _Average(require_weights(options.weights, models, "average"))


class _Average(Rule):
    takes_base = False

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = weights

    def merge(self, piece: Piece) -> Tensor:
        """Return the running mean after the last model."""
        return mean(piece.models, self.weights)


def mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted mean of tensors of one shape, a new tensor."""
    kept = [(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight]
    (first, total), *others = kept
    result = first.clone()
    for tensor, weight in others:
        total += weight
        result += (tensor - result).mul_(weight / total)
    return result
