"""A batch whose texts belong to many tasks: sharing the products with the base's weight, other ways, and PEFT's LoRA.

    base       the plain model, one task and no adapter
    shared     `x W0^T` once, each task's entries for its rows as CSR (what `adapter_names` does)
    scattered  the same, each task's entries gathered, multiplied and added up one by one
    composed   a composed weight for each task and layer, written and cleared, on its rows
    apart      one task at a time through the whole model (`share_products = False`)
    lora       PEFT's LoRA r8 with `adapter_names`

Masks are random ones of the density: time does not depend on which entries a mask keeps. All ways take turns in one
process; a figure is the median over turns of the throughput relative to the base in the same turn. `--clock cpu` counts
the process's own time, for a machine that others use too; it says nothing of what several threads would save.
run: python scripts/bench_serve.py [--tasks 1 4 10 50] [--density 0.01] [--length 16] [--device cpu|cuda] [--ways ...]
"""

import argparse
import json
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from hf_cl import MaskConfig
from hf_cl.layers.linear import apply_weight
from hf_cl.masks.compose import clear_entries, pick, positions, put
from hf_cl.tuner.names import BASE
from hf_cl.tuner.rows import Rows

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
WAYS = ("base", "shared", "scattered", "composed", "apart", "lora")
LABELS = 15


class Scattered(Rows):
    """Adds a task's entries up one by one: memory and time grow with rows times entries."""

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        """Return a masked linear's output."""
        out = layer.common(x)
        for adapter, rows in self._of(x):
            if adapter != BASE:
                part = layer.part(adapter)
                counts = part.crow_indices().diff().long()
                heights = torch.repeat_interleave(torch.arange(part.shape[0], device=x.device), counts)
                terms = x[rows][..., part.col_indices().long()] * part.values()
                out[rows] += torch.zeros_like(out[rows]).index_add_(-1, heights, terms)
        return out


class Composed(Rows):
    """Writes each task's weight before its rows' product, and clears it after."""

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        """Return a masked linear's output."""
        weight, out = layer.base_weight, None
        scratch = layer.__dict__.setdefault("_scratch", weight.detach().clone())
        kept = layer.__dict__.setdefault("_kept", {})
        for adapter, rows in self._of(x):
            if adapter not in kept:
                kept[adapter] = positions(layer.mask(adapter).view(-1))
            where = kept[adapter]
            put(scratch, where, pick(weight, where) + pick(layer.store.values, where))
            part = apply_weight(layer.base_layer, x[rows], scratch)
            clear_entries(scratch, weight, where, delta=True)
            out = part.new_empty(*x.shape[:-1], part.shape[-1]) if out is None else out
            out[rows] = part
        return out


def plain(device: str) -> Any:
    """Return MiniLM's shape with random weights."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30522, num_labels=LABELS, **MINILM)
    return BertForSequenceClassification(config).to(device).eval()


def masked(tasks: int, density: float, device: str) -> Any:
    """Return a model with finished tasks of random masks."""
    generator, model = torch.Generator().manual_seed(0), None
    for task in range(tasks):
        config = MaskConfig(task_type="SEQ_CLS", density=density, scale=1.0, num_labels=LABELS)
        config.__dict__["arrives"] = True
        if model is None:
            model = get_peft_model(plain(device), config, adapter_name="task0")
        else:
            model.add_adapter(f"task{task}", config)
        for layer in model.base_model.mask_layers():
            mask = torch.rand(layer.base_layer.weight.shape, generator=generator) < density
            layer.install(f"task{task}", mask.to(device), None)
        model.base_model.finish(f"task{task}")
    return model.eval()


def with_lora(tasks: int, device: str) -> Any:
    """Return a model with LoRA adapters r8."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="SEQ_CLS", modules_to_save=[])
    model = get_peft_model(plain(device), config, adapter_name="task0")
    for task in range(1, tasks):
        model.add_adapter(f"task{task}", config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def ways(names: list[str], tasks: int, density: float, batch: int, length: int, device: str) -> dict[str, Callable]:
    """Return each way as a function that answers the batch."""
    ids = torch.randint(1000, 30000, (batch, length), device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    adapters = [f"task{row % tasks}" for row in range(batch)]
    counts = Counter(adapters)
    ends = dict(zip(counts, accumulate(counts.values()), strict=True))
    places = {name: slice(ends[name] - count, ends[name]) for name, count in counts.items()}
    base, model = plain(device), masked(tasks, density, device)
    lora = with_lora(tasks, device) if "lora" in names else None
    tuner = model.base_model

    def mixed(share: bool) -> None:
        tuner.share_products = share
        model(**inputs, adapter_names=adapters)

    def planned(kind: type[Rows]) -> None:
        with tuner.planned(kind(places, batch)):
            tuner.model(**inputs)

    made: dict[str, Callable] = {
        "base": lambda: base(**inputs),
        "shared": lambda: mixed(True),
        "scattered": lambda: planned(Scattered),
        "composed": lambda: planned(Composed),
        "apart": lambda: mixed(False),
        "lora": lambda: lora(**inputs, adapter_names=adapters),
    }
    return {name: made[name] for name in names}


def main() -> None:
    """Print a JSON line for each number of tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 4, 10, 50])
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    given = parser.parse_args()
    clock = time.perf_counter if given.clock == "wall" else time.process_time
    for tasks in given.tasks:
        names = ["base", *(name for name in given.ways if name != "base")]
        made = ways(names, tasks, given.density, given.batch, given.length, given.device)
        seconds: dict[str, list[float]] = {name: [] for name in made}
        with torch.no_grad():
            for turn in range(given.turns + 1):
                for name, run in made.items():
                    begun = clock()
                    run()
                    if given.device == "cuda":
                        torch.cuda.synchronize()
                    if turn:  # the first one builds what is kept
                        seconds[name].append(clock() - begun)
        against = {
            name: statistics.median(b / s for b, s in zip(seconds["base"], spent, strict=True))
            for name, spent in seconds.items()
        }
        record = {
            "tasks": tasks,
            **{key: getattr(given, key) for key in ("density", "batch", "length", "device", "turns", "clock")},
            "base_ms": round(1000 * statistics.median(seconds["base"]), 2),
            "throughput_of_base": {name: round(value, 3) for name, value in against.items()},
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
