"""Texts a second: one task, a merged task, and batches whose texts belong to many tasks.

    base       the plain model, no adapter
    attached   one masked task that is active: its composed weight stands in the layers
    merged     the same after `merge_adapter`
    lora       one LoRA r8 that is active
    mixed      rows of many tasks by `adapter_names`: `x W0^T` once, each task's entries for its rows as CSR
    composed   the same rows with a composed weight a task and layer, written and cleared
    apart      one task at a time through the whole model (`share_products = False`)
    mixed lora the same rows by PEFT's LoRA r8 with `adapter_names`

Measured: 64 texts of 16 tokens without gradients, masks of density .01. Against: the base alone, and LoRA.

Floor: an attached or merged task multiplies by one dense weight of the base's size and shape, as the base does, so
the floor is 1; what is more is Python around each layer. A mixed batch shares that product and adds 2 p N operations
a token for N masked weights at density p, 1 + p of the base's operations; sparse products reach no dense rate, so
this floor is far. A composed weight a task is one dense product a task on its rows: 1 again in operations, and 8 p N
writes a task.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hf_cl.bench._measure import against, in_ms, turns
from hf_cl.bench._models import DENSITY, batch, masked, plain, with_lora
from hf_cl.bench._row import Mark, Row, Settings, Tell
from hf_cl.layers.linear import apply_weight
from hf_cl.masks.compose import put
from hf_cl.tuner.rows import Rows

BASE, ATTACHED, MERGED, LORA = "base", "attached", "merged", "lora"
MIXED, COMPOSED, APART, MIXED_LORA = "mixed", "composed", "apart", "mixed lora"
TASKS, TEXTS, LENGTH, TURNS = (4, 10, 50), 64, 16, 9
RIVALS = {ATTACHED: (BASE, LORA), MERGED: (BASE, LORA), LORA: (BASE,), MIXED: (BASE, MIXED_LORA)}
"""What a way is measured against; the ways that are not here, against the base."""
Ways = dict[str, Callable[[], object]]


class Composed(Rows):
    """Writes each task's weight before its rows' product, and clears it after."""

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        """Return a masked linear's output."""
        out = None
        scratch = layer.__dict__.setdefault("_scratch", layer.base_weight.detach().clone())
        for adapter, rows in self._of(x):
            patch = layer.patch(adapter)
            put(scratch, patch.where, patch.shown)
            part = apply_weight(layer.base_layer, x[rows], scratch)
            put(scratch, patch.where, patch.bare)
            out = part.new_empty(*x.shape[:-1], part.shape[-1]) if out is None else out
            out[rows] = part
        assert out is not None
        return out


def run(settings: Settings, tell: Tell) -> Iterator[Row]:
    """Yield texts a second by model and number of tasks, and the marked times of one task."""
    for size in settings.models():
        tell(f"{size}: one task")
        yield from _rows(size, 1, one_task(size, settings), settings)
        for tasks in (3,) if settings.quick else TASKS:
            tell(f"{size}: a batch of {tasks} tasks")
            yield from _rows(size, tasks, many_tasks(size, tasks, settings), settings)


def _rows(size: str, tasks: int, ways: Ways, settings: Settings) -> Iterator[Row]:
    with torch.no_grad():
        taken = turns(ways, 2 if settings.quick else TURNS, device=settings.device)
    under = {"model": size, "tasks": tasks, "texts": _texts(settings), "length": LENGTH, "density": DENSITY}
    under["device"] = settings.device
    for name in ways:
        for rival in RIVALS.get(name, (BASE,)) if name != BASE else ():
            floor = "1: the products are the base's" if tasks == 1 else f"{1 / (1 + DENSITY):.2f} by operations"
            own, other = (_texts(settings) / median(taken[way]) for way in (name, rival))
            # Texts a second go up where seconds go down, so the rival's seconds stand above the line.
            row = against(taken[rival], taken[name])
            yield Row("serve", f"throughput, {name}", under, own, "texts/s", floor, rival, other, **row)
    for name in (ATTACHED, MERGED):
        if name in ways:
            row = in_ms(taken[name], taken[BASE])
            floor = "1: one dense product a layer, as the base"
            mark = Mark(1.05) if name == ATTACHED else None
            yield Row("serve", f"time a batch, {name}", under, rival=BASE, floor=floor, mark=mark, **row)


def _texts(settings: Settings) -> int:
    return 6 if settings.quick else TEXTS


def one_task(size: str, settings: Settings) -> Ways:
    """Return the ways to answer a batch of one task."""
    inputs = batch(size, _texts(settings), LENGTH, settings.device)
    device = settings.device
    models = {
        BASE: plain(size, device), ATTACHED: masked(size, 1, device), MERGED: masked(size, 1, device),
        LORA: with_lora(size, 1, device),
    }  # fmt: skip
    models[MERGED].merge_adapter()
    return {name: partial(model, **inputs) for name, model in models.items()}


def many_tasks(size: str, tasks: int, settings: Settings) -> Ways:
    """Return the ways to answer a batch whose rows take turns among tasks."""
    texts, device = _texts(settings), settings.device
    inputs = batch(size, texts, LENGTH, device)
    adapters = [f"task{row % tasks}" for row in range(texts)]
    counts = Counter(adapters)
    ends = dict(zip(counts, accumulate(counts.values()), strict=True))
    places = {name: slice(ends[name] - count, ends[name]) for name, count in counts.items()}
    base, model, lora = plain(size, device), masked(size, tasks, device), with_lora(size, tasks, device)
    tuner = model.base_model

    def mixed(share: bool) -> None:
        tuner.share_products = share
        model(**inputs, adapter_names=adapters)

    def composed() -> None:
        with tuner.planned(Composed(places, texts)):
            tuner.model(**inputs)

    return {
        BASE: lambda: base(**inputs),
        MIXED: lambda: mixed(True),
        COMPOSED: composed,
        APART: lambda: mixed(False),
        MIXED_LORA: lambda: lora(**inputs, adapter_names=adapters),
    }
