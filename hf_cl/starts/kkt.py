"""KKT: begin a task's mask at the earlier task whose network sees the new task best.

For each candidate the new task's training texts go through that task's network; if a nearest-neighbour
vote on the pooled features beats both chance and the bare base by more than noise, the best
candidate's committed mask is the start. Scores are gone by then, so fresh ones are shifted: kept entries by
a margin, small enough that training can undo it. Nothing of the source is ever written.

Source: ExSSNeT, arXiv 2210.10209, section "KNN-based knowledge transfer". Differences, ours: the bare
base is a candidate (any mask beats chance on a pretrained encoder), evaluation mode, at most three
candidates, so that task 100 costs what task 10 does.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_CANDIDATES = 3
"""Each is loaded and asked about every text of the sample; docs/log.md has how rarely a farther one is chosen."""
HELD_OUT = 0.34
MARGIN_OF_NOISE = 2.0
"""Standard errors by which a candidate must beat the bar: the best of eight noisy figures nearly always beats
it by some (on random labels 9 of 10 starts were not fresh without this, 1 to 3 of 100 with it)."""
_BLOCK = 1024


@dataclass(frozen=True)
class Choice:
    """What KKT found and chose; recorded with the task.

    Attributes:
        source: Number of the task to start from; None starts fresh.
        accuracies: Held-out accuracy of each candidate by task number.
        base: The same for the bare base.
        chance: One over the number of classes.
    """

    source: int | None
    accuracies: dict[int, float]
    base: float
    chance: float


def nearest_tasks(mean: Tensor, means: Mapping[int, Tensor], most: int = MOST_CANDIDATES) -> list[int]:
    """Return the numbers of at most `most` tasks whose mean base feature lies nearest to `mean` (d,)."""
    return sorted(means, key=lambda task: (float(torch.dist(means[task], mean)), task))[:most]


def knn_accuracy(features: Tensor, labels: Tensor, k: int, generator: torch.Generator) -> float:
    """Return the held-out accuracy of a k-nearest-neighbour vote.

    Args:
        features: (n, d) float; one row a text.
        labels: (n,) int64.
        k: Neighbours, cut to a third of the sample. Ties go to the smallest label.
        generator: CPU generator of the split: 66 % vote, 34 % are asked.
    """
    order = torch.randperm(len(labels), generator=generator)
    asked = max(1, int(len(labels) * HELD_OUT))
    known, held = order[asked:], order[:asked]
    k = max(1, min(k, len(labels) // 3, len(known)))
    right = 0
    for block in held.split(_BLOCK):
        near = torch.cdist(features[block], features[known]).topk(k, largest=False).indices
        votes = labels[known][near]
        right += int((votes.mode(dim=1).values == labels[block]).sum())
    return right / asked


def choose(
    features: Callable[[int | None], Tensor],
    labels: Tensor,
    candidates: Sequence[int],
    *,
    classes: int,
    k: int,
    generator: torch.Generator,
) -> Choice:
    """Ask every candidate and the bare base, and choose.

    Args:
        features: Gives the (n, d) features through a task's network; None asks the bare base.
        labels: (n,) int64, the new task's.
        candidates: Task numbers.
        classes: Number of classes of the new task.
        k: Neighbours.
        generator: CPU generator; every candidate is asked on the same split.
    """
    if len(labels) < 2:
        return Choice(None, {}, 0.0, 1 / classes)
    state = generator.get_state()

    def accuracy(task: int | None) -> float:
        generator.set_state(state)
        return knn_accuracy(features(task).float(), labels, k, generator)

    base, chance = accuracy(None), 1 / classes
    found = {task: accuracy(task) for task in candidates}
    best = max(found, key=lambda task: (found[task], -task), default=None)
    bar = max(base, chance)
    asked = max(1, int(len(labels) * HELD_OUT))
    noise = math.sqrt(2 * bar * (1 - bar) / asked)
    source = best if best is not None and found[best] > bar + MARGIN_OF_NOISE * noise else None
    return Choice(source, found, base, chance)


def scores_from_mask(fresh: Tensor, mask: Tensor, margin: float, *, magnitude: bool) -> Tensor:
    """Return scores whose first mask is `mask` (where the kept counts agree).

    Args:
        fresh: Fresh scores.
        mask: bool, the source's mask, of the same shape.
        margin: How far a kept score stands above the highest fresh one, in units of the scores.
        magnitude: Whether the scores are ranked by magnitude.
    """
    if magnitude:
        shift = (fresh.abs().max() + margin) * torch.where(fresh < 0, -1.0, 1.0)
    else:
        shift = fresh.max() - fresh.min() + margin
    return torch.where(mask, fresh + shift, fresh)
