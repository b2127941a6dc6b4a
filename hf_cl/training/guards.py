"""What stops a task's training at the step where it went wrong.

The Trainer hides a NaN loss (`logging_nan_inf_filter`) and trains on; whatever a task then commits is
noise. The gradients' norm shows it at the step, before the optimizer acts on it.
"""

import logging
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_cl import ranks
from hf_cl.errors import ConfigError, TrainingError

logger = logging.getLogger(__name__)
SHARDING = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")
"""How `accelerate launch` says it to the processes that it starts."""
PARALLEL = ("TP", "CP", "SP", "DP_SHARD")


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

    Also where only the launcher asks for one: accelerate then ignores it on a CPU, and shards on a GPU.

    Raises:
        ConfigError: DeepSpeed, FSDP, Megatron or tensor parallelism is asked for; or several GPUs in one process.
    """
    launched = {name for name in SHARDING if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")}
    sizes = [int(os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE") or 1) for name in PARALLEL]
    asked = {
        "deepspeed": args.deepspeed or "ACCELERATE_USE_DEEPSPEED" in launched,
        "fsdp": args.fsdp or "ACCELERATE_USE_FSDP" in launched,
        "megatron": "ACCELERATE_USE_MEGATRON_LM" in launched,
        "parallelism_config (tensor, context or sequence parallelism)": args.parallelism_config or max(sizes) > 1,
    }
    for name in [name for name, found in asked.items() if found]:
        raise ConfigError(
            f"{name}: it shards parameters, and ownership is kept on whole ones. Use plain DDP, as in "
            f"`torchrun --nproc_per_node N`; docs/launching.md has the launches."
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs in one process: the Trainer would use nn.DataParallel, whose replicas lack adapters. "
            f"Start a process a GPU, `torchrun --nproc_per_node {args.n_gpu}`, or show one: CUDA_VISIBLE_DEVICES=0."
        )


def keep_from_ddp(model: nn.Module, args: TrainingArguments, names: Iterable[str]) -> None:
    """Have DDP leave buffers alone that are equal on all ranks by construction, before it wraps the model.

    It would send them before each forward, and could not: no backend broadcasts int16, which owners are. It would also
    make a rank that holds others look like rank 0. Where a user's arguments leave it on for the other buffers, warn.

    Args:
        model: What DDP will wrap.
        args: The Trainer's.
        names: Of its buffers.
    """
    if ranks.world() == 1:
        return
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(names))
    if args.ddp_broadcast_buffers is not False and ranks.rank() == 0:
        logger.warning(
            "ddp_broadcast_buffers is on: every forward sends rank 0's buffers to all, which costs time and hides a "
            "rank that holds others. Masks, values and owners are left out. Set ddp_broadcast_buffers=False."
        )


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
