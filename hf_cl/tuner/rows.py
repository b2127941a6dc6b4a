"""Which rows of a batch belong to which task, or by which shares to several, while one forward answers them all.

While a model computes with such a plan, each masked linear adds its tasks' sparse parts to one product with the base's
weight, and each of a task's own layers (head, norms) runs once for each task on its rows. No weight is composed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from hf_cl.layers.linear import apply_weight
from hf_cl.layers.sparse import sparse_product
from hf_cl.tuner.names import BASE

if TYPE_CHECKING:
    from hf_cl.tuner.layer import MaskLinear
    from hf_cl.tuner.own_layer import OwnLayer


class NoRowsError(Exception):
    """An input has no row a text (DeBERTa's relative positions): such a model answers one task at a time."""

    def __init__(self) -> None:
        super().__init__("an input of a layer has no row a text")


class Plan(Protocol):
    """Says what the layers compute while it is in force."""

    def linear(self, layer: "MaskLinear", x: Tensor) -> Tensor:
        """Return a masked linear's output."""

    def own(self, layer: "OwnLayer", x: Tensor) -> Tensor:
        """Return the output of a layer that each task has to itself."""


class Bare:
    """The bare base, whichever task is active."""

    def linear(self, layer: "MaskLinear", x: Tensor) -> Tensor:
        """Return `x W0^T + b`."""
        return apply_weight(layer.base_layer, x, layer.base_weight)

    def own(self, layer: "OwnLayer", x: Tensor) -> Tensor:
        """Return the output of the base's own layer."""
        return layer.run(None, x)


@dataclass(frozen=True)
class Rows:
    """One adapter a row, and the rows of each beside each other, so that none is copied.

    Attributes:
        places: Rows of each adapter, `__base__` among them; every row once.
        count: Number of rows.
    """

    places: Mapping[str, slice]
    count: int

    def linear(self, layer: "MaskLinear", x: Tensor) -> Tensor:
        """Return `x A^T + b` with each task's part added in its rows."""
        out = layer.common(x)
        for adapter, rows in self._of(x):
            if adapter != BASE:
                part = sparse_product(x[rows].reshape(-1, x.shape[-1]), layer.part(adapter))
                out[rows].view(-1, out.shape[-1]).add_(part.to(out.dtype))
        return out

    def own(self, layer: "OwnLayer", x: Tensor) -> Tensor:
        """Return each row by its task's copy; a row of fewer outputs than the widest ends in -inf."""
        parts = [(rows, layer.run(None if adapter == BASE else adapter, x[rows])) for adapter, rows in self._of(x)]
        widest = max(part.shape[-1] for _, part in parts)
        out = parts[0][1].new_full((*x.shape[:-1], widest), -torch.inf)
        for rows, part in parts:
            out[rows, ..., : part.shape[-1]] = part.to(out.dtype)
        return out

    def _of(self, x: Tensor) -> list[tuple[str, slice]]:
        if x.shape[0] != self.count:
            raise NoRowsError
        return list(self.places.items())


@dataclass
class Shares:
    """A network mixed of several tasks, row by row: `A + (sum_i a_i M_i) * V`. Gradients reach the shares.

    Attributes:
        adapters: The tasks.
        shares: (rows, tasks) float32.
        head: The adapter whose head answers; norms are the base's.
    """

    adapters: Sequence[str]
    shares: Tensor
    head: str | None = None

    def linear(self, layer: "MaskLinear", x: Tensor) -> Tensor:
        """Return `x A^T + b` with each task's part by its share."""
        if x.shape[0] != len(self.shares):
            raise NoRowsError
        out, flat = layer.common(x), x.reshape(-1, x.shape[-1])
        for place, adapter in enumerate(self.adapters):
            share = self.shares[:, place].view(-1, *[1] * (x.ndim - 1))
            part = sparse_product(flat, layer.part(adapter)).reshape(out.shape)
            out = out + (share * part).to(out.dtype)
        return out

    def own(self, layer: "OwnLayer", x: Tensor) -> Tensor:
        """Return the output of the answering task's head."""
        return layer.run(None if layer.is_norm else self.head, x)
