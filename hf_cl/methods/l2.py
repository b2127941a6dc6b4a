"""L2: sequential fine-tuning with a quadratic penalty on the way from the last task's encoder.

    loss + strength / 2 * |theta - theta_previous|^2        encoder only; heads are free

Nothing is stored but the encoder. The first task has no penalty. It is what EWC is where every weight matters alike.

Source: the baseline of EWC, arXiv 1612.00796.
"""

from dataclasses import dataclass

from datasets import Dataset

from hf_cl.config import option
from hf_cl.layers.base import Base
from hf_cl.training.method import Settled
from hf_cl.training.penalty import Penalty, Quadratic
from hf_cl.training.whole_encoder import Lesson, Rates, SharedEncoder, Way


@dataclass(frozen=True)
class Options(Rates):
    """Options of `l2`."""

    strength: float = option(0.1, help="Factor of the penalty.", least=0)


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> SharedEncoder:
    """Wrap a base to learn a stream by fine-tuning with a penalty on the way gone."""
    return SharedEncoder(base, options, seed, _Pull(options.strength))


class _Pull(Way):
    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.quadratic: Quadratic | None = None

    def rows(self, method: SharedEncoder, index: int, lesson: Lesson) -> Dataset:
        """Centre the penalty where the task begins."""
        centre = {name: method.before[name].float() for name in method.encoder_parameters()}
        self.quadratic = Quadratic(centre).to(lesson.args.device) if index else None
        return super().rows(method, index, lesson)

    def penalty(self) -> Penalty | None:
        """Return the penalty, from the second task on."""
        return None if self.quadratic is None else self.quadratic.times(self.strength)
