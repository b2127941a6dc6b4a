"""Scores -> mask: exactly at commit, by a kept threshold between steps.

Sorting every layer's scores at each step, as the papers' code does, costs more than the step's own
extra arithmetic. Scores move little in one step, so a threshold found once keeps nearly the right count
for many: each step compares and counts (one pass), and only a layer whose count has left its budget
by `TOLERANCE` gets a new threshold. The committed mask is exact, ties broken by index.

Ranking is by the signed score, or by its magnitude (SupSup, ExSSNeT).
Source: SupSup, arXiv 2006.14769, section 3; threshold upkeep is ours.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from hf_cl.errors import ConfigError

TOLERANCE = 0.05
"""Largest relative distance between a layer's count and its budget while its scores train."""
_SAMPLE = 4096
_SMALL = 65536


def kept_count(size: int, density: float) -> int:
    """Return how many of `size` entries a density keeps: `floor(density * size + 1/2)`, at least 1.

    Computed in exact decimal arithmetic: .1 of 589,824 is 58,982, not what a float product gives.

    Raises:
        ConfigError: `density` is outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ConfigError(f"density: expected a share in (0, 1], found {density!r}.")
    return max(1, math.floor(Fraction(str(density)) * size + Fraction(1, 2)))


def topk_mask(scores: Tensor, count: int, *, magnitude: bool = False) -> Tensor:
    """Select the `count` entries with the largest score; equal scores in storage order.

    Args:
        scores: Any shape and float dtype.
        count: How many to keep, from 1 to `scores.numel()`.
        magnitude: Rank by |score| instead of the signed score.

    Returns:
        Bool tensor of the same shape with exactly `count` entries True.
    """
    flat = (scores.abs() if magnitude else scores).flatten()
    if count >= flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    lowest = torch.topk(flat, count, sorted=False).values.min()
    mask = flat > lowest
    tied = torch.nonzero(flat == lowest).squeeze(1)
    mask[tied[: count - int(mask.count_nonzero())]] = True
    return mask.view_as(scores)


def refresh_masks(
    scores: Sequence[Tensor],
    masks: Sequence[Tensor],
    thresholds: Tensor,
    counts: Sequence[int],
    *,
    magnitude: bool = False,
) -> int:
    """Bring each layer's mask up to date with its scores, in place; call it between steps.

    Args:
        scores: One float32 tensor a layer.
        masks: One bool tensor a layer, of the scores' shape; overwritten.
        thresholds: Float32, one number a layer, on the scores' device; NaN asks for an exact selection.
            Overwritten where a layer's threshold is renewed.
        counts: Each layer's budget.
        magnitude: Rank by |score|.

    Returns:
        How many layers got a new threshold. An accelerator is waited for three times a call, whatever the number
        of layers: all counts come back together. Only a layer whose ties spoil its threshold is waited for alone.
    """
    ranked = [score.abs() for score in scores] if magnitude else list(scores)
    unset = thresholds.isnan().tolist()
    for rank, mask, threshold in zip(ranked, masks, thresholds, strict=True):
        _exceeds(rank, threshold, mask)
    off = [layer for layer, found in enumerate(_count(masks)) if _is_off(found, counts[layer])]
    for layer in off:
        _renew(ranked[layer], masks[layer], thresholds, layer, counts[layer])
    # Ties can spoil a threshold: then, and where an exact selection is asked for, index breaks them.
    for layer, found in zip(off, _count([masks[layer] for layer in off]), strict=True):
        if found != counts[layer] and (unset[layer] or _is_off(found, counts[layer])):
            masks[layer].copy_(topk_mask(ranked[layer], counts[layer]))
            thresholds[layer] = math.nan
    return len(off)


def _exceeds(rank: Tensor, threshold: Tensor, mask: Tensor) -> None:
    """Set `mask` where `rank` is above the threshold; on a CPU one numpy pass, which beats waking torch's threads."""
    if rank.device.type == "cpu" and rank.dtype == torch.float32:
        np.greater(rank.numpy(), np.float32(float(threshold)), out=mask.numpy())
    else:
        torch.gt(rank, threshold, out=mask)


def _is_off(found: int, count: int) -> bool:
    return abs(found - count) > TOLERANCE * count


def _count(masks: Sequence[Tensor]) -> list[int]:
    if not masks:
        return []
    if masks[0].device.type == "cpu":
        return [int(np.count_nonzero(mask.numpy())) for mask in masks]
    return torch.stack([mask.count_nonzero() for mask in masks]).tolist()


def _renew(rank: Tensor, mask: Tensor, thresholds: Tensor, layer: int, count: int) -> None:
    """Set the layer's threshold to its (count + 1)-th largest score, and its mask by it."""
    flat = rank.flatten()
    if count >= flat.numel():
        thresholds[layer] = -math.inf
        mask.fill_(True)
        return
    thresholds[layer] = _nth_largest(flat, count + 1)
    _exceeds(rank, thresholds[layer], mask)


def _nth_largest(flat: Tensor, nth: int) -> Tensor:
    """Return the `nth` largest value; on the CPU only the tail that can hold it is partitioned.

    A strided sample proposes a bound that about twice `nth` entries exceed; if too few do, all are used.
    """
    if flat.device.type != "cpu" or flat.numel() <= _SMALL or nth > flat.numel() // 8:
        return torch.topk(flat, nth, sorted=False).values.min()
    values = flat.numpy()
    sample = np.sort(values[:: max(1, values.size // _SAMPLE)])
    place = sample.size - 1 - math.ceil(2 * nth * sample.size / values.size) - 8
    tail = values[values > sample[max(0, place)]]
    if tail.size < nth:
        tail = values
    return torch.as_tensor(np.partition(tail, tail.size - nth)[tail.size - nth])
