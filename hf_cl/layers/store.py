"""One masked layer's shared state: the value store V, who owns which entry, and the composed weight.

Pure tensors, no PEFT: the tuner's layer holds one of these, and asks it to compose a task.

Invariants: V changes at a commit alone; the composed weight holds one task at a time and equals
`A + M * V` bit for bit however it was reached.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hf_cl.errors import BaseModelError
from hf_cl.masks.compose import pick, positions, put, start_store
from hf_cl.ownership.owner import all_free

DENSE_FROM = 0.125
"""Share of kept entries from which, on a CPU, one pass over the weight beats writing entries one by one."""


class Patch(NamedTuple):
    """What a task changes in the composed weight: two writes switch from one task to another, and nothing is looked up.

    Attributes:
        where: int64, flat positions of the mask's entries.
        shown: The composed weight there, in its dtype.
        bare: A there, in the same dtype.
    """

    where: Tensor
    shown: Tensor
    bare: Tensor


class MaskStore(nn.Module):
    """V, the owner map and the composed weight of one linear; derived, never saved with an adapter."""

    def __init__(self, weight: Tensor, *, compose: str, seed: int, path: str, scale: float) -> None:
        super().__init__()
        self.compose, self.seed, self.path, self.scale = compose, seed, path, scale
        self.values: Tensor
        self.owner: Tensor
        self.weight: Tensor
        self.register_buffer("values", self.start(weight), persistent=False)
        self.register_buffer("owner", all_free(tuple(weight.shape), weight.device), persistent=False)
        self.register_buffer("weight", self._empty(weight), persistent=False)
        # What was written into the composed weight: a patch, or all of it in one pass.
        self._written: Patch | None = None
        self._whole = False

    @property
    def delta(self) -> bool:
        """Whether A is the pretrained weight (`delta`) rather than 0."""
        return self.compose == "delta"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MaskStore":
        """Follow the model to another device; refuse another dtype, which would round what tasks own."""
        self.refuse_cast(fn)
        super()._apply(fn, recurse)
        if self._written is not None:
            self._written = Patch(*(tensor.to(self.weight.device) for tensor in self._written))
        return self

    def refuse_cast(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Refuse a change of dtype.

        Raises:
            BaseModelError: `fn` would cast the store or the composed weight.
        """
        if any(fn(tensor[:1]).dtype != tensor.dtype for tensor in (self.values, self.weight)):
            raise BaseModelError(
                f"{self.path}: the values that tasks own are float32 and a cast would change finished tasks. "
                f"Load the base in the wanted dtype instead, as in from_pretrained(..., dtype=torch.bfloat16)."
            )

    def _empty(self, weight: Tensor) -> Tensor:
        return weight.detach().clone() if self.delta else torch.zeros_like(weight)

    def start(self, weight: Tensor) -> Tensor:
        """Return V as it was before any task, float32; computed anew."""
        return start_store(self.compose, weight, self.seed, self.path, self.scale)

    def reset(self, weight: Tensor) -> None:
        """Make the composed weight A again in one pass, whatever wrote to it."""
        self.weight.copy_(self._empty(weight))
        self._written, self._whole = None, False

    def show(self, weight: Tensor, mask: Tensor, values: Tensor | None = None) -> None:
        """Make the composed weight `A + mask * V`.

        Args:
            weight: The base's weight.
            mask: bool, of the weight's shape.
            values: float32, taken in V's place while they train; None is V.
        """
        values = self.values if values is None else values
        flat = mask.view(-1)
        # An accelerator would have to be waited for to count, and writes the whole weight in no time.
        if flat.device.type != "cpu" or np.count_nonzero(flat.numpy()) > DENSE_FROM * flat.numel():
            full = weight.float() + values if self.delta else values
            rest = weight if self.delta else torch.zeros((), dtype=weight.dtype, device=weight.device)
            self.weight.copy_(torch.where(mask, full.to(weight.dtype), rest))
            self._written, self._whole = None, True
        else:
            self.show_patch(weight, self.patch(weight, mask, values))

    def patch(self, weight: Tensor, mask: Tensor, values: Tensor | None = None) -> Patch:
        """Return what a mask changes in the base's weight, its arguments being those of `show`.

        It holds until the mask, V or the base's weight moves. Sums are float32, rounded once to the weight's dtype.
        """
        where = positions(mask.view(-1))
        bare, own = self.base_at(weight, where), pick(self.values if values is None else values, where)
        return Patch(where, (bare + own if self.delta else own).to(weight.dtype), bare.to(weight.dtype))

    def show_patch(self, weight: Tensor, patch: Patch) -> None:
        """Make the composed weight the base's with a patch."""
        self.clear(weight)
        put(self.weight, patch.where, patch.shown)
        self._written = patch

    def clear(self, weight: Tensor) -> None:
        """Make the composed weight A again."""
        if self._whole:
            self.reset(weight)
        elif self._written is not None:
            put(self.weight, self._written.where, self._written.bare)
            self._written = None

    def write(self, base: Tensor, where: Tensor, values: Tensor) -> None:
        """Set composed entries to `base + values` while a task's own values train; V itself stays.

        Args:
            base: float32, A at `where`.
            where: Flat positions, all of them in the shown mask.
            values: float32, one number a position.
        """
        put(self.weight, where, base + values)

    def base_at(self, weight: Tensor, where: Tensor) -> Tensor:
        """Return A at flat positions, float32."""
        if self.delta:
            return pick(weight, where).float()
        return torch.zeros(where.shape[0], device=weight.device)
