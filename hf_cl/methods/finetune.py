"""Sequential fine-tuning: the whole encoder, one task after another, no protection. The floor.

Its learning rate decides how much it forgets (28.5 against 75.7 in the literature), so it is tuned like
every other's, or the comparison is a lie. Every task keeps its head; the encoder is the latest.

Source of the warning: MIGU, arXiv 2406.17245, table 9.
"""

from dataclasses import dataclass

from hf_cl.layers.base import Base
from hf_cl.training.method import Settled
from hf_cl.training.whole_encoder import Rates, SharedEncoder


@dataclass(frozen=True)
class Options(Rates):
    """Options of `finetune`."""


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> SharedEncoder:
    """Wrap a base to learn a stream by plain sequential fine-tuning."""
    return SharedEncoder(base, options, seed)
