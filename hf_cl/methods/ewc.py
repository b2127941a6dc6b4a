"""EWC: sequential fine-tuning with a penalty that is strong where a finished task's answers need a weight.

    loss + strength / 2 * sum_j sum_i F_ji (theta_i - theta*_ji)^2        over earlier tasks j and encoder weights i

F_j is task j's diagonal Fisher, of single rows, taken when it is finished, in evaluation mode. One penalty a task, as
in the paper, is kept as one quadratic with the same gradient (`training/penalty.py`), so both forms cost two copies of
the encoder, whatever the number of tasks. `online` keeps the last task's encoder as the one centre and lets older
Fishers fade. The run folder has the summed Fisher as `tasks/*.fisher-*.safetensors`, as the merge rule `fisher` reads
it. A strength means nothing across programs: they differ by factors of 2, in what they square, and in the labels.

Source: EWC, arXiv 1612.00796, eq. 3; online EWC: Progress & Compress, arXiv 1805.06370.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from hf_cl.config import option
from hf_cl.data.rows import stratified
from hf_cl.errors import RunError
from hf_cl.layers.base import Base
from hf_cl.layers.task_heads import require_same_shapes
from hf_cl.training.fisher import LABELS, fisher
from hf_cl.training.method import Settled, Tensors
from hf_cl.training.penalty import Penalty, Quadratic, together
from hf_cl.training.whole_encoder import Lesson, Rates, SharedEncoder, Way


@dataclass(frozen=True)
class Options(Rates):
    """Options of `ewc`."""

    strength: float = option(1e5, help="Factor of the penalty.", least=0)
    online: bool = option(False, help="One centre, the last task's encoder, instead of one a task.")
    decay: float = option(
        1.0, help="What is left of older Fishers at each new task, where it is online.", least=0, most=1
    )
    rows: int = option(200, help="Most training rows of a task that its Fisher is the mean of.", least=1)
    labels: str = option(
        "data", help="Gradients for each row's own label, or for all labels by the model's odds.", choices=LABELS
    )


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> SharedEncoder:
    """Wrap a base to learn a stream by fine-tuning with EWC."""
    return SharedEncoder(base, options, seed, _Ewc(options, seed))


class _Ewc(Way):
    def __init__(self, options: Options, seed: int) -> None:
        self.options, self.seed = options, seed
        self.quadratic: Quadratic | None = None
        self.newest = -1
        self._before: tuple[int, Quadratic | None] = (-1, None)
        self._lesson: Lesson | None = None

    def begin(self, method: SharedEncoder, index: int) -> None:
        """Remember the penalty of the earlier tasks."""
        self._before = index, self.quadratic

    def rows(self, method: SharedEncoder, index: int, lesson: Lesson) -> Dataset:
        """Keep the rows that the Fisher is taken of.

        Raises:
            RunError: The earlier tasks' penalty was not restored with them.
        """
        if self.newest != index - 1:
            raise RunError(f"ewc: the Fisher of the {index} earlier tasks is not there. Restore the run whole.")
        self._lesson = lesson
        self.quadratic = None if self.quadratic is None else self.quadratic.to(lesson.args.device)
        return super().rows(method, index, lesson)

    def penalty(self) -> Penalty | None:
        """Return the earlier tasks' penalty."""
        return None if self.quadratic is None else self.quadratic.times(self.options.strength)

    def finish(self, method: SharedEncoder, index: int) -> None:
        """Take the finished task's Fisher, and add its penalty to the earlier ones."""
        assert self._lesson is not None
        rows = self._lesson.rows["train"]
        rows = rows.select(stratified(np.array(rows["labels"]), self.options.rows, (self.seed, index)))
        centre = {name: tensor.detach().float().clone() for name, tensor in method.encoder_parameters().items()}
        found = fisher(method.model, list(centre), rows, self._lesson.collator, labels=self.options.labels)
        held, self.quadratic = self.quadratic, Quadratic(centre, found)
        if held is not None and self.options.online:
            weight = {name: self.options.decay * held.weight[name] + gained for name, gained in found.items()}
            self.quadratic = Quadratic(centre, weight)
        elif held is not None:
            self.quadratic = together(held, self.quadratic)
        self.newest, self._lesson = index, None

    def abandon(self, method: SharedEncoder, index: int) -> None:
        """Put the earlier tasks' penalty back."""
        if self._before[0] == index:
            self.quadratic, self.newest, self._lesson = self._before[1], index - 1, None

    def facts(self, index: int) -> dict[str, Any]:
        """Return the sum of all Fishers' entries, with the newest task."""
        if self.quadratic is None or index != self.newest:
            return {}
        return {"fisher_trace": sum(tensor.sum().item() for tensor in self.quadratic.weight.values())}

    def rewritten(self, index: int) -> Sequence[int]:
        """Return the last two tasks: the newest one's files take the place of those of the one before."""
        return range(max(0, index - 1), index + 1)

    def carried(self, index: int) -> dict[str, Tensors]:
        """Return the penalty, with the newest task."""
        if self.quadratic is None or index != self.newest:
            return {}
        kept = {"fisher": self.quadratic.weight, "centre": self.quadratic.centre}
        return {part: {name: tensor.cpu() for name, tensor in tensors.items()} for part, tensors in kept.items()}

    def restore_carried(self, method: SharedEncoder, index: int, carried: Mapping[str, Tensors]) -> None:
        """Take back the penalty, which the newest task has."""
        if carried:
            for part in ("centre", "fisher"):
                require_same_shapes(method.encoder_parameters(), carried.get(part, {}), f"task {index}: its {part}")
            self.newest, self.quadratic = index, Quadratic(carried["centre"], carried["fisher"])
