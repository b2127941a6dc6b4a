"""A task's training kept in its middle, and gone on with bit for bit by as many processes.

The Trainer's checkpoints would do the same with pickles; they are loaded and written in four places of it, and those
are replaced here. Its moments stay: `save_strategy` and `save_steps` if they are given, else every ten minutes.

What is kept: what training moves (`Method.moving`), optimizer, schedule, scaler, the callbacks' and the Trainer's own
state, and each rank's random state. Where in the data it is follows from the step: the sampler is seeded.
"""

import dataclasses
import json
import logging
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_cl import ranks
from hf_cl.errors import StoppedError
from hf_cl.storage.state_folder import State, StateFolder
from hf_cl.training.method import Method
from hf_cl.training.plain import from_plain, to_plain
from hf_cl.training.stop import StopRequest

logger = logging.getLogger(__name__)
MINUTES = 10.0
"""Between two states, where the training arguments do not say: what a kill costs at most, and far more than a save."""
MOVING, BEST = "moving.", "best."


@dataclasses.dataclass
class Keeping:
    """Where a task's training is kept, and what asks it to stop.

    Attributes:
        folder: The states.
        request: Set when the process is asked to stop.
        minutes: Between two states, unless the training arguments have a `save_strategy`.
        tell: Told a line when a training goes on, and when a state is passed over.
    """

    folder: StateFolder
    request: StopRequest
    minutes: float = MINUTES
    tell: Callable[[str], None] = logger.info


