"""A task's life in one masked layer: its tensors, its phase, its claim, its commit, its end.

A task goes through three phases, and which one it is in is read off its tensors alone, so a reloaded
checkpoint needs no other state:

    mask       scores train
    weight     the threshold is inf: bits are set, a vector of the entries the task may change trains
    committed  scores and vector are gone; bits and the values at the mask's entries remain, as buffers

The vector is registered with the scores, before an optimizer exists, at the mask's kept count, which is
known before the mask is; its positions are filled in at the claim and cells beyond them never move.
Where values train with the mask (`joint`) there is no weight phase: which entries they are changes from step to step,
so they are a private tensor of the weight's shape, read at free entries alone.

Source: ExSSNeT, arXiv 2210.10209; the layout is ours.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_cl.errors import OwnershipError
from hf_cl.layers.heads import task_generator
from hf_cl.layers.linear import Linear, fan_in
from hf_cl.layers.sparse import compressed
from hf_cl.layers.store import MaskStore, Patch
from hf_cl.masks.bits import pack, unpack
from hf_cl.masks.compose import layer_scale
from hf_cl.masks.select import kept_count, topk_mask
from hf_cl.masks.values import round_values
from hf_cl.ownership.digest import digest
from hf_cl.ownership.owner import FREE, claim
from hf_cl.tuner.arrival import install_arrived, make_room
from hf_cl.tuner.config import MaskConfig

SCORE_STD = 1e-4
"""Signed scores begin near zero, well below one learning-rate step: the first gradients decide."""
SPARSE_BELOW = 32
"""A finished task's patch is kept where its mask has fewer than one of so many entries: four times its bits at most."""
Phase = Literal["mask", "weight", "committed"]


