"""The Trainer callback that pulls the encoder back to where it began: SFA, averaging inside the training.

    theta <- (1 - beta) theta + beta theta_o      every ceil(period * N) optimizer steps, and at step N, the last

`theta_o`, the anchor, is the model at the end of the task before; N the task's optimizer steps. Averages are taken in
`on_step_end`, so a checkpoint or an evaluation of that step has them in it, and once where the last step is a periodic
one. Heads are never averaged, and the optimizer keeps its moments (the paper does not say).

Source: SFA, "Soup to go", arXiv 2501.05559, algorithm 1.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_cl.errors import ConfigError
from hf_cl.layers.base import encoder_tensors
from hf_cl.layers.targets import find_head
from hf_cl.merging.sfa import sfa
from hf_cl.ownership.digest import digest
from hf_cl.training.guards import refuse_sharding


class AveragingCallback(TrainerCallback, ExportableState):
    """Averages a model, while it trains on a new task, with what it was before.

    The first task of a stream is not averaged: train it without this. To resume in the middle of a task, make it from
    the same anchor again, which is the model before the task, not that of the checkpoint; another one is refused.

    Under `load_best_model_at_end` the model ends as its best checkpoint, averaged as that one was, and not once more.
    A training that another callback stops early is averaged at its end.

    Example:
        >>> from hf_cl import AveragingCallback
        >>> # learned = AutoModelForSequenceClassification.from_pretrained("model-after-the-first-task")
        >>> # callback = AveragingCallback(learned, period=0.25, beta=0.5)
        >>> # Trainer(model=learned, args=args, train_dataset=second_task, callbacks=[callback]).train()
    """

    def __init__(
        self,
        anchor: "nn.Module | Mapping[str, Tensor]",
        *,
        period: float = 0.25,
        beta: float = 0.25,
        head: Iterable[str] | None = None,
    ) -> None:
        """Hold the anchor, in float32.

        Args:
            anchor: The model as it is before the task, which is copied, or such a model's tensors by name, which are
                held. They stay on the device they are on, the CPU for instance, and go to the model's one at a time.
            period: Share of the task's steps between two averages, in (0, 1]; 1 averages at the end alone.
            beta: Share of the anchor in an average, in [0, 1].
            head: Names of a model's layers that are not averaged; None finds its head. Of tensors, those that are named
                by none are averaged all.

        Raises:
            ConfigError: A number is out of its range, or the model has adapters.
        """
        if not 0 < period <= 1:
            raise ConfigError(f"period: expected a share of the steps in (0, 1], found {period!r}.")
        if not 0 <= beta <= 1:
            raise ConfigError(f"beta: expected a share of the anchor in [0, 1], found {beta!r}.")
        is_model = isinstance(anchor, nn.Module)
        tensors = _encoder(anchor, head) if isinstance(anchor, nn.Module) else _others(anchor, head)
        self.anchor = {
            name: tensor.detach().to(torch.float32, copy=is_model)
            for name, tensor in sorted(tensors.items())
            if tensor.is_floating_point()
        }
        broken = [name for name, tensor in self.anchor.items() if not bool(tensor.isfinite().all())]
        if broken:
            raise ConfigError(f"anchor: {broken[0]} holds NaN or infinity. Take a model from before it diverged.")
        self.period, self.beta = period, beta
        self.steps: list[int] = []
        """Optimizer steps after which the model was averaged."""
        self._digest = digest(self.anchor.items())

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint says of this: options, the steps it averaged at, and which anchor it had."""
        return {
            "args": {"period": self.period, "beta": self.beta},
            "attributes": {"steps": list(self.steps), "anchor": self._digest},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the model, and in the middle of a task that this is the anchor it began with.

        Raises:
            ConfigError: The model is another, sharded or has adapters; or the checkpoint is of another averaging.
        """
        refuse_sharding(args)
        _refuse_adapters(kwargs["model"])
        held = _tensors(kwargs["model"])
        strange = [name for name in self.anchor if name not in held or held[name].shape != self.anchor[name].shape]
        if strange:
            raise ConfigError(
                f"anchor: {strange[0]} is no tensor of this {type(kwargs['model']).__name__}, or has another shape. "
                f"Give the same model as it was before the task."
            )
        self.steps = []
        if state.global_step:
            self._go_on(state)

    def _go_on(self, state: TrainerState) -> None:
        recorded: Any = (state.stateful_callbacks or {}).get(type(self).__name__)
        ours = self.state()
        if not isinstance(recorded, dict) or recorded.get("args") != ours["args"]:
            found = recorded.get("args") if isinstance(recorded, dict) else "no averaging"
            raise ConfigError(f"checkpoint: was made with {found}, not with {ours['args']}. Resume it with the same.")
        held = recorded["attributes"]
        if held["anchor"] != self._digest:
            raise ConfigError(
                "anchor: the checkpoint's training began from another model. Make the callback from the model before "
                "the task, and give the checkpoint to `resume_from_checkpoint` alone."
            )
        self.steps = [int(step) for step in held["steps"]]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Average at the periodic steps, and at the last."""
        step, last = state.global_step, state.max_steps
        # Rounded first: .1 * 30 is a little more than 3, and its ceiling would be 4.
        every = math.ceil(round(self.period * last, 9))
        if step % every == 0 or step == last:
            self._average(kwargs["model"], step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Average a training that was stopped before its last step, where its end is not a checkpoint of it."""
        averaged = bool(self.steps) and self.steps[-1] == state.global_step
        if state.global_step and not averaged and not args.load_best_model_at_end:
            self._average(kwargs["model"], state.global_step)

    @torch.no_grad()
    def _average(self, model: nn.Module, step: int) -> None:
        self.steps.append(step)
        if self.beta == 0:  # not a bit changes, the sign of a zero neither
            return
        held = _tensors(model)
        for name, anchor in self.anchor.items():
            tensor = held[name]
            tensor.copy_(sfa({name: tensor}, {name: anchor}, self.beta)[name])


def _encoder(model: nn.Module, head: Iterable[str] | None) -> dict[str, Tensor]:
    _refuse_adapters(model)
    return dict(encoder_tensors(model, find_head(model, head, ())))


def _others(tensors: Mapping[str, Tensor], head: Iterable[str] | None) -> dict[str, Tensor]:
    skip = tuple(f"{name}." for name in head or ())
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(skip)}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _refuse_adapters(model: nn.Module) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ConfigError(
            "model: it has adapters, and the average of two factors is not that of their product. Train the whole "
            "encoder, or average adapters of one base with `hf-cl merge lora_arithmetic`."
        )
