"""DARE: drop entries of a task's direction at random and rescale the rest, so that its expectation stays.

    theta = base + M * (model - base) / density,   each M = 1 with probability `density`, else 0

It makes one model sparse, and its result goes into any other rule: each model with a seed of its own, or all drop the
same entries. density 1 is the model, bit for bit. The paper's p is 1 - density, and it divides by 1 - p as here; PEFT
does too, mergekit's `rescale` matches L1 norms instead. Kept directions are exactly delta / density before the sum is
rounded to the base's dtype: with a base in bfloat16 that rounding is coarse.

The mask is drawn tensor by tensor, from a generator seeded by (seed, name of the tensor): it depends neither on the
other tensors nor on the device.

Source: Language models are super Mario, arXiv 2311.03099.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_cl.config import option, read
from hf_cl.merging._check import Tensors, require_models
from hf_cl.merging._rule import Piece, Rule, merge_tensors


@dataclass(frozen=True)
class Options:
    """Options of `dare`."""

    density: float = option(0.1, help="Share of the direction that is kept, on average.", above=0, most=1)
    seed: int = option(0, help="Seed of the choice.")


def dare(base: Tensors, model: Tensors, density: float, seed: int = 0) -> dict[str, Tensor]:
    """Return a model whose direction from the base is sparse.

    Args:
        base: What the model was trained from.
        model: The same tensors.
        density: Share of entries that is kept, on average, in (0, 1].
        seed: Of the choice; give each model another one.

    Raises:
        MergeError: The model does not fit the base, holds NaN or infinity, or the result overflows.
        ConfigError: `density` is out of range.

    Example:
        >>> import torch
        >>> dare({"w": torch.zeros(4)}, {"w": torch.ones(4)}, density=0.5, seed=1)["w"].unique()
        tensor([0., 2.])
    """
    return merge_tensors(build(read(Options, {"density": density, "seed": seed}, "dare"), 1), base, [model])


def build(options: Options, models: int) -> Rule:
    """Return the rule; it takes one model."""
    require_models(models, "dare", one=True)
    return Drop(options.density, options.seed)


class Drop(Rule):
    """One model made sparse; its pieces must come in storage order, and may come again from the first on."""

    def __init__(self, density: float, seed: int) -> None:
        """Take a checked density and a seed."""
        self.density, self.seed = density, seed

    def merge(self, piece: Piece) -> Tensor:
        """Return the base's piece plus what is kept of the one model's direction."""
        (model,) = piece.models
        if self.density == 1:
            return model.clone()
        if piece.start == 0:
            self.generator = torch.Generator().manual_seed(_seed(self.seed, piece.name))
        kept = torch.rand(model.shape, generator=self.generator) < self.density
        return (model - piece.base).div_(self.density).mul_(kept.to(model.device)).add_(piece.base)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little")