class LayerTasks(nn.Module, BaseTunerLayer):
    """All tasks of one masked linear: one adapter a task, on one shared store."""

    adapter_layer_names = ("hfcl_scores", "hfcl_values")
    other_param_names = ("hfcl_bits", "hfcl_owned", "hfcl_inherited", "hfcl_where", "hfcl_threshold")

    hfcl_bits: BufferDict
    hfcl_owned: BufferDict
    hfcl_inherited: BufferDict
    hfcl_where: BufferDict
    hfcl_threshold: BufferDict
    pretrained: Tensor | None

    def __init__(self, base_layer: Linear, path: str, config: MaskConfig) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.path = path
        known = (config.scales or {}).get(path)
        if known is None:
            assert config.scale is not None  # the model has settled it
            known = layer_scale(config.compose, base_layer.weight, config.scale, fan_in(base_layer))
        self.store = MaskStore(base_layer.weight, compose=config.compose, seed=config.seed, path=path, scale=known)
        self.hfcl_scores, self.hfcl_values = nn.ParameterDict(), nn.ParameterDict()
        for name in self.other_param_names:
            setattr(self, name, BufferDict(persistent=True))
        self.configs: dict[str, MaskConfig] = {}
        # While a task is merged: the base's own weight, so that unmerging gives back its very bits.
        self.register_buffer("pretrained", None, persistent=False)
        self.arrived: set[str] = set()
        # Finished tasks that are not loaded here and own entries all the same, and whether they trained values.
        self.elsewhere: dict[int, bool] = {}
        self._overwritten: tuple[str, Tensor, Tensor] | None = None
        # By finished task: the bits and versions that it was made of, and what `derived` holds. Never saved.
        self._derived: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.register_load_state_dict_pre_hook(make_room)
        self.register_load_state_dict_post_hook(install_arrived)

    @abstractmethod
    def compose(self) -> None:
        """Make the composed weight that of the active adapter anew."""

    @property
    def base_weight(self) -> Tensor:
        """The base's own weight, also while a task is merged into it."""
        weight: Tensor = self.base_layer.weight if self.pretrained is None else self.pretrained
        return weight

    # --- one adapter a task ---------------------------------------------------------------------

    def add(self, adapter: str, config: MaskConfig) -> None:
        """Register a new task's tensors: fresh scores, an empty vector, no mask."""
        weight, size = self.base_layer.weight, self.base_layer.weight.numel()
        self.configs[adapter] = config
        empty = torch.empty(0, device=weight.device)
        if config.arrives:  # finished: what would train it is not even drawn
            for parameters in (self.hfcl_scores, self.hfcl_values):
                parameters[adapter] = nn.Parameter(empty.clone(), requires_grad=False)
        else:
            self.hfcl_scores[adapter] = nn.Parameter(self.first_scores(adapter))
            values = self.store.values.clone() if config.joint else torch.zeros(self.count(adapter)).to(weight.device)
            self.hfcl_values[adapter] = nn.Parameter(values)
        self.hfcl_bits[adapter] = torch.zeros(-(-size // 8), dtype=torch.uint8, device=weight.device)
        self.hfcl_owned[adapter], self.hfcl_inherited[adapter] = empty.clone(), empty.clone()
        self.hfcl_where[adapter] = self.owners_digest()
        threshold = math.nan if config.threshold is None else config.threshold
        self.hfcl_threshold[adapter] = torch.full((1,), threshold, device=weight.device)

    def owners_digest(self) -> Tensor:
        """Return the sha256 of which entries are owned: an unfinished task is right only beside the same tasks."""
        return torch.frombuffer(
            bytearray.fromhex(digest([("owned", pack(self.store.owner != FREE))])), dtype=torch.uint8
        )

    def first_scores(self, adapter: str) -> Tensor:
        """Return the scores a task begins with, a function of seed, task and layer.

        Float32: near zero where the sign ranks, else uniform in +-1/sqrt(fan_in); one number for a fixed threshold.
        """
        config, weight = self.configs[adapter], self.base_layer.weight
        if config.threshold is not None:
            return torch.full(weight.shape, config.first_score, device=weight.device)
        generator = task_generator(config.seed, int(config.task_index or 0), self.path)
        scores = torch.empty(weight.shape)
        if config.rank == "magnitude":
            bound = 1 / math.sqrt(fan_in(self.base_layer))
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

    def is_joint(self, adapter: str) -> bool:
        """Return whether the adapter trains values and mask in the same steps, now."""
        return self.configs[adapter].joint and self.phase(adapter) == "mask"

    def read_values(self, adapter: str) -> Tensor:
        """Return V as the adapter reads it: the store's, and its own at free entries where those train already."""
        if not self.is_joint(adapter):
            return self.store.values
        return self.hfcl_values[adapter].detach().where(self.store.owner == FREE, self.store.values)

    def trainable(self, adapter: str, mask: Tensor) -> Tensor:
        """Return the flat positions of the entries whose values the task trains."""
        own = mask if self.configs[adapter].trains == "mask" else mask & (self.store.owner == FREE)
        return own.view(-1).nonzero().squeeze(1)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of a copy what is derived: torch does not copy sparse tensors."""
        return {**self.__dict__, "_derived": {}}

    def derived(self, adapter: str) -> dict[str, Any]:
        """Return what was made of a finished task's bits, V and the base, to keep more in; empty once one has moved."""
        bits, values, weight = self.hfcl_bits[adapter], self.store.values, self.base_weight
        if any(tensor.is_inference() for tensor in (bits, values, weight)):  # these have no versions
            return {}
        made = (bits, bits._version, values._version, weight._version)
        held = self._derived.get(adapter)
        if held is None or held[0][0] is not bits or held[0][1:] != made[1:]:
            held = self._derived[adapter] = (made, {})
        return held[1]

    def patch(self, adapter: str) -> Patch | None:
        """Return what a finished task changes in the base's weight, made once and kept; None where that is much."""
        derived = self.derived(adapter)
        if "patch" not in derived:
            sparse = self.count(adapter) * SPARSE_BELOW < self.base_weight.numel()
            derived["patch"] = self.store.patch(self.base_weight, self.mask(adapter)) if sparse else None
        found: Patch | None = derived["patch"]
        return found

    def part(self, adapter: str) -> Tensor:
        """Return what a finished task adds to A, a CSR matrix (out, in); made once, then kept.

        Its values are those by which the composed weight differs from A, so that both are one network.
        """
        derived = self.derived(adapter)
        if "part" not in derived:
            shape, patch = self.base_weight.shape, self.patch(adapter)
            if patch is None:
                patch = self.store.patch(self.base_weight, self.mask(adapter))
            values = patch.shown.float() - patch.bare.float()
            transposed = isinstance(self.base_layer, Conv1D)
            derived["part"] = compressed(patch.where, values, (shape[0], shape[1]), transposed=transposed)
        return derived["part"]

    # --- claim and commit -------------------------------------------------------------------------

    def exact_mask(self, adapter: str) -> Tensor:
        """Return the mask the scores stand for: exactly the budget, ties by index; or what exceeds its threshold."""
        ranked, budget = self.ranked(adapter), self.budget(adapter)
        if self.configs[adapter].threshold is not None:
            return ranked > self.hfcl_threshold[adapter]
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
        in_mask_phase, held = self.phase(adapter) == "mask", self.hfcl_values[adapter].detach()
        mask = self.exact_mask(adapter) if in_mask_phase else self.mask(adapter)
        self.hfcl_bits[adapter] = pack(mask)
        if config.joint or not in_mask_phase:
            where = self.trainable(adapter, mask)
            values = held.view(-1)[where] if config.joint else held[: where.shape[0]]
            trained = round_values(values, where, mask.shape[1], config.values_dtype)
            if config.trains == "mask":
                self._overwritten = (adapter, where, self.store.values.view(-1)[where])
            self.store.values.view(-1)[where] = trained
        own = mask & (self.store.owner == FREE)
        with self.owners_change():
            self.store.owner = claim(self.store.owner, mask, int(config.task_index or 0))
        self._finish(adapter, mask, own, trained is not None)

    def occupy(self, index: int, own: Tensor, values: Tensor | None) -> None:
        """Make a task that is not loaded the owner of its entries.

        Args:
            index: The task's number.
            own: bool, of the weight's shape.
            values: float32, the values it trained at those entries in storage order, or None.
        """
        if values is not None:
            self.store.values.view(-1)[own.view(-1).nonzero().squeeze(1)] = values.to(self.store.values.device)
        with self.owners_change():
            self.store.owner = claim(self.store.owner, own, index)
        self.elsewhere[index] = values is not None

    def install(self, adapter: str, mask: Tensor, values: Tensor | None, own: Tensor | None = None) -> None:
        """Put a finished task in place from its mask and the trained values of its own entries.

        Args:
            adapter: An added adapter.
            mask: bool, of the weight's shape.
            values: float32, the claimed entries' values in storage order, or None where none were trained.
            own: bool, which entries it claims; None is all free ones of its mask.

        Raises:
            OwnershipError: The number of values is not that of the entries the task claims.
        """
        own = mask & (self.store.owner == FREE) if own is None else own
        self.elsewhere.pop(int(self.configs[adapter].task_index or 0), None)
        where = own.view(-1).nonzero().squeeze(1)
        if values is not None:
            if values.shape[0] != where.shape[0]:
                raise OwnershipError(
                    f"{self.path}: task {self.configs[adapter].task_index} brings {values.shape[0]} values for "
                    f"{where.shape[0]} claimed entries. Load the tasks in the order they were learned."
                )
            self.store.values.view(-1)[where] = values.to(self.store.values.device)
        self.hfcl_bits[adapter] = pack(mask)
        self.store.owner = claim(self.store.owner, own, int(self.configs[adapter].task_index or 0))
        self._finish(adapter, mask, own, values is not None)

    def _finish(self, adapter: str, mask: Tensor, own: Tensor, trained: bool) -> None:
        for parameters in (self.hfcl_scores, self.hfcl_values):
            parameters[adapter] = nn.Parameter(torch.empty(0, device=own.device), requires_grad=False)
        self.hfcl_where[adapter] = pack(own[mask])
        self.hfcl_threshold[adapter] = torch.full((1,), math.nan, device=own.device)
        self.save_values(adapter, trained)
        self.store.reset(self.base_weight)
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

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop a task: what no other task reads is free again at its start value, the rest stays as it is."""
        config = self.configs.pop(adapter_name, None)
        self._derived.pop(adapter_name, None)
        super().delete_adapter(adapter_name)
        if config is not None:
            with self.owners_change():
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
        left = [*(int(config.task_index or 0) for config in self.configs.values()), *self.elsewhere]
        mine = (self.store.owner >= 0) & ~torch.isin(self.store.owner, torch.tensor(left, dtype=self.store.owner.dtype))
        for other in self.configs:
            if self.phase(other) == "committed":
                mine &= ~self.mask(other)
        where = mine.view(-1).nonzero().squeeze(1)
        self.store.values.view(-1)[where] = self.store.start(self.base_weight).view(-1)[where]
        self.store.owner.view(-1)[where] = FREE

    @contextmanager
    def owners_change(self) -> Iterator[None]:
        """Keep adapters that are still in their mask phase right while owners change.

        Only those that were right before: one whose tasks are not loaded stays refused. One in its weight phase
        holds values for the entries that were free at its claim; others' claims would misalign them, so it is
        refused from then on.
        """
        before = self.owners_digest()
        right = [
            name
            for name in self.configs
            if self.phase(name) == "mask" and torch.equal(self.hfcl_where[name].cpu(), before)
        ]
        yield
        for name in right:
            self.hfcl_where[name] = self.owners_digest()

    def save_all(self) -> None:
        """Copy every finished task's values from the store anew."""
        for adapter in self.configs:
            if self.phase(adapter) == "committed":
                self.save_values(adapter, bool(self.hfcl_owned[adapter].numel()))
