"""A layer that each task has to itself: one copy a task, swapped in with the task.

The head's layers begin fresh, seeded by (seed, task, name), never by the global generator, which the
Trainer re-seeds: two tasks would start alike. Norms (`train_norms`) begin as copies of the base's.

Invariant: a finished task's copy requires no gradient, whatever is set active.
"""

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


def task_generator(seed: int, task: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends on the seed, the task's number and a name alone."""
    key = hashlib.sha256(f"{seed}:{task}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))


def fresh_linear(like: nn.Linear, out_features: int, std: float, generator: torch.Generator) -> nn.Linear:
    """Return a new float32 linear on `like`'s device: weights normal(0, std), bias 0.

    Args:
        like: Gives in_features, device and whether there is a bias.
        out_features: Rows of the new weight.
        std: The family's `initializer_range`.
        generator: CPU generator of the weights.
    """
    linear = nn.Linear(like.in_features, out_features, bias=like.bias is not None, device="meta")
    linear = linear.to_empty(device=like.weight.device)
    with torch.no_grad():
        weight = torch.empty(linear.weight.shape).normal_(0, std, generator=generator)
        linear.weight.copy_(weight)
        if linear.bias is not None:
            linear.bias.zero_()
    return linear


def task_copy(layer: nn.Module, *, out_features: int | None, std: float, generator: torch.Generator) -> nn.Module:
    """Return one task's own copy of `layer`.

    Args:
        layer: A layer of the base.
        out_features: Rows of a fresh linear; None copies the layer as it is (a norm).
        std: Standard deviation of fresh weights.
        generator: CPU generator of fresh weights.
    """
    if out_features is None or not isinstance(layer, nn.Linear):
        return copy.deepcopy(layer).float().requires_grad_(True)
    return fresh_linear(layer, out_features, std, generator)


class TaskLayer(nn.Module):
    """Stands in the base's place and calls the active task's copy; the base's own layer when none is active.

    For methods without masks; the masked tuner has the same layer as a PEFT layer.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        # Not `base_layer`: PEFT takes whatever has that for a layer of its own.
        self.original = base_layer.requires_grad_(False)
        self.copies = nn.ModuleDict()
        self.active: str | None = None
        self.rows: tuple[tuple[str, ...], Tensor] | None = None
        """While a batch holds rows of several tasks: keys, and a row's place among them; see `MixedRows`."""
        self.together: tuple[str, ...] = ()
        """Copies that answer side by side, along the last dimension; empty: the active one alone."""

    def add(self, key: str, layer: nn.Module) -> None:
        """Add a task's copy under a key without dots."""
        self.copies[key] = layer

    def forward(self, x: Tensor) -> Tensor:
        """Apply the active copy, to each row its own task's, or several side by side; x is cast to its dtype."""
        if self.rows is not None:
            keys, places = self.rows
            return of_each_row([run_copy(self.copies[key], x) for key in keys], places)
        if self.together:
            layers = [self.copies[key] for key in self.together]
            # A head's later layers get what its first one gave, one part a task; what lies between is elementwise.
            shared = x.shape[-1] == next(layers[0].parameters()).shape[-1]
            parts = [x] * len(layers) if shared else x.chunk(len(layers), dim=-1)
            return torch.cat([run_copy(layer, part) for layer, part in zip(layers, parts, strict=True)], dim=-1)
        layer = self.original if self.active is None else self.copies[self.active]
        return run_copy(layer, x)


def run_copy(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer kept in float32 below a base of any dtype; under autocast the dtype is autocast's affair."""
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(next(layer.parameters()).dtype)
    return layer(x)


def of_each_row(answers: Sequence[Tensor], places: Tensor) -> Tensor:
    """Return each row from the answer that is its own; narrower ones are filled up with -inf.

    Every copy answers every row: no shape depends on the batch, and DDP sees each copy in each step.

    Args:
        answers: One (rows, ..., width) a copy.
        places: Which of them each row is taken from, int64 (rows,).
    """
    widest = max(answer.shape[-1] for answer in answers)
    filled = [pad(answer, (0, widest - answer.shape[-1]), value=float("-inf")) for answer in answers]
    return torch.stack(filled)[places, torch.arange(len(places), device=places.device)]


PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
"""What transformers calls the kinds of loss a sequence classifier has."""


def follow_labels(model: Any, labels: tuple[str, ...], problem_type: str | None = PROBLEMS[0]) -> None:
    """Set a sequence classifier's `num_labels`, `id2label`, `label2id` and `problem_type` to a task's."""
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}
    model.config.problem_type = problem_type
    model.num_labels = len(labels)
