"""The ranks of one job hold the same bits: compared before a task, every n steps, and at its end.

DDP makes them the same when it wraps the model and never looks again: a rank that has drawn another mask, or whose
memory has lost a bit, trains on with wrong sums and nobody is told.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_cl import ranks
from hf_cl.errors import ConfigError
from hf_cl.layers.heads import TaskLayer
from hf_cl.tuner.own_layer import OwnLayer

CHECK_STEPS = 100
"""Optimizer steps between two comparisons: at a step of 50 ms, under one percent of the time."""
OF_A_RANK = ("local_rank", "process_index", "output_dir", "logging_dir", "run_name", "log_level", "hub_token")
"""What of the training arguments may differ between ranks."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD, _BLOCK = 0x1E3779B97F4A7C15, 1 << 16


class Agreement(TrainerCallback):
    """Stops all ranks when one holds other bits than rank 0: in what trains, in masks, thresholds, store or owners."""

    def __init__(self, steps: int = CHECK_STEPS) -> None:
        """Say how often to compare.

        Args:
            steps: Optimizer steps between two comparisons; at begin and end they are compared too.
        """
        if steps < 1:
            raise ConfigError(f"check_steps: expected at least 1 step between two comparisons, found {steps!r}.")
        self.steps = steps

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare options and the whole model, before DDP makes every rank's that of rank 0.

        Raises:
            RankError: A rank's differ; names rank and option or tensor.
        """
        if ranks.world() > 1:
            model = kwargs["model"]
            unread = _base_heads(model)
            read = [(name, tensor) for name, tensor in model.named_parameters() if id(tensor) not in unread]
            tensors = [*read, *model.named_buffers()]
            ranks.require_equal(_options(args) | checksums(tensors), "before training")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare every `steps` steps."""
        if state.global_step % self.steps == 0:
            self._compare(kwargs["model"], f"at step {state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare once more, before anything is kept for good."""
        self._compare(kwargs["model"], f"at its end, step {state.global_step}")

    def _compare(self, model: nn.Module, when: str) -> None:
        if ranks.world() > 1:
            ranks.require_equal(checksums(_moving(model)), when)


def _moving(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what a training can move: parameters that train, and all buffers (masks, thresholds, store, owners)."""
    yield from ((name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad)
    yield from model.named_buffers()


def _base_heads(model: nn.Module) -> set[int]:
    """Return the ids of the base's own head: no task reads it, and where a checkpoint lacks it each rank draws one."""
    heads = [module.base_layer for module in model.modules() if isinstance(module, OwnLayer) and not module.is_norm]
    heads += [module.original for module in model.modules() if isinstance(module, TaskLayer)]
    return {id(parameter) for head in heads for parameter in head.parameters()}


def _options(args: TrainingArguments) -> dict[str, str]:
    return {
        f"option {name}": json.dumps(value, sort_keys=True, default=str)
        for name, value in args.to_dict().items()
        if name not in OF_A_RANK
    }


def checksums(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return, by name, what stands for a tensor's dtype, shape and bits; see `checksum`."""
    return {name: f"{tensor.dtype} {tuple(tensor.shape)} {checksum(tensor):x}" for name, tensor in tensors}


def checksum(tensor: Tensor) -> int:
    """Return a number that another tensor of this dtype and shape does not have if one element differs.

    The sum, modulo 2^64, of the elements' bits times odd numbers by position. A difference in one element is never
    lost, since an odd number divides no power of two; differences in several cancel once in 2^64. It is taken where
    the tensor lies: a sha256 would fetch an accelerator's tensors first. It proves nothing against a forger.
    """
    bits = tensor.detach().contiguous().view(-1)
    whole = bits.view(_INTEGERS[bits.element_size()]) if bits.numel() else bits.to(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    odd = (torch.arange(min(_BLOCK, whole.numel()), dtype=torch.int64, device=tensor.device) * _ODD) | 1
    for block in whole.split(_BLOCK):
        total = total * _ODD + (block * odd[: block.numel()]).sum()
    return int(total)
