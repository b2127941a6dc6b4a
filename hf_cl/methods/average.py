"""Average: each task fine-tuned from the base; the encoder is the mean of all of them.

No coefficient, nothing to choose. With more tasks every one counts less.

Source: model soups (uniform), arXiv 2203.05482, over tasks instead of runs; the rule is `hf_cl/merging/average.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_cl.layers.base import Base
from hf_cl.merging.average import average
from hf_cl.training.merged_way import MergedWay
from hf_cl.training.method import Settled, Tensors
from hf_cl.training.whole_encoder import Rates, SharedEncoder


@dataclass(frozen=True)
class Options(Rates):
    """Options of `average`."""


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> SharedEncoder:
    """Wrap a base to learn a stream by averaging."""
    return SharedEncoder(base, options, seed, MergedWay(_mean, (1.0,)))


def _mean(start: Tensors, models: Sequence[Tensors], coefficient: float) -> Tensors:
    return average(models)
