"""What stops a task's training at the step where it went wrong.

The Trainer hides a NaN loss (`logging_nan_inf_filter`) and trains on; whatever a task then commits is
noise. The gradients' norm shows it at the step, before the optimizer acts on it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_cl.errors import ConfigError, TrainingError


def require_finite(parameters: Iterable[nn.Parameter], step: int) -> None:
    """Raise if a gradient is not finite; one synchronisation on an accelerator.

    Raises:
        TrainingError: Names the step; nothing of the task is committed.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads or bool(torch.nn.utils.get_total_norm(grads).isfinite()):
        return
    # A norm can overflow where no gradient has: look closer, now that it costs nothing.
    if not all(bool(grad.isfinite().all()) for grad in grads):
        raise TrainingError(
            f"step {step + 1}: the loss or its gradient is not finite. Nothing of this task is kept, earlier tasks are "
            f"untouched. Lower the learning rates, or look for texts that give infinite logits."
        )


def refuse_sharding(args: TrainingArguments) -> None:
    """Refuse backends that cut parameters into pieces: masks and owner maps are whole tensors.

    Raises:
        ConfigError: DeepSpeed or FSDP is asked for.
    """
    for name, asked in (("deepspeed", args.deepspeed), ("fsdp", args.fsdp)):
        if asked:
            raise ConfigError(f"{name}: it shards parameters, and ownership is kept on whole ones. Use plain DDP.")


def refuse_partial_push(args: TrainingArguments, adapter: str) -> None:
    """Refuse to push checkpoints of a named adapter: the Trainer then uploads no weights and says nothing.

    It looks for an adapter's files at the top of a checkpoint; those of an adapter that is not called `default`
    lie in a folder of its name.

    Raises:
        ConfigError: `push_to_hub` with a strategy that pushes checkpoints.
    """
    strategy = getattr(args.hub_strategy, "value", args.hub_strategy)
    if args.push_to_hub and strategy != "end" and adapter != "default":
        raise ConfigError(
            f"hub_strategy: {strategy!r} would push no weights of adapter {adapter!r}, the Trainer looks for those of "
            f"`default`. Use hub_strategy='end' and call trainer.push_to_hub(), or model.push_to_hub(...) when it is "
            f"finished."
        )


def refuse_push(args: TrainingArguments) -> None:
    """Refuse to push from inside a task's training: a stream would push every task's checkpoint to one place.

    Raises:
        ConfigError: `push_to_hub` is asked for.
    """
    if args.push_to_hub:
        raise ConfigError(
            "push_to_hub: a stream's Trainers each know one task. Save the whole with save_pretrained and push that."
        )


def forget_preparation(model: nn.Module) -> None:
    """Take back what accelerate left on a model: a later Trainer would neither compile it nor change its precision.

    It marks what it has prepared, and under bf16 puts an autocast forward in the model's place for good, so that
    evaluation, too, would answer with other bits than a process that only loads the model.
    """
    held = vars(model)
    held.pop("_is_accelerate_prepared", None)
    if held.pop("_original_forward", None) is not None:
        held.pop("forward", None)


class FiniteGradients(TrainerCallback):
    """Stops at the first step whose gradients are not finite; for methods without masks."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check all gradients at once, by their norm."""
        if not args.fp16:  # its scaler overflows on purpose, and skips the step itself
            require_finite(kwargs["model"].parameters(), state.global_step)
