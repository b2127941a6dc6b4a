"""Train one task: the one function that every method's tasks go through."""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_cl import ranks
from hf_cl.errors import ConfigError
from hf_cl.training.agreement import CHECK_STEPS, Agreement, checksums
from hf_cl.training.evaluation import ComputeMetrics, with_ours
from hf_cl.training.guards import forget_preparation, refuse_push, refuse_sharding
from hf_cl.training.keeping import Keeper, Keeping
from hf_cl.training.method import Method
from hf_cl.training.reduce import Reduction, reducing


@dataclass(frozen=True)
class Training:
    """What training a task left to tell.

    Attributes:
        seconds: Wall-clock seconds, evaluations during training included.
        steps: Optimizer steps.
        log: The Trainer's log history.
    """

    seconds: float
    steps: int
    log: list[dict[str, Any]]


def train_task(
    method: Method,
    index: int,
    labels: tuple[str, ...],
    rows: DatasetDict,
    collator: Any,
    args: TrainingArguments,
    compute_metrics: ComputeMetrics | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    trainer_class: type[Trainer] = Trainer,
    check_steps: int = CHECK_STEPS,
    keeping: Keeping | None = None,
) -> Training:
    """Begin, train and commit task number `index`; on any error nothing of it is left behind.

    Args:
        method: The way to learn.
        index: The task's number, from 0.
        labels: Names of its classes.
        rows: Tokenised `train` and `validation`.
        collator: Pads a batch.
        args: The user's arguments; each task trains below its own folder in `output_dir`.
        compute_metrics: The user's own metrics, for evaluation during training.
        callbacks: The user's own callbacks.
        trainer_class: The user's own Trainer.
        check_steps: Optimizer steps between two comparisons of what the ranks hold, where there are several.
        keeping: Where the training is kept in its middle, and gone on with from there; None keeps nothing.

    Raises:
        StoppedError: The process was asked to stop; the training is kept.
        RankError: The ranks hold different bits.
        ConfigError: The arguments ask for something that this cannot do with them; before any work.
    """
    refuse_sharding(args)
    refuse_push(args)
    start = time.perf_counter()
    try:
        if ranks.world() > 1:
            ranks.require_equal(_seen(rows), f"before task {index}")
        method.begin(index, labels)
        keeper = Keeper(keeping, method, index) if keeping is not None else None
        made = keeper.trainer(trainer_class) if keeper is not None else trainer_class
        if ranks.world() > 1:
            made = reducing(made, Reduction(method))
        hooks = (*callbacks, keeper) if keeper is not None else callbacks
        trainer = _trainer(made, method, index, rows, collator, args, compute_metrics, hooks, check_steps)
        trainer.train(**(keeper.way_back if keeper is not None else {}))
        forget_preparation(method.model)
        method.commit(index)
    except BaseException:
        method.abandon(index)
        raise
    spent = time.perf_counter() - start + (keeper.seconds if keeper is not None else 0.0)
    return Training(spent, trainer.state.global_step, trainer.state.log_history)


def _trainer(
    trainer_class: type[Trainer],
    method: Method,
    index: int,
    rows: DatasetDict,
    collator: Any,
    args: TrainingArguments,
    compute_metrics: ComputeMetrics | None,
    callbacks: tuple[TrainerCallback, ...],
    check_steps: int,
) -> Trainer:
    task_args = copy.copy(args)
    # Store, masks and owners are buffers: equal on all ranks, and far too large to travel with each forward.
    task_args.ddp_broadcast_buffers = False
    if task_args.ddp_find_unused_parameters is None:  # what trains is in every forward, in both phases
        task_args.ddp_find_unused_parameters = False
    task_args.output_dir = str(Path(args.output_dir or "trainer_output") / f"task{index:04d}")
    train_rows = method.rows(index, rows, collator, task_args)
    trainer = method.trainer(trainer_class)(
        model=method.model,
        args=task_args,
        train_dataset=train_rows,
        eval_dataset=rows["validation"],
        data_collator=collator,
        compute_metrics=with_ours(compute_metrics),
        callbacks=[Agreement(check_steps), *method.callbacks(), *callbacks],
        optimizers=(_optimizer(method, task_args), None),
    )
    report_last(trainer)
    return trainer


def _seen(rows: DatasetDict) -> dict[str, str]:
    """Return, by split, what tells other rows or another order: their labels. Each rank trains on its own copy."""
    labels = [(f"labels of the {split} rows", torch.as_tensor(found["labels"][:])) for split, found in rows.items()]
    return checksums(labels)


def report_last(trainer: Trainer) -> None:
    """Move a Trainer's `report_to` integrations behind its other callbacks.

    The Trainer puts them first, so what a callback adds to the logs (density, overlap, capacity left) would
    not be reported. Call it on your own Trainer after it is made.
    """
    integrations = tuple(INTEGRATION_TO_CALLBACK.values())
    for callback in [made for made in trainer.callback_handler.callbacks if isinstance(made, integrations)]:
        trainer.remove_callback(callback)
        trainer.add_callback(callback)


def _optimizer(method: Method, args: TrainingArguments) -> Optimizer:
    """Return the optimizer the arguments name, over the method's groups.

    Made before the Trainer restores a checkpoint, so that a resumed optimizer finds the same groups.
    """
    made, options = Trainer.get_optimizer_cls_and_kwargs(args, method.model)
    layerwise = sorted({"params", "model", "optimizer_dict"} & set(options))
    if layerwise:
        raise ConfigError(
            f"optim: {getattr(args.optim, 'value', args.optim)} makes parameter groups of its own, and each phase "
            f"needs those of scores, values and head. Use adamw_torch, adafactor, sgd or another that takes groups."
        )
    groups = method.groups(args)
    optimizer: Optimizer = made([dict(group) for group in groups], **options)
    return optimizer
