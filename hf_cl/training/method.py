"""What a method is: the contract between one way to learn a stream and everything that is shared.

A method wraps a base and knows tasks by their numbers. Training data, the Trainer, evaluation, files,
digests and results are the same for all; a method says what trains, what is stored, and what a task's
forward reads.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_cl.errors import ConfigError
from hf_cl.layers.base import Base, base_fingerprint
from hf_cl.layers.heads import TaskLayer
from hf_cl.layers.targets import refuse_unmaskable
from hf_cl.layers.task_heads import load_exactly

Tensors = dict[str, Tensor]
Settled = Mapping[str, Any]
"""What a method computed once from the base and stores as JSON: targets, scales, head."""


@dataclass(frozen=True)
class Packed:
    """A finished task as tensors to store.

    Attributes:
        task: What the task adds (`bytes_per_task`); empty where it adds nothing of its own.
        head: Its head, norms and start statistics (`head_bytes_per_task`).
    """

    task: Tensors = field(default_factory=dict)
    head: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Stores:
    """What a method's tasks keep in a bank besides masks, values and head; each method file says it as `STORES`.

    Attributes:
        task: Names of tensors a task may have.
        features: Of these, the float32 vectors with one number an input of the head.
        shared: Names of tensors that all tasks share.
    """

    task: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()


class Method(ABC):
    """One way to learn a stream of tasks on one base."""

    keeps_best = False
    """Whether its callbacks keep and restore the best state themselves (`load_best_model_at_end`)."""

    def __init__(self, base: Base) -> None:
        """Take a base that no other method has wrapped.

        Raises:
            ConfigError: The base is wrapped already.
            BaseModelError: Its weights are quantised, sharded or on the meta device.
        """
        if any(isinstance(module, BaseTunerLayer | TaskLayer) for module in base.model.modules()):
            raise ConfigError(f"base {base.name}: another learner has wrapped it already. Load it anew for this one.")
        refuse_unmaskable(base.model)
        self.base = base
        self.fingerprint = base_fingerprint(base.model, base.head)

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The module the Trainer trains and evaluation runs; there is one from the first `begin` on."""

    @abstractmethod
    def settled(self) -> Settled:
        """Return what was computed once from the base, as plain JSON values."""

    @abstractmethod
    def begin(self, index: int, labels: tuple[str, ...]) -> None:
        """Add task number `index`, make it active and trainable."""

    def rows(self, index: int, rows: DatasetDict, collator: Any, args: TrainingArguments) -> Dataset:
        """Return what a begun task trains on; by default its own training rows.

        Args:
            index: The task's number.
            rows: Tokenised `train` and `validation`.
            collator: Pads a batch.
            args: The user's arguments.
        """
        del index, collator, args
        return rows["train"]

    def trainer(self, given: type[Trainer]) -> type[Trainer]:
        """Return the Trainer to train the active task with, after `rows`; by default the one that is given."""
        return given

    @abstractmethod
    def abandon(self, index: int) -> None:
        """Forget a task that was begun and not committed; earlier tasks stay untouched."""

    @abstractmethod
    def groups(self, args: TrainingArguments) -> list[dict[str, Any]]:
        """Return the active task's optimizer groups."""

    @abstractmethod
    def callbacks(self) -> list[TrainerCallback]:
        """Return new callbacks that train the active task."""

    @abstractmethod
    def commit(self, index: int) -> None:
        """Finish the task after its training (where a callback has not done it already)."""

    @abstractmethod
    def activate(self, index: int) -> None:
        """Make a finished task's network the one that answers."""

    @abstractmethod
    def parts(self, index: int) -> dict[str, str]:
        """Return digests of all a task's forward reads, by part: base, masks, values, head and so on."""

    @abstractmethod
    def facts(self, index: int) -> dict[str, Any]:
        """Return what is worth recording of a finished task, as plain JSON values; has `trainable`."""

    @abstractmethod
    def pack(self, index: int) -> Packed:
        """Return a finished task's tensors to store."""

    @abstractmethod
    def restore(self, index: int, labels: tuple[str, ...], packed: Packed) -> None:
        """Add a finished task from its stored tensors, after all tasks before it."""

    kept_midway = True
    """Whether `moving` is all that the training moves; else a task that was interrupted begins anew."""

    def moving(self, index: int) -> Tensors:
        """Return what the training of task `index` moves, the very tensors: by default the parameters that train.

        With the optimizer's and the callbacks' state this is all that is kept of a task in its middle. A method whose
        training moves more (a mask, a statistic) adds it here, and takes it back in `set_moving`.
        """
        del index
        return {name: tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}

    def set_moving(self, index: int, tensors: Tensors) -> None:
        """Put back what `moving` gave, into the task as `begin` left it."""
        load_exactly(self.moving(index), tensors, f"task {index}: what was kept of its training")

    def resting(self) -> Collection[nn.Parameter]:
        """Return what requires gradients and gets none in this phase, so that ranks do not send its zeros."""
        return ()

    def rewritten(self, index: int) -> Sequence[int]:
        """Return the numbers of the tasks whose stored tensors changed with the commit of `index`."""
        return (index,)

    def extra(self, index: int) -> Tensors:
        """Return what a finished task keeps in a bank besides masks, values and head: names that `STORES` declares."""
        del index
        return {}

    def restore_extra(self, index: int, tensors: Tensors) -> None:
        """Take back what `extra` gave; by default there is nothing to take."""
        del index, tensors

    def carried(self, index: int) -> dict[str, Tensors]:
        """Return by a short name what only the next task's training needs of a finished one, and no answer reads."""
        del index
        return {}

    def restore_carried(self, index: int, carried: Mapping[str, Tensors]) -> None:
        """Take back what `carried` gave, before the next task is learned; by default there is nothing to take."""
        del index, carried

    def remember(self, index: int, rows: DatasetDict) -> None:
        """Take back the tokenised rows of a restored task; by default no later task needs them."""
        del index, rows

    def shared(self) -> Tensors:
        """Return tensors that all tasks share and that are stored once; none by default."""
        return {}

    def restore_shared(self, tensors: Tensors) -> None:
        """Take back what `shared` gave; by default there is nothing to take."""
        del tensors
