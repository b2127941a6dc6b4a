"""A hypernetwork that turns a task's embedding into low-rank factors, and the linear whose weight they mask.

For a linear of n x m weights it gives a (n, rank) and b (m, rank), and the semi-binary mask is

    M = |tanh(a b^T)|, and 0 but for the `density` share of entries with the largest |a b^T|

One trunk reads the task's embedding beside one of the layer, one output block serves all layers of a shape. So its size
grows neither with the tasks nor with the depth, but by a layer's embedding.

Source: HyperMask, arXiv 2310.00113; its network gives every entry of a mask, 100 times as many numbers as a base has.
The factors, blocks and embeddings of layers are ours.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_cl.layers.heads import task_generator
from hf_cl.layers.linear import Linear, apply_weight
from hf_cl.masks.select import kept_count, topk_mask

SAMPLE = 4096
"""Entries of a mask that its threshold is read off while it trains: the share kept is right to about one point."""
LAYER_SIZE = 24
FIRST = {"delta": (0.0, 0.3), "prune": (1.5, 0.1)}
"""What a b^T begins as: an even part, and the deviation of each factor's entries. `delta` begins near the base with
masks near 0; `prune` with masks near tanh 1.5, since a mask of 1 has no gradient."""
SPREAD = 0.02
"""Deviation of an output block's weights: what tells one layer and one task from another at the start."""


class Hypernetwork(nn.Module):
    """From a task's embedding to two factors a layer."""

    def __init__(
        self, shapes: Sequence[tuple[int, int]], *, task_size: int, hidden: int, rank: int, compose: str, seed: int
    ) -> None:
        """Make one with fresh weights, a function of the seed.

        Args:
            shapes: The masked weights', as they are stored.
            task_size: Numbers of a task's embedding.
            hidden: Units of each of the trunk's two layers.
            rank: Of a b^T.
            compose: `delta` or `prune`: where masks begin.
            seed: Of its weights and of the tasks' embeddings.
        """
        super().__init__()
        self.shapes, self.rank, self.task_size, self.seed = list(shapes), rank, task_size, seed
        with torch.device("meta"):  # what torch would draw here comes from the global generator
            self.layers = nn.Parameter(torch.empty(len(shapes), LAYER_SIZE))
            self.trunk = nn.Sequential(
                nn.Linear(task_size + LAYER_SIZE, hidden), nn.ELU(), nn.Linear(hidden, hidden), nn.ELU()
            )
            self.blocks = nn.ModuleDict({_name(s): nn.Linear(hidden, (s[0] + s[1]) * rank) for s in shapes})
        self.tasks = nn.ParameterDict()
        self.to_empty(device="cpu")
        self._begin(compose)

    def _begin(self, compose: str) -> None:
        """Draw all weights, each from a generator of its own."""
        even, deviation = FIRST[compose]
        with torch.no_grad():
            for name, tensor in self.named_parameters():
                generator = task_generator(self.seed, 0, f"hypernetwork.{name}")
                drawn = torch.empty(tensor.shape).normal_(generator=generator)
                if name.startswith("blocks."):
                    block = drawn * (SPREAD if tensor.ndim == 2 else deviation)
                    if tensor.ndim == 1:
                        block.view(-1, self.rank)[:, 0] += math.sqrt(even)
                    tensor.copy_(block)
                elif name == "layers":
                    tensor.copy_(drawn)
                else:
                    tensor.copy_(drawn / math.sqrt(tensor.shape[1]) if tensor.ndim == 2 else torch.zeros(tensor.shape))

    def add(self, key: str, task: int) -> None:
        """Add a task's embedding, normal(0, 1) by seed and the task's number."""
        drawn = torch.empty(self.task_size).normal_(generator=task_generator(self.seed, task, "embedding"))
        self.tasks[key] = nn.Parameter(drawn.to(self.layers.device))

    def outputs(self, tasks: Tensor) -> Tensor:
        """Return the raw outputs for embeddings (k, task_size): all factors of all layers, (k, numbers) float32."""
        return torch.cat([self._raw(tasks, layer) for layer in range(len(self.shapes))], dim=1)

    def _raw(self, tasks: Tensor, layer: int) -> Tensor:
        of_layer = self.layers[layer].expand(tasks.shape[0], -1)
        found: Tensor = self.blocks[_name(self.shapes[layer])](self.trunk(torch.cat([tasks, of_layer], dim=1)))
        return found

    def factors(self, key: str, layer: int) -> tuple[Tensor, Tensor]:
        """Return a task's a (n, rank) and b (m, rank) of one layer."""
        n, m = self.shapes[layer]
        raw = self._raw(self.tasks[key][None], layer).view(n + m, self.rank)
        return raw[:n], raw[n:]

    def threshold(self, key: str, layer: int, density: float) -> Tensor:
        """Return, from a seeded sample, the |a b^T| that a share `density` of a layer's entries exceeds."""
        with torch.no_grad():
            if density == 1:
                return torch.tensor(-1.0, device=self.layers.device)
            a, b = self.factors(key, layer)
            generator = task_generator(self.seed, layer, "sample")
            rows, columns = (torch.randint(f.shape[0], (SAMPLE,), generator=generator).to(f.device) for f in (a, b))
            found = (a[rows] * b[columns]).sum(1).abs()
            return found.kthvalue(max(1, SAMPLE - kept_count(SAMPLE, density))).values

    def shared(self) -> dict[str, Tensor]:
        """Return everything but the tasks' embeddings."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("tasks.")}


def semi_binary(a: Tensor, b: Tensor, threshold: Tensor) -> Tensor:
    """Return |tanh(a b^T)| where |a b^T| exceeds a threshold, else 0; differentiable, (n, m) float32."""
    product = a @ b.T
    return product.tanh().abs() * (product.detach().abs() > threshold)


def exact_kept(a: Tensor, b: Tensor, density: float) -> Tensor:
    """Return which entries a finished mask keeps, bool: exactly the density's count, ties by index."""
    product = (a @ b.T).abs()
    return topk_mask(product, kept_count(product.numel(), density))


