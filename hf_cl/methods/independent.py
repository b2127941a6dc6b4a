"""Independent: one whole fine-tuned model a task, each from the base. What it costs to be the ceiling.

Exact, as nothing is shared; a task's bytes are those of an encoder. The single-task ceiling of the merging methods.

Source: the "per-task fine-tuning" of the literature's tables.
"""

from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from hf_cl.layers.base import Base
from hf_cl.ownership.digest import digest
from hf_cl.training.guards import FiniteGradients
from hf_cl.training.method import Packed, Settled, Tensors
from hf_cl.training.whole_encoder import Rates, WholeEncoder


@dataclass(frozen=True)
class Options(Rates):
    """Options of `independent`."""


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> "Independent":
    """Wrap a base to learn a stream with one model a task."""
    return Independent(base, options, seed)


class Independent(WholeEncoder):
    """An encoder and a head a task, on the CPU but for the active one."""

    def __init__(self, base: Base, options: Options, seed: int) -> None:
        super().__init__(base, options, seed)
        self.start = self.on_cpu()
        self.encoders: dict[int, Tensors] = {}

    def begin(self, index: int, labels: tuple[str, ...]) -> None:
        """Begin at the base."""
        self.put(self.start)
        self.heads.add(index, labels)

    def abandon(self, index: int) -> None:
        """Forget the encoder and the head."""
        self.encoders.pop(index, None)
        self.heads.remove(index)

    def callbacks(self) -> list[TrainerCallback]:
        """Return the guard against non-finite gradients."""
        return [FiniteGradients()]

    def commit(self, index: int) -> None:
        """Keep the encoder, and freeze the head."""
        self.encoders[index] = self.on_cpu()
        self.heads.freeze(index)

    def activate(self, index: int) -> None:
        """Put a task's encoder and head in place."""
        self.put(self.encoders[index])
        self.heads.show(index)

    def parts(self, index: int) -> dict[str, str]:
        """Return digests of a task's encoder and head."""
        return {"encoder": digest(self.encoders[index].items()), "head": self.head_digest(index)}

    def more_facts(self, index: int) -> dict[str, Any]:
        """Return nothing more."""
        return {}

    def pack(self, index: int) -> Packed:
        """Return a task's encoder and head."""
        return Packed(self.encoders[index], self.head(index))

    def restore(self, index: int, labels: tuple[str, ...], packed: Packed) -> None:
        """Add a finished task's encoder and head."""
        self.put(packed.task)  # which refuses what is no encoder of this model
        self.encoders[index] = self.on_cpu()
        self.heads.add(index, labels)
        self.heads.load(index, packed.head)
