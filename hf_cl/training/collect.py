"""What routers know of a task is collected while it trains: one pass of its training texts through the bare base."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_cl.routing.nearest_mean import SHARED_TENSORS, Spread, TaskMeans, added, measure
from hf_cl.training.kkt_start import KKT, ask_base, batches_of, order_of
from hf_cl.tuner.model import MaskModel

TEXTS = 1024
"""Training texts that are looked at by default: on `clinc10`, all 1,500 chose no better (docs/log.md)."""


class RouterState:
    """Class means a task and one covariance, grown by a task at a time; see `hf_cl.routing.nearest_mean`."""

    def __init__(self, texts: int) -> None:
        """Say how many training texts of a task are looked at."""
        self.texts = texts
        self.means: dict[int, TaskMeans] = {}
        self._spread: Spread | None = None
        self._newest: tuple[int, Tensor, int] | None = None

    def add(self, index: int, features: Tensor, labels: Tensor, classes: int) -> None:
        """Take a task's features (n, d) and labels (n,); the newest one can still be left out again."""
        self._spread = self._whole()
        self.means[index], scatter, freedom = measure(features, labels, classes)
        self._newest = (index, scatter, freedom)

    def leave_out(self, index: int) -> None:
        """Forget the newest task, which was not finished."""
        self.means.pop(index, None)
        if self._newest is not None and self._newest[0] == index:
            self._newest = None

    def tensors(self) -> dict[str, Tensor]:
        """Return what all tasks share."""
        whole = self._whole()
        return {} if whole is None else whole.tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what earlier tasks shared."""
        if set(SHARED_TENSORS) <= set(tensors):
            self._spread, self._newest = Spread.read(tensors), None

    def _whole(self) -> Spread | None:
        return self._spread if self._newest is None else added(self._spread, *self._newest)


class CollectCallback(TrainerCallback):
    """Collects before the first step; what a KKT start has read of the base already is not read again."""

    def __init__(self, state: RouterState, kkt: KKT | None = None) -> None:
        """Take what is grown, and the start."""
        self._state, self._kkt = state, kkt

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the texts; their order is a seeded one of their own, so nothing of the training changes."""
        tuner: MaskModel = kwargs["model"].base_model
        config = tuner.peft_config[str(tuner.active_adapters[0])]
        index, loader = int(config.task_index or 0), kwargs["train_dataloader"]
        rows = order_of(loader, config.seed, index)
        first = self._kkt.sample if self._kkt is not None else 0
        known = self._kkt.seen if self._kkt is not None else None
        # A task that goes on in its middle has had its start: the same batches are read here then, for the same bits.
        seen = [known] if known is not None and known.index == index else []
        for part in (rows[:first] if not seen else [], rows[first : self._state.texts]):
            if part:
                seen.append(ask_base(tuner, index, batches_of(loader, part), args.device))
        features, labels = (torch.cat([getattr(part, name) for part in seen]) for name in ("mean", "labels"))
        self._state.add(index, features, labels, int(config.num_labels or 0))
