"""SupSup: a mask a task over values nobody trains; the task costs its mask and its head.

With `delta` the values are random signs of one magnitude a layer, a function of the seed. The task claims
the free entries of its mask like every other, so a bank may mix methods.

Source: SupSup, arXiv 2006.14769 (task identity given).
"""

from dataclasses import dataclass

from hf_cl.layers.base import Base
from hf_cl.training.mask_options import MaskOptions, mask_config, rates
from hf_cl.training.masked import MaskedMethod
from hf_cl.training.method import Settled, Stores

STORES = Stores()


@dataclass(frozen=True)
class Options(MaskOptions):
    """Options of `supsup`."""


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> MaskedMethod:
    """Wrap a base to learn a stream with SupSup."""
    config = mask_config(options, seed)
    return MaskedMethod(base, config, settled=settled, density_warmup=options.density_warmup, rates=rates(options))
