"""The Trainer callback that takes one masked adapter from its start to its commit.

    on_train_begin           checks, start (fresh or KKT), digest of what earlier tasks own, groups, schedules
    on_step_end              mask phase: refresh masks; at the claim: fix them, open the values
    on_pre_optimizer_step    stop at a non-finite gradient; the off phase's gradients become None
    on_evaluate              keep the best state of the last phase (load_best_model_at_end)
    on_train_end             commit: claim, round, freeze; audit the digest

One `Trainer.train()` holds all of it. The off phase is off: its gradients are None when the optimizer
steps, so momentum, decay and Adam's step count do not move, and clipping never saw them.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_cl.errors import ConfigError, OwnershipError, TrainingError
from hf_cl.layers.heads import PROBLEMS
from hf_cl.starts.kkt import Choice
from hf_cl.training.groups import (
    ROLES,
    parameter_groups,
    require_unstepped,
    role_of,
    schedule,
    set_groups,
    set_schedule,
)
from hf_cl.training.guards import (
    forget_preparation,
    keep_from_ddp,
    refuse_partial_push,
    refuse_sharding,
    require_finite,
)
from hf_cl.training.kkt_start import KKT, start_by_kkt
from hf_cl.tuner.model import MaskModel
from hf_cl.tuner.names import is_ours

logger = logging.getLogger(__name__)
DENSITY_WARMUP = 0.25
"""Share of the mask phase in which a fresh mask grows to its density; docs/log.md, 2026-11-21, has what chose it."""
SCARCE = 0.1
"""Share of its budget under which a task's trainable entries are called scarce."""


