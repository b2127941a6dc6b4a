"""Task arithmetic: each task fine-tuned from the base; the encoder is the base plus a factor of all directions.

    theta = base + scale * sum_t (theta_t - base)

The scale is chosen on validation rows unless it is given: it falls as tasks come (`hf_cl/training/merged_way.py`).

Source: arXiv 2212.04089; the rule is `hf_cl/merging/task_arithmetic.py`.
"""

from dataclasses import dataclass

from hf_cl.config import option
from hf_cl.layers.base import Base
from hf_cl.merging.task_arithmetic import task_arithmetic
from hf_cl.training.merged_way import MergedWay
from hf_cl.training.method import Settled
from hf_cl.training.whole_encoder import Rates, SharedEncoder

GRID = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


@dataclass(frozen=True)
class Options(Rates):
    """Options of `task_arithmetic`."""

    scale: float | None = option(
        None, help="Factor of the summed directions; none: the best of .1 to 1 on validation rows.", above=0
    )


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> SharedEncoder:
    """Wrap a base to learn a stream by task arithmetic."""
    grid = GRID if options.scale is None else (options.scale,)
    return SharedEncoder(base, options, seed, MergedWay(task_arithmetic, grid))
