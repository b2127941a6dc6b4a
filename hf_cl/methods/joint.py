"""Joint training: the base, trained anew on the rows of all tasks so far, each row by its own task's head.

The multi-task ceiling of shared weights, and no continual learner: it sees every earlier row again. After the last
task it has taken the steps that sequential fine-tuning takes over the stream, on all rows at once; what it says after
earlier tasks is the ceiling of those alone. To say it, it trains after each task from the start, so a stream of n tasks
costs about (n + 1) / 2 times what sequential fine-tuning costs. No order of the tasks, nothing to forget: a task's
accuracy changes only because others share the encoder.

Source: multi-task learning, Caruana 1997; the upper bound of the literature's tables.
"""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict

from hf_cl.errors import DataError
from hf_cl.layers.base import Base
from hf_cl.training.method import Settled
from hf_cl.training.mixed_way import MixedWay
from hf_cl.training.whole_encoder import Rates, SharedEncoder


@dataclass(frozen=True)
class Options(Rates):
    """Options of `joint`."""


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> SharedEncoder:
    """Wrap a base to learn all tasks so far at once."""
    return SharedEncoder(base, options, seed, _Joint())


class _Joint(MixedWay):
    from_base = True
    fresh_heads = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Dataset] = {}

    def keep(self, index: int, rows: Dataset) -> None:
        """Keep all rows."""
        self.seen[index] = rows

    def earlier(self, index: int, like: Dataset) -> list[Dataset]:
        """Return all rows of each earlier task."""
        missing = [str(earlier) for earlier in range(index) if earlier not in self.seen]
        if missing:
            raise DataError(
                f"joint: the rows of the tasks number {', '.join(missing)} are not here, and it trains on all tasks so "
                f"far. Give them with `remember`."
            )
        return [self.seen[earlier].cast(like.features) for earlier in range(index)]

    def forget(self, index: int) -> None:
        """Forget a task's rows."""
        self.seen.pop(index, None)

    def remember(self, index: int, rows: DatasetDict) -> None:
        """Take back a restored task's rows."""
        self.keep(index, rows["train"])

    def facts(self, index: int) -> dict[str, Any]:
        """Return on how many rows of all tasks it was trained; unknown where it was restored without them."""
        seen = [self.seen.get(task) for task in range(index + 1)]
        return {"joint_rows": sum(len(rows) for rows in seen if rows is not None)} if None not in seen else {}
