"""The masked linear as a PEFT layer: what the active adapter computes with.

Its weight is composed between steps and kept until the task or its mask changes: a forward composes
nothing, however often it reads the layer (ALBERT's shared layers, checkpointing). What a layer of n entries
keeps: the base's weight, the composed one in the same dtype, V in float32, owners in int16; 14 n bytes with a
base in float32. A committed task adds n/8 bytes and its values; a training one 4 n for its scores and n for
its mask (4 n more for values that train with it), and what the optimizer adds for these. What a sparse finished mask
writes is kept too, once it was active: switching to it then reads no bits, and looks up neither V nor the base.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hf_cl.errors import ConfigError, OwnershipError
from hf_cl.layers.linear import Linear, apply_weight
from hf_cl.layers.sparse import SampledLinear, compressed, is_sampled
from hf_cl.masks.compose import JointWeight, TrainedWeight
from hf_cl.ownership.owner import FREE
from hf_cl.tuner.config import MaskConfig
from hf_cl.tuner.layer_tasks import LayerTasks
from hf_cl.tuner.rows import Plan


class MaskLinear(LayerTasks):
    """A linear whose weight is `A + M * V`, with the mask M of the active adapter."""

    live_mask: Tensor | None
    _active_adapter: str | list[str]

    def __init__(self, base_layer: Linear, path: str, config: MaskConfig) -> None:
        super().__init__(base_layer, path, config)
        self.merged_adapters: list[str] = []
        self.register_buffer("live_mask", None, persistent=False)
        self._where: Tensor | None = None
        self._start: Tensor | None = None
        self._pattern: Tensor | None = None
        self._seen = (-1, -1)
        self._lacking = False
        self.plan: Plan | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of a copy what is derived; the next forward makes it."""
        return {**super().__getstate__(), "_pattern": None}

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active and compose its weight; a committed one never trains again.

        Raises:
            OwnershipError: More than one adapter is named; masks of several tasks have no sum.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise OwnershipError(f"{self.path}: adapters {', '.join(names)} cannot be active together. Name one.")
        self.make_active(names, inference_mode, [name for name in self.configs if self.hfcl_scores[name].numel()])

    def make_active(self, names: list[str], inference_mode: bool, training: Iterable[str]) -> None:
        """Do what `set_adapter` does, told which adapters are unfinished; no other has anything that could train."""
        for parameters in (self.hfcl_scores, self.hfcl_values):
            for name in training:
                parameters[name].requires_grad_(name in names and not inference_mode)
        self._active_adapter = names
        self.compose()

    def _adapter(self) -> str | None:
        names: list[str] = list(self.active_adapters)  # type: ignore[arg-type]
        return names[0] if names and names[0] in self.configs else None

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Turn gradients of adapters on or off; a committed one has nothing that could train."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_finished()

    def _freeze_finished(self) -> None:
        for parameters in (self.hfcl_scores, self.hfcl_values):
            for parameter in parameters.values():
                if not parameter.numel():
                    parameter.requires_grad_(False)

    @contextmanager
    def answering(self, adapter: str | None) -> Iterator[None]:
        """Compute with another adapter, or with the bare base, inside the context; what trains stays as it is."""
        active = self._active_adapter
        self._active_adapter = [adapter] if adapter is not None else []
        self.compose()
        try:
            yield
        finally:
            self._active_adapter = active
            self.compose()

    def _apply(self, fn: Any, recurse: bool = True) -> "MaskLinear":
        """Follow the model to another device; what is derived is derived there."""
        super()._apply(fn, recurse)
        self._derived.clear()
        if self._where is not None:
            self.compose()
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter's tensors; PEFT would cast them to the base's dtype too, and round what tasks own."""
        device = device or self.base_layer.weight.device
        for name in (*self.adapter_layer_names, *self.other_param_names):
            held = getattr(self, name)
            if adapter_name in held and not held[adapter_name].is_meta:
                held[adapter_name] = held[adapter_name].to(device)

    def compose(self) -> None:
        """Make the composed weight that of the active adapter, in its phase."""
        adapter, weight = self._adapter(), self.base_weight
        self._where = self._start = self._pattern = None
        if adapter is None or weight.is_meta or self.hfcl_scores[adapter].is_meta:
            return
        phase = self.phase(adapter)
        if phase == "committed":
            self._lacking, self.live_mask = False, None
            patch = self.patch(adapter)
            if patch is None:
                self.store.show(weight, self.mask(adapter))
            else:
                self.store.show_patch(weight, patch)
            return
        mask = self.mask(adapter)
        self.store.show(weight, mask, self.read_values(adapter))
        self._lacking = not torch.equal(self.hfcl_where[adapter].cpu(), self.owners_digest())
        self.live_mask = mask if phase == "mask" else None
        if phase == "weight":
            self._where = self.trainable(adapter, mask)
            self._start = self.store.base_at(weight, self._where)
            self._seen = (-1, -1)
            self.write_values()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the active adapter's weight; x of shape (..., in) gives (..., out)."""
        if self.plan is not None and not self.disable_adapters:
            return self.plan.linear(self, x)
        layer, adapter = self.base_layer, self._adapter()
        if self.merged and self.disable_adapters:
            self.unmerge()
        if self.disable_adapters or self.merged or adapter is None:
            return layer(x, *args, **kwargs)
        if self._lacking:
            raise OwnershipError(
                f"{self.path}: the unfinished adapter {adapter!r} was saved beside other finished tasks than are "
                f"loaded here, whose entries it reads. Load those adapters too."
            )
        weight = self.store.weight
        scores, values = self.hfcl_scores[adapter], self.hfcl_values[adapter]
        if self._where is not None and not torch.compiler.is_compiling():
            self._write_if_moved(values)
        trains = torch.is_grad_enabled() and scores.requires_grad
        if trains and self.live_mask is not None and self.is_joint(adapter):
            own = self.live_mask & (self.store.owner == FREE)
            weight = JointWeight.apply(scores, values, weight, self.read_values(adapter), own, self.magnitude(adapter))
        elif trains and self._where is not None and self._samples(x, self._where):
            if self._pattern is None:
                shape = (weight.shape[0], weight.shape[1])
                self._pattern = compressed(self._where, torch.zeros(len(self._where)), shape, transposed=False)
            return SampledLinear.apply(x, weight, layer.bias, values, scores, self._pattern, isinstance(layer, Conv1D))
        elif trains:
            weight = TrainedWeight.apply(
                scores, values, weight, self.store.values, self._where, self.magnitude(adapter)
            )
        return apply_weight(layer, x, weight)

    def _samples(self, x: Tensor, where: Tensor) -> bool:
        """Return whether the gradients of the values that train at `where` are taken there alone."""
        return not torch.compiler.is_compiling() and is_sampled(x, self.store.weight, len(where))

    def common(self, x: Tensor) -> Tensor:
        """Return `x A^T + b`, which all tasks share; A is the base's weight with `delta`, else 0."""
        weight = self.base_weight if self.store.delta else torch.zeros_like(self.base_weight)
        return apply_weight(self.base_layer, x, weight)

    def _write_if_moved(self, values: Tensor) -> None:
        """Write the vector where torch says that it moved: for training loops that do not call `write_values`."""
        if (id(values), values._version) != self._seen:
            self.write_values()

    def write_values(self) -> None:
        """Write the active adapter's vector into the composed weight; once an optimizer step, outside a forward."""
        if self._where is None or self._start is None:
            return
        values = self.hfcl_values[str(self._adapter())]
        self.store.write(self._start, self._where, values.detach()[: self._where.shape[0]])
        self._seen = (id(values), values._version)

    # --- merging a task into the base -------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put a task's weight in the base's place; the base's own is kept.

        Args:
            safe_merge: Refuse a weight that is not finite.
            adapter_names: One adapter; None is the active one.

        Raises:
            ConfigError: None or several are named, one is merged already, or `safe_merge` found a bad weight.
        """
        names: list[str] = list(self.active_adapters if adapter_names is None else adapter_names)  # type: ignore[arg-type]
        if len(names) != 1 or names[0] not in self.configs or self.merged:
            raise ConfigError(
                f"{self.path}: one task can be merged, found {', '.join(names) or 'none'}; merged are "
                f"{', '.join(self.merged_adapters) or 'none'}. Name one adapter, and unmerge the other first."
            )
        with self.answering(names[0]):
            weight = self.store.weight.clone()
        if safe_merge and not bool(weight.isfinite().all()):
            raise ConfigError(f"{self.path}: adapter {names[0]!r} has values that are not finite. It is not merged.")
        self.pretrained = self.base_layer.weight.data
        self.base_layer.weight.data = weight
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        """Put the base's own weight back, bit for bit."""
        if self.pretrained is not None:
            self.base_layer.weight.data = self.pretrained
        self.pretrained = None
        self.merged_adapters.clear()
