"""The run folder: what a stream leaves on disk.

    RUN/run.json                      what was learned so far; renamed into place last
    RUN/bank/                         the mask bank, where the method gives one; see hf_cl/storage/bank_folder.py
    RUN/tasks/0003.task-<sha>.safetensors   else: what the task adds
    RUN/tasks/0003.head-<sha>.safetensors   its head and norms
    RUN/tasks/0003.fisher-<sha>.safetensors what only the next task's training needs, by the method's own name for it
    RUN/shared/<sha>.safetensors      what all tasks share, where a method has such
    RUN/state/                        the training of the next task, in its middle; see storage/state_folder.py
    RUN/results.json, accuracy.png    after the last task
    RUN/trainer/                      what the Trainer writes itself, if asked to

Invariant: `run.json` names files by number and content, never by a task's name, and is replaced by one
rename after the files are on disk. So a finished task is in the folder whole or not at all, whenever the
process ends. Files that `run.json` does not name are leftovers and go with the next save. Of several ranks, rank 0
writes; all call, and all hold what it wrote.

Source: shared-nothing atomic replacement, rename(2) and fsync(2).
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from hf_cl import ranks
from hf_cl.errors import RunError
from hf_cl.storage.disk import json_bytes, require_room, write_atomic
from hf_cl.storage.state_folder import StateFolder

FORMAT = 1
MANIFEST = "run.json"
RESULTS = "results.json"
PICTURE = "accuracy.png"
BANK = "bank"
STATE = "state"
KEYS = ("model", "fingerprint", "method", "seed", "max_length", "tasks", "shared")
TASK_KEYS = {"name", "labels", "parts", "probe", "files"}
FILE = re.compile(r"^(tasks|shared)/[a-z0-9.-]{1,80}\.safetensors$")
PARTS = ("task", "head")
"""A task's files that its answers read; others are for the next task alone."""


