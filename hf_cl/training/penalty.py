"""Quadratic penalties: what pulls the weights back while a task trains, as a term of its loss.

    penalty(theta) = strength / 2 * sum_i weight_i * (theta_i - centre_i)^2

L2 to the earlier weights has weight 1 and the last task's weights as its centre; EWC's weight is a Fisher. The terms
of several tasks, each with a centre of its own, are together one such quadratic and a constant, which no gradient
sees: their weights add up, and the centre is the mean of theirs by weight. So a penalty of a hundred tasks costs two
copies of the encoder and the time of one.

Source: EWC, arXiv 1612.00796, eq. 3; that several quadratics are one: completing the square.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

Penalty = Callable[[nn.Module], Tensor]
"""Takes the unwrapped model, and gives what to add to its loss."""


@dataclass(frozen=True)
class Quadratic:
    """A sum of quadratics around earlier weights.

    Attributes:
        centre: By parameter name, float32.
        weight: By parameter name, float32, at least 0; empty is 1 everywhere.
    """

    centre: Mapping[str, Tensor]
    weight: Mapping[str, Tensor] = field(default_factory=dict)

    def value(self, model: nn.Module) -> Tensor:
        """Return the sum at a model's weights, halved; a scalar with a gradient to the parameters that it names."""
        parameters = dict(model.named_parameters())
        total = torch.zeros((), device=next(model.parameters()).device)
        for name, centre in self.centre.items():
            parameter = parameters[name]
            squares = (parameter.float() - centre.to(parameter.device)).square()
            if self.weight:
                squares = squares * self.weight[name].to(parameter.device)
            total = total + squares.sum()
        return total / 2

    def to(self, device: torch.device) -> "Quadratic":
        """Return it on a device; what is there already is not copied."""
        moved = [{name: tensor.to(device) for name, tensor in held.items()} for held in (self.centre, self.weight)]
        return Quadratic(*moved)

    def times(self, strength: float) -> Penalty:
        """Return it as a penalty of a strength."""
        return lambda model: strength * self.value(model)


def together(one: Quadratic, other: Quadratic) -> Quadratic:
    """Return two quadratics, both with weights, as one: their sum but for a constant."""
    weights, centres = {}, {}
    for name, weight in other.weight.items():
        weights[name] = one.weight[name] + weight
        # Where neither weighs anything, the centre does not matter.
        share = torch.where(weights[name] > 0, weight / weights[name], 0.0)
        centres[name] = torch.lerp(one.centre[name], other.centre[name], share)
    return Quadratic(centres, weights)


def with_penalty(trainer_class: type[Trainer], penalty: Penalty) -> type[Trainer]:
    """Return a Trainer whose training loss is the given one's and the penalty.

    The loss that evaluation reports stays the task's own. Under gradient accumulation each of the n batches of a step
    brings an n-th of the penalty, as of its loss.

    Args:
        trainer_class: A Trainer.
        penalty: Gives the term; it must be the same on every process.
    """

    class PenalisedTrainer(trainer_class):
        """Adds a penalty to the training loss."""

        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
        ) -> Any:
            """Return the loss and, while the model trains, the penalty in it."""
            found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
            if not model.training:
                return found
            added = penalty(self.accelerator.unwrap_model(model))
            return (found[0] + added, found[1]) if return_outputs else found + added

    return PenalisedTrainer
