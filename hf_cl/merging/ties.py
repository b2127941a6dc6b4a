"""TIES: trim each task's direction, elect a sign for each weight, average what agrees with it.

    1  tau_t = theta_t - base; keep its `density` entries of largest magnitude, set the others to 0
    2  elected sign = sign(sum_t w_t tau_t); where the sum is 0, the sign that most other weights elected, and
       negative if even that is a draw
    3  tau = mean of the kept entries that have the elected sign (weighted by w_t), 0 where there is none
    4  theta = base + scale * tau

Where codes disagree:

- `scope="global"` ranks a task's entries over all tensors at once, as the paper does; `"tensor"` ranks within each
  tensor, as PEFT and mergekit do. Steps 1 and 2 then both look at one tensor alone.
- Exactly `floor(density n + 1/2)` entries are kept (at least 1), equal magnitudes in the order of sorted names, then of
  storage. The authors' code keeps int(density n) + 1 or all that equal the last; PEFT and mergekit int(density n).
- `merge="sum"` adds what agrees in step 3, as fusion_bench does by default.
- Weights count in the election and in the mean, as in mergekit. PEFT elects without them, then divides by the number
  of models. With equal weights of 1 all agree with the paper.
- A draw goes to the positive sign in PEFT and mergekit.

Source: TIES-Merging, arXiv 2306.01708, algorithm 1, and the authors' code for draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_cl.config import option, read
from hf_cl.masks.select import kept_count
from hf_cl.merging._check import Tensors, require_models, require_weights
from hf_cl.merging._rule import Piece, Rule, SurveyRule, merge_tensors
from hf_cl.merging.task_arithmetic import moved

_LOW, _BINS = 15, 1 << 16
"""Bits below the upper ones of a magnitude in float32 (its sign bit is 0), and the values that the upper ones have."""


@dataclass(frozen=True)
class Options:
    """Options of `ties`."""

    density: float = option(0.2, help="Share of each direction that is kept.", above=0, most=1)
    scale: float = option(1.0, help="Factor of the merged direction.")
    weights: tuple[float, ...] = option((), help="One a model, at least 0. None: all 1.")
    scope: str = option(
        "global", help="Trim over all tensors at once, or each by itself.", choices=("global", "tensor")
    )
    merge: str = option("mean", help="What becomes of the entries that agree.", choices=("mean", "sum"))


def ties(
    base: Tensors,
    models: Sequence[Tensors],
    density: float,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    scope: str = "global",
    merge: str = "mean",
) -> dict[str, Tensor]:
    """Return the base plus the elected mean of the models' trimmed directions.

    Args:
        base: What every model was trained from.
        models: At least one; each has the tensors of the base.
        density: Share of each direction that is kept, in (0, 1].
        scale: Factor of the merged direction; any finite number.
        weights: One a model, at least 0, not all 0. None: all 1.
        scope: `global` or `tensor`; see above.
        merge: `mean` or `sum`.

    Raises:
        MergeError: A model does not fit the base, or holds NaN or infinity, or the result overflows.
        ConfigError: An option is out of range, or there is no model.

    Example:
        >>> import torch
        >>> base, models = {"w": torch.zeros(3)}, [{"w": torch.tensor(x)} for x in ([4.0, -1, 0], [-3.0, -2, 5])]
        >>> ties(base, models, density=1.0)
        {'w': tensor([ 4.0000, -1.5000,  5.0000])}
    """
    given = {"density": density, "scale": scale, "weights": tuple(weights or ()), "scope": scope, "merge": merge}
    return merge_tensors(build(read(Options, given, "ties"), len(models)), base, models)


def build(options: Options, models: int) -> Rule:
    """Return the rule for so many models."""
    require_models(models, "ties")
    return _Ties(options, require_weights(options.weights, models, "ties"))


class _Ties(SurveyRule):
    surveys = 3

    def __init__(self, options: Options, weights: Sequence[float]) -> None:
        self.options, self.weights = options, weights
        self.across = options.scope == "global"

    def begin(self) -> None:
        """Start with a vector: nothing is counted, no sign elected."""
        self.trims = [_Trim(self.options.density) for _ in self.weights]
        self.majority = 0.0

    def survey(self, turn: int, piece: Piece) -> None:
        """Rank the magnitudes by their upper bits, then by their lower bits, then count the elected signs."""
        if turn < 2:
            for trim, model in zip(self.trims, piece.models, strict=True):
                trim.count(model - piece.base)
        else:
            self.majority += float(_total(self._kept(piece)).sign_().sum(dtype=torch.float64))

    def settle(self, turn: int) -> None:
        """Find the last magnitude that is kept; after the vote, begin the count of its equals anew."""
        for trim in self.trims:
            if turn < 2:
                trim.settle()
            trim.rewind()

    def merge(self, piece: Piece) -> Tensor:
        """Return the base's piece plus what agrees with the elected signs."""
        kept = self._kept(piece)
        total = _total(kept)
        positive = total >= 0 if self.majority > 0 else total > 0
        merged, counted = torch.zeros_like(total), torch.zeros_like(total)
        for values, weight in zip(kept, self.weights, strict=True):
            agrees = ((values != 0) & ((values > 0) == positive)).to(values.dtype)
            merged += values.mul_(agrees)
            counted += agrees.mul_(weight)
        if self.options.merge == "mean":
            merged /= counted.masked_fill_(counted == 0, 1.0)
        return moved(piece.base, merged, self.options.scale)

    def _kept(self, piece: Piece) -> list[Tensor]:
        """Return each model's trimmed and weighted direction."""
        return [
            trim.cut(model - piece.base).mul_(weight)
            for trim, model, weight in zip(self.trims, piece.models, self.weights, strict=True)
        ]


