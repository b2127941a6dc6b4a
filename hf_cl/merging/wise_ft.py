"""The straight line between a base and a model trained from it.

    theta = (1 - alpha) base + alpha model

Both ends are exact, bit for bit: alpha 0 is the base, alpha 1 the model (in the dtype of the base).

Source: WiSE-FT, arXiv 2109.01903.
"""

from dataclasses import dataclass

from torch import Tensor

from hf_cl.config import option, read
from hf_cl.merging._check import Tensors, require_models
from hf_cl.merging._rule import Piece, Rule, merge_tensors


@dataclass(frozen=True)
class Options:
    """Options of `wise_ft`."""

    alpha: float = option(0.5, help="Weight of the model, from 0 (the base) to 1 (the model).", least=0, most=1)


def wise_ft(base: Tensors, model: Tensors, alpha: float) -> dict[str, Tensor]:
    """Return the point at `alpha` between a base and a model.

    Args:
        base: Where training began.
        model: What it led to; the same tensors.
        alpha: Weight of the model, in [0, 1].

    Raises:
        MergeError: The two do not fit each other, or hold NaN or infinity.
        ConfigError: `alpha` is out of range.

    Example:
        >>> import torch
        >>> wise_ft({"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}, alpha=0.25)
        {'w': tensor([1.])}
    """
    return merge_tensors(build(read(Options, {"alpha": alpha}, "wise_ft"), 1), base, [model])


def build(options: Options, models: int) -> Rule:
    """Return the rule; it takes one model."""
    require_models(models, "wise_ft", one=True)
    return _Line(options.alpha)


class _Line(Rule):
    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def merge(self, piece: Piece) -> Tensor:
        """Return the point between the base and the one model."""
        return between(piece.base, piece.models[0], self.alpha)


def between(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Return `(1 - share) start + share end`, a new tensor; at 0 and 1 the very bits of an end."""
    if share in (0, 1):
        return (end if share else start).clone()
    return (start * (1 - share)).add_(end * share)
