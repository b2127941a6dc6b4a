"""Where a task's training is kept in its middle: one folder a state, whole or not at all.

    STATE/0001-00000040/tensors.safetensors   what training moves, and the optimizer's tensors
    STATE/0001-00000040/trainer_state.json    the Trainer's own: step, epoch, log
    STATE/0001-00000040/state.json            the rest, and the sha256 of the two files above

A state is made beside its place, synced, and renamed into it, so a process that ends leaves the state before it. What
the disk has spoiled since is recognised by its sha256, passed over and named. The newest two are kept, and all go when
their task is finished: its bank is what lasts.

Source: rename(2), fsync(2).
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from hf_cl.errors import RunError
from hf_cl.storage.disk import json_bytes, make_folder, require_room, stands_for, sync, temporary_of, write_new

FORMAT = 1
KEPT = 2
TENSORS, TRAINER, FACTS = "tensors.safetensors", "trainer_state.json", "state.json"
NAME = re.compile(r"(\d{4,})-(\d{8,})")


@dataclass(frozen=True)
class State:
    """A task's training at one step, as it was saved.

    Attributes:
        path: Its folder.
        step: Optimizer steps done.
        facts: JSON values: what no tensor holds.
        tensors: By name.
    """

    path: Path
    step: int
    facts: dict[str, Any]
    tensors: dict[str, Tensor]


class StateFolder:
    """The states of the task that trains; one writer."""

    def __init__(self, path: Path) -> None:
        """Name the folder; it need not be there."""
        self.path = path

    def write(
        self, task: int, step: int, facts: Mapping[str, Any], trainer: bytes, tensors: Mapping[str, Tensor]
    ) -> Path:
        """Write a state, then remove all but the newest two; return its folder.

        Args:
            task: The task's number.
            step: Optimizer steps done.
            facts: JSON values.
            trainer: The Trainer's state as it writes it itself.
            tensors: By name; of any device.

        Raises:
            RunError: The disk has no room for it.
            OSError: Writing failed; it names the file. Older states are as they were.
        """
        make_folder(self.path)
        self._sweep()
        data = save_tensors({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})
        files = {TENSORS: data, TRAINER: trainer}
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        files[FACTS] = json_bytes({"format": FORMAT, "task": task, "step": step, "files": digests, **facts})
        require_room(self.path, sum(map(len, files.values())), RunError)
        place = self.path / f"{task:04d}-{step:08d}"
        made = temporary_of(place)
        try:
            made.mkdir()
            for name, content in files.items():
                write_new(made / name, content, place / name)
            sync(made)
            if place.exists():  # of the same step of an interrupted try, or spoiled
                shutil.rmtree(place)
            made.rename(place)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        sync(self.path)
        for old in self._states(task)[KEPT:]:
            shutil.rmtree(old)
        return place

    def newest(self, task: int, world: int) -> tuple[Path | None, list[str]]:
        """Return the folder of the newest whole state of a task, None where there is none, and what is torn.

        Args:
            task: The task's number.
            world: How many processes would go on from it.

        Raises:
            RunError: It was saved by another number of processes.
        """
        torn: list[str] = []
        for place in self._states(task):
            try:
                state = self.read(place)
            except RunError as error:
                torn.append(str(error))
                continue
            if state.facts["world"] != world:
                raise RunError(
                    f"{place}: was saved by {state.facts['world']} processes, and {world} would go on. Resume with as "
                    f"many, or remove {self.path} to begin this task anew."
                )
            return place, torn
        return None, torn

    def read(self, place: Path) -> State:
        """Return a state, after checking that its bytes are those that were written.

        Raises:
            RunError: It is torn, spoiled, or of another format.
        """
        try:
            facts = json.loads((place / FACTS).read_text("utf-8"))
            data = {name: (place / name).read_bytes() for name in (TENSORS, TRAINER)}
            if facts["format"] != FORMAT:
                raise RunError(f"{place}: format {facts['format']!r}, this version reads {FORMAT}.")
            spoiled = [name for name in data if hashlib.sha256(data[name]).hexdigest() != facts["files"][name]]
            if spoiled:
                raise RunError(f"{place}: {' and '.join(spoiled)} is not what was written.")
            # Cloned: the reader's views are not aligned, and kernels then round differently.
            tensors = {name: tensor.clone() for name, tensor in load_tensors(data[TENSORS]).items()}
            return State(place, int(facts["step"]), facts, tensors)
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            raise RunError(f"{place}: is no whole state ({error}).") from error

    def clear(self) -> None:
        """Remove all states: their task is finished."""
        if self.path.is_dir():
            self._sweep()
            for place in self._places():
                shutil.rmtree(place)

    def holds_any(self) -> bool:
        """Return whether some task's training was kept here."""
        return self.path.is_dir() and any(True for _ in self._places())

    def _places(self) -> list[Path]:
        return [place for place in self.path.iterdir() if NAME.fullmatch(place.name)]

    def _states(self, task: int) -> list[Path]:
        """Return a task's states, the newest first."""
        found = (
            {tuple(map(int, place.name.split("-"))): place for place in self._places()} if self.path.is_dir() else {}
        )
        return [found[key] for key in sorted(found, reverse=True) if key[0] == task]

    def _sweep(self) -> None:
        """Remove what a process that ended left half made."""
        for place in self.path.iterdir():
            if stands_for(place.name) != place.name and NAME.fullmatch(stands_for(place.name)):
                shutil.rmtree(place)
