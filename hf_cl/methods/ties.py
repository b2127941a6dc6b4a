"""TIES: each task fine-tuned from the base; their directions trimmed, signs elected, what agrees is averaged.

The scale is chosen on validation rows unless it is given (`hf_cl/training/merged_way.py`); trimmed over all tensors at
once, as in the paper.

Source: arXiv 2306.01708; the rule is `hf_cl/merging/ties.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_cl.config import option
from hf_cl.layers.base import Base
from hf_cl.merging.ties import ties
from hf_cl.training.merged_way import MergedWay
from hf_cl.training.method import Settled, Tensors
from hf_cl.training.whole_encoder import Rates, SharedEncoder

GRID = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5)
"""The paper's .8 to 2.5, and below."""


@dataclass(frozen=True)
class Options(Rates):
    """Options of `ties`."""

    density: float = option(0.2, help="Share of each task's direction that is kept.", above=0, most=1)
    scale: float | None = option(
        None, help="Factor of the merged direction; none: the best of .5 to 2.5 on validation rows.", above=0
    )


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> SharedEncoder:
    """Wrap a base to learn a stream by TIES merging."""

    def merge(start: Tensors, models: Sequence[Tensors], scale: float) -> Tensors:
        return ties(start, models, options.density, scale)

    return SharedEncoder(base, options, seed, MergedWay(merge, GRID if options.scale is None else (options.scale,)))
