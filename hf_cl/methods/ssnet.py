"""SSNet, the negative control: as ExSSNeT, but trains its whole mask, whoever owns the entries.

Where masks overlap, earlier tasks change: this method forgets, and a test that cannot see it forget is
broken. Its results are reported as measured; it never writes a bank.

Source: ExSSNeT, arXiv 2210.10209 (SSNeT is its ablation).
"""

from dataclasses import dataclass

from hf_cl.config import option
from hf_cl.layers.base import Base
from hf_cl.masks.compose import COMPOSES
from hf_cl.training.masked import MaskedMethod
from hf_cl.training.method import Settled
from hf_cl.training.ownership_callback import DENSITY_WARMUP
from hf_cl.tuner import MaskConfig
from hf_cl.tuner.config import HEADS


@dataclass(frozen=True)
class Options:
    """Options of `ssnet`."""

    density: float = option(0.01, help="Share of each layer's entries that a task's mask keeps.", above=0, most=1)
    compose: str = option("delta", help="Form of the store: delta, prune or random.", choices=COMPOSES)
    scale: float | None = option(
        None, help="Magnitude of the store's start, in deviations of the layer's weight; none: by the density.", above=0
    )
    rank: str = option("signed", help="What of a score ranks.", choices=("signed", "magnitude"))
    mask_share: float = option(
        0.67, help="Share of a task's steps that train the mask; the rest train values.", above=0, below=1
    )
    density_warmup: float = option(
        DENSITY_WARMUP, help="Share of the mask's steps in which it grows to its density.", least=0, most=1
    )
    scores_learning_rate: float = option(0.01, help="Peak learning rate of the scores.", above=0)
    values_learning_rate: float = option(0.001, help="Peak learning rate of the values.", above=0)
    head_learning_rate: float | None = option(
        None, help="Peak learning rate of the head; none: the training's.", above=0
    )
    head: str = option("own", help="A head a task, or the first task's, frozen, for all.", choices=HEADS)


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> MaskedMethod:
    """Wrap a base to learn a stream with SSNet."""
    config = MaskConfig(
        density=options.density,
        compose=options.compose,
        scale=options.scale,
        rank=options.rank,
        trains="mask",
        head=options.head,
        seed=seed,
    )
    rates = {
        "scores": options.scores_learning_rate,
        "values": options.values_learning_rate,
        "head": options.head_learning_rate,
    }
    return MaskedMethod(
        base, config, settled=settled, mask_share=options.mask_share, density_warmup=options.density_warmup, rates=rates
    )