class RunFolder:
    """A run folder that is open for adding tasks, or for reading."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        """Hold a folder and its manifest; use `create` or `open`."""
        self.path, self.manifest = path, manifest

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any], *, overwrite: bool = False) -> "RunFolder":
        """Make a new run folder.

        Args:
            path: Where; it must not exist, or be empty.
            header: What is known before the first task, JSON values.
            overwrite: Remove a run folder that is there. Anything that is no run folder is refused still.

        Raises:
            RunError: Something is there already.
        """
        folder = cls(path, {"format": FORMAT, **header, "tasks": [], "shared": None})

        def make() -> dict[str, Any]:
            cls.require_place(path, overwrite=overwrite)
            if (path / MANIFEST).exists():
                _remove_run(path)
            for name in ("tasks", "shared"):
                (path / name).mkdir(parents=True, exist_ok=True)
            return folder._replace_manifest(folder.manifest)

        folder.manifest = ranks.on_first(make)
        return folder

    @staticmethod
    def require_place(path: Path, *, overwrite: bool = False) -> None:
        """Refuse a place that is taken, before any work is done.

        A run without a finished task, and without one in its middle, may be replaced: nothing was learned there.

        Raises:
            RunError: It holds what was learned and `overwrite` is not given, or it holds something else.
        """
        if RunFolder.is_free(path):
            return
        if not (path / MANIFEST).is_file():
            raise RunError(f"{path}: exists and is no run folder. Choose another --output-dir.")
        held = RunFolder.open(path)
        if (held.tasks or held.states.holds_any()) and not overwrite:
            raise RunError(f"{path}: holds a run already. Add --resume to go on with it, or --overwrite.")

    @staticmethod
    def is_free(path: Path) -> bool:
        """Return whether nothing is there, or just what is made before the first manifest."""
        if not path.is_dir():
            return not path.exists()
        made = [place for place in path.iterdir() if place.name not in ("tasks", "shared", f".{MANIFEST}.tmp")]
        return not made and not any(any((path / name).glob("*")) for name in ("tasks", "shared"))

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open an existing run folder.

        Raises:
            RunError: There is no readable manifest of a known format.
        """
        file = path / MANIFEST
        if not file.is_file():
            raise RunError(
                f"{path}: no {MANIFEST} here, so this is no run folder. Give the folder `hf-cl train` wrote."
            )
        try:
            manifest = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise RunError(f"{file}: is no JSON ({error}). Restore it from a copy, or run again.") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
            raise RunError(f"{file}: format {found!r}, this version reads {FORMAT}. Use the version that wrote it.")
        linked = [name for name in ("tasks", "shared") if (path / name).is_symlink()]
        if linked:
            raise RunError(
                f"{path}: {' and '.join(linked)} is a symbolic link, which a run never makes. Copy its files."
            )
        missing = [key for key in KEYS if key not in manifest]
        if missing:
            raise RunError(f"{file}: lacks {', '.join(missing)}. Restore it from a copy, or run again.")
        tasks = manifest["tasks"]
        whole = isinstance(tasks, list) and all(isinstance(task, dict) and set(task) >= TASK_KEYS for task in tasks)
        if not whole:
            raise RunError(f"{file}: its tasks are no records of finished tasks. Restore it from a copy, or run again.")
        return cls(path, manifest)

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """The finished tasks' records, in order."""
        tasks: list[dict[str, Any]] = self.manifest["tasks"]
        return tasks

    @property
    def states(self) -> StateFolder:
        """Where the training of the next task is kept in its middle."""
        return StateFolder(self.path / STATE)

    def add_task(
        self,
        record: Mapping[str, Any],
        files: Mapping[int, Mapping[str, Mapping[str, Tensor]]],
        shared: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add the next finished task: write its files, then rename the manifest.

        Args:
            record: What is recorded of the task, JSON values.
            files: For each task whose tensors changed: part name -> tensors. Holds the new task's number.
            shared: What all tasks share, if anything.

        Raises:
            RunError: The disk has no room for it; the folder stays as it was.
        """
        self.manifest = ranks.on_first(lambda: self._add(record, files, shared))

    def _add(
        self,
        record: Mapping[str, Any],
        files: Mapping[int, Mapping[str, Mapping[str, Tensor]]],
        shared: Mapping[str, Tensor] | None,
    ) -> dict[str, Any]:
        tasks = [dict(task) for task in self.tasks] + [{**record, "files": {}}]
        blobs: dict[str, bytes] = {}
        for index, parts in files.items():
            tasks[index]["files"] = {}
            for part, tensors in parts.items():
                if tensors:
                    entry = _blob(blobs, f"tasks/{index:04d}.{part}", tensors)
                    tasks[index]["files"][part] = entry
        for task in (tasks[index] for index in files):
            sizes = {part: file["bytes"] for part, file in task["files"].items()}
            answering = {part: sizes.pop(part, 0) for part in PARTS}
            task["bytes"] = {**answering, "carried": sum(sizes.values())}
        manifest = {**self.manifest, "tasks": tasks}
        if shared:
            manifest["shared"] = _blob(blobs, "shared/all", shared)
        require_room(self.path, 2 * sum(map(len, blobs.values())), RunError)
        for name, data in blobs.items():
            write_atomic(self.path / name, data)
        self._replace_manifest(manifest)
        self._sweep()
        return manifest

    def update(self, **values: Any) -> None:
        """Set fields of the manifest and write it."""
        self.manifest = ranks.on_first(lambda: self._replace_manifest({**self.manifest, **values}))

    def read(self, entry: Mapping[str, Any] | None, *, trust: bool = False) -> dict[str, Tensor]:
        """Return the tensors of one file entry of the manifest; an absent entry has none.

        Args:
            entry: `{"file", "sha256", "bytes"}`.
            trust: Read on although the sha256 differs (`verify` says which tensor moved).

        Raises:
            RunError: The file is missing, unreadable, or not what the manifest says.
        """
        if entry is None:
            return {}
        if not FILE.fullmatch(str(entry["file"])):
            raise RunError(f"{self.path / MANIFEST}: {entry['file']!r} is no file name of a run folder.")
        file = self.path / entry["file"]
        try:
            data = file.read_bytes()
        except OSError as error:
            raise RunError(f"{file}: cannot be read ({error}). Restore it from a copy, or run again.") from error
        if not trust and hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise RunError(f"{file}: its content is not what {MANIFEST} says. Restore it from a copy, or run again.")
        try:
            # Cloned: the reader's views are not aligned, and kernels then round differently.
            return {name: tensor.clone() for name, tensor in load_tensors(data).items()}
        except SafetensorError as error:
            raise RunError(f"{file}: is no safetensors file ({error}). Restore it from a copy.") from error

    def parts(self, index: int, *, trust: bool = False) -> dict[str, dict[str, Tensor]]:
        """Return a task's tensors by part; see `read`."""
        files = self.tasks[index]["files"]
        return {part: self.read(files.get(part), trust=trust) for part in PARTS}

    def carried(self, index: int) -> dict[str, dict[str, Tensor]]:
        """Return by name what a task left for the next one to be learned with; see `read`."""
        files = self.tasks[index]["files"]
        return {part: self.read(entry) for part, entry in files.items() if part not in PARTS}

    def changed_files(self) -> list[str]:
        """Return the files whose content is not what the manifest says."""
        entries = [entry for task in self.tasks for entry in task["files"].values()]
        entries += [self.manifest["shared"]] if self.manifest["shared"] else []
        return [entry["file"] for entry in entries if not self._holds(entry)]

    def _holds(self, entry: Mapping[str, Any]) -> bool:
        file = self.path / str(entry["file"])
        return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == entry["sha256"]

    def _replace_manifest(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Write a manifest; what this object holds follows the disk, also when writing fails."""
        write_atomic(self.path / MANIFEST, json_bytes(manifest))
        self.manifest = manifest
        return manifest

    def _sweep(self) -> None:
        named = {entry["file"] for task in self.tasks for entry in task["files"].values()}
        named |= {self.manifest["shared"]["file"]} if self.manifest["shared"] else set()
        for name in ("tasks", "shared"):
            for file in (self.path / name).glob("*"):
                ours = FILE.fullmatch(f"{name}/{file.name}") or file.name.endswith(".tmp")
                if ours and file.is_file() and f"{name}/{file.name}" not in named:
                    file.unlink()


def _remove_run(path: Path) -> None:
    """Remove what a run writes, and nothing else that lies beside it."""
    for name in ("tasks", "shared", "trainer", STATE, BANK):
        if not (path / name).is_symlink():
            shutil.rmtree(path / name, ignore_errors=True)
    for name in (RESULTS, PICTURE, MANIFEST):
        (path / name).unlink(missing_ok=True)


def _blob(blobs: dict[str, bytes], stem: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    data = save_tensors({name: tensors[name].detach().contiguous() for name in sorted(tensors)})
    sha = hashlib.sha256(data).hexdigest()
    name = f"{stem}-{sha[:12]}.safetensors"
    blobs[name] = data
    return {"file": name, "sha256": sha, "bytes": len(data)}