class Keeper(TrainerCallback):
    """Saves one task's training when it is time, and loads it again."""

    def __init__(self, keeping: Keeping, method: Method, index: int) -> None:
        """Look for a state of task number `index` to go on from.

        Raises:
            RunError: It was saved by another number of processes.
        """
        self.keeping, self.method, self.index = keeping, method, index
        folder, world = keeping.folder, ranks.world()
        place, torn = ranks.on_first(lambda: folder.newest(index, world))
        for error in torn:
            keeping.tell(f"passed over: {error}")
        self.state: State | None = folder.read(place) if place is not None else None
        if self.state is not None:
            keeping.tell(f"task {index} goes on after step {self.state.step}, from {place}")
        self.seconds = float(self.state.facts["seconds"]) if self.state is not None else 0.0
        self._began = self._last = time.monotonic()
        self._due = self._stop = self._epoch_over = False
        self._best: dict[str, Tensor] = {}

    @property
    def way_back(self) -> dict[str, str]:
        """What `Trainer.train` is given to go on from the state; nothing where there is none."""
        return {"resume_from_checkpoint": str(self.state.path)} if self.state is not None else {}

    # --- when ------------------------------------------------------------------------------------------

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Agree with the other ranks whether to save now, and whether to stop then."""
        self.state = None  # loaded; it may be larger than the model
        by_clock = args.save_strategy == "no" and time.monotonic() - self._last >= 60 * self.keeping.minutes
        flags = [by_clock and ranks.rank() == 0, self.keeping.request.signal is not None]
        due, stop = ranks.any_rank(flags, args.device)
        self._due, self._stop = self._due or due or stop, self._stop or stop
        control.should_save = control.should_save or self._due

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that an epoch has begun."""
        self._epoch_over = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save what was due at the epoch's last step."""
        self._epoch_over = True
        control.should_save = control.should_save or self._due

    def save(self, trainer: Trainer) -> None:
        """Save the training as it stands.

        At an epoch's last step this waits for the evaluation at its end, which a resumed training would miss. After
        the last step of all there is nothing to go on with.

        Raises:
            StoppedError: It is saved, and was asked to stop.
        """
        state = trainer.state
        best = trainer.args.load_best_model_at_end and state.best_global_step == state.global_step
        if best and not self.method.keeps_best:
            moving = self.method.moving(self.index)
            self._best = {name: tensor.detach().clone() for name, tensor in moving.items()}
            state.best_model_checkpoint = BEST
        if state.global_step >= state.max_steps:
            return
        if not self.method.kept_midway:
            self._due, self._last = False, time.monotonic()
            if self._stop:
                raise StoppedError(
                    f"stopped by {self.keeping.request.signal or 'a signal to another rank'} after step "
                    f"{state.global_step} of {state.max_steps}. This method is not kept in the middle of a task: the "
                    f"same command and --resume begins the task anew."
                )
            return
        if float(state.epoch or 0).is_integer() and not self._epoch_over:
            self._due = True
            return
        moving = self.method.moving(self.index)
        tensors = {MOVING + name: held for name, held in moving.items()}
        tensors |= {BEST + name: held for name, held in self._best.items()}
        facts = self._facts(trainer, tensors)
        written = _trainer_state(trainer)
        folder, step = self.keeping.folder, state.global_step
        ranks.on_first(lambda: folder.write(self.index, step, facts, written, tensors))
        self._due, self._last = False, time.monotonic()
        if self._stop:
            raise StoppedError(
                f"stopped by {self.keeping.request.signal or 'a signal to another rank'} after step {step} of "
                f"{state.max_steps}, which is saved. Go on with the same command and --resume."
            )

    def _facts(self, trainer: Trainer, tensors: dict[str, Tensor]) -> dict[str, Any]:
        scaler = trainer.accelerator.scaler
        held = {
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        plain = {name: to_plain(value, tensors, name) for name, value in held.items()}
        seconds = self.seconds + time.monotonic() - self._began
        return {"world": ranks.world(), "seconds": seconds, "random": ranks.gather(random_state()), **plain}

    # --- back ------------------------------------------------------------------------------------------

    def load_model(self, trainer: Trainer) -> None:
        """Put back what training moves."""
        assert self.state is not None
        self.method.set_moving(self.index, _below(MOVING, self.state.tensors))
        self._best = _below(BEST, self.state.tensors)

    def load_optimizer(self, trainer: Trainer) -> None:
        """Put optimizer, schedule and scaler back."""
        assert self.state is not None
        facts, tensors = self.state.facts, self.state.tensors
        trainer.optimizer.load_state_dict(from_plain(facts["optimizer"], tensors))
        trainer.lr_scheduler.load_state_dict(from_plain(facts["scheduler"], tensors))
        if facts["scaler"] is not None and trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(from_plain(facts["scaler"], tensors))
        if self._best:
            trainer.state.best_model_checkpoint = BEST

    def load_random(self) -> None:
        """Put this rank's random state back."""
        assert self.state is not None
        set_random_state(self.state.facts["random"][ranks.rank()])

    def load_best(self) -> None:
        """Put back the best that was seen."""
        self.method.set_moving(self.index, self._best)

    def trainer(self, trainer_class: type[Trainer]) -> type[Trainer]:
        """Return a Trainer's class with its checkpoints replaced by the keeper's states."""
        keeper = self

        class KeptTrainer(trainer_class):
            """Writes and reads states where the Trainer would write and read pickles."""

            def _save_checkpoint(self, model: Any, trial: Any) -> None:
                keeper.save(self)

            def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
                keeper.load_model(self)

            def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
                if checkpoint is not None:
                    keeper.load_optimizer(self)

            def _load_scaler(self, checkpoint: str | None) -> None:
                """Leave it to the optimizer's loading."""

            def _load_rng_state(self, checkpoint: str | None) -> None:
                if checkpoint is not None:
                    keeper.load_random()

            def _load_best_model(self) -> None:
                keeper.load_best()

        return KeptTrainer


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): held for name, held in tensors.items() if name.startswith(prefix)}


def _trainer_state(trainer: Trainer) -> bytes:
    """Return the Trainer's state as it would write it, with its callbacks' as they stand."""
    held = trainer.state.stateful_callbacks
    exported = [*trainer.callback_handler.callbacks, trainer.control]
    held.update({type(made).__name__: made.state() for made in exported if isinstance(made, ExportableState)})
    return (json.dumps(dataclasses.asdict(trainer.state), indent=2, sort_keys=True) + "\n").encode()


def random_state() -> dict[str, Any]:
    """Return the state of Python's, numpy's and torch's generators, an accelerator's too, as JSON values."""
    version, numbers, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": {**numpy, "state": {"key": numpy["state"]["key"].tolist(), "pos": int(numpy["state"]["pos"])}},
        "torch": _hex(torch.get_rng_state()),
        "cuda": _hex(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the generators to what `random_state` gave."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {"key": key, "pos": state["numpy"]["state"]["pos"]}})
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _tensor(state: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8)
