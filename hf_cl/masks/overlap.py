"""How much of a mask earlier masks already hold.

Source: ExSSNeT, arXiv 2210.10209 ("sparse overlap"); a share here, not a percentage.
"""

from torch import Tensor


def overlap_share(mask: Tensor, union: Tensor) -> float:
    """Return |mask & union| / |mask| of two bool tensors of one shape; 0.0 for an empty mask."""
    kept = int(mask.count_nonzero())
    return int((mask & union).count_nonzero()) / kept if kept else 0.0
