"""WiSE-FT: each task fine-tuned from the base; the encoder lies between the base and the mean of all of them.

    theta = (1 - alpha) base + alpha mean_t theta_t

That is task arithmetic with scale alpha / T: the same line, between its two ends. Alpha is chosen on validation rows
unless it is given. WiSE-FT from each task to the next is `sfa` with `period: 1`.

Source: arXiv 2109.01903, with several models in the place of one; the rule is `hf_cl/merging/wise_ft.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_cl.config import option
from hf_cl.layers.base import Base
from hf_cl.merging.average import average
from hf_cl.merging.wise_ft import wise_ft
from hf_cl.training.merged_way import MergedWay
from hf_cl.training.method import Settled, Tensors
from hf_cl.training.whole_encoder import Rates, SharedEncoder

GRID = (0.2, 0.4, 0.5, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Options(Rates):
    """Options of `wise_ft`."""

    alpha: float | None = option(
        None, help="Share of the mean; none: the best of .2 to 1 on validation rows.", above=0, most=1
    )


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> SharedEncoder:
    """Wrap a base to learn a stream by interpolation with the base."""
    return SharedEncoder(base, options, seed, MergedWay(_between, GRID if options.alpha is None else (options.alpha,)))


def _between(start: Tensors, models: Sequence[Tensors], alpha: float) -> Tensors:
    return wise_ft(start, average(models), alpha)
