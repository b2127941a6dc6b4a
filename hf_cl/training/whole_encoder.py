"""What methods without masks share: the whole encoder trains, and every task has a head.

`SharedEncoder` answers every task by one encoder, the latest. What a method does for the earlier tasks besides, it says
as a `Way`: whether a task starts from the base, what it trains on, a penalty, what becomes of the encoder at the end,
and what the next task needs of all that. A `Way` whose every hook is the default is plain sequential fine-tuning.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_cl.config import option
from hf_cl.layers.base import Base, encoder_tensors
from hf_cl.layers.task_heads import TaskHeads, load_exactly
from hf_cl.ownership.digest import digest
from hf_cl.training.groups import parameter_groups
from hf_cl.training.guards import FiniteGradients
from hf_cl.training.method import Method, Packed, Settled, Tensors
from hf_cl.training.penalty import Penalty, with_penalty


@dataclass(frozen=True)
class Rates:
    """Peak learning rates, the options that all methods which train the whole encoder have."""

    learning_rate: float = option(5e-5, help="Peak learning rate of the encoder.", above=0)
    head_learning_rate: float | None = option(
        None, help="Peak learning rate of the head; none: the training's.", above=0
    )


@dataclass(frozen=True)
class Lesson:
    """What a task is learned from.

    Attributes:
        rows: Tokenised `train` and `validation`.
        collator: Pads a batch.
        args: The user's arguments.
    """

    rows: DatasetDict
    collator: Any
    args: TrainingArguments


class WholeEncoder(Method):
    """A plain model whose encoder trains whole, with a head a task."""

    def __init__(self, base: Base, rates: Rates, seed: int) -> None:
        super().__init__(base)
        self.rates, self.seed = rates, seed
        base.model.requires_grad_(True)
        self.heads = TaskHeads(base, seed)
        base.model.accepts_loss_kwargs = False

    @property
    def model(self) -> nn.Module:
        """The plain model."""
        return self.base.model

    def settled(self) -> Settled:
        """Return the head's layers."""
        return {"head_modules": list(self.base.head)}

    def encoder(self) -> Tensors:
        """Return the encoder's live tensors by name, sorted."""
        return dict(encoder_tensors(self.model, self.base.head))

    def encoder_copy(self) -> Tensors:
        """Return the encoder's tensors as they are now."""
        return {name: tensor.detach().clone() for name, tensor in self.encoder().items()}

    def encoder_parameters(self) -> Tensors:
        """Return those of the encoder's live tensors that train."""
        return {name: tensor for name, tensor in self.encoder().items() if tensor.requires_grad}

    def on_cpu(self) -> Tensors:
        """Return a copy of the encoder on the CPU."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.encoder().items()}

    def put(self, encoder: Mapping[str, Tensor]) -> None:
        """Make this the encoder.

        Raises:
            RunError: Its tensors are not those of an encoder of this model.
        """
        load_exactly(self.encoder(), encoder, "the encoder")

    def groups(self, args: TrainingArguments) -> list[dict[str, Any]]:
        """Return the encoder's and the head's groups."""
        head = self.rates.head_learning_rate
        rates = {"encoder": self.rates.learning_rate, "head": args.learning_rate if head is None else head}
        own = tuple(f"{name}." for name in self.base.head)
        return parameter_groups(
            self.model.named_parameters(),
            rates,
            args.weight_decay,
            lambda name: "head" if name.startswith(own) else "encoder",
        )

    def facts(self, index: int) -> dict[str, Any]:
        """Return the number of encoder weights that train."""
        trainable = sum(tensor.numel() for tensor in self.encoder_parameters().values())
        return {"trainable": trainable, **self.more_facts(index)}

    @abstractmethod
    def more_facts(self, index: int) -> dict[str, Any]:
        """Return what else is worth recording of a finished task."""

    def head(self, index: int) -> Tensors:
        """Return a task's head."""
        return {name: tensor.cpu() for name, tensor in self.heads.tensors(index).items()}

    def head_digest(self, index: int) -> str:
        """Return the digest of a task's head."""
        return digest(sorted(self.heads.tensors(index).items()))


