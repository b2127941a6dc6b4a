"""The masked linear as a PEFT layer: one adapter a task over one shared store.

A task goes through three phases, and which one it is in is read off its tensors alone, so a reloaded
checkpoint needs no other state:

    mask       scores train
    weight     the threshold is inf: bits are set, a vector of the entries the task may change trains
    committed  scores and vector are gone; bits and the values at the mask's entries remain, as buffers

The vector is registered with the scores, before an optimizer exists, at the mask's kept count, which is
known before the mask is; its positions are filled in at the claim and cells beyond them never move.

Source: ExSSNeT, arXiv 2210.10209; the layout is ours.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_cl.errors import OwnershipError
from hf_cl.layers.heads import task_generator
from hf_cl.layers.store import MaskStore
from hf_cl.masks.compose import TrainedWeight, layer_scale
from hf_cl.masks.select import kept_count, topk_mask
from hf_cl.ownership.digest import digest
from hf_cl.ownership.owner import FOREIGN, FREE, claim
from hf_cl.tuner.config import MaskConfig

SCORE_STD = 1e-4
"""Signed scores begin near zero, well below one learning-rate step: the first gradients decide."""
Phase = Literal["mask", "weight", "committed"]


class MaskLinear(nn.Module, BaseTunerLayer):
    """A linear whose weight is `A + M * V`, with the mask M of the active adapter."""

    adapter_layer_names = ("hfcl_scores", "hfcl_values")
    other_param_names = ("hfcl_bits", "hfcl_owned", "hfcl_inherited", "hfcl_where", "hfcl_threshold")

    hfcl_bits: BufferDict
    hfcl_owned: BufferDict
    hfcl_inherited: BufferDict
    hfcl_where: BufferDict
    hfcl_threshold: BufferDict
    live_mask: Tensor | None

    def __init__(self, base_layer: nn.Linear, path: str, config: MaskConfig) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.path = path
        known = (config.scales or {}).get(path)
        scale = layer_scale(config.compose, base_layer.weight, config.scale) if known is None else known
        self.store = MaskStore(base_layer.weight, compose=config.compose, seed=config.seed, path=path, scale=scale)
        self.hfcl_scores, self.hfcl_values = nn.ParameterDict(), nn.ParameterDict()
        for name in self.other_param_names:
            setattr(self, name, BufferDict(persistent=True))
        self.configs: dict[str, MaskConfig] = {}
        self.register_buffer("live_mask", None, persistent=False)
        self._where: Tensor | None = None
        self._start: Tensor | None = None
        self._seen = (-1, -1)
        self._arrived: set[str] = set()
        self._overwritten: tuple[str, Tensor, Tensor] | None = None
        self._lacking = False
        self.register_load_state_dict_pre_hook(_make_room)
        self.register_load_state_dict_post_hook(_install_arrived)

    # --- one adapter a task ---------------------------------------------------------------------

    def add(self, adapter: str, config: MaskConfig) -> None:
        """Register a new task's tensors: fresh scores, an empty vector, no mask."""
        weight, size = self.base_layer.weight, self.base_layer.weight.numel()
        self.configs[adapter] = config
        generator = task_generator(config.seed, int(config.task_index or 0), self.path)
        self.hfcl_scores[adapter] = nn.Parameter(self.fresh_scores(adapter, generator))
        self.hfcl_values[adapter] = nn.Parameter(torch.zeros(self.count(adapter), device=weight.device))
        empty = torch.empty(0, device=weight.device)
        self.hfcl_bits[adapter] = torch.zeros(-(-size // 8), dtype=torch.uint8, device=weight.device)
        self.hfcl_owned[adapter], self.hfcl_inherited[adapter] = empty.clone(), empty.clone()
        self.hfcl_where[adapter] = self._owners()
        self.hfcl_threshold[adapter] = torch.full((1,), math.nan, device=weight.device)

    def _owners(self) -> Tensor:
        """Return the sha256 of which entries are owned: an unfinished task is right only beside the same tasks."""
        return torch.frombuffer(
            bytearray.fromhex(digest([("owned", pack(self.store.owner != FREE))])), dtype=torch.uint8
        )

    def fresh_scores(self, adapter: str, generator: torch.Generator) -> Tensor:
        """Return new scores, float32: near zero where the sign ranks, else uniform in +-1/sqrt(fan_in)."""
        weight = self.base_layer.weight
        scores = torch.empty(weight.shape)
        if self.configs[adapter].rank == "magnitude":
            bound = 1 / math.sqrt(weight.shape[1])
            return scores.uniform_(-bound, bound, generator=generator).to(weight.device)
        return scores.normal_(0, SCORE_STD, generator=generator).to(weight.device)

    def count(self, adapter: str) -> int:
        """Return how many entries the adapter's mask keeps in this layer."""
        return kept_count(self.base_layer.weight.numel(), self.configs[adapter].density)

    def budget(self, adapter: str) -> int:
        """Return how many entries the mask may keep now: its count, or with `free_topk` what is free of it."""
        count = self.count(adapter)
        if not self.configs[adapter].free_topk:
            return count
        return min(count, int((self.store.owner == FREE).count_nonzero()))

    def ranked(self, adapter: str) -> Tensor:
        """Return what ranks: the scores, or their magnitudes; with `free_topk`, -inf where an entry is owned."""
        scores = self.hfcl_scores[adapter].detach()
        ranked = scores.abs() if self.magnitude(adapter) else scores
        if not self.configs[adapter].free_topk:
            return ranked
        return ranked.where(self.store.owner == FREE, -math.inf)

    def magnitude(self, adapter: str) -> bool:
        """Return whether the adapter's scores are ranked by magnitude."""
        return self.configs[adapter].rank == "magnitude"

    def phase(self, adapter: str) -> Phase:
        """Return the adapter's phase, read off its tensors."""
        if not self.hfcl_scores[adapter].numel():
            return "committed"
        return "weight" if bool(self.hfcl_threshold[adapter].isposinf()) else "mask"

    def mask(self, adapter: str) -> Tensor:
        """Return the adapter's mask, bool: the exact one from the claim on, before it the kept threshold's."""
        if self.phase(adapter) == "mask":
            threshold = self.hfcl_threshold[adapter]
            return self.exact_mask(adapter) if bool(threshold.isnan()) else self.ranked(adapter) > threshold
        return unpack(self.hfcl_bits[adapter], self.base_layer.weight.shape)

    # --- what the active adapter computes with ----------------------------------------------------

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active and compose its weight; a committed one never trains again.

        Raises:
            OwnershipError: More than one adapter is named; masks of several tasks have no sum.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise OwnershipError(f"{self.path}: adapters {', '.join(names)} cannot be active together. Name one.")
        super().set_adapter(names, inference_mode=inference_mode)
        self._freeze_finished()
        self.compose()

    def _adapter(self) -> str | None:
        names: list[str] = list(self.active_adapters)  # type: ignore[arg-type]
        return names[0] if names and names[0] in self.configs else None

    def _apply(self, fn: Any, recurse: bool = True) -> "MaskLinear":
        """Follow the model to another device; what is derived is derived there."""
        super()._apply(fn, recurse)
        if self._where is not None:
            self.compose()
        return self

    def compose(self) -> None:
        """Make the composed weight that of the active adapter, in its phase."""
        adapter, weight = self._adapter(), self.base_layer.weight
        self._where = self._start = None
        if adapter is None or weight.is_meta or self.hfcl_scores[adapter].is_meta:
            return
        mask = self.mask(adapter)
        self.store.show(weight, mask)
        phase = self.phase(adapter)
        self._lacking = phase != "committed" and not torch.equal(self.hfcl_where[adapter].cpu(), self._owners())
        self.live_mask = mask if phase == "mask" else None
        if phase == "weight":
            self._where = self.trainable(adapter, mask)
            self._start = self.store.base_at(weight, self._where)
            self._seen = (-1, -1)

    def trainable(self, adapter: str, mask: Tensor) -> Tensor:
        """Return the flat positions of the entries whose values the task trains."""
        own = mask if self.configs[adapter].trains == "mask" else mask & (self.store.owner == FREE)
        return own.view(-1).nonzero().squeeze(1)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the active adapter's weight; x of shape (..., in) gives (..., out)."""
        layer, adapter = self.base_layer, self._adapter()
        if self.disable_adapters or self.merged or adapter is None:
            return layer(x, *args, **kwargs)
        if self._lacking:
            raise OwnershipError(
                f"{self.path}: the unfinished adapter {adapter!r} was saved beside other finished tasks than are "
                f"loaded here, whose entries it reads. Load those adapters too."
            )
        weight = self.store.weight
        scores, values = self.hfcl_scores[adapter], self.hfcl_values[adapter]
        if self._where is not None and self._start is not None:
            self._write_values(values)
        if torch.is_grad_enabled() and scores.requires_grad:
            weight = TrainedWeight.apply(
                scores, values, weight, self.store.values, self._where, self.magnitude(adapter)
            )
        return F.linear(x, weight, layer.bias)

    def _write_values(self, values: Tensor) -> None:
        """Write the vector into the composed weight, once an optimizer step however often it is read."""
        version = (id(values), values._version)
        if version != self._seen and self._where is not None and self._start is not None:
            self.store.write(self._start, self._where, values.detach()[: self._where.shape[0]])
            self._seen = version

    # --- claim and commit -------------------------------------------------------------------------

    def exact_mask(self, adapter: str) -> Tensor:
        """Return the mask the scores stand for: exactly the budget, ties by index."""
        ranked, budget = self.ranked(adapter), self.budget(adapter)
        return topk_mask(ranked, budget) if budget else torch.zeros_like(ranked, dtype=torch.bool)

    def begin_weight_phase(self, adapter: str) -> int:
        """Fix the mask, fill the vector with the values at its trainable entries; return their number."""
        mask = self.exact_mask(adapter)
        self.hfcl_bits[adapter] = pack(mask)
        self.hfcl_threshold[adapter].fill_(math.inf)
        where = self.trainable(adapter, mask)
        with torch.no_grad():
            self.hfcl_values[adapter][: where.shape[0]] = self.store.values.view(-1)[where]
        self.compose()
        return where.shape[0]

    def commit(self, adapter: str) -> None:
        """Claim the free entries of the mask, round what was trained, and drop what trained it."""
        config, trained = self.configs[adapter], None
        if self.phase(adapter) == "mask":
            mask = self.exact_mask(adapter)
            self.hfcl_bits[adapter] = pack(mask)
        else:
            mask = self.mask(adapter)
            where = self.trainable(adapter, mask)
            values = self.hfcl_values[adapter].detach()[: where.shape[0]]
            trained = values.to(getattr(torch, config.values_dtype)).float()
            if config.trains == "mask":
                self._overwritten = (adapter, where, self.store.values.view(-1)[where])
            self.store.values.view(-1)[where] = trained
        own = mask & (self.store.owner == FREE)
        with self._owners_change():
            self.store.owner = claim(self.store.owner, mask, int(config.task_index or 0))
        self._finish(adapter, mask, own, trained is not None)

    def install(self, adapter: str, mask: Tensor, values: Tensor | None) -> None:
        """Put a finished task in place from its mask and the trained values of its own entries.

        Args:
            adapter: An added adapter.
            mask: bool, of the weight's shape.
            values: float32, the claimed entries' values in storage order, or None where none were trained.

        Raises:
            OwnershipError: The number of values is not that of the entries the task claims.
        """
        own = mask & (self.store.owner == FREE)
        where = own.view(-1).nonzero().squeeze(1)
        if values is not None:
            if values.shape[0] != where.shape[0]:
                raise OwnershipError(
                    f"{self.path}: task {self.configs[adapter].task_index} brings {values.shape[0]} values for "
                    f"{where.shape[0]} claimed entries. Load the tasks in the order they were learned."
                )
            self.store.values.view(-1)[where] = values.to(self.store.values.device)
        self.hfcl_bits[adapter] = pack(mask)
        self.store.owner = claim(self.store.owner, mask, int(self.configs[adapter].task_index or 0))
        self._finish(adapter, mask, own, values is not None)

    def _finish(self, adapter: str, mask: Tensor, own: Tensor, trained: bool) -> None:
        for parameters in (self.hfcl_scores, self.hfcl_values):
            parameters[adapter] = nn.Parameter(torch.empty(0, device=own.device), requires_grad=False)
        self.hfcl_where[adapter] = pack(own[mask])
        self.hfcl_threshold[adapter] = torch.full((1,), math.nan, device=own.device)
        self.save_values(adapter, trained)
        self.store.reset(self.base_layer.weight)
        self.compose()

    def save_values(self, adapter: str, trained: bool) -> None:
        """Copy the values at a finished task's entries from the store into what is saved with the adapter."""
        mask = self.mask(adapter)
        own = self.own(adapter)
        values = self.store.values[mask]
        self.hfcl_owned[adapter] = values[own] if trained else values[:0].clone()
        self.hfcl_inherited[adapter] = values[~own]

    def own(self, adapter: str) -> Tensor:
        """Return, for each entry of a finished task's mask in storage order, whether the task owns it (bool)."""
        kept = int(self.mask(adapter).count_nonzero())
        return unpack(self.hfcl_where[adapter], (kept,))

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Turn gradients of adapters on or off; a committed one has nothing that could train."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_finished()

    def _freeze_finished(self) -> None:
        for parameters in (self.hfcl_scores, self.hfcl_values):
            for parameter in parameters.values():
                if not parameter.numel():
                    parameter.requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop a task: what no other task reads is free again at its start value, the rest stays as it is."""
        config = self.configs.pop(adapter_name, None)
        super().delete_adapter(adapter_name)
        if config is not None:
            with self._owners_change():
                self._undo(adapter_name)
                self._free()
        self.compose()

    def _undo(self, adapter: str) -> None:
        """Take back what the newest commit wrote over other tasks' values (SSNet alone does)."""
        if self._overwritten is not None and self._overwritten[0] == adapter:
            _, where, values = self._overwritten
            self.store.values.view(-1)[where] = values
            self._overwritten = None
            self.save_all()

    def _free(self) -> None:
        """Free what belongs to no task that is left and is read by none."""
        left = [int(config.task_index or 0) for config in self.configs.values()]
        mine = (self.store.owner >= 0) & ~torch.isin(self.store.owner, torch.tensor(left, dtype=self.store.owner.dtype))
        for other in self.configs:
            if self.phase(other) == "committed":
                mine &= ~self.mask(other)
        where = mine.view(-1).nonzero().squeeze(1)
        self.store.values.view(-1)[where] = self.store.start(self.base_layer.weight).view(-1)[where]
        self.store.owner.view(-1)[where] = FREE

    @contextmanager
    def _owners_change(self) -> Iterator[None]:
        """Keep adapters that are still in their mask phase right while owners change.

        Only those that were right before: one whose tasks are not loaded stays refused. One in its weight phase
        holds values for the entries that were free at its claim; others' claims would misalign them, so it is
        refused from then on.
        """
        before = self._owners()
        right = [
            name
            for name in self.configs
            if self.phase(name) == "mask" and torch.equal(self.hfcl_where[name].cpu(), before)
        ]
        yield
        for name in right:
            self.hfcl_where[name] = self._owners()

    def save_all(self) -> None:
        """Copy every finished task's values from the store anew."""
        for adapter in self.configs:
            if self.phase(adapter) == "committed":
                self.save_values(adapter, bool(self.hfcl_owned[adapter].numel()))

    # --- loading --------------------------------------------------------------------------------

    def rebuild(self, adapter: str) -> None:
        """Put a loaded finished adapter's values into the store.

        Raises:
            OwnershipError: A value disagrees with the store: the files are of different banks or states.
        """
        if self.phase(adapter) != "committed":
            return
        index, mask, own = int(self.configs[adapter].task_index or 0), self.mask(adapter), self.own(adapter)
        where = mask.view(-1).nonzero().squeeze(1)
        owner, values = self.store.owner.view(-1), self.store.values.view(-1)
        mine, others = where[own], where[~own]
        owned, inherited = self.hfcl_owned[adapter], self.hfcl_inherited[adapter]
        theirs = ~((owner[mine] == FREE) | (owner[mine] == FOREIGN) | (owner[mine] == index))
        arriving = owned if owned.numel() else self.store.start(self.base_layer.weight).view(-1)[mine]
        stale = (owner[mine] != FREE) & (values[mine] != arriving)
        known = owner[others] != FREE
        wrong = known & (values[others] != inherited)
        if bool(theirs.any()) or bool(stale.any()) or bool(wrong.any()):
            raise OwnershipError(
                f"{self.path}: adapter {adapter!r} (task {index}) disagrees with loaded tasks on "
                f"{int(theirs.sum()) + int(stale.sum()) + int(wrong.sum())} entries. Its file is stale or of another "
                f"bank: load adapters saved together."
            )
        values[mine], owner[mine] = arriving, index
        values[others[~known]] = inherited[~known]
        owner[others[~known]] = FOREIGN


def pack(mask: Tensor) -> Tensor:
    """Return a bool tensor's bits, eight a byte from the lowest, uint8."""
    bits = np.packbits(mask.detach().cpu().view(-1).numpy(), bitorder="little")
    return torch.from_numpy(bits).to(mask.device)


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the bool tensor of the given shape that `pack` packed."""
    size = math.prod(shape)
    flat = np.unpackbits(bits.cpu().numpy(), count=size, bitorder="little").view(np.bool_)
    return torch.from_numpy(flat).to(bits.device).view(shape)


def _make_room(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before loading: give each adapter's tensors the sizes that arrive (a finished task has no scores)."""
    layer: Any = module
    for name in (*layer.adapter_layer_names, *layer.other_param_names):
        held = getattr(layer, name)
        for adapter in list(held.keys()):
            arriving = state.get(f"{prefix}{name}.{adapter}")
            if arriving is None:
                continue
            layer._arrived.add(adapter)
            if arriving.shape != held[adapter].shape or held[adapter].is_meta:
                room = torch.empty(arriving.shape, dtype=held[adapter].dtype, device=layer.base_layer.weight.device)
                is_parameter = name in layer.adapter_layer_names
                held[adapter] = nn.Parameter(room, requires_grad=arriving.numel() > 0) if is_parameter else room


def _install_arrived(module: nn.Module, _: Any) -> None:
    """After loading: derive store and owners from what arrived, and compose the active adapter anew."""
    layer: Any = module
    arrived, layer._arrived = sorted(layer._arrived), set()
    for adapter in arrived:
        layer.rebuild(adapter)
    if arrived:
        layer.compose()
