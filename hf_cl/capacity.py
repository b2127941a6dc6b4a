"""How many tasks a bank has room for, and what they cost: arithmetic, before anything is trained.

A task claims the free entries of its mask. If masks were independent, each entry would be missed by a task with
probability `1 - density`, so a share `(1 - density)**n` would be free after n tasks, of the store and of the next mask
alike. Learned masks overlap more than that: more of the store stays free, and a task finds less of its own mask free.

All figures are expectations. Heads come on top, in every method alike, and so do norms and a file's header.

Source: the owner map is ExSSNeT's (arXiv 2210.10209); bytes of a mask are Shannon's bound for independent bits, which
the coding meets within 2 % (docs/log.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_cl.errors import BaseModelError, ConfigError
from hf_cl.ownership.owner import MOST_TASKS

BF16 = 2
"""Bytes of a number in bfloat16: of a trained value as `exssnet` stores it by default, and of LoRA's."""
SCARCE = 0.1
"""A task that finds less of its mask free than this is warned of when it trains."""
Shape = tuple[int, int]


@dataclass(frozen=True)
class Milestone:
    """What one task is expected to find, and to cost.

    Attributes:
        task: The how-manieth it is, from 1.
        free_of_mask: Share of its own mask's entries that it can claim.
        free_of_store: Share of all entries that is free after it.
        mask_bytes: Its coded mask; all that `supsup` stores. None where the number of entries is not known.
        value_bytes: With `exssnet`: its claimed values in bfloat16, and which entries of its mask they are.
    """

    task: int
    free_of_mask: float
    free_of_store: float
    mask_bytes: int | None
    value_bytes: int | None


@dataclass(frozen=True)
class Plan:
    """What a bank of so many tasks is expected to hold.

    Attributes:
        tasks: How many.
        density: Share of each layer's entries that a mask keeps.
        entries: Of all masked layers together; None where not known.
        milestones: Some of the tasks, the last one included.
        half: First task that finds no more than half of its mask free.
        scarce: First task that finds no more than `SCARCE` of its mask free.
        full: With `claim: free_topk`, the number of tasks after which no entry is free.
        supsup_bytes: All tasks' masks.
        exssnet_bytes: All tasks' masks and values.
        lora_bytes: One LoRA a task, in bfloat16; None where the layers' shapes are not known.
    """

    tasks: int
    density: float
    entries: int | None
    milestones: tuple[Milestone, ...]
    half: int
    scarce: int
    full: int
    supsup_bytes: int | None
    exssnet_bytes: int | None
    lora_bytes: int | None


def plan(
    tasks: int, density: float, *, entries: int | None = None, shapes: Sequence[Shape] = (), rank: int = 8
) -> Plan:
    """Work out what a bank of equal tasks is expected to hold.

    Args:
        tasks: How many tasks, at least 1.
        density: Share of each layer's entries that a mask keeps, in (0, 1].
        entries: Of all masked layers together; None takes the shapes'.
        shapes: The masked layers', (out, in) each; without them there is nothing to say of LoRA.
        rank: LoRA's.

    Raises:
        ConfigError: A number is out of its range.
    """
    if not 0 < density <= 1:
        raise ConfigError(f"density: expected a share in (0, 1], found {density!r}.")
    if not 1 <= tasks <= MOST_TASKS + 1:
        raise ConfigError(f"tasks: expected 1 to {MOST_TASKS + 1:,}, found {tasks:,}: a bank numbers no more.")
    if rank < 1:
        raise ConfigError(f"rank: expected at least 1, found {rank}.")
    if entries is not None and entries < 1:
        raise ConfigError(f"params: expected at least 1 masked entry, found {entries:,}.")
    size = sum(height * width for height, width in shapes) or entries
    every = [_milestone(number, density, size) for number in range(1, tasks + 1)]
    masks = None if size is None else tasks * mask_bytes(size, density)
    values = None if size is None else sum(task.value_bytes or 0 for task in every)
    return Plan(
        tasks=tasks,
        density=density,
        entries=size,
        milestones=tuple(every[number - 1] for number in marks(tasks)),
        half=until(density, 0.5),
        scarce=until(density, SCARCE),
        full=math.ceil(round(1 / density, 9)),
        supsup_bytes=masks,
        exssnet_bytes=None if masks is None or values is None else masks + values,
        lora_bytes=tasks * lora_bytes(shapes, rank) if shapes else None,
    )


def free_share(density: float, tasks: int) -> float:
    """Return the share of entries that so many independent masks leave free."""
    return float((1 - density) ** tasks)


def until(density: float, share: float) -> int:
    """Return the number of the first task, from 1, that finds at most a share in (0, 1) of its mask free."""
    if density == 1:
        return 2
    # Rounded, so that the last bit of a logarithm does not decide over a task.
    return 1 + math.ceil(round(math.log(share) / math.log1p(-density), 9))


def mask_bytes(entries: int, density: float) -> int:
    """Return the bytes of one coded mask: the entropy of independent bits."""
    return math.ceil(entries * entropy(density) / 8)


def lora_bytes(shapes: Sequence[Shape], rank: int) -> int:
    """Return the bytes of one LoRA on layers of these shapes, in bfloat16."""
    return BF16 * rank * sum(height + width for height, width in shapes)


def entropy(share: float) -> float:
    """Return the bits that one of independent entries takes, a share of which is kept."""
    return -sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)


def marks(tasks: int) -> list[int]:
    """Return the numbers to show of so many tasks: 1, 2, 5, 10, 20, 50 and so on, and the last."""
    steps = (number * 10**power for power in range(len(str(tasks))) for number in (1, 2, 5))
    return [*(number for number in steps if number < tasks), tasks]


def masked_shapes(folder: Path) -> list[Shape]:
    """Return the shapes of the linears that masks would cut, from a model's config alone: no weight is loaded.

    Args:
        folder: Holds the model's config.json.

    Raises:
        BaseModelError: There is no config of a text classifier, or of a family that is not in the table.
    """
    # These bring transformers, which takes seconds to import; arithmetic alone must not wait for it.
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from hf_cl.layers.families import family_of
    from hf_cl.layers.targets import find_head, find_targets

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise BaseModelError(f"{folder}: no config of a text classifier ({error}). Give --params instead.") from error
    names = find_targets(model, family_of(model).targets, find_head(model, None, ()))
    return [(int(height), int(width)) for height, width in (model.get_submodule(n).weight.shape for n in names)]


def _milestone(task: int, density: float, entries: int | None) -> Milestone:
    free = free_share(density, task - 1)
    mask = values = None
    if entries is not None:
        kept = entries * density
        mask, values = mask_bytes(entries, density), round(kept * free * BF16 + kept * entropy(free) / 8)
    return Milestone(task, free, free_share(density, task), mask, values)