class Way:
    """What a method does besides fine-tuning one encoder; by default nothing. Hooks in the order they are called."""

    from_base = False
    """Whether a task starts from the base's encoder, not from where the last one left it."""

    def begin(self, method: "SharedEncoder", index: int) -> None:
        """Begin task number `index`, which has its head already."""

    def check(self, args: TrainingArguments) -> None:
        """Refuse arguments that this cannot train with.

        Raises:
            ConfigError: Says which.
        """

    def rows(self, method: "SharedEncoder", index: int, lesson: Lesson) -> Dataset:
        """Return what the task trains on."""
        return lesson.rows["train"]

    def callbacks(self, method: "SharedEncoder", index: int) -> list[TrainerCallback]:
        """Return new callbacks for the task's training."""
        return []

    def penalty(self) -> Penalty | None:
        """Return what is added to the task's loss."""
        return None

    def finish(self, method: "SharedEncoder", index: int) -> None:
        """Finish the trained task: last changes to the encoder, and what the next task will need."""

    def abandon(self, method: "SharedEncoder", index: int) -> None:
        """Forget a task, finished or not, that was the last to begin."""

    def facts(self, index: int) -> dict[str, Any]:
        """Return what is worth recording of a finished task."""
        return {}

    def rewritten(self, index: int) -> Sequence[int]:
        """Return the tasks whose files change with the commit of `index`."""
        return (index,)

    def carried(self, index: int) -> dict[str, Tensors]:
        """Return what only the next task needs, by a short name."""
        return {}

    def restore_carried(self, method: "SharedEncoder", index: int, carried: Mapping[str, Tensors]) -> None:
        """Take back what `carried` gave.

        Raises:
            RunError: It is not of this method and encoder.
        """

    def remember(self, index: int, rows: DatasetDict) -> None:
        """Take back the rows of a restored task."""


class SharedEncoder(WholeEncoder):
    """One encoder answers all tasks: the latest, as its way leaves it."""

    def __init__(self, base: Base, rates: Rates, seed: int, way: Way | None = None) -> None:
        super().__init__(base, rates, seed)
        self.way = way or Way()
        self.start = self.on_cpu() if self.way.from_base else {}
        """The base's encoder, where tasks start from it."""
        self.before: Tensors = {}
        self.index = 0

    def begin(self, index: int, labels: tuple[str, ...]) -> None:
        """Add a fresh head; the encoder goes on from where it is, or starts from the base."""
        self.index, self.before = index, self.encoder_copy()
        if self.way.from_base:
            self.put(self.start)
        self.heads.add(index, labels)
        self.way.begin(self, index)

    def rows(self, index: int, rows: DatasetDict, collator: Any, args: TrainingArguments) -> Dataset:
        """Return what the task trains on, as the way says."""
        return self.way.rows(self, index, Lesson(rows, collator, args))

    def abandon(self, index: int) -> None:
        """Forget the head and put the encoder back."""
        self.way.abandon(self, index)
        self.heads.remove(index)
        self.put(self.before)

    def groups(self, args: TrainingArguments) -> list[dict[str, Any]]:
        """Return the encoder's and the head's groups.

        Raises:
            ConfigError: The way cannot train with these arguments.
        """
        self.way.check(args)
        return super().groups(args)

    def callbacks(self) -> list[TrainerCallback]:
        """Return the guard against non-finite gradients, and the way's own."""
        return [FiniteGradients(), *self.way.callbacks(self, self.index)]

    def trainer(self, given: type[Trainer]) -> type[Trainer]:
        """Return the given Trainer; with a penalty, one that adds it to the loss."""
        penalty = self.way.penalty()
        return given if penalty is None else with_penalty(given, penalty)

    def commit(self, index: int) -> None:
        """Finish as the way says, and freeze the head; the encoder stays open to the next task."""
        self.way.finish(self, index)
        self.heads.freeze(index)

    def activate(self, index: int) -> None:
        """Make a task's head active."""
        self.heads.show(index)

    def parts(self, index: int) -> dict[str, str]:
        """Return digests of the encoder as it is now and of the head."""
        return {"encoder": digest(self.encoder().items()), "head": self.head_digest(index)}

    def more_facts(self, index: int) -> dict[str, Any]:
        """Return the way's facts."""
        return self.way.facts(index)

    def pack(self, index: int) -> Packed:
        """Return the head alone: a task adds nothing else."""
        return Packed({}, self.head(index))

    def rewritten(self, index: int) -> Sequence[int]:
        """Return the tasks whose head or state changed."""
        return self.way.rewritten(index)

    def carried(self, index: int) -> dict[str, Tensors]:
        """Return what the next task needs of this one."""
        return self.way.carried(index)

    def restore_carried(self, index: int, carried: Mapping[str, Tensors]) -> None:
        """Take back what the next task needs."""
        self.way.restore_carried(self, index, carried)

    def remember(self, index: int, rows: DatasetDict) -> None:
        """Take back the rows of a restored task."""
        self.way.remember(index, rows)

    def restore(self, index: int, labels: tuple[str, ...], packed: Packed) -> None:
        """Add a finished task's head."""
        self.heads.add(index, labels)
        self.heads.load(index, packed.head)

    def shared(self) -> Tensors:
        """Return the encoder, which all tasks share."""
        return {name: tensor.detach().cpu() for name, tensor in self.encoder().items()}

    def restore_shared(self, tensors: Tensors) -> None:
        """Take back the encoder."""
        self.put(tensors)