def straight_through(mask: Tensor) -> Tensor:
    """Return a mask with one level where it is not 0, the mean of what is there; gradients are the mask's own."""
    flat = mask.detach()
    return mask + (level_of(flat) * (flat != 0) - flat)


def level_of(mask: Tensor) -> Tensor:
    """Return the mean of a mask's entries that are not 0."""
    return mask.sum() / mask.count_nonzero().clamp_min(1)


class HyperLinear(nn.Module):
    """A frozen linear whose weight is `A + M * V`: composed for good for a finished task, anew while one trains."""

    hyper_values: Tensor
    hyper_weight: Tensor | None

    def __init__(self, original: Linear, values: Tensor, *, delta: bool) -> None:
        super().__init__()
        # Not `base_layer`: PEFT takes whatever has that for a layer of its own.
        self.original = original.requires_grad_(False)
        self.delta = delta
        self.live: Callable[[], Tensor] | None = None
        """Gives the mask of the task that trains."""
        self.register_buffer("hyper_values", values, persistent=False)
        self.register_buffer("hyper_weight", None, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The base's own weight: T5 asks its linears for the dtype."""
        layer: Any = self.original
        weight: Tensor = layer.weight
        return weight

    def compose(self, mask: Tensor) -> Tensor:
        """Return `A + M * V` in the base's dtype; A is the pretrained weight (`delta`) or 0 (`prune`)."""
        layer: Any = self.original
        masked = mask * self.hyper_values
        weight: Tensor = (layer.weight.float() + masked if self.delta else masked).to(layer.weight.dtype)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Apply the active task's weight; the base's own where none is active."""
        layer: Any = self.original
        weight = self.hyper_weight
        if weight is None:
            weight = layer.weight if self.live is None else self.compose(self.live())
        return apply_weight(layer, x, weight)


def _name(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"
