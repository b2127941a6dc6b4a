"""SupSup: a mask a task over values nobody trains; the task costs its mask and its head.

With `delta` the values are random signs of one magnitude a layer, a function of the seed. The task claims
the free entries of its mask like every other, so a bank may mix methods.

Source: SupSup, arXiv 2006.14769 (task identity given).
"""

from dataclasses import dataclass

from hf_cl.config import option
from hf_cl.layers.base import Base
from hf_cl.masks.compose import COMPOSES
from hf_cl.training.masked import MaskedMethod
from hf_cl.training.method import Settled, Stores
from hf_cl.training.ownership_callback import DENSITY_WARMUP
from hf_cl.tuner import MaskConfig
from hf_cl.tuner.config import HEADS

STORES = Stores()


@dataclass(frozen=True)
class Options:
    """Options of `supsup`."""

    density: float = option(0.01, help="Share of each layer's entries that a task's mask keeps.", above=0, most=1)
    compose: str = option("delta", help="Form of the store: delta, prune or random.", choices=COMPOSES)
    scale: float | None = option(
        None, help="Magnitude of the store's start, in deviations of the layer's weight; none: by the density.", above=0
    )
    rank: str = option("signed", help="What of a score ranks.", choices=("signed", "magnitude"))
    density_warmup: float = option(
        DENSITY_WARMUP, help="Share of the mask's steps in which it grows to its density.", least=0, most=1
    )
    scores_learning_rate: float = option(0.01, help="Peak learning rate of the scores.", above=0)
    head_learning_rate: float | None = option(
        None, help="Peak learning rate of the head; none: the training's.", above=0
    )
    train_norms: bool = option(False, help="Give every task its own copies of the norms.")
    head: str = option("own", help="A head a task, or the first task's, frozen, for all.", choices=HEADS)


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> MaskedMethod:
    """Wrap a base to learn a stream with SupSup."""
    config = MaskConfig(
        density=options.density,
        compose=options.compose,
        scale=options.scale,
        rank=options.rank,
        train_norms=options.train_norms,
        head=options.head,
        seed=seed,
    )
    rates = {"scores": options.scores_learning_rate, "head": options.head_learning_rate}
    return MaskedMethod(base, config, settled=settled, density_warmup=options.density_warmup, rates=rates)
