"""Train one task: the one function that every method's tasks go through."""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_cl.errors import ConfigError
from hf_cl.training.evaluation import ComputeMetrics, with_ours
from hf_cl.training.guards import forget_preparation, refuse_push, refuse_sharding
from hf_cl.training.method import Method


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

    Raises:
        ConfigError: The arguments ask for something that this cannot do with them; before any work.
    """
    refuse_sharding(args)
    refuse_push(args)
    start = time.perf_counter()
    try:
        method.begin(index, labels)
        trainer = _trainer(trainer_class, method, index, rows, collator, args, compute_metrics, callbacks)
        trainer.train()
        forget_preparation(method.model)
        method.commit(index)
    except BaseException:
        method.abandon(index)
        raise
    return Training(time.perf_counter() - start, trainer.state.global_step, trainer.state.log_history)


def _trainer(
    trainer_class: type[Trainer],
    method: Method,
    index: int,
    rows: DatasetDict,
    collator: Any,
    args: TrainingArguments,
    compute_metrics: ComputeMetrics | None,
    callbacks: tuple[TrainerCallback, ...],
) -> Trainer:
    task_args = copy.copy(args)
    task_args.output_dir = str(Path(args.output_dir or "trainer_output") / f"task{index:04d}")
    trainer = trainer_class(
        model=method.model,
        args=task_args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=collator,
        compute_metrics=with_ours(compute_metrics),
        callbacks=[*method.callbacks(), *callbacks],
        optimizers=(_optimizer(method, task_args), None),
    )
    report_last(trainer)
    return trainer


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
