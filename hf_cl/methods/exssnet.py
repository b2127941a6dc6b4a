"""ExSSNeT: find a mask, claim its free entries, then train the values of just those.

A later task may use what earlier tasks own (that is the transfer) and can never change it. The start is
KKT, unless `start: fresh`. A mask without a free entry is pure reuse: the weight phase trains the head alone.

Source: ExSSNeT, arXiv 2210.10209 (masks, exclusive training, KKT); on pretrained linears the form is ours.
"""

from dataclasses import dataclass

from hf_cl.config import option
from hf_cl.layers.base import Base
from hf_cl.masks.compose import COMPOSES
from hf_cl.masks.values import DTYPES
from hf_cl.training.kkt_start import KKT
from hf_cl.training.masked import KKT_MEAN, MaskedMethod
from hf_cl.training.method import Settled, Stores
from hf_cl.training.ownership_callback import DENSITY_WARMUP
from hf_cl.tuner import MaskConfig
from hf_cl.tuner.config import HEADS

STORES = Stores(task=(KKT_MEAN,), features=(KKT_MEAN,))


@dataclass(frozen=True)
class Options:
    """Options of `exssnet`."""

    density: float = option(0.01, help="Share of each layer's entries that a task's mask keeps.", above=0, most=1)
    compose: str = option("delta", help="Form of the store: delta, prune or random.", choices=COMPOSES)
    scale: float | None = option(
        None, help="Magnitude of the store's start, in deviations of the layer's weight; none: by the density.", above=0
    )
    rank: str = option("signed", help="What of a score ranks.", choices=("signed", "magnitude"))
    mask_share: float = option(
        0.67, help="Share of a task's steps that train the mask; the rest train values.", above=0, below=1
    )
    claim: str = option("intersect", help="Free part of the mask, or the whole budget from free entries.",
                        choices=("intersect", "free_topk"))  # fmt: skip
    start: str = option("kkt", help="Where scores begin.", choices=("kkt", "fresh"))
    kkt_k: int = option(10, help="Neighbours that vote in KKT.", least=1)
    kkt_sample: int = option(512, help="Training texts that KKT looks at.", least=2)
    kkt_margin: float = option(
        5.0, help="Head start of a source's entries, in steps of the scores' learning rate.", least=0
    )
    density_warmup: float = option(
        DENSITY_WARMUP, help="Share of the mask's steps in which it grows to its density.", least=0, most=1
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
    """Wrap a base to learn a stream with ExSSNeT."""
    config = MaskConfig(
        density=options.density,
        compose=options.compose,
        scale=options.scale,
        rank=options.rank,
        trains="claimed",
        free_topk=options.claim == "free_topk",
        values_dtype=options.values_dtype,
        train_norms=options.train_norms,
        head=options.head,
        seed=seed,
    )
    kkt = KKT(options.kkt_k, options.kkt_sample, options.kkt_margin, {}) if options.start == "kkt" else None
    rates = {
        "scores": options.scores_learning_rate,
        "values": options.values_learning_rate,
        "head": options.head_learning_rate,
    }
    return MaskedMethod(
        base,
        config,
        settled=settled,
        mask_share=options.mask_share,
        density_warmup=options.density_warmup,
        rates=rates,
        kkt=kkt,
    )
