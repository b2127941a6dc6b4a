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
from hf_cl.training.mask_options import ValueOptions, mask_config, rates
from hf_cl.training.masked import MaskedMethod
from hf_cl.training.method import Settled, Stores

STORES = Stores()


@dataclass(frozen=True)
class Options(ValueOptions):
    """Options of `wsn`."""

    start: str = option("last", help="Where scores begin: at the last mask, or fresh.", choices=("last", "fresh"))
    margin: float = option(
        5.0, help="Head start of the last mask's entries, in steps of the scores' learning rate.", least=0
    )


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> MaskedMethod:
    """Wrap a base to learn a stream with WSN."""
    return MaskedMethod(
        base,
        mask_config(options, seed, trains="claimed", joint=True),
        settled=settled,
        density_warmup=options.density_warmup,
        rates=rates(options),
        last_margin=options.margin * options.scores_learning_rate if options.start == "last" else None,
    )
