"""The mean of models weighted by their Fisher information: each weight is taken from those who care about it.

    theta = sum_t w_t F_t theta_t / sum_t w_t F_t,   entry by entry

If every task's loss is a quadratic around its model, with F its curvature, this is the minimum of their weighted sum.
An F below `floor` counts as `floor`: an entry that no task cares about is then the plain mean. Identical models give
that model exactly.

The Fishers are those that EWC writes: the mean over samples of the squared gradient of the log-likelihood, one tensor
for each tensor of the model. Their scale matters between tasks: normalise by `weights` where sizes differ.

Source: Merging models with Fisher-weighted averaging, arXiv 2111.09832.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_cl.config import option, read
from hf_cl.errors import ConfigError
from hf_cl.merging._check import Tensors, require_models, require_weights
from hf_cl.merging._rule import Piece, Rule, merge_tensors

FLOOR = 1e-6
"""The authors' default."""


@dataclass(frozen=True)
class Options:
    """Options of `fisher`."""

    weights: tuple[float, ...] = option((), help="One a model, at least 0. None: all equal.")
    floor: float = option(FLOOR, help="What a smaller Fisher counts as.", above=0)


def fisher(
    models: Sequence[Tensors],
    fishers: Sequence[Tensors],
    weights: Sequence[float] | None = None,
    floor: float = FLOOR,
) -> dict[str, Tensor]:
    """Return the Fisher-weighted mean of models.

    Args:
        models: At least one; all have the same tensors. The first gives dtypes, integers and ties.
        fishers: One a model: the Fisher of every floating-point tensor, of its shape; more tensors are ignored.
        weights: One a model, at least 0, not all 0. None: all equal.
        floor: What a smaller Fisher counts as, above 0.

    Raises:
        MergeError: The models or the Fishers do not fit, or hold NaN or infinity; a Fisher is negative.
        ConfigError: An option is out of range, or there are not as many Fishers as models.

    Example:
        >>> import torch
        >>> models = [{"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}]
        >>> fisher(models, [{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}])
        {'w': tensor([3.])}
    """
    options = read(Options, {"weights": tuple(weights or ()), "floor": floor}, "fisher")
    if len(fishers) != len(models):
        raise ConfigError(f"fisher: {len(fishers)} Fishers for {len(models)} models. Give one a model, in their order.")
    rule = build(options, len(models))
    return merge_tensors(rule, models[0], models, fishers=fishers, label="model 0")


def build(options: Options, models: int) -> Rule:
    """Return the rule for so many models; their pieces must bring Fishers."""
    require_models(models, "fisher")
    return _Fisher(require_weights(options.weights, models, "fisher"), options.floor)


class _Fisher(Rule):
    takes_base = False

    def __init__(self, weights: Sequence[float], floor: float) -> None:
        self.weights, self.floor = weights, floor

    def merge(self, piece: Piece) -> Tensor:
        """Return the running mean after the last model."""
        found = zip(piece.models, piece.fishers, self.weights, strict=True)
        (model, information, weight), *others = [(m, f, w) for m, f, w in found if w]
        result, total = model.clone(), information.clamp(min=self.floor).mul_(weight)
        for model, information, weight in others:
            share = information.clamp(min=self.floor).mul_(weight)
            total += share
            result += (model - result).mul_(share.div_(total))
        return result
