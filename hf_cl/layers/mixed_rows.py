"""Batches with rows of several tasks: each row is answered by its own task's head, in one pass of the encoder.

A row brings its task along in its label: labels are numbered across the tasks, those of the first task first. So
the rows need no column that a Trainer or a collator would drop. While the model trains, a hook reads the tasks off
the labels and gives the model each row's label within its task; while it is evaluated, one task is active as ever.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import nn

from hf_cl.layers.task_heads import TaskHeads


class MixedRows:
    """Lets a model train on rows of several tasks at once, until it is closed."""

    def __init__(self, heads: TaskHeads, indices: Sequence[int]) -> None:
        """Open it.

        Args:
            heads: Has a head of each task.
            indices: The tasks, the one that is evaluated meanwhile last.
        """
        self.heads, self.indices = heads, tuple(indices)
        self._ends = list(accumulate(len(heads.labels[index]) for index in indices))
        self._hook = heads.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def join(self, rows: Sequence[Dataset]) -> Dataset:
        """Return the tasks' tokenised rows as one data set, labels numbered across them.

        Args:
            rows: One data set a task, in the order of the tasks.
        """
        starts = [0, *self._ends[:-1]]
        columns = ["input_ids", "attention_mask", "token_type_ids", "labels"]
        joined = []
        for own, start in zip(rows, starts, strict=True):
            kept = own.select_columns([name for name in columns if name in own.column_names])
            labels = [label + start for label in kept["labels"]]
            joined.append(kept.remove_columns("labels").add_column("labels", labels))
        return concatenate_datasets(joined)

    def _before_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        labels = kwargs.get("labels")
        if not model.training or labels is None:
            self.heads.show(self.indices[-1])
            return args, kwargs
        ends = torch.tensor(self._ends, device=labels.device)
        places = torch.bucketize(labels, ends, right=True)
        self.heads.answer_rows(self.indices, places)
        starts = ends - torch.tensor([len(self.heads.labels[index]) for index in self.indices], device=labels.device)
        return args, {**kwargs, "labels": labels - starts[places]}

    def close(self) -> None:
        """Let one task be active again."""
        self._hook.remove()
        if self.indices[-1] in self.heads.labels:
            self.heads.show(self.indices[-1])
