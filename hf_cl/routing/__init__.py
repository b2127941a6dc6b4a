"""Routing: which task a text belongs to that comes without a task id. One router a file, named as its file is.

A router is made once by its file's `build(tasks)`, and says of each text how sure it is of each task. It knows a
bank only by what `Tasks` offers, so it needs no model of its own, and a test can ask it about tasks made by hand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Inputs = Mapping[str, Tensor]
"""A tokenised batch: `input_ids`, `attention_mask` and so on, each (n, length)."""


@dataclass(frozen=True)
class Gaussians:
    """What the base's features of each task's texts look like.

    Attributes:
        means: A (classes, d) float32 tensor a task, without the classes that no text was seen of.
        counts: A (classes,) int32 tensor a task, the texts that each of these was made of.
        covariance: (d, d) float64, of texts about their class's mean; shrunk, positive definite.
        typical: Mean squared Mahalanobis distance of a text to its own class's mean.
    """

    means: Sequence[Tensor]
    counts: Sequence[Tensor]
    covariance: Tensor
    typical: float


class Tasks(Protocol):
    """The tasks of a bank on their base, as a router may ask about them; k of them."""

    @property
    def classes(self) -> Sequence[int]:
        """Number of labels of each task."""

    def gaussians(self) -> Gaussians:
        """Return the state that was collected while the tasks trained.

        Raises:
            BankError: A task was learned without, or it does not belong to this base.
        """

    def features(self, inputs: Inputs) -> Tensor:
        """Return the bare base's features of the texts, (n, d) float32, by one forward."""

    def logits(self, inputs: Inputs) -> Sequence[Tensor]:
        """Return every task's logits of the texts, (n, classes) float32 each."""

    def slopes(self, inputs: Inputs, shares: Tensor) -> Tensor:
        """Return how the entropy of the answers rises with each task's share of a mixed network, (n, k) float32.

        Args:
            inputs: The texts.
            shares: (n, k), of each task's masks and head in the network that reads each text.
        """


class Router(Protocol):
    """Chooses tasks."""

    def confidences(self, inputs: Inputs) -> Tensor:
        """Return how sure the router is of each task for each text: (n, k), each in [0, 1]; the largest is chosen."""