class OwnershipCallback(TrainerCallback, ExportableState):
    """Trains one masked adapter with the user's own Trainer and arguments.

    The Trainer loads a checkpoint's optimizer before any callback is asked. So to resume in the middle of a
    task, make the optimizer over `parameter_groups` and pass it as `optimizers=`, as `train_task` does. Under several
    processes add `Agreement()` (hf_cl.training.agreement), which stops the job where ranks hold different bits.

    Example:
        >>> from transformers import Trainer
        >>> callback = OwnershipCallback("news", mask_share=0.5)
        >>> # Trainer(model=model, args=args, train_dataset=data, callbacks=[callback]).train()
    """

    def __init__(
        self,
        adapter: str,
        *,
        mask_share: float = 1.0,
        density_warmup: float = DENSITY_WARMUP,
        learning_rates: Mapping[str, float] | None = None,
        start: KKT | None = None,
    ) -> None:
        """Say how the adapter's training is divided.

        Args:
            adapter: The adapter that is active and not committed.
            mask_share: Share of the optimizer steps that train the mask; the rest train values. Below 1
                needs a config with `trains` other than "nothing".
            density_warmup: Share of the mask phase in which the mask grows to its density, evenly. A fresh mask that is
                whole at once exchanges its share of every weight for random signs after one step; no learning rate
                mends that. A mask that starts from an earlier task's is whole at once.
            learning_rates: Of `scores`, `values` and `head`; one left out is the arguments' learning rate.
            start: Where scores begin; None begins fresh.
        """
        if not 0 < mask_share <= 1:
            raise ConfigError(f"mask_share: expected a share in (0, 1], found {mask_share!r}.")
        if not 0 <= density_warmup <= 1:
            raise ConfigError(f"density_warmup: expected a share in [0, 1], found {density_warmup!r}.")
        self.adapter, self.mask_share, self.start = adapter, mask_share, start
        self.density_warmup = density_warmup
        self.learning_rates = dict(learning_rates or {})
        self.choice: Choice | None = None
        self.facts: dict[str, float] = {}
        self._claim_step = 0
        self._whole = False
        self._owned = ""
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self.best: dict[str, Tensor] = {}
        self._best_value: float | None = None
        self._checkpoint: str | None = None

    def state(self) -> dict[str, Any]:
        """Return, as JSON values, what a checkpoint needs besides tensors to go on exactly."""
        args = {name: getattr(self, name) for name in ("adapter", "mask_share", "density_warmup", "learning_rates")}
        choice = asdict(self.choice) if self.choice is not None else None
        return {"args": args, "attributes": {"kept": [self._whole, self._best_value, choice]}}

    def _go_on(self, state: TrainerState) -> None:
        """Take back what `state` gave, out of a checkpoint.

        Raises:
            TrainingError: The checkpoint is of a training without this callback.
        """
        held = (state.stateful_callbacks or {}).get(type(self).__name__) or []
        entries = held if isinstance(held, list) else [held]
        kept = [entry["attributes"]["kept"] for entry in entries if entry["args"]["adapter"] == self.adapter]
        if not kept:
            raise TrainingError(
                f"adapter {self.adapter!r}: the checkpoint at step {state.global_step} was saved without its "
                f"OwnershipCallback, so how its mask had grown is not known. Train it from the start."
            )
        self._whole, best, choice = kept[0]
        self._best_value = best if self.best else None  # the Trainer's own checkpoints do not hold its tensors
        if choice is not None:  # JSON has no keys that are numbers
            accuracies = {int(task): accuracy for task, accuracy in choice["accuracies"].items()}
            self.choice = Choice(**{**choice, "accuracies": accuracies})

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make the Trainer prepare the model for itself, whatever an earlier one has made of it."""
        model = kwargs["model"]
        forget_preparation(model)
        keep_from_ddp(model, args, (name for name, _ in model.named_buffers() if is_ours(name)))
        if args.torch_compile:  # every task adds graphs, and Dynamo gives up at eight
            torch.compiler.reset()

    # --- before the first step ------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check, start, and take over optimizer and scheduler.

        Raises:
            ConfigError: The model, backend, optimizer or scheduler cannot train this adapter.
            OwnershipError: Values are to train and no layer has a free entry.
        """
        tuner = self._tuner(kwargs["model"])
        self._check(tuner, args)
        tuner.require_free(self.adapter)
        self._checkpoint = None
        steps = state.max_steps
        if steps < 2 and not self._one_phase(tuner):
            raise ConfigError(f"max_steps: {steps} step has no room for a mask phase and a weight phase. Train longer.")
        self._claim_step = steps if self._one_phase(tuner) else max(1, min(steps - 1, round(self.mask_share * steps)))
        if state.global_step > 0:
            self._go_on(state)
        else:
            self._begin(tuner, args, kwargs["train_dataloader"])
        # After the start, which loads and unloads tasks that lie on disk: the digest covers those that are loaded.
        self._owned = tuner.owned_digest(self._index(tuner))
        if tuner.phase(self.adapter) == "mask":
            tuner.refresh_masks(self.adapter, self._grown(state.global_step))
        self._parameters = {role: [] for role in ROLES}
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.requires_grad:
                self._parameters[role_of(name)].append(parameter)
        self._take_over(kwargs["model"], args, steps, kwargs["optimizer"], kwargs["lr_scheduler"])
        self.facts = tuner.facts(self.adapter)

    def _begin(self, tuner: MaskModel, args: TrainingArguments, dataloader: Any) -> None:
        """Begin fresh or by KKT; what is an earlier task's mask is whole at once."""
        self.best, self._best_value = {}, None
        if self.start is not None:
            rate = self._rate("scores", args)
            self.choice = start_by_kkt(tuner, self.adapter, dataloader, self.start, rate, args.device)
        self._whole = self.choice is not None and self.choice.source is not None

    def _tuner(self, model: Any) -> MaskModel:
        tuner = getattr(model, "base_model", None)
        if not isinstance(tuner, MaskModel):
            raise ConfigError(
                f"OwnershipCallback: expected get_peft_model(model, MaskConfig(...)), found {type(model).__name__}."
            )
        return tuner

    def _check(self, tuner: MaskModel, args: TrainingArguments) -> None:
        refuse_sharding(args)
        if self.adapter not in tuner.peft_config:
            raise ConfigError(f"adapter {self.adapter!r}: the model has {', '.join(tuner.peft_config)}. Add it first.")
        refuse_partial_push(args, self.adapter)
        if tuner.mask_layers()[0].merged:
            raise ConfigError(
                f"adapter {self.adapter!r}: a task is merged into the base. Call unmerge_adapter() first."
            )
        if self.start is not None and tuner.peft_config[self.adapter].problem != PROBLEMS[0]:
            raise ConfigError(
                f"start: KKT asks neighbours for their class, and adapter {self.adapter!r} is a "
                f"{tuner.peft_config[self.adapter].problem} task. Start it fresh (start=None)."
            )
        if tuner.phase(self.adapter) == "committed":
            raise ConfigError(f"adapter {self.adapter!r} is committed and never changes again. Add a new adapter.")
        if tuner.active_adapters != [self.adapter]:
            raise ConfigError(
                f"adapter {self.adapter!r}: active is {', '.join(tuner.active_adapters) or 'none'}. "
                f"Call model.set_adapter({self.adapter!r}) before the Trainer is made."
            )
        config = tuner.peft_config[self.adapter]
        if config.one_phase != (self.mask_share == 1.0):
            raise ConfigError(
                f"adapter {self.adapter!r}: trains={config.trains!r} and mask_share={self.mask_share}. A mask alone "
                f"has mask_share 1 and trains nothing; values need a mask_share below 1, or `joint`."
            )

    def _one_phase(self, tuner: MaskModel) -> bool:
        return bool(tuner.peft_config[self.adapter].one_phase)

    def _grown(self, step: int) -> float:
        """Return the share of its density that the mask has after `step` optimizer steps."""
        warm = self.density_warmup * self._claim_step
        return 1.0 if self._whole or step >= warm else step / warm

    def _index(self, tuner: MaskModel) -> int:
        return int(tuner.peft_config[self.adapter].task_index or 0)

    def _rate(self, role: str, args: TrainingArguments) -> float:
        return float(self.learning_rates.get(role, args.learning_rate))

    def _take_over(self, model: nn.Module, args: TrainingArguments, steps: int, optimizer: Any, scheduler: Any) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        ours = all("role" in group for group in inner.param_groups)
        if not ours:
            require_unstepped(inner)
        held = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
        mine = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        if held != mine and ours and inner.state:
            require_unstepped(inner)
        if held != mine:
            raise ConfigError(
                f"optimizer: it holds {len(held - mine)} tensors that do not train and lacks {len(mine - held)} that "
                f"do. Activate adapter {self.adapter!r} before the optimizer is made, or let the Trainer make it."
            )
        if not ours:
            rates = {role: self._rate(role, args) for role in ("scores", "values", "head")}
            set_groups(optimizer, parameter_groups(model.named_parameters(), rates, args.weight_decay))
        claim = self._claim_step
        both = [(0, claim), (claim, steps)] if claim < steps else [(0, steps)]
        joint = self._tuner(model).peft_config[self.adapter].joint
        spans = {"scores": [(0, claim)], "values": both if joint else both[1:], "head": both}
        set_schedule(optimizer, scheduler, {role: schedule(args, span) for role, span in spans.items()})

    # --- each step --------------------------------------------------------------------------------------

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop at a non-finite gradient; drop what DDP may have filled in for the off phase."""
        tuner = self._tuner(kwargs["model"])
        off = "values" if tuner.phase(self.adapter) == "mask" else "scores"
        for parameter in [] if tuner.peft_config[self.adapter].joint else self._parameters[off]:
            parameter.grad = None
        if not args.fp16:  # its scaler overflows on purpose, and skips the step itself
            require_finite((p for held in self._parameters.values() for p in held), state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the values that moved into the composed weight: outside the forward, which may be compiled.

        A fused optimizer moves them past torch's version counter, so nobody else would notice.
        """
        for layer in self._tuner(kwargs["model"]).mask_layers():
            layer.write_values()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refresh the masks; at the claim's step fix them and open the values."""
        tuner = self._tuner(kwargs["model"])
        if tuner.phase(self.adapter) != "mask":
            return
        if state.global_step < self._claim_step or self._one_phase(tuner):
            tuner.refresh_masks(self.adapter, self._grown(state.global_step))
            return
        opened = tuner.begin_weight_phase(self.adapter)
        for scores in self._parameters["scores"]:  # they never step again: eight bytes an entry are free
            kwargs["optimizer"].state.pop(scores, None)
        self.facts = tuner.facts(self.adapter)
        self.best, self._best_value, state.best_metric, self._checkpoint = {}, None, None, None
        if opened == 0:
            logger.warning("%s: its mask holds no free entry, so nothing is left to train but its head.", self.adapter)
        elif self.facts["trainable_share"] < SCARCE:
            logger.warning(
                "%s: only %.1f %% of its budget is free to train, %.1f %% of the store is left.",
                self.adapter,
                100 * self.facts["trainable_share"],
                100 * self.facts["capacity_left"],
            )

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add density, overlap, trainable share and capacity left to what is logged; see `report_last`."""
        logs = kwargs.get("logs")
        if logs is not None and "loss" in logs:
            tuner = self._tuner(kwargs["model"])
            self.facts = tuner.facts(self.adapter)
            extra = {f"mask_{name}": round(value, 6) for name, value in self.facts.items()}
            logs.update(extra)
            state.log_history[-1].update(extra)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the best state of the last phase in memory: the Trainer's own best misses named adapters."""
        tuner = self._tuner(kwargs["model"])
        if not args.load_best_model_at_end:
            return
        name = args.metric_for_best_model or "loss"
        value = kwargs["metrics"].get(name if name.startswith("eval_") else f"eval_{name}")
        if value is None:
            raise ConfigError(f"metric_for_best_model: {name!r} is not among {', '.join(kwargs['metrics'])}.")
        # While the mask still grows it is not the one that would be committed.
        whole = self._one_phase(tuner) and self._grown(state.global_step) == 1
        if not (whole or tuner.phase(self.adapter) == "weight"):
            return
        better = value if args.greater_is_better else -value
        if self._best_value is None or better > self._best_value:
            self._best_value = better
            self.best = {key: tensor.detach().clone() for key, tensor in self._training(kwargs["model"])}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hide the best checkpoint from the Trainer's end: it would load what lies at its top, an adapter `default`."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._checkpoint, state.best_model_checkpoint = state.best_model_checkpoint, None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show it again: the Trainer spares the best checkpoint when it deletes old ones."""
        if self._checkpoint is not None:
            state.best_model_checkpoint, self._checkpoint = self._checkpoint, None

    def _training(self, model: nn.Module) -> list[tuple[str, Tensor]]:
        """Return what training moves, as it stands: trainable parameters and the kept thresholds."""
        moving: list[tuple[str, Tensor]] = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        suffix = f".hfcl_threshold.{self.adapter}"
        return moving + [(n, b) for n, b in model.named_buffers() if n.endswith(suffix)]

    # --- after the last step ----------------------------------------------------------------------------

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the best state, commit, and audit.

        Raises:
            TrainingError: Training stopped before the claim of a method that trains values.
            OwnershipError: Something that earlier tasks own has moved.
        """
        model, tuner = kwargs["model"], self._tuner(kwargs["model"])
        if self._checkpoint is not None:
            state.best_model_checkpoint, self._checkpoint = self._checkpoint, None
        if not self._one_phase(tuner) and tuner.phase(self.adapter) == "mask":
            raise TrainingError(
                f"adapter {self.adapter!r}: training stopped at step {state.global_step}, before its claim at step "
                f"{self._claim_step}. Nothing is committed. Train longer, or lower `mask_share`."
            )
        if self.best:
            with torch.no_grad():
                for name, tensor in self._training(model):
                    tensor.copy_(self.best[name])
            self.best, self._best_value = {}, None
        self.facts = tuner.facts(self.adapter)
        tuner.commit(self.adapter)
        self.facts |= tuner.facts(self.adapter) | {"trainable_share": self.facts["trainable_share"]}
        if tuner.peft_config[self.adapter].trains != "mask" and tuner.owned_digest(self._index(tuner)) != self._owned:
            raise OwnershipError(
                f"adapter {self.adapter!r}: what earlier tasks own has moved while it trained. Something outside this "
                f"library writes to the model; find it before you trust this model."
            )
