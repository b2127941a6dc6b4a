"""Heads a task for models without masks: the base's head layers replaced by `TaskLayer`s."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_cl.errors import RunError
from hf_cl.layers.base import Base
from hf_cl.layers.heads import TaskLayer, follow_labels, task_copy, task_generator


class TaskHeads:
    """One head a task on a plain model; tasks are known by their numbers."""

    def __init__(self, base: Base, seed: int) -> None:
        """Replace the base's head layers in place."""
        self.model, self.seed, self.names = base.model, seed, base.head
        self.labels: dict[int, tuple[str, ...]] = {}
        self.layers: dict[str, TaskLayer] = {}
        for name in self.names:
            layer = TaskLayer(self.model.get_submodule(name))
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer)
            self.layers[name] = layer

    def add(self, index: int, labels: tuple[str, ...]) -> None:
        """Add task number `index` with a fresh head and make it active and trainable."""
        std = float(getattr(self.model.config, "initializer_range", 0.02))
        for name, layer in self.layers.items():
            rows = len(labels) if name == self.names[-1] else getattr(layer.original, "out_features", None)
            made = task_copy(
                layer.original,
                out_features=rows,
                std=std,
                generator=task_generator(self.seed, index, name),
            )
            layer.add(_key(index), made)
        self.labels[index] = labels
        self.show(index)

    def remove(self, index: int) -> None:
        """Forget a task's head."""
        for layer in self.layers.values():
            if _key(index) in layer.copies:
                del layer.copies[_key(index)]
            layer.active = None
        self.labels.pop(index, None)

    def show(self, index: int) -> None:
        """Make a task's head and labels the active ones."""
        for layer in self.layers.values():
            layer.active, layer.rows = _key(index), None
        follow_labels(self.model, self.labels[index])

    @contextmanager
    def together(self, indices: Iterable[int]) -> Iterator[None]:
        """Let several tasks' heads answer inside the context: the logits are theirs side by side, in this order."""
        keys = tuple(_key(index) for index in indices)
        for layer in self.layers.values():
            layer.together = keys
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.together = ()

    def freeze(self, index: int) -> None:
        """Freeze a finished task's head."""
        for layer in self.layers.values():
            layer.copies[_key(index)].requires_grad_(False)

    def answer_rows(self, indices: Sequence[int], places: Tensor) -> None:
        """Answer each row of the next batches by its own task's head.

        Args:
            indices: The tasks whose rows a batch may hold.
            places: Each row's place among them, int64 (rows,).
        """
        widest = max(len(self.labels[index]) for index in indices)
        for layer in self.layers.values():
            layer.rows = tuple(_key(index) for index in indices), places
        follow_labels(self.model, tuple(map(str, range(widest))))

    def thaw(self, index: int) -> None:
        """Make a task's head trainable (PEFT freezes all it does not know)."""
        for layer in self.layers.values():
            layer.copies[_key(index)].requires_grad_(True)

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Return a task's head by layer and parameter name."""
        return {
            f"{name}.{key}": tensor
            for name, layer in self.layers.items()
            for key, tensor in layer.copies[_key(index)].state_dict().items()
        }

    def load(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Fill an added task's head from stored tensors.

        Raises:
            RunError: They are not that head's.
        """
        load_exactly(self.tensors(index), tensors, f"task {index}: its head")
        self.freeze(index)


def load_exactly(held: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Copy tensors into those of the same names and shapes.

    Raises:
        RunError: A name or a shape differs.
    """
    require_same_shapes(held, given, what)
    with torch.no_grad():
        for name, tensor in held.items():
            tensor.copy_(given[name])


def require_same_shapes(held: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Require tensors of the same names and shapes.

    Raises:
        RunError: A name or a shape differs.
    """
    if set(held) != set(given) or any(held[name].shape != given[name].shape for name in held):
        raise RunError(f"{what} holds {', '.join(sorted(given)[:4])} ...; expected {', '.join(sorted(held)[:4])} ....")


def _key(index: int) -> str:
    return f"task{index}"
