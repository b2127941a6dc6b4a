"""Other ways to choose a mask or the values under it than those the package has: each changes one thing of a recipe.

    once K          scores rest after K steps and the head trains on: with K = 1 the mask is one gradient's
    signs K         V's free entries get the sign that lowers the loss of K batches, seen before the first step
    scale layer|row of trained values only one scale a layer, or a row, is learned: their gradients are tied
    head fresh      with KKT, the head begins fresh also where the source's labels are the task's

What they would store besides a mask (a sign, a scale) is not counted: these are experiments, and no method's option.
run: python scripts/bench_choice.py OUT.jsonl "VARIANT" RECIPE [key=value ...]      (a row a task; HF_CL_DATA as for it)
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from bench_learning import measure
from transformers import TrainerCallback

from hf_cl.ownership.owner import FREE


class Once(TrainerCallback):
    """Scores rest after so many steps."""

    def __init__(self, steps: str) -> None:
        self.steps = int(steps)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Let them rest."""
        if state.global_step == self.steps:
            for layer in model.base_model.mask_layers():
                layer.hfcl_scores[layer.active_adapters[0]].requires_grad_(False)


class Signs(TrainerCallback):
    """The store's free entries point downhill, as seen from the base and the fresh head."""

    def __init__(self, batches: str) -> None:
        self.batches = int(batches)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take the gradient of a few batches; that of the scores is the weight's times V."""
        layers = model.base_model.mask_layers()
        for batch in itertools.islice(kwargs["train_dataloader"], self.batches):
            model(**{name: tensor.to(args.device) for name, tensor in batch.items()}).loss.backward()
        with torch.no_grad():
            for layer in layers:
                values = layer.store.values
                slope = layer.hfcl_scores[layer.active_adapters[0]].grad * values.sign()
                pointing = values.abs() * -torch.where(slope == 0, -values, slope).sign()
                values.copy_(torch.where(layer.store.owner == FREE, pointing, values))
        model.zero_grad()
        for layer in layers:
            layer.compose()


class Scale(TrainerCallback):
    """One scale a layer or a row: entries that share it move by the same share of their first value."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Replace each entry's gradient by the mean one of its scale, with the entry's sign."""
        for layer in model.base_model.mask_layers():
            adapter = layer.active_adapters[0]
            values, where = layer.hfcl_values[adapter], layer._where
            if values.grad is None or where is None or not where.numel():
                continue
            signs = layer.store.values.view(-1)[where].sign()
            rows = where // layer.store.values.shape[1] if self.what == "row" else torch.zeros_like(where)
            slopes = torch.zeros(layer.store.values.shape[0], device=where.device)
            slopes.index_add_(0, rows, values.grad[: where.numel()] * signs)
            slopes /= torch.bincount(rows, minlength=slopes.numel()).clamp_min(1)
            values.grad[: where.numel()] = slopes[rows] * signs


class Head(TrainerCallback):
    """The head begins as it was drawn, whatever a start has put there."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Remember it."""
        self.drawn = [{name: tensor.clone() for name, tensor in head.state_dict().items()} for head in _heads(model)]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Put it back."""
        for head, drawn in zip(_heads(model), self.drawn, strict=True):
            head.load_state_dict(drawn)


def _heads(model: Any) -> list[Any]:
    return [layer.hfcl_copy[layer.active_adapters[0]] for layer in model.base_model.own_layers() if not layer.is_norm]


WAYS = {"head": Head, "once": Once, "signs": Signs, "scale": Scale}


if __name__ == "__main__":
    out, variant, recipe, *overrides = sys.argv[1:]
    way, value = variant.split()
    found = measure(recipe, overrides, (WAYS[way](value),))
    with Path(out).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"variant": variant, **row}) + "\n" for row in found)
