"""A task's own copy of a layer (head or norm) as a PEFT layer.

PEFT's `modules_to_save` cannot hold heads of different widths, so the head is a layer of this method.
A head of several layers (RoBERTa, DistilBERT, DeBERTa's pooler) is several of these.
Source of the gap: huggingface/peft issue 2136.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_cl.layers.heads import run_copy, task_copy, task_generator
from hf_cl.tuner.config import MaskConfig
from hf_cl.tuner.rows import Plan


class OwnLayer(nn.Module, BaseTunerLayer):
    """Calls the active adapter's copy of a layer; the base's own where none is active."""

    adapter_layer_names = ("hfcl_copy",)
    other_param_names = ()
    _active_adapter: str | list[str]

    def __init__(self, base_layer: nn.Module, name: str, *, is_norm: bool) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.name, self.is_norm = name, is_norm
        self.hfcl_copy = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.pretrained: nn.Module | None = None
        self.finished: set[str] = set()
        self._added: dict[str, list[int]] = {}
        self.plan: Plan | None = None

    def add(self, adapter: str, config: MaskConfig, std: float, *, is_output: bool, head_of: str | None) -> None:
        """Register a new task's copy: a fresh linear, a norm as the base has it, or an earlier task's head.

        Args:
            adapter: The new adapter.
            config: Its config.
            std: Standard deviation of fresh weights.
            is_output: The layer gives the logits, so the task's labels say how wide it is.
            head_of: The adapter whose head this task shares; its copy is frozen from the start.
        """
        if head_of is not None and not self.is_norm:
            self.hfcl_copy[adapter] = _like(self.hfcl_copy[head_of])
        else:
            rows = None
            if not self.is_norm:
                rows = config.num_labels if is_output else getattr(self.base_layer, "out_features", None)
            generator = task_generator(config.seed, int(config.task_index or 0), self.name)
            self.hfcl_copy[adapter] = task_copy(self.base_layer, out_features=rows, std=std, generator=generator)
        self._added[adapter] = self._versions(adapter)
        if config.head_of is not None and not self.is_norm:
            self.finish(adapter)

    def _versions(self, adapter: str) -> list[int]:
        return [parameter._version for parameter in self.hfcl_copy[adapter].parameters()]

    def is_untouched(self, adapter: str) -> bool:
        """Return whether nobody has written to an adapter's copy since it was added, as far as torch counts."""
        return self._versions(adapter) == self._added[adapter]

    def finish(self, adapter: str) -> None:
        """Freeze a finished task's copy for good."""
        self.finished.add(adapter)
        self.hfcl_copy[adapter].requires_grad_(False)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter's copy active; a finished one never trains again."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._freeze_finished()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Turn gradients of adapters on or off; a finished one stays frozen."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_finished()

    def _freeze_finished(self) -> None:
        for adapter in self.finished & set(self.hfcl_copy):
            self.hfcl_copy[adapter].requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter's copy; PEFT would cast it to the base's dtype too, and round what tasks own."""
        if adapter_name in self.hfcl_copy and not any(p.is_meta for p in self.hfcl_copy[adapter_name].parameters()):
            self.hfcl_copy[adapter_name].to(device or next(self.base_layer.parameters()).device)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter's copy."""
        super().delete_adapter(adapter_name)
        self.finished.discard(adapter_name)

    def _names(self) -> list[str]:
        names: list[str] = list(self.active_adapters)  # type: ignore[arg-type]
        return names

    @contextmanager
    def answering(self, adapter: str | None) -> Iterator[None]:
        """Call another adapter's copy, or the base's own, inside the context; what trains stays as it is."""
        active = self._active_adapter
        self._active_adapter = [adapter] if adapter is not None else []
        try:
            yield
        finally:
            self._active_adapter = active

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put a task's copy, in the base's dtype, in the place of the base's own layer, which is kept."""
        (name,) = self._names() if adapter_names is None else adapter_names
        dtype = next(self.base_layer.parameters()).dtype
        self.pretrained = self.base_layer
        self.base_layer = copy.deepcopy(self.hfcl_copy[name]).to(dtype).requires_grad_(False)
        self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the base's own layer back."""
        if self.pretrained is not None:
            self.base_layer = self.pretrained
        self.pretrained = None
        self.merged_adapters.clear()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the active copy, in its own dtype; the result has the input's."""
        if self.merged and self.disable_adapters:
            self.unmerge()
        if self.plan is not None and not self.disable_adapters:
            return self.plan.own(self, x)
        names = self._names()
        if self.disable_adapters or self.merged or not names or names[0] not in self.hfcl_copy:
            return self.base_layer(x, *args, **kwargs)
        return self.run(names[0], x)

    def run(self, adapter: str | None, x: Tensor) -> Tensor:
        """Apply an adapter's copy; None applies the base's own."""
        if adapter is None:
            out: Tensor = self.base_layer(x)
            return out
        out = run_copy(self.hfcl_copy[adapter], x)
        return out.to(x.dtype) if self.is_norm else out


def _like(layer: nn.Module) -> nn.Module:
    """Return a frozen copy of a task's layer."""
    made = task_copy(layer, out_features=None, std=0.0, generator=torch.Generator())
    return made.requires_grad_(False)
