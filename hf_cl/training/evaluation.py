"""Evaluating a task: every cell of the accuracy matrix is a fresh pass over the task's rows."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import EvalPrediction, Trainer, TrainingArguments

from hf_cl.metrics import accuracy, macro_f1
from hf_cl.training.guards import forget_preparation

ComputeMetrics = Callable[[EvalPrediction], dict[str, Any]]


def with_ours(own: ComputeMetrics | None) -> ComputeMetrics:
    """Return a `compute_metrics` that gives accuracy and macro-F1, and what the user's gives under other names."""

    def compute(prediction: EvalPrediction) -> dict[str, Any]:
        logits = _logits(prediction.predictions)
        chosen, labels = np.argmax(logits, axis=-1), np.asarray(prediction.label_ids)
        ours = {"accuracy": accuracy(chosen, labels), "macro_f1": macro_f1(chosen, labels, logits.shape[-1])}
        return {**(own(prediction) if own else {}), **ours}

    return compute


@dataclass(frozen=True)
class Measured:
    """What a pass over a task's rows found.

    Attributes:
        metrics: `accuracy`, `macro_f1`, `loss`, and the user's own.
        correct: Whether each row was answered rightly, in the order of the rows; bool.
    """

    metrics: dict[str, Any]
    correct: np.ndarray


def evaluate(
    model: nn.Module,
    rows: Dataset,
    collator: Any,
    args: TrainingArguments,
    compute_metrics: ComputeMetrics | None = None,
) -> Measured:
    """Return a model's metrics on tokenised rows, and which rows it answered rightly.

    Args:
        model: The model with the task active.
        rows: Tokenised rows with `labels`.
        collator: Pads a batch.
        args: Batch size, device and precision are taken from these.
        compute_metrics: The user's own metrics.
    """
    quiet = copy.copy(args)
    quiet.disable_tqdm, quiet.report_to, quiet.load_best_model_at_end = True, [], False
    # A Trainer that only predicts has no rows to evaluate on while it trains.
    quiet.eval_strategy = quiet.save_strategy = "no"
    quiet.push_to_hub = False
    trainer = Trainer(model=model, args=quiet, data_collator=collator, compute_metrics=with_ours(compute_metrics))
    order = np.arange(len(rows))
    if compute_metrics is None:  # texts of one length share a batch; a user's own metric sees the rows in their order
        order = np.argsort([len(ids) for ids in rows["input_ids"]], kind="stable")
    output = trainer.predict(rows.select(order), metric_key_prefix="test")
    forget_preparation(model)
    correct = np.empty(len(rows), dtype=bool)
    correct[order] = _logits(output.predictions).argmax(axis=-1) == np.asarray(output.label_ids)
    timing = (
        "test_runtime",
        "test_samples_per_second",
        "test_steps_per_second",
        "test_model_preparation_time",
    )
    found = {
        key.removeprefix("test_"): _plain(value) for key, value in (output.metrics or {}).items() if key not in timing
    }
    return Measured(found, correct)


def _logits(predictions: Any) -> np.ndarray:
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)


def _plain(value: Any) -> Any:
    """Return a metric as a JSON value: a number that is none is null, anything else a user's metric gives stays."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)
