"""EideticNet: a side network beside the frozen base whose units belong to tasks; one forward answers all of them.

A task trains a share of the free units (the paper: all), then gives back those it can do without: the least important
go, a few at a time, while validation accuracy stays within the tolerance; the first time that it does not, the last
pruning is undone. Survivors are the task's for good, the others begin afresh with the next task. A unit reads the base
and units owned no later than itself (`transfer: false`: its own task's alone): later tasks cannot reach earlier ones,
whatever their weights are.

All steps are the training's own: the first `train_share` of them train, the rest recover from prunings.

Source: EideticNet, arXiv 2502.09500; beside a frozen transformer instead of inside (layers/side_network.py), ours.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_cl.config import option
from hf_cl.errors import ConfigError, RunError
from hf_cl.layers.base import Base
from hf_cl.layers.side_network import SideNetwork
from hf_cl.layers.task_heads import TaskHeads, load_exactly
from hf_cl.ownership.digest import digest
from hf_cl.ownership.owner import FREE
from hf_cl.training.groups import parameter_groups
from hf_cl.training.guards import FiniteGradients
from hf_cl.training.method import Method, Packed, Settled

logger = logging.getLogger(__name__)
READOUT = "readout"


@dataclass(frozen=True)
class Options:
    """Options of `eidetic`."""

    width: int = option(128, help="Units beside each layer of the base, for all tasks together.", least=1)
    transfer: bool = option(True, help="Let a task read the units of earlier tasks.")
    share: float = option(
        0.25,
        help="Share of the free units that a task may train, so that later ones find some; 1: all.",
        above=0,
        most=1,
    )
    train_share: float = option(0.5, help="Share of a task's steps before its first pruning.", above=0, most=1)
    prunings: int = option(8, help="Prunings at most, evenly over the other steps.", least=0)
    prune_step: float = option(0.1, help="Share of a task's candidates that one pruning takes.", above=0, below=1)
    tolerance: float = option(
        0.02, help="Share of the best validation accuracy that a pruning may cost.", least=0, below=1
    )
    learning_rate: float = option(3e-3, help="Peak learning rate of the units.", above=0)
    head_learning_rate: float | None = option(
        None, help="Peak learning rate of readout and head; none: the training's.", above=0
    )


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> "Eidetic":
    """Wrap a base to learn a stream with a side network of owned units."""
    return Eidetic(base, options, seed)


class Eidetic(Method):
    """A frozen encoder, a side network for all tasks, a readout and a head a task."""

    kept_midway = False  # which units live, and what pruning would undo, is not among the parameters

    def __init__(self, base: Base, options: Options, seed: int) -> None:
        super().__init__(base)
        self.options, model = options, base.model
        model.requires_grad_(False)
        config = model.config
        self.side = SideNetwork(
            int(config.num_hidden_layers), int(config.hidden_size), options.width, transfer=options.transfer, seed=seed
        ).to(next(model.parameters()).device)
        self.heads = TaskHeads(base, seed)
        self.candidates = 0
        """Units that the task which trains began with."""
        model.side = self.side
        model.accepts_loss_kwargs = False
        self._answering: tuple[int, ...] = ()
        self._mask: Tensor | None = None
        self._units: Tensor | None = None
        model.register_forward_pre_hook(self._see_inputs, with_kwargs=True)
        model.base_model.register_forward_pre_hook(_ask_for_states, with_kwargs=True)
        model.base_model.register_forward_hook(self._compute)
        self.heads.layers[base.head[-1]].register_forward_hook(self._add)

    @property
    def model(self) -> nn.Module:
        """The base with its side network."""
        model: nn.Module = self.base.model
        return model

    def settled(self) -> Settled:
        """Return the head's layers."""
        return {"head_modules": list(self.base.head)}

    # --- one forward ----------------------------------------------------------------------------------------

    def _see_inputs(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)

    def _compute(self, encoder: nn.Module, args: Any, output: Any) -> None:
        states = output.get("hidden_states") or output["encoder_hidden_states"]
        self._units = self.side(states[1:], self._mask)

    def _add(self, layer: nn.Module, args: Any, logits: Tensor) -> Tensor:
        """Add the readouts of the tasks that answer to their heads' logits; a decoder has logits at every token."""
        if self._units is None or not self._answering:
            raise RunError("no task is active. Begin or activate one first.")
        read = torch.cat([self.side.read(task, self._units) for task in self._answering], dim=-1)
        return logits + (read if logits.ndim == 2 else read[:, None])

    def answers(self, **inputs: Tensor) -> dict[int, Tensor]:
        """Return every finished task's logits, (texts, classes) by its number, of one forward; the model as it stands.

        Args:
            inputs: What the base takes, without labels.
        """
        active, self._answering = self._answering, tuple(sorted(self.heads.labels))
        try:
            with self.heads.together(self._answering):
                logits = self.base.model(**inputs).logits
        finally:
            self._answering = active
        sizes = [len(self.heads.labels[task]) for task in sorted(self.heads.labels)]
        return dict(zip(sorted(self.heads.labels), logits.split(sizes, dim=-1), strict=True))

    # --- learning -------------------------------------------------------------------------------------------

    def begin(self, index: int, labels: tuple[str, ...]) -> None:
        """Give the task free units, a readout and a fresh head."""
        self.heads.add(index, labels)
        self.candidates = self.side.begin(index, len(labels), self.options.share)
        self._answering = (index,)
        if not self.candidates:
            logger.warning("task %d: no unit is free; what is left to train is its readout and its head.", index)

    def abandon(self, index: int) -> None:
        """Forget units, readout and head."""
        self.side.forget(index)
        self.heads.remove(index)
        self._answering = ()

    def groups(self, args: TrainingArguments) -> list[dict[str, Any]]:
        """Return the units' and the head's groups; the readout is the head's.

        Raises:
            ConfigError: `load_best_model_at_end`: the Trainer knows nothing of units that were pruned since.
        """
        if args.load_best_model_at_end:
            raise ConfigError("load_best_model_at_end: it would bring pruned units back. Train without it.")
        head = self.options.head_learning_rate
        rates = {"side": self.options.learning_rate, "head": args.learning_rate if head is None else head}
        return parameter_groups(
            self.model.named_parameters(),
            rates,
            args.weight_decay,
            lambda name: "side" if name.startswith(("side.rows.", "side.biases.")) else "head",
        )

    def callbacks(self) -> list[TrainerCallback]:
        """Return the guard against non-finite gradients, and what prunes."""
        return [FiniteGradients(), Pruning(self)]

    def commit(self, index: int) -> None:
        """Make the living units the task's own, and freeze readout and head."""
        self.side.commit()
        self.heads.freeze(index)

    def activate(self, index: int) -> None:
        """Make a task's readout and head active."""
        self._answering = (index,)
        self.heads.show(index)

    # --- what is known and stored -----------------------------------------------------------------------------

    def parts(self, index: int) -> dict[str, str]:
        """Return digests of the base, of all units that the task reads with their owners, and of readout and head."""
        side, read = self.side, self.side.read_by(index)
        names = ("units", "owners", "weights", "biases")
        held = (read.nonzero(), side.owner[read], side.weight[read], side.bias[read])
        return {
            "base": digest(self._base_tensors()),
            "units": digest(zip(names, held, strict=True)),
            "head": digest(sorted(self._head(index).items())),
        }

    def _base_tensors(self) -> list[tuple[str, Tensor]]:
        ours = ("side.", *(f"{name}." for name in self.base.head))
        named = dict([*self.base.model.named_parameters(), *self.base.model.named_buffers()])
        return [(name, named[name]) for name in sorted(named) if not name.startswith(ours)]

    def _head(self, index: int) -> dict[str, Tensor]:
        """Return a finished task's head, and of its readout what it reads."""
        readout = self.side.readouts[f"task{index}"].detach()[:, self.side.read_by(index).view(-1)]
        return {READOUT: readout.contiguous(), **self.heads.tensors(index)}

    def facts(self, index: int) -> dict[str, Any]:
        """Return the task's units and the weights of these, and the share of all units that is owned."""
        owner = self.side.owner
        return {
            "trainable": sum(tensor.numel() for tensor in self.side.units(index)[1:]),
            "units": int((owner == index).count_nonzero()),
            "capacity_used": float(((owner != FREE) & (owner <= index)).float().mean()),
        }

    def pack(self, index: int) -> Packed:
        """Return the task's units with the weights they read, in bfloat16; and its readout and head."""
        units, weight, bias = self.side.units(index)
        task = {"units": units.cpu(), "weight": weight.bfloat16().cpu(), "bias": bias.bfloat16().cpu()}
        return Packed(task, {name: tensor.cpu() for name, tensor in self._head(index).items()})

    def restore(self, index: int, labels: tuple[str, ...], packed: Packed) -> None:
        """Add a finished task's units, readout and head.

        Raises:
            RunError: The tensors are not those of such a task.
        """
        if set(packed.task) != {"units", "weight", "bias"} or READOUT not in packed.head:
            raise RunError(f"task {index}: its files hold {', '.join(sorted(packed.task))}. Restore them from a copy.")
        try:
            self.side.place(index, packed.task["units"], packed.task["weight"], packed.task["bias"])
        except ValueError as error:
            raise RunError(f"task {index}: its file holds {error}. Restore it from a copy.") from error
        self.heads.add(index, labels)
        self.side.add_readout(index, len(labels))
        readout = self.side.readouts[f"task{index}"].requires_grad_(False)
        read = self.side.read_by(index).view(-1)
        head = dict(packed.head)
        held = torch.zeros(len(labels), int(read.count_nonzero()), device=readout.device)
        load_exactly({READOUT: held}, {READOUT: head.pop(READOUT)}, f"task {index}: its readout")
        readout[:, read] = held
        self.heads.load(index, head)


