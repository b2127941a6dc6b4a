"""Training on a task's rows and earlier tasks' rows together: each row by its own task's head.

Replay brings a few rows of each earlier task, joint training all of them; the rest is the same.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from datasets import Dataset
from transformers import TrainingArguments

from hf_cl.errors import ConfigError
from hf_cl.layers.mixed_rows import MixedRows
from hf_cl.training.method import Tensors
from hf_cl.training.whole_encoder import Lesson, SharedEncoder, Way


class MixedWay(Way, ABC):
    """Learns each task together with rows of the earlier ones."""

    fresh_heads = False
    """Whether earlier heads, too, begin anew with each task."""
    open_heads = True
    """Whether earlier heads train on by their rows."""

    def __init__(self) -> None:
        self._mixed: MixedRows | None = None
        self._heads: tuple[int, list[Tensors]] = (-1, [])

    @abstractmethod
    def keep(self, index: int, rows: Dataset) -> None:
        """Keep of a task's training rows what later tasks will need.

        Raises:
            ConfigError: There is nothing to keep.
        """

    @abstractmethod
    def earlier(self, index: int, like: Dataset) -> list[Dataset]:
        """Return the rows of each earlier task, with the columns and types of `like`.

        Raises:
            DataError: They are not here.
        """

    @abstractmethod
    def forget(self, index: int) -> None:
        """Forget what was kept of a task, if anything."""

    def begin(self, method: SharedEncoder, index: int) -> None:
        """Open the earlier heads."""
        held = [{name: tensor.clone() for name, tensor in method.heads.tensors(i).items()} for i in range(index)]
        self._heads, self._mixed = (index, held), None
        for earlier in range(index):
            if self.fresh_heads:
                method.heads.add(earlier, method.heads.labels[earlier])
            if self.open_heads:
                method.heads.thaw(earlier)
        method.heads.show(index)

    def check(self, args: TrainingArguments) -> None:
        """Refuse label smoothing, where the Trainer keeps the labels from the model, and one process for many GPUs."""
        if args.n_gpu > 1:
            raise ConfigError(
                f"n_gpu: {args.n_gpu} would share one model among threads, and a batch holds rows of several tasks. "
                f"Start a process for each GPU (torchrun), or show this one a single GPU (CUDA_VISIBLE_DEVICES)."
            )
        if args.label_smoothing_factor:
            raise ConfigError(
                f"label_smoothing_factor: {args.label_smoothing_factor} would be spread over other tasks' labels, as "
                f"a batch holds rows of several tasks. Leave it at 0 for this method."
            )

    def rows(self, method: SharedEncoder, index: int, lesson: Lesson) -> Dataset:
        """Return the task's rows and the earlier ones', shuffled by the Trainer."""
        own = lesson.rows["train"]
        earlier = self.earlier(index, own)
        self.keep(index, own)
        self._mixed = MixedRows(method.heads, range(index + 1))
        return self._mixed.join([*earlier, own])

    def _close(self) -> None:
        if self._mixed is not None:
            self._mixed.close()
            self._mixed = None

    def finish(self, method: SharedEncoder, index: int) -> None:
        """Close the earlier heads."""
        self._close()
        for earlier in range(index):
            method.heads.freeze(earlier)

    def abandon(self, method: SharedEncoder, index: int) -> None:
        """Put the earlier heads back."""
        self._close()
        self.forget(index)
        if self._heads[0] == index:
            for earlier, tensors in enumerate(self._heads[1]):
                method.heads.load(earlier, tensors)

    def rewritten(self, index: int) -> Sequence[int]:
        """Return all tasks: every head has changed."""
        return range(index + 1)
