"""One task of a bank, out of its file and into a masked model: the bytes are checked already, their content here."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hf_cl.errors import BankCorruptError, HfClError
from hf_cl.layers.task_heads import load_exactly
from hf_cl.masks.coding import decode
from hf_cl.masks.select import kept_count
from hf_cl.ownership.owner import FREE
from hf_cl.storage.manifest import TaskEntry
from hf_cl.training.masked import KKT_MEAN, adapter_of
from hf_cl.tuner import MaskLinear, MaskModel


class OpenedTask:
    """A task's file, taken apart."""

    def __init__(self, entry: TaskEntry, tensors: dict[str, Tensor]) -> None:
        self.entry = entry
        must = {"masks", "mask_lengths"}
        must |= {"values", "owned", "owned_lengths"} if entry.trains == "claimed" else set()
        lacking = sorted(must - set(tensors))
        if lacking:
            raise self.corrupt(f"its file lacks {', '.join(lacking)}")
        self._masks = self._cut(tensors.pop("masks"), tensors.pop("mask_lengths"))
        self._owned, self._values = None, torch.empty(0)
        if entry.trains == "claimed":
            self._owned = self._cut(tensors.pop("owned"), tensors.pop("owned_lengths"))
            self._values = tensors.pop("values").float()
        self._head = {name[5:]: tensors.pop(name) for name in [*tensors] if name.startswith("head.")}
        extra = sorted(set(tensors) - {KKT_MEAN})
        if extra:
            raise self.corrupt(f"its file brings {', '.join(extra[:3])}, which no task has")

    def corrupt(self, what: str) -> BankCorruptError:
        """Return the error that names this task and its file."""
        return BankCorruptError(f"task {self.entry.name!r} ({self.entry.file.name}): {what}. Fetch the bank again.")

    def _cut(self, codes: Tensor, lengths: Tensor) -> list[bytes]:
        data, sizes = codes.numpy().tobytes(), lengths.tolist()
        if codes.dtype != torch.uint8 or lengths.ndim != 1 or min(sizes, default=0) < 0 or sum(sizes) != len(data):
            raise self.corrupt(f"{len(data):,} bytes of codes in parts of {sum(sizes):,}")
        edges = np.cumsum([0, *sizes]).tolist()
        return [data[a:b] for a, b in itertools.pairwise(edges)]

    def _layers(self, layers: Sequence[MaskLinear]) -> Iterator[tuple[MaskLinear, Tensor, Tensor | None, Tensor]]:
        """Yield, for each layer: its mask, which of all entries the task owns and trained (or None), their values."""
        if len(self._masks) != len(layers) or (self._owned is not None and len(self._owned) != len(layers)):
            raise self.corrupt(f"masks of {len(self._masks)} layers for a base with {len(layers)}")
        used = 0
        for place, layer in enumerate(layers):
            shape, device = layer.base_layer.weight.shape, layer.store.owner.device
            mask, own = self._decode(self._masks[place], shape.numel(), shape[1]).view(shape), None
            kept, most = int(mask.count_nonzero()), kept_count(shape.numel(), self.entry.density)
            if kept > most:
                raise self.corrupt(f"{layer.path} keeps {kept:,} entries, density {self.entry.density} means {most:,}")
            size = 0
            if self._owned is not None:
                own = torch.zeros(shape, dtype=torch.bool)
                own[mask] = self._decode(self._owned[place], kept)
                size = int(own.count_nonzero())
            values = self._values[used : used + size]
            if values.shape[0] != size:
                raise self.corrupt(f"{self._values.shape[0]:,} values end within {layer.path}")
            used += size
            yield layer, mask.to(device), None if own is None else own.to(device), values.to(device)
        if used != self._values.shape[0]:
            raise self.corrupt(f"{self._values.shape[0]:,} values for {used:,} entries")

    def _decode(self, code: bytes, size: int, row: int | None = None) -> Tensor:
        try:
            return torch.from_numpy(decode(code, size, row))
        except HfClError as error:
            raise self.corrupt(str(error)) from error

    def lend(self, tuner: MaskModel) -> None:
        """Put the trained values of this task, which is not attached, where attached ones read them."""
        for layer, _, own, values in self._layers(tuner.mask_layers()):
            if own is not None:
                layer.lend(own, values)

    def place(self, tuner: MaskModel, *, whole: bool) -> None:
        """Put this task into its adapter: masks, values, owners, head.

        Args:
            tuner: The masked model; the adapter is added to it.
            whole: Every task of the bank is attached, so that owners can be checked.

        Raises:
            BankCorruptError: Something in the file is not what the base, the labels or the other tasks make it.
        """
        adapter = adapter_of(self.entry.index)
        for layer, mask, own, values in self._layers(tuner.mask_layers()):
            if whole and own is not None and not torch.equal(own, mask & (layer.store.owner == FREE)):
                raise self.corrupt(f"{layer.path}: it claims entries that an earlier task owns, or leaves free ones")
            layer.install(adapter, mask, values if own is not None else None, own)
        try:
            load_exactly(tuner.own_tensors(adapter), self._head, "its head")
        except HfClError as error:
            raise self.corrupt(str(error)) from error
        tuner.finish(adapter)
