"""A narrow network beside a frozen base, each of whose units belongs to one task.

Layer l reads the base's hidden state of that layer and the side units of the layer below, token by token:

    z_l = min(max(W_l [h_l, z_(l-1)] + b_l, 0), 6)

and a task's readout adds to its head's logits what it makes of the units, averaged over a text's tokens. A unit reads
units owned no later than itself, never a later one: its row of W_l is 0 there. No normalisation runs across units, and
none leaves [0, 6], so whatever a later unit's weights are, 0 times its value is 0: a later task cannot reach an earlier
one. All tasks' units are computed in the same forward, whichever task is asked for.

Inside a pretrained transformer there are no such units: its residual stream and norms mix all channels.

Source: EideticNet, arXiv 2502.09500 (owners, pruning by importance, fresh free units); the ladder is ours.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_cl.layers.heads import task_generator
from hf_cl.ownership.owner import FREE


class SideNetwork(nn.Module):
    """All tasks' units; owned rows are buffers, those of the task that trains a parameter of their own."""

    owner: Tensor
    weight: Tensor
    bias: Tensor
    alive: Tensor
    importance: Tensor
    _candidates: Tensor

    def __init__(self, layers: int, inputs: int, width: int, *, transfer: bool, seed: int) -> None:
        """Make one whose units are all free.

        Args:
            layers: Layers of the base.
            inputs: Width of its hidden states.
            width: Units of each side layer.
            transfer: Whether a task reads the units of earlier tasks.
            seed: Of fresh units.
        """
        super().__init__()
        self.inputs, self.width, self.transfer, self.seed = inputs, width, transfer, seed
        self.register_buffer("owner", torch.full((layers, width), FREE, dtype=torch.int16))
        self.register_buffer("weight", torch.zeros(layers, width, inputs + width))
        self.register_buffer("bias", torch.zeros(layers, width))
        self.rows, self.biases, self.readouts = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.task: int | None = None
        """The task that trains."""
        self.register_buffer("alive", torch.zeros(layers, width, dtype=torch.bool), persistent=False)
        self.register_buffer("importance", torch.zeros(layers, width), persistent=False)

    # --- who reads whom -----------------------------------------------------------------------------------

    def read_by(self, task: int) -> Tensor:
        """Return the units that a task's readout and units may read, bool (layers, width)."""
        if self.transfer:
            owned = (self.owner != FREE) & (self.owner <= task)
        else:
            owned = self.owner == task
        return owned | self.alive if task == self.task else owned

    def columns(self, task: int, layer: int) -> Tensor:
        """Return which inputs a task's units of one layer read, bool (inputs + width,)."""
        below = self.read_by(task)[layer - 1] if layer else torch.zeros_like(self.owner[0], dtype=torch.bool)
        return torch.cat([torch.ones(self.inputs, dtype=torch.bool, device=below.device), below])

    # --- a task's life ------------------------------------------------------------------------------------

    def begin(self, task: int, classes: int, share: float = 1.0) -> int:
        """Give a new task free units, freshly drawn, and a readout of zeros; return how many units those are.

        Weights are uniform within 1 / sqrt(inputs + width), biases too.

        Args:
            task: Its number.
            classes: Rows of the readout.
            share: Of each layer's free units that it may train, rounded up; the first ones, since all are alike.
        """
        key, device = _key(task), self.weight.device
        free = self.owner == FREE
        most = torch.ceil(share * free.sum(1, keepdim=True))
        self.task, self.alive = task, free & (free.cumsum(1) <= most)
        self.importance.zero_()
        count, inputs = int(self.alive.count_nonzero()), self.weight.shape[2]
        bound = 1 / math.sqrt(inputs)
        for held, shape in ((self.rows, (count, inputs)), (self.biases, (count,))):
            name = "rows" if held is self.rows else "biases"
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=task_generator(self.seed, task, name))
            held[key] = nn.Parameter(drawn.to(device))
        self.add_readout(task, classes)
        self._candidates = self.alive.clone()
        return count

    def add_readout(self, task: int, classes: int) -> None:
        """Give a task a readout of zeros: before training it adds nothing to the head's logits."""
        self.readouts[_key(task)] = nn.Parameter(torch.zeros(classes, self.owner.numel(), device=self.weight.device))

    def prune(self, count: int) -> int:
        """Take the least important of the living units out; return how many. One always stays.

        Importance is summed |gradient x output| since the last pruning, of length 1 in each layer.
        """
        count = min(count, int(self.alive.count_nonzero()) - 1)
        if count < 1:
            return 0
        scaled = self.importance / self.importance.norm(dim=1, keepdim=True).clamp_min(1e-30)
        ranked = scaled.where(self.alive, torch.inf).view(-1)
        self.alive.view(-1)[ranked.sort(stable=True).indices[:count]] = False
        self.importance.zero_()
        return count

    def commit(self) -> None:
        """Make the living units the task's own, rounded to bfloat16; the others are free again."""
        task = int(self.task or 0)
        key = _key(task)
        with torch.no_grad():
            for layer in range(self.owner.shape[0]):
                weight, bias = self._layer(layer)
                mine = self.alive[layer]
                # Not a product with 0, which would leave zeros of either sign.
                read = weight.where(self.columns(task, layer), torch.zeros_like(weight))
                self.weight[layer][mine] = read[mine].bfloat16().float()
                self.bias[layer][mine] = bias[mine].bfloat16().float()
            self.readouts[key].mul_(self.read_by(task).view(-1))
            self.owner[self.alive] = task
        self._finish(key)

    def _finish(self, key: str) -> None:
        self.task = None
        self.alive = torch.zeros_like(self.alive)
        _drop(key, self.rows, self.biases)
        self.readouts[key].requires_grad_(False)

    def forget(self, task: int) -> None:
        """Take a task out, finished or not: its units are free."""
        mine = self.owner == task
        self.weight[mine] = 0.0
        self.bias[mine] = 0.0
        self.owner[mine] = FREE
        _drop(_key(task), self.rows, self.biases, self.readouts)
        if self.task == task:
            self.task = None
            self.alive = torch.zeros_like(self.alive)

    def place(self, task: int, units: Tensor, weight: Tensor, bias: Tensor) -> None:
        """Put a finished task's units in place.

        Args:
            task: Its number; all tasks before it are in place.
            units: int, flat positions (layer * width + unit), rising; all free.
            weight: The inputs that its units read, layer by layer, flat.
            bias: One a unit.

        Raises:
            ValueError: They are not such a task's.
        """
        flat = units.long().to(self.owner.device)
        rising = bool((flat[1:] > flat[:-1]).all())
        if not rising or (flat.numel() and not 0 <= int(flat[0]) <= int(flat[-1]) < self.owner.numel()):
            raise ValueError("units that do not rise, or lie outside of the network")
        if bool((self.owner.view(-1)[flat] != FREE).any()) or bias.shape != flat.shape:
            raise ValueError("units that another task owns, or biases of other units")
        self.owner.view(-1)[flat] = task
        self.bias.view(-1)[flat] = bias.float().to(self.bias.device)
        used = 0
        for layer, (mine, columns) in enumerate(self._own(task)):
            size = int(mine.count_nonzero()) * int(columns.count_nonzero())
            part = weight[used : used + size]
            if part.numel() != size:
                raise ValueError(f"{weight.numel()} weights that end within layer {layer}")
            rows = torch.zeros(int(mine.count_nonzero()), columns.numel(), device=self.weight.device)
            rows[:, columns] = part.view(-1, int(columns.count_nonzero())).float().to(rows.device)
            self.weight[layer][mine] = rows
            used += size
        if used != weight.numel():
            raise ValueError(f"{weight.numel()} weights for {used}")

    def units(self, task: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a finished task's units as `place` takes them; what no unit reads is left out."""
        flat = (self.owner == task).view(-1).nonzero().squeeze(1)
        parts = [
            self.weight[layer][mine][:, columns].reshape(-1) for layer, (mine, columns) in enumerate(self._own(task))
        ]
        return flat.int(), torch.cat(parts), self.bias.view(-1)[flat]

    def _own(self, task: int) -> Sequence[tuple[Tensor, Tensor]]:
        return [(self.owner[layer] == task, self.columns(task, layer)) for layer in range(self.owner.shape[0])]

    # --- computing ----------------------------------------------------------------------------------------

    def _layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return a layer's weight and bias, those of the task that trains in their places."""
        weight, bias = self.weight[layer], self.bias[layer]
        if self.task is None:
            return weight, bias
        before = int(self._candidates[:layer].count_nonzero())
        where = self._candidates[layer].nonzero().squeeze(1)
        mine, alive = slice(before, before + where.shape[0]), self.alive[layer][where]
        rows = self.rows[_key(self.task)][mine] * self.columns(self.task, layer) * alive[:, None]
        return weight.index_copy(0, where, rows), bias.index_copy(0, where, self.biases[_key(self.task)][mine] * alive)

    def forward(self, states: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """Return every unit's mean over the tokens of a text.

        Args:
            states: The base's hidden states, one (texts, tokens, inputs) a layer.
            mask: (texts, tokens), 1 at real tokens; None where there is no padding.

        Returns:
            (texts, layers * width), float32.
        """
        found, below = [], None
        real = torch.ones(states[0].shape[:2], device=states[0].device) if mask is None else mask.float()
        share = (real / real.sum(1, keepdim=True).clamp_min(1))[..., None]
        for layer, state in enumerate(states):
            weight, bias = self._layer(layer)
            out = F.linear(state.float(), weight[:, : self.inputs], bias)
            if below is not None:
                out = out + F.linear(below, weight[:, self.inputs :])
            below = F.relu6(out)
            if below.requires_grad and self.task is not None:
                below.register_hook(partial(self._account, layer, below.detach()))
            found.append((below * share).sum(1))
        return torch.cat(found, dim=1)

    def _account(self, layer: int, output: Tensor, grad: Tensor) -> None:
        """Add a step's |gradient x output| to the layer's importance."""
        self.importance[layer] += (grad.float() * output.float()).abs().mean((0, 1))

    def read(self, task: int, units: Tensor) -> Tensor:
        """Return what a task's readout makes of the units' means, (texts, classes) float32."""
        readout: Any = self.readouts[_key(task)]
        return F.linear(units, readout * self.read_by(task).view(-1))


def _key(task: int) -> str:
    return f"task{task}"


def _drop(key: str, *held: nn.ParameterDict) -> None:
    for parameters in held:
        if key in parameters:
            del parameters[key]
