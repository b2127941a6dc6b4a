"""SSNet, the negative control: as ExSSNeT, but trains its whole mask, whoever owns the entries.

Where masks overlap, earlier tasks change: this method forgets, and a test that cannot see it forget is
broken. Its results are reported as measured; it never writes a bank.

Source: ExSSNeT, arXiv 2210.10209 (SSNeT is its ablation).
"""

from dataclasses import dataclass

from hf_cl.config import option
from hf_cl.layers.base import Base
from hf_cl.training.mask_options import ValueOptions, mask_config, rates
from hf_cl.training.masked import MaskedMethod
from hf_cl.training.method import Settled


@dataclass(frozen=True)
class Options(ValueOptions):
    """Options of `ssnet`."""

    mask_share: float = option(
        0.67, help="Share of a task's steps that train the mask; the rest train values.", above=0, below=1
    )


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> MaskedMethod:
    """Wrap a base to learn a stream with SSNet."""
    return MaskedMethod(
        base,
        mask_config(options, seed, trains="mask"),
        settled=settled,
        mask_share=options.mask_share,
        density_warmup=options.density_warmup,
        rates=rates(options),
    )