class Pruning(TrainerCallback):
    """Prunes and looks at validation accuracy, in turns; undoes the pruning that cost more than the tolerance."""

    def __init__(self, method: Eidetic) -> None:
        self.method, self.options = method, method.options
        self._turns: Sequence[int] = ()
        self._best = 0.0
        self._kept: list[tuple[Tensor, Tensor]] | None = None
        self._asked = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lay out the turns: after the first share of the steps, then evenly, the last one at the last step."""
        steps, times = state.max_steps, self.options.prunings
        first = max(1, round(self.options.train_share * steps))
        turns = {first + round(turn * (steps - first) / times) for turn in range(times + 1)} if times else set()
        self._turns = sorted(turn for turn in turns if turn <= steps) if self.method.candidates > 1 else ()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for validation accuracy where it is a turn's."""
        self._asked = state.global_step in self._turns
        if self._asked:
            control.should_evaluate = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Undo the last pruning if it cost too much, and end; else prune again, but after the last step."""
        if not self._asked:
            return
        self._asked = False
        accuracy = float(kwargs["metrics"]["eval_accuracy"])
        if self._kept is not None and accuracy < self._best * (1 - self.options.tolerance):
            with torch.no_grad():
                for held, kept in self._kept:
                    held.copy_(kept)
            self._turns = ()
            return
        self._best = max(self._best, accuracy)
        if state.global_step < state.max_steps:
            trains = [parameter for parameter in self.method.model.parameters() if parameter.requires_grad]
            self._kept = [(held, held.detach().clone()) for held in (*trains, self.method.side.alive)]
            self.method.side.prune(max(1, round(self.options.prune_step * self.method.candidates)))


def _ask_for_states(
    encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "output_hidden_states": True}
