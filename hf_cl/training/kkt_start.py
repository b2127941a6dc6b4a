"""Ask earlier tasks' networks about a new task's texts, and shift its scores (KKT on a live model)."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_cl.layers.families import head_features
from hf_cl.layers.heads import task_generator
from hf_cl.starts.kkt import Choice, choose, nearest_tasks, scores_from_mask
from hf_cl.tuner.model import MaskModel


class Finished(Protocol):
    """Knows finished tasks that are not loaded."""

    def numbers(self) -> Collection[int]:
        """Return the numbers of all finished tasks."""

    def bring(self, index: int) -> str:
        """Load one, if it is not; return its adapter."""

    def put_away(self) -> None:
        """Unload those that were loaded, but for the active task."""


@dataclass
class KKT:
    """Options and memory of the KKT start, one object for a stream.

    Attributes:
        k: Neighbours that vote.
        sample: Training texts that are looked at.
        margin: How far kept scores stand above fresh ones, in steps of the scores' learning rate.
        means: Mean base feature of each learned task by its number; chooses the candidates.
        finished: Loads tasks that lie on disk; None where all are loaded.
    """

    k: int
    sample: int
    margin: float
    means: dict[int, Tensor]
    finished: Finished | None = None


def start_by_kkt(
    tuner: MaskModel, adapter: str, dataloader: Any, options: KKT, rate: float, device: torch.device
) -> Choice:
    """Set the adapter's scores and head by the best earlier task, if one is good enough; return what was found.

    Args:
        tuner: The masked model with `adapter` active.
        adapter: The new task's adapter, in its mask phase.
        dataloader: The new task's training data; its dataset and collator are used, not its order.
        options: See `KKT`; the new task's mean is added to it.
        rate: Learning rate of the scores, the margin's unit.
        device: Where the model computes.
    """
    config = tuner.peft_config[adapter]
    index = int(config.task_index or 0)
    batches = _sample(dataloader, options.sample, config.seed, index)
    labels = torch.cat([batch["labels"] for batch in batches])
    adapters = {
        int(other.task_index or 0): name
        for name, other in tuner.peft_config.items()
        if name != adapter and tuner.phase(name) == "committed"
    }
    on_disk = set(options.finished.numbers()) - {index, *adapters} if options.finished is not None else set()
    cache: dict[int | None, Tensor] = {None: _features(tuner, None, batches, device)}

    def features(task: int | None) -> Tensor:
        if task is None:
            return cache[None]
        with _loaded(options, adapters, task) as source:
            return _features(tuner, source, batches, device)

    mean = cache[None].mean(0)
    far = torch.full_like(mean, torch.inf)
    candidates = nearest_tasks(mean, {task: options.means.get(task, far) for task in {*adapters, *on_disk}})
    generator = task_generator(config.seed, index, "kkt")
    choice = choose(
        features,
        labels,
        sorted(candidates),
        classes=int(config.num_labels or 0),
        k=options.k,
        generator=generator,
    )
    options.means[index] = mean
    if choice.source is not None:
        with _loaded(options, adapters, choice.source) as source:
            _start_from(tuner, adapter, source, options.margin * rate)
    return choice


@contextmanager
def _loaded(options: KKT, adapters: Mapping[int, str], task: int) -> Iterator[str]:
    """Give a finished task's adapter, loaded from disk meanwhile if it lies there."""
    if task in adapters or options.finished is None:
        yield adapters[task]
        return
    try:
        yield options.finished.bring(task)
    finally:
        options.finished.put_away()


def _start_from(tuner: MaskModel, adapter: str, source: str, margin: float) -> None:
    with torch.no_grad():
        for layer in tuner.mask_layers():
            scores = layer.hfcl_scores[adapter]
            scores.copy_(
                scores_from_mask(scores.detach(), layer.mask(source), margin, magnitude=layer.magnitude(adapter))
            )
        if tuner.peft_config[adapter].labels == tuner.peft_config[source].labels:
            shared = tuner.peft_config[adapter].head_of is not None
            for own in (own for own in tuner.own_layers() if own.is_norm or not shared):
                own.hfcl_copy[adapter].load_state_dict(own.hfcl_copy[source].state_dict())


def _sample(dataloader: Any, count: int, seed: int, index: int) -> list[dict[str, Tensor]]:
    """Return batches of a seeded sample of the training texts."""
    dataset = dataloader.dataset
    order = torch.randperm(len(dataset), generator=task_generator(seed, index, "kkt.sample"))[:count].tolist()
    size = dataloader.batch_size or 32
    return [dataloader.collate_fn([dataset[i] for i in order[at : at + size]]) for at in range(0, len(order), size)]


def _features(tuner: MaskModel, adapter: str | None, batches: list[dict[str, Tensor]], device: torch.device) -> Tensor:
    """Return (n, d) float32 CPU features as the head sees them, in evaluation mode; None asks the bare base."""
    first = str(tuner.mask_config.head_modules[0])  # type: ignore[index]
    head = next(layer for layer in tuner.own_layers() if layer.name == first)
    was_training = tuner.training
    tuner.eval()
    try:
        with tuner.answering(adapter), torch.no_grad():
            return torch.cat([_batch_features(tuner, head, batch, device) for batch in batches])
    finally:
        tuner.train(was_training)


def _batch_features(tuner: MaskModel, head: nn.Module, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    return head_features(head, lambda: tuner(**inputs), inputs.get("attention_mask"))
