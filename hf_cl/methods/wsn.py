"""WSN: scores and values train together, in every step the mask is the scores' quantile, nothing owned is written.

A task reads whatever earlier tasks own and trains private values at free entries alone, so what it shares it cannot
change. Its mask begins as the last task's (the paper keeps one score tensor from task to task; scores are not stored,
so kept entries get a head start instead, as in KKT). The values committed are those at the committed mask's entries, of
the very step whose scores made it. With `delta` the mask sits on top of a whole pretrained weight, which the paper's
networks, trained from nothing, do not have; with `prune` a low density removes most of the model at step 0.

Source: WSN, ICML 2022 (Kang et al., "Forget-free continual learning with winning subnetworks"); the form is ours.
"""

from dataclasses import dataclass

from hf_cl.config import option
from hf_cl.layers.base import Base
from hf_cl.masks.compose import COMPOSES
from hf_cl.masks.values import DTYPES
from hf_cl.training.masked import MaskedMethod
from hf_cl.training.method import Settled, Stores
from hf_cl.training.ownership_callback import DENSITY_WARMUP
from hf_cl.tuner import MaskConfig
from hf_cl.tuner.config import HEADS

STORES = Stores()


@dataclass(frozen=True)
class Options:
    """Options of `wsn`."""

    density: float = option(0.01, help="Share of each layer's entries that a task's mask keeps.", above=0, most=1)
    compose: str = option("delta", help="Form of the store: delta, prune or random.", choices=COMPOSES)
    scale: float = option(
        1.0, help="Magnitude of the store's start, in standard deviations of the layer's weight.", above=0
    )
    rank: str = option("signed", help="What of a score ranks.", choices=("signed", "magnitude"))
    start: str = option("last", help="Where scores begin: at the last mask, or fresh.", choices=("last", "fresh"))
    margin: float = option(
        5.0, help="Head start of the last mask's entries, in steps of the scores' learning rate.", least=0
    )
    density_warmup: float = option(
        DENSITY_WARMUP, help="Share of the steps in which a fresh mask grows to its density.", least=0, most=1
    )
    scores_learning_rate: float = option(0.01, help="Peak learning rate of the scores.", above=0)
    values_learning_rate: float = option(0.001, help="Peak learning rate of the values.", above=0)
    head_learning_rate: float | None = option(
        None, help="Peak learning rate of the head; none: the training's.", above=0
    )
    values_dtype: str = option("bfloat16", help="What values are rounded to.", choices=DTYPES)
    train_norms: bool = option(False, help="Give every task its own copies of the norms.")
    head: str = option("own", help="A head a task, or the first task's, frozen, for all.", choices=HEADS)


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> MaskedMethod:
    """Wrap a base to learn a stream with WSN."""
    config = MaskConfig(
        density=options.density,
        compose=options.compose,
        scale=options.scale,
        rank=options.rank,
        trains="claimed",
        joint=True,
        values_dtype=options.values_dtype,
        train_norms=options.train_norms,
        head=options.head,
        seed=seed,
    )
    rates = {
        "scores": options.scores_learning_rate,
        "values": options.values_learning_rate,
        "head": options.head_learning_rate,
    }
    margin = options.margin * options.scores_learning_rate if options.start == "last" else None
    return MaskedMethod(
        base, config, settled=settled, density_warmup=options.density_warmup, rates=rates, last_margin=margin
    )