def _total(kept: Sequence[Tensor]) -> Tensor:
    total = kept[0].clone()
    for values in kept[1:]:
        total += values
    return total


class _Trim:
    """The largest entries of one direction that comes in pieces, exactly: a histogram over the bits of magnitudes.

    Magnitudes of float32 are ordered as their bits are. The first survey counts the upper bits, which says in which bin
    the last kept entry lies; the second counts the lower bits within that bin. float64 is ranked as float32.
    """

    def __init__(self, density: float) -> None:
        self.density = density
        self.counts = torch.zeros(_BINS, dtype=torch.int64)
        self.bin: int | None = None
        self.room = self.equal = self.left = 0
        self.least = 0.0

    def count(self, direction: Tensor) -> None:
        """Count a piece's magnitudes: by their upper bits, or those of the bin by their lower bits."""
        bits = _magnitude(direction).view(torch.int32)
        if self.bin is None:
            bits = bits >> _LOW
        else:
            bits = bits[(bits >> _LOW) == self.bin] & ((1 << _LOW) - 1)
        self.counts += torch.bincount(bits, minlength=_BINS).cpu()

    def settle(self) -> None:
        """Turn the counts into the bin; the next time into the last kept magnitude."""
        if self.bin is None:
            self.bin, self.room = _last(self.counts, kept_count(int(self.counts.sum()), self.density))
            self.counts = torch.zeros_like(self.counts)
        else:
            low, self.room = _last(self.counts, self.room)
            self.equal = int(self.counts[low])
            self.least = torch.tensor((self.bin << _LOW) | low, dtype=torch.int32).view(torch.float32).item()

    def rewind(self) -> None:
        """Expect the first piece again."""
        self.left = self.room

    def cut(self, direction: Tensor) -> Tensor:
        """Return a piece with all but its kept entries set to 0, in the memory of `direction`."""
        if self.least == 0:
            return direction  # what else would be cut is 0 already
        magnitude = _magnitude(direction)
        if self.room == self.equal:
            keep = magnitude >= self.least
        else:
            keep = magnitude > self.least
            tied = torch.nonzero(magnitude == self.least).squeeze(1)[: self.left]
            keep[tied] = True
            self.left -= len(tied)
        return direction.mul_(keep.view_as(direction).to(direction.dtype))


def _magnitude(direction: Tensor) -> Tensor:
    """Return |direction| in float32 as one row, in storage order."""
    return direction.abs().float().reshape(-1)


def _last(counts: Tensor, room: int) -> tuple[int, int]:
    """Return the bin in which the `room`-th largest entry lies, and how many of that bin are within the room."""
    reached = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, room))
    above = int(reached[place - 1]) if place else 0
    return len(counts) - 1 - place, room - above
