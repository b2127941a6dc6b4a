"""A task's own copy of a layer (head or norm) as a PEFT layer.

PEFT's `modules_to_save` cannot hold heads of different widths, so the head is a layer of this method.
Source of the gap: huggingface/peft issue 2136.
"""

from collections.abc import Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_cl.layers.heads import run_copy, task_copy, task_generator
from hf_cl.tuner.config import MaskConfig


class OwnLayer(nn.Module, BaseTunerLayer):
    """Calls the active adapter's copy of a layer; the base's own where none is active."""

    adapter_layer_names = ("hfcl_copy",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, name: str, *, is_norm: bool) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.name, self.is_norm = name, is_norm
        self.hfcl_copy = nn.ModuleDict()
        self.finished: set[str] = set()

    def add(self, adapter: str, config: MaskConfig, std: float, *, is_output: bool) -> None:
        """Register a new task's copy: a fresh linear, or a norm as the base has it."""
        rows = None
        if not self.is_norm:
            rows = config.num_labels if is_output else getattr(self.base_layer, "out_features", None)
        generator = task_generator(config.seed, int(config.task_index or 0), self.name)
        self.hfcl_copy[adapter] = task_copy(self.base_layer, out_features=rows, std=std, generator=generator)

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

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter's copy."""
        super().delete_adapter(adapter_name)
        self.finished.discard(adapter_name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the active copy, in its own dtype; the result has the input's."""
        names: list[str] = list(self.active_adapters)  # type: ignore[arg-type]
        if self.disable_adapters or not names or names[0] not in self.hfcl_copy:
            return self.base_layer(x, *args, **kwargs)
        out = run_copy(self.hfcl_copy[names[0]], x)
        return out.to(x.dtype) if self.is_norm else out
