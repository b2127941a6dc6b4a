"""Ask earlier tasks' networks about a new task's texts, and shift its scores (KKT on a live model)."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_cl import ranks
from hf_cl.layers.families import head_features
from hf_cl.layers.heads import task_generator
from hf_cl.starts.kkt import Choice, choose, nearest_tasks, scores_from_mask
from hf_cl.tuner.model import MaskModel
from hf_cl.tuner.view import bare_features


class Finished(Protocol):
    """Knows finished tasks that are not loaded."""

    def numbers(self) -> Collection[int]:
        """Return the numbers of all finished tasks."""

    def bring(self, index: int) -> str:
        """Load one, if it is not; return its adapter."""

    def put_away(self) -> None:
        """Unload those that were loaded, but for the active task."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What the bare base says of some of a task's training texts.

    Attributes:
        index: The task's number.
        head: (n, d) float32, as the head sees them.
        mean: (n, d) float32, the masked means of the last hidden states.
        labels: (n,) int64.
    """

    index: int
    head: Tensor
    mean: Tensor
    labels: Tensor


@dataclass
class KKT:
    """Options and memory of the KKT start, one object for a stream.

    Attributes:
        k: Neighbours that vote.
        sample: Training texts that are looked at.
        margin: How far kept scores stand above fresh ones, in steps of the scores' learning rate.
        means: Mean base feature of each learned task by its number; chooses the candidates.
        finished: Loads tasks that lie on disk; None where all are loaded.
        seen: The newest task's sample, for whoever looks at its texts next.
    """

    k: int
    sample: int
    margin: float
    means: dict[int, Tensor]
    finished: Finished | None = None
    seen: Seen | None = None


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
    batches = batches_of(dataloader, order_of(dataloader, config.seed, index)[: options.sample])
    seen = options.seen = ask_base(tuner, index, batches, device)
    adapters = {
        int(other.task_index or 0): name
        for name, other in tuner.peft_config.items()
        if name != adapter and tuner.phase(name) == "committed"
    }
    on_disk = set(options.finished.numbers()) - {index, *adapters} if options.finished is not None else set()

    def features(task: int | None) -> Tensor:
        if task is None:
            return seen.head
        with _loaded(options, adapters, task) as source:
            return _features(tuner, source, batches, device)

    mean = seen.head.mean(0)
    far = torch.full_like(mean, torch.inf)
    candidates = nearest_tasks(mean, {task: options.means.get(task, far) for task in {*adapters, *on_disk}})
    generator = task_generator(config.seed, index, "kkt")
    choice = choose(
        features,
        seen.labels,
        sorted(candidates),
        classes=int(config.num_labels or 0),
        k=options.k,
        generator=generator,
    )
    choice = ranks.broadcast(choice)
    options.means[index] = mean
    if choice.source is not None:
        with _loaded(options, adapters, choice.source) as source:
            start_from(tuner, adapter, source, options.margin * rate)
    return choice


@contextmanager
def _loaded(options: KKT, adapters: Mapping[int, str], task: int) -> Iterator[str]:
    """Give a finished task's adapter, loaded from disk meanwhile if it lies there.

    Also one that was loaded at first: the putting away after another candidate may have unloaded it.
    """
    if options.finished is None:
        yield adapters[task]
        return
    try:
        yield options.finished.bring(task)
    finally:
        options.finished.put_away()


def start_from(tuner: MaskModel, adapter: str, source: str, margin: float) -> None:
    """Let an adapter's first mask be a finished one's; its head, too, where labels are the same.

    Args:
        tuner: The masked model; both adapters are loaded.
        adapter: In its mask phase.
        source: A finished adapter.
        margin: How far kept scores stand above fresh ones, in units of the scores.
    """
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


def order_of(dataloader: Any, seed: int, index: int) -> list[int]:
    """Return the rows of a task's training data in the order in which they are looked at, a seeded one."""
    return torch.randperm(len(dataloader.dataset), generator=task_generator(seed, index, "kkt.sample")).tolist()


def batches_of(dataloader: Any, rows: Sequence[int]) -> list[dict[str, Tensor]]:
    """Return rows of a dataloader's data set in batches of its size, made by its collator."""
    dataset, size = dataloader.dataset, dataloader.batch_size or 32
    return [dataloader.collate_fn([dataset[i] for i in rows[at : at + size]]) for at in range(0, len(rows), size)]


def ask_base(tuner: MaskModel, index: int, batches: Sequence[dict[str, Tensor]], device: torch.device) -> Seen:
    """Return what the bare base says of one batch or more, in evaluation mode: both features by one forward each."""
    head, mean = _ask(tuner, batches, device, lambda inputs: bare_features(tuner, inputs))
    return Seen(index, head, torch.cat(mean), torch.cat([batch["labels"] for batch in batches]))


def _features(tuner: MaskModel, adapter: str, batches: Sequence[dict[str, Tensor]], device: torch.device) -> Tensor:
    """Return (n, d) float32 CPU features as the head sees them through a task's network, in evaluation mode."""

    def answer(inputs: dict[str, Tensor]) -> None:
        tuner(**inputs)

    with tuner.answering(adapter), torch.no_grad():
        return _ask(tuner, batches, device, answer)[0]


def _ask(
    tuner: MaskModel,
    batches: Sequence[dict[str, Tensor]],
    device: torch.device,
    forward: Callable[[dict[str, Tensor]], Any],
) -> tuple[Tensor, list[Any]]:
    """Return (n, d) features as the head sees them, and what `forward` gave for each batch.

    Each rank computes some of the batches; all get all of them, in their order.
    """
    first = str(tuner.mask_config.head_modules[0])  # type: ignore[index]
    head = next(layer for layer in tuner.own_layers() if layer.name == first)

    def ask(batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
        given: list[Any] = []
        features = head_features(head, lambda: given.append(forward(inputs)), inputs.get("attention_mask"))
        return features, given[0]

    was_training = tuner.training
    tuner.eval()
    try:
        parts = ranks.gather([ask(batch) for batch in batches[ranks.rank() :: ranks.world()]])
    finally:
        tuner.train(was_training)
    pairs = [parts[place % len(parts)][place // len(parts)] for place in range(len(batches))]
    return torch.cat([features for features, _ in pairs]), [given for _, given in pairs]
