"""Sequential fine-tuning: the whole encoder, one task after another, no protection. The floor.

Its learning rate decides how much it forgets (28.5 against 75.7 in the literature), so it is tuned like
every other's, or the comparison is a lie. Every task keeps its head; the encoder is the latest.

Source of the warning: MIGU, arXiv 2406.17245, table 9.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainingArguments

from hf_cl.config import option
from hf_cl.layers.base import Base, encoder_tensors
from hf_cl.layers.task_heads import TaskHeads, load_exactly
from hf_cl.ownership.digest import digest
from hf_cl.training.groups import parameter_groups
from hf_cl.training.guards import FiniteGradients
from hf_cl.training.method import Method, Packed, Settled, Tensors


@dataclass(frozen=True)
class Options:
    """Options of `finetune`."""

    learning_rate: float = option(5e-5, help="Peak learning rate of the encoder.", above=0)
    head_learning_rate: float | None = option(
        None, help="Peak learning rate of the head; none: the training's.", above=0
    )


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> "Finetune":
    """Wrap a base to learn a stream by plain sequential fine-tuning."""
    return Finetune(base, options, seed)


class Finetune(Method):
    """One encoder that every task trains on, and a head a task."""

    def __init__(self, base: Base, options: Options, seed: int) -> None:
        super().__init__(base)
        self.options = options
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

    def begin(self, index: int, labels: tuple[str, ...]) -> None:
        """Add a fresh head; the encoder goes on from where it is."""
        self._encoder_before = {name: tensor.detach().clone() for name, tensor in self._encoder()}
        self.heads.add(index, labels)

    def _encoder(self) -> list[tuple[str, Any]]:
        return list(encoder_tensors(self.model, self.base.head))

    def abandon(self, index: int) -> None:
        """Forget the head and put the encoder back."""
        self.heads.remove(index)
        load_exactly(dict(self._encoder()), self._encoder_before, "the encoder")

    def groups(self, args: TrainingArguments) -> list[dict[str, Any]]:
        """Return the encoder's and the head's groups."""
        head = self.options.head_learning_rate
        rates = {"encoder": self.options.learning_rate, "head": args.learning_rate if head is None else head}
        own = tuple(f"{name}." for name in self.base.head)
        return parameter_groups(
            self.model.named_parameters(),
            rates,
            args.weight_decay,
            lambda name: "head" if name.startswith(own) else "encoder",
        )

    def callbacks(self) -> list[TrainerCallback]:
        """Return the guard against non-finite gradients."""
        return [FiniteGradients()]

    def commit(self, index: int) -> None:
        """Freeze the head; the encoder stays open to the next task."""
        self.heads.freeze(index)

    def activate(self, index: int) -> None:
        """Make a task's head active."""
        self.heads.show(index)

    def parts(self, index: int) -> dict[str, str]:
        """Return digests of the encoder as it is now and of the head."""
        return {"encoder": digest(self._encoder()), "head": digest(sorted(self.heads.tensors(index).items()))}

    def facts(self, index: int) -> dict[str, Any]:
        """Return the number of encoder weights that train."""
        return {"trainable": sum(tensor.numel() for _, tensor in self._encoder() if tensor.requires_grad)}

    def pack(self, index: int) -> Packed:
        """Return the head alone: a task adds nothing else."""
        return Packed({}, {name: tensor.cpu() for name, tensor in self.heads.tensors(index).items()})

    def restore(self, index: int, labels: tuple[str, ...], packed: Packed) -> None:
        """Add a finished task's head."""
        self.heads.add(index, labels)
        self.heads.load(index, packed.head)

    def shared(self) -> Tensors:
        """Return the encoder, which all tasks share."""
        return {name: tensor.detach().cpu() for name, tensor in self._encoder()}

    def restore_shared(self, tensors: Tensors) -> None:
        """Take back the encoder."""
        load_exactly(dict(self._encoder()), tensors, "the encoder")
