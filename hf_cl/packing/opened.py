"""One task of a bank, out of its file: the bytes are checked already, their content here."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_cl.errors import BankCorruptError, BaseMismatchError, HfClError
from hf_cl.layers.task_heads import load_exactly
from hf_cl.masks.coding import decode
from hf_cl.masks.select import kept_count
from hf_cl.masks.values import from_int8
from hf_cl.ownership.owner import FREE
from hf_cl.packing.stores import HEAD, MASKS, OWNED, PROBE, stores_of
from hf_cl.proof import TEXTS
from hf_cl.routing.nearest_mean import TASK_TENSORS, TaskMeans
from hf_cl.storage.manifest import StoreEntry, TaskEntry, Tombstone
from hf_cl.training.masked import adapter_of, task_digests
from hf_cl.training.method import Stores
from hf_cl.tuner import MaskLinear, MaskModel


@dataclass(frozen=True)
class Part:
    """What a task has in one layer: its mask, which entries it owns and trained (None: none), their float32 values."""

    path: str
    mask: Tensor
    own: Tensor | None
    values: Tensor


class OpenedTask:
    """A task's file, taken apart. With a tombstone, the mask is what the dropped task still owns."""

    def __init__(self, entry: TaskEntry | Tombstone, tensors: Mapping[str, Tensor]) -> None:
        """Sort a file's tensors by what they are.

        Raises:
            BankCorruptError: One is missing, or is there and no such task has it.
        """
        self.entry, left = entry, dict(tensors)
        lacking = sorted(_names(entry) - set(left))
        if lacking:
            raise self.corrupt(f"its file lacks {', '.join(lacking)}")
        self._masks = self._cut(left.pop("masks"), left.pop("mask_lengths"))
        self._owned: list[bytes] | None = None
        self._values, self._scales = torch.empty(0), torch.empty(0)
        if entry.trains == "claimed":
            self._take_values(left)
        self.head = {name[len(HEAD) :]: left.pop(name) for name in [*left] if name.startswith(HEAD)}
        self.probe = left.pop(PROBE, torch.empty(0))
        """Its probe logits at its commit, float32 (texts, labels)."""
        self._stores = stores_of(entry) if isinstance(entry, TaskEntry) else Stores()
        self.extra = {name: left.pop(name) for name in self._stores.task if name in left}
        self.routing = self._routing()
        """Its class means, None where they were not collected."""
        for name, tensor in self.head.items():
            self._require(f"{HEAD}{name}", tensor, torch.float32, None)
        if isinstance(entry, TaskEntry):
            self._require(PROBE, self.probe, torch.float32, 2)
            if self.probe.shape != (TEXTS, len(entry.labels)):
                raise self.corrupt(f"its probe has the shape {tuple(self.probe.shape)}")
        if left:
            raise self.corrupt(f"its file brings {', '.join(sorted(left)[:3])}, which no such task has")

    def _routing(self) -> TaskMeans | None:
        found = set(TASK_TENSORS) & set(self.extra)
        if not found or not isinstance(self.entry, TaskEntry):
            return None
        if len(found) < len(TASK_TENSORS):
            raise self.corrupt(f"its file has {', '.join(sorted(found))} alone of what routers know")
        try:
            return TaskMeans.read(self.extra, len(self.entry.labels))
        except ValueError as error:
            raise self.corrupt(str(error)) from error

    def _take_values(self, left: dict[str, Tensor]) -> None:
        entry = self.entry
        self._values = left.pop("values")
        self._require("values", self._values, getattr(torch, entry.values_dtype), 1)
        if entry.values_dtype == "int8":
            self._scales = left.pop("value_scales")
            self._require("value_scales", self._scales, torch.bfloat16, 1)
            if bool((self._scales < 0).any()):
                raise self.corrupt("its value_scales are below 0")
        if not isinstance(entry, Tombstone):
            self._owned = self._cut(left.pop("owned"), left.pop("owned_lengths"))

    @property
    def code_bytes(self) -> int:
        """Bytes of its masks' codes."""
        return sum(map(len, self._masks))

    def corrupt(self, what: str) -> BankCorruptError:
        """Return the error that names this task and its file."""
        return BankCorruptError(f"task {self.entry.name!r} ({self.entry.file.name}): {what}. Fetch the bank again.")

    def _require(self, name: str, tensor: Tensor, dtype: torch.dtype, axes: int | None) -> None:
        if tensor.dtype != dtype or (axes is not None and tensor.ndim != axes):
            raise self.corrupt(f"{name} is {tensor.dtype} with {tensor.ndim} axes, expected {dtype} with {axes}")

    def _cut(self, codes: Tensor, lengths: Tensor) -> list[bytes]:
        self._require("codes", codes, torch.uint8, 1)
        self._require("lengths of codes", lengths, torch.int32, 1)
        data, sizes = codes.numpy().tobytes(), lengths.tolist()
        if min(sizes, default=0) < 0 or sum(sizes) != len(data):
            raise self.corrupt(f"{len(data):,} bytes of codes in parts of {sum(sizes):,}")
        edges = np.cumsum([0, *sizes]).tolist()
        return [data[a:b] for a, b in itertools.pairwise(edges)]

    def parts(self, store: StoreEntry) -> Iterator[Part]:
        """Yield what the task has in each layer, decoded; every size is checked against the layer's shape.

        Raises:
            BankCorruptError: Codes, counts or values are not those of such layers.
        """
        layers = store.layers
        self._require_features(store)
        if len(self._masks) != len(layers) or (self._owned is not None and len(self._owned) != len(layers)):
            raise self.corrupt(f"masks of {len(self._masks)} layers for a base with {len(layers)}")
        used = rows = 0
        for place, path in enumerate(layers):
            height, width = store.shapes[path]
            mask = self._decode(self._masks[place], height * width, width).view(height, width)
            kept, most = int(mask.count_nonzero()), kept_count(height * width, self.entry.density)
            if kept > most:
                raise self.corrupt(f"{path} keeps {kept:,} entries, density {self.entry.density} means {most:,}")
            if self.entry.trains != "claimed":
                yield Part(path, mask, None, torch.empty(0))
                continue
            own = mask
            if self._owned is not None:
                own = torch.zeros(height, width, dtype=torch.bool)
                own[mask] = self._decode(self._owned[place], kept)
            size, height_used = int(own.count_nonzero()), int(own.any(1).count_nonzero())
            values = self._values[used : used + size]
            if values.shape[0] != size:
                raise self.corrupt(f"{self._values.shape[0]:,} values end within {path}")
            if values.dtype == torch.int8:
                where = own.view(-1).nonzero().squeeze(1)
                try:
                    values = from_int8(values, self._scales[rows : rows + height_used], where, width)
                except ValueError as error:
                    raise self.corrupt(f"{path}: {error}") from error
                rows += height_used
            used += size
            yield Part(path, mask, own, values.float())
        if used != self._values.shape[0] or rows != self._scales.shape[0]:
            raise self.corrupt(f"{self._values.shape[0]:,} values and {self._scales.shape[0]:,} scales for {used:,}")

    def _require_features(self, store: StoreEntry) -> None:
        """Refuse a vector that is not of the width of what the head reads."""
        width = self.head.get(f"{store.head[0]}.weight", torch.empty(0)).shape[-1:]
        for name in self._stores.features:
            if name in self.extra and (self.extra[name].dtype != torch.float32 or self.extra[name].shape != width):
                raise self.corrupt(f"{name} is of another width than what its head reads")

    def _decode(self, code: bytes, size: int, row: int | None = None) -> Tensor:
        try:
            return torch.from_numpy(decode(code, size, row))
        except HfClError as error:
            raise self.corrupt(str(error)) from error

    # --- into a masked model ------------------------------------------------------------------------

    def occupy(self, tuner: MaskModel, store: StoreEntry, *, whole: bool) -> None:
        """Make this task, which stays on disk, the owner of its entries, with their values.

        Args:
            tuner: The masked model.
            store: What the bank says of its layers.
            whole: All tasks before this one own their entries in the model. If not, only what this one trained is
                put where attached tasks read it.
        """
        for layer, part in self._on(tuner, store):
            mask = part.mask.to(layer.store.owner.device)
            own = mask & (layer.store.owner == FREE) if part.own is None else part.own.to(mask.device)
            if whole:
                self._require_free(layer, own, mask)
            if whole or part.own is not None:
                layer.occupy(self.entry.index, own, part.values if part.own is not None else None)

    def place(self, tuner: MaskModel, store: StoreEntry, *, whole: bool, prove: bool = True) -> None:
        """Put this task into its adapter: masks, values, owners, head.

        Args:
            tuner: The masked model; the adapter is added to it.
            store: What the bank says of its layers.
            whole: Every task of the bank owns its entries in the model, so that owners can be checked.
            prove: Compare its digests with those at its commit; False where the caller does.

        Raises:
            BankCorruptError: Something in the file is not what the base, the labels or the other tasks make it.
        """
        adapter, index = adapter_of(self.entry.index), self.entry.index
        for layer, part in self._on(tuner, store):
            owner = layer.store.owner
            mask = part.mask.to(owner.device)
            own = mask & ((owner == FREE) | (owner == index)) if part.own is None else part.own.to(owner.device)
            if whole:
                self._require_free(layer, own, mask)
            layer.install(adapter, mask, part.values.to(owner.device) if part.own is not None else None, own)
        try:
            load_exactly(tuner.own_tensors(adapter), self.head, "its head")
        except HfClError as error:
            raise self.corrupt(str(error)) from error
        tuner.finish(adapter)
        if prove and isinstance(self.entry, TaskEntry):
            found = task_digests(tuner, adapter)
            moved = [part for part in ("masks", "values", "head") if found[part] != self.entry.parts.get(part)]
            if moved:
                raise self.corrupt(f"its {', '.join(moved)} are not those of its commit")

    def _require_free(self, layer: MaskLinear, own: Tensor, mask: Tensor) -> None:
        free = (layer.store.owner == FREE) | (layer.store.owner == self.entry.index)
        if not torch.equal(own, mask & free):
            raise self.corrupt(f"{layer.path}: it claims entries that an earlier task owns, or leaves free ones")

    def _on(self, tuner: MaskModel, store: StoreEntry) -> Iterator[tuple[MaskLinear, Part]]:
        layers = tuner.mask_layers()
        if [layer.path for layer in layers] != store.layers or shapes_of(layers) != store.shapes:
            raise BaseMismatchError("this bank masks other layers than the base has. Load the model it was learned on.")
        yield from zip(layers, self.parts(store), strict=True)


def _names(entry: TaskEntry | Tombstone) -> set[str]:
    """Return the tensors that a file must have, besides its head."""
    names = {*MASKS}
    if entry.trains == "claimed":
        names |= {"values", *(("value_scales",) if entry.values_dtype == "int8" else ())}
    if isinstance(entry, Tombstone):
        return names
    return names | {PROBE} | ({*OWNED} if entry.trains == "claimed" else set())


def shapes_of(layers: Sequence[MaskLinear]) -> dict[str, list[int]]:
    """Return the shapes of masked layers by path."""
    return {layer.path: list(layer.base_layer.weight.shape) for layer in layers}
