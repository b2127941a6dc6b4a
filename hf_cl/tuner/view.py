"""A masked model's tasks as routers ask about them; see `hf_cl.routing.Tasks`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_cl.layers.features import mean_features
from hf_cl.routing import Gaussians
from hf_cl.routing.entropy import normalised_entropy
from hf_cl.tuner.mixed import run_mixed
from hf_cl.tuner.model import MaskModel
from hf_cl.tuner.rows import Bare, NoRowsError, Shares

MOST_ROWS = 512
"""Of a batch in which every text is asked of several tasks."""
Inputs = Mapping[str, Tensor]


class TaskView:
    """Finished tasks of a model in evaluation mode."""

    def __init__(self, tuner: MaskModel, adapters: Sequence[str], gaussians: Callable[[], Gaussians]) -> None:
        """Take the model, its tasks' adapters, and what reads the state that was collected of them."""
        self._tuner, self._adapters, self.gaussians = tuner, list(adapters), gaussians

    @property
    def classes(self) -> list[int]:
        """Number of labels of each task."""
        return [int(self._tuner.peft_config[adapter].num_labels or 0) for adapter in self._adapters]

    def features(self, inputs: Inputs) -> Tensor:
        """Return the bare base's features, by one forward."""
        moved = self._moved(inputs)
        return bare_features(self._tuner, moved)

    def logits(self, inputs: Inputs) -> list[Tensor]:
        """Return every task's logits; tasks share batches of up to `MOST_ROWS` rows."""
        moved, count = self._moved(inputs), len(inputs["input_ids"])
        width, found = max(1, MOST_ROWS // count), list[Tensor]()
        for start in range(0, len(self._adapters), width):
            adapters = self._adapters[start : start + width]
            names = [adapter for adapter in adapters for _ in range(count)]
            whole = {name: tensor.repeat(len(adapters), *[1] * (tensor.ndim - 1)) for name, tensor in moved.items()}
            with torch.no_grad():
                output: Any = run_mixed(self._tuner, names, (), whole)
            found += [part.float() for part in output.logits.split(count)]
        return [logits[:, :classes] for logits, classes in zip(found, self.classes, strict=True)]

    def slopes(self, inputs: Inputs, shares: Tensor) -> Tensor:
        """Return how the entropy rises with each task's share, each head's counted by its share."""
        moved = self._moved(inputs)
        try:
            return self._slopes(moved, shares)
        except NoRowsError:  # one text at a time has no rows to be told apart
            each = [{name: tensor[row : row + 1] for name, tensor in moved.items()} for row in range(len(shares))]
            return torch.cat([self._slopes(one, shares[row : row + 1]) for row, one in enumerate(each)])

    def _slopes(self, inputs: Inputs, shares: Tensor) -> Tensor:
        free = shares.detach().float().to(next(iter(inputs.values())).device).requires_grad_()
        plan = Shares(self._adapters, free)
        with torch.enable_grad(), self._tuner.planned(plan):
            entropies = [normalised_entropy(logits) for logits in self._heads(plan, inputs)]
            total = (free * torch.stack(entropies, 1)).sum()
            (slopes,) = torch.autograd.grad(total, free)
        return slopes.cpu()

    def _heads(self, plan: Shares, inputs: Inputs) -> Iterator[Tensor]:
        """Yield each head's logits on the mixed network; its encoder runs once, unless a head is part of it."""
        model = self._tuner.model
        encoder, found = model.base_model, list[Any]()
        heads = [layer for layer in self._tuner.own_layers() if not layer.is_norm]
        within = {id(module) for module in encoder.modules()}
        handle = encoder.register_forward_hook(lambda _, __, output: found.append(output))
        try:
            plan.head = self._adapters[0]
            yield model(**inputs).logits
        finally:
            handle.remove()
        with _answer(encoder, None if any(id(head) in within for head in heads) else found[0]):
            for adapter in self._adapters[1:]:
                plan.head = adapter
                yield model(**inputs).logits

    def _moved(self, inputs: Inputs) -> dict[str, Tensor]:
        device = next(self._tuner.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in inputs.items()}


def bare_features(tuner: MaskModel, inputs: Inputs) -> Tensor:
    """Return the bare base's features of a batch, (n, d) float32 on the CPU; the model is in evaluation mode.

    Args:
        tuner: The masked model.
        inputs: The batch, on the model's device.
    """
    with tuner.planned(Bare()), torch.no_grad():
        return mean_features(tuner.model, lambda: tuner.model(**inputs), inputs.get("attention_mask"))


@contextmanager
def _answer(module: nn.Module, output: Any) -> Iterator[None]:
    """Make a module answer with what it has given before; None lets it compute."""
    if output is None:
        yield
        return
    held: dict[str, Any] = module.__dict__
    held["forward"] = lambda *_, **__: output
    try:
        yield
    finally:
        held.pop("forward", None)
