"""SFA: sequential fine-tuning that is averaged, while it trains, with the model before the task.

Every ceil(period * N) steps of a task's N, and at its end, the encoder goes back by a share of the way to where the
task began. Nothing is stored but the encoder, no earlier text is seen. Period 1 averages at the end alone: WiSE-FT from
task to task, with alpha = 1 - beta. The first task is not averaged: before it there is nothing but the base to keep.

Source: "Soup to go", arXiv 2501.05559; without code of the authors, so what it leaves open is said in the callback.
"""

from dataclasses import dataclass

from transformers import TrainerCallback

from hf_cl.config import option
from hf_cl.layers.base import Base
from hf_cl.training.averaging_callback import AveragingCallback
from hf_cl.training.method import Settled
from hf_cl.training.whole_encoder import Rates, SharedEncoder, Way


@dataclass(frozen=True)
class Options(Rates):
    """Options of `sfa`."""

    period: float = option(0.25, help="Share of a task's steps between two averages.", above=0, most=1)
    beta: float = option(0.25, help="Share of the earlier encoder in an average.", least=0, most=1)


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> SharedEncoder:
    """Wrap a base to learn a stream by fine-tuning with averaging."""
    return SharedEncoder(base, options, seed, _Averaging(options))


class _Averaging(Way):
    def __init__(self, options: Options) -> None:
        self.options = options

    def callbacks(self, method: SharedEncoder, index: int) -> list[TrainerCallback]:
        """Return the averaging, from the second task on."""
        if index == 0:
            return []
        return [AveragingCallback(method.before, period=self.options.period, beta=self.options.beta)]
