"""Piggyback: a task is a mask on the pretrained weights, kept where its score exceeds a threshold; dense at the start.

Every score begins above the threshold, so the first forward is the base's, bit for bit, and training takes weights out.
The comparison is strict: a score on the threshold is out. How many weights stay is the task's own affair: there is no
density to choose, and the coded mask costs what its zeros do. A task claims the free entries of its mask like every
other; the first one leaves little, so a method that trains values finds no room in such a bank, and masks alone do.

A score has to fall by `first_score - threshold` to flip: 25 steps of the default learning rate that agree, 50 of the
paper's 1e-4. Too fast is worse than too slow: at 1e-3 a run of 141 steps took out a quarter of MiniLM and ended at
chance (docs/log.md).

Source: Piggyback, ECCV 2018, arXiv 1801.06519; on pretrained encoders Zhao et al., EMNLP 2020, arXiv 2004.12406.
"""

from dataclasses import dataclass

from hf_cl.config import option
from hf_cl.layers.base import Base
from hf_cl.training.mask_options import ScoreOptions, mask_config, rates
from hf_cl.training.masked import MaskedMethod
from hf_cl.training.method import Settled, Stores

STORES = Stores()


@dataclass(frozen=True)
class Options(ScoreOptions):
    """Options of `piggyback`."""

    scores_learning_rate: float = option(2e-4, help="Peak learning rate of the scores.", above=0)
    first_score: float = option(0.01, help="Every score's start.")
    threshold: float = option(0.005, help="A weight stays where its score is above this.")


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> MaskedMethod:
    """Wrap a base to learn a stream with Piggyback."""
    config = mask_config(options, seed, density=1.0, compose="prune")
    return MaskedMethod(base, config, settled=settled, density_warmup=0.0, rates=rates(options))
