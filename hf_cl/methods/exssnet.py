"""ExSSNeT: find a mask, claim its free entries, then train the values of just those.

A later task may use what earlier tasks own (that is the transfer) and can never change it. The start is
KKT, unless `start: fresh`. A mask without a free entry is pure reuse: the weight phase trains the head alone.

Source: ExSSNeT, arXiv 2210.10209 (masks, exclusive training, KKT); on pretrained linears the form is ours.
"""

from dataclasses import dataclass

from hf_cl.config import option
from hf_cl.layers.base import Base
from hf_cl.training.kkt_start import KKT
from hf_cl.training.mask_options import ValueOptions, mask_config, rates
from hf_cl.training.masked import KKT_MEAN, MaskedMethod
from hf_cl.training.method import Settled, Stores

STORES = Stores(task=(KKT_MEAN,), features=(KKT_MEAN,))


@dataclass(frozen=True)
class Options(ValueOptions):
    """Options of `exssnet`."""

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


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> MaskedMethod:
    """Wrap a base to learn a stream with ExSSNeT."""
    return MaskedMethod(
        base,
        mask_config(options, seed, trains="claimed", free_topk=options.claim == "free_topk"),
        settled=settled,
        mask_share=options.mask_share,
        density_warmup=options.density_warmup,
        rates=rates(options),
        kkt=KKT(options.kkt_k, options.kkt_sample, options.kkt_margin, {}) if options.start == "kkt" else None,
    )
