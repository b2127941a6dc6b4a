"""The step of Sequential Fine-tuning with Averaging: the weights are pulled back to where the task began.

    theta <- (1 - beta) theta + beta theta_o

theta_o is the model at the end of the previous task. When the step is taken (every ceil(p N) optimizer steps, and at
the last one) is the trainer's business; this is the rule alone. Taken once, at the end, it is WiSE-FT with
alpha = 1 - beta. The result has the dtype, device and ties of `current`; the anchor may live on another device.

Source: Soup to go, arXiv 2501.05559.
"""

from dataclasses import dataclass

from torch import Tensor

from hf_cl.config import option, read
from hf_cl.merging._check import Tensors, require_models
from hf_cl.merging._rule import Piece, Rule, merge_tensors
from hf_cl.merging.wise_ft import between


@dataclass(frozen=True)
class Options:
    """Options of `sfa`."""

    beta: float = option(0.25, help="Weight of the anchor (the base), from 0 to 1 (the anchor).", least=0, most=1)


def sfa(current: Tensors, anchor: Tensors, beta: float) -> dict[str, Tensor]:
    """Return `(1 - beta) current + beta anchor`; at 0 and 1 the very bits of `current` and `anchor`.

    Args:
        current: The weights in training.
        anchor: The weights at the end of the previous task; the same tensors.
        beta: Weight of the anchor, in [0, 1].

    Raises:
        MergeError: The two do not fit each other, or hold NaN or infinity.
        ConfigError: `beta` is out of range.
    """
    rule = _Pull(read(Options, {"beta": beta}, "sfa").beta, swapped=True)
    return merge_tensors(rule, current, [anchor], label="current")


def build(options: Options, models: int) -> Rule:
    """Return the rule on files, where the base is the anchor and the one model the current weights."""
    require_models(models, "sfa", one=True)
    return _Pull(options.beta, swapped=False)


class _Pull(Rule):
    def __init__(self, beta: float, *, swapped: bool) -> None:
        self.beta, self.swapped = beta, swapped

    def merge(self, piece: Piece) -> Tensor:
        """Return the pulled weights; `swapped` where the anchor stands in the place of the model."""
        current, anchor = (piece.base, piece.models[0]) if self.swapped else (piece.models[0], piece.base)
        return between(current, anchor, self.beta)
