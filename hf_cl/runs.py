"""Opening a run folder again: restore its model, and verify that nothing of a finished task has moved."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_cl import plugins, ranks
from hf_cl.config import read
from hf_cl.errors import BaseModelError, HfClError, RunError
from hf_cl.layers.base import Base, load_base
from hf_cl.ownership.digest import task_digest
from hf_cl.packing.entries import gives_bank
from hf_cl.packing.grow import cut
from hf_cl.packing.opened import OpenedTask
from hf_cl.packing.proof import digests_of
from hf_cl.packing.shared import open_shared
from hf_cl.packing.shelf import BankShelf, fixed_by, open_entry
from hf_cl.proof import probe_digest
from hf_cl.storage.bank_folder import FolderReader, read_manifest
from hf_cl.storage.manifest import MANIFEST, Manifest
from hf_cl.storage.run_folder import BANK, RunFolder
from hf_cl.training.masked import MaskedMethod
from hf_cl.training.method import Method, Packed
from hf_cl.tuner import MaskConfig

BEAT = 30
"""Seconds after which the other ranks of a job are told that a run is still being verified."""


@dataclass
class Verdict:
    """What `verify` found.

    Attributes:
        tasks: A record a task: name, digest at commit and now, which parts moved, whether the probe agrees.
        files: Files whose content is not what the manifest says.
    """

    tasks: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether every task's digests are those taken at its commit."""
        return not self.files and all(not task["moved"] for task in self.tasks)

    @property
    def same_logits(self) -> bool:
        """Whether every task's probe logits are bit for bit those at its commit (one machine)."""
        return all(task["same_logits"] for task in self.tasks)


def build_method(manifest: Mapping[str, Any], base: Base) -> Method:
    """Return the run's method on a base, with nothing learned yet.

    Raises:
        BaseModelError: The base is another than the one the run was learned on.
    """
    name, options = manifest["method"]["name"], manifest["method"]["options"]
    settled = manifest.get("settled")
    if name == "mask_config":
        method: Method = MaskedMethod(base, MaskConfig(**options), settled=settled)
    else:
        module = plugins.load("methods", name)
        method = module.build(base, read(module.Options, options, "run.method"), manifest["seed"], settled)
    if method.fingerprint != manifest["fingerprint"]:
        raise BaseModelError(
            f"base {base.name!r}: its fingerprint is {method.fingerprint[:16]}, the run was learned on "
            f"{manifest['model']!r} with {manifest['fingerprint'][:16]}. Give that model, in the same "
            f"revision and dtype."
        )
    return method


def open_run(path: Path, base: Base | str | None = None) -> tuple[RunFolder, Base, Method]:
    """Restore a run's model from its files; `method.activate(record["index"])` makes a task answer.

    Args:
        path: The run folder.
        base: The base, or where it lies now; None loads the one the run names.

    Raises:
        RunError: A file is missing or not what the manifest says.
        BankError: The same of the run's bank.
        BaseModelError: The base is another than the run's.
    """
    folder = RunFolder.open(path)
    base = base if isinstance(base, Base) else _load(folder, base)
    method = build_method(folder.manifest, base)
    if isinstance(method, MaskedMethod) and gives_bank(method):
        bank = _bank(folder)
        method.config = fixed_by(bank.store, method.config)
        method.keep_on(BankShelf(bank, FolderReader(path / BANK)))
        return folder, base, method
    for index, task in enumerate(folder.tasks):
        method.restore(index, tuple(task["labels"]), Packed(**folder.parts(index)))
    if folder.manifest["shared"]:
        method.restore_shared(folder.read(folder.manifest["shared"]))
    return folder, base, method


def _bank(folder: RunFolder) -> Manifest:
    """Return the manifest of a run's bank.

    Raises:
        RunError: It says something else of a task than the run does.
    """
    bank = read_manifest(folder.path / BANK)
    held = {task.index: task for task in bank.tasks}
    for record in folder.tasks:
        entry = held.get(record["index"])
        same = entry is not None and (entry.name, entry.labels, entry.parts, entry.probe) == (
            record["name"], record["labels"], record["parts"], record["probe"],
        )  # fmt: skip
        if not same:
            raise RunError(
                f"{folder.path}: run.json and bank/bank.json say different things of task {record['name']!r}. Restore "
                f"both from one copy."
            )
    return bank


def _load(folder: RunFolder, name: str | None) -> Base:
    head = (folder.manifest.get("settled") or {}).get("head_modules")
    return load_base(name or folder.manifest["model"], dtype=folder.manifest.get("dtype", "float32"), head=head)


def verify(path: Path, base: Base | str | None = None) -> Verdict:
    """Compute every finished task's digests from the saved files, and compare them with those at its commit.

    Args:
        path: The run folder.
        base: The base, or where it lies now; None loads the one the run names.

    Raises:
        RunError: There is no run, or a file is missing altogether.
        BaseModelError: The base is another than the run's.
        ConfigError: The run's options are not those that its bank was made with.
    """
    folder = RunFolder.open(path)
    base = base if isinstance(base, Base) else _load(folder, base)
    method = build_method(folder.manifest, base)
    if not folder.tasks:
        raise RunError(f"{path}: no task is finished, so there is nothing to verify. Go on with --resume.")
    verdict, unreadable = Verdict(files=folder.changed_files()), dict[int, str]()
    banked = gives_bank(method)
    if isinstance(method, MaskedMethod) and banked:
        verdict.files, unreadable = _shelve(method, folder)
    for index, task in enumerate([] if banked else folder.tasks):
        try:
            method.restore(index, tuple(task["labels"]), Packed(**folder.parts(index, trust=True)))
        except HfClError as error:
            unreadable[index] = str(error)
            break
    if folder.manifest["shared"] and not unreadable:
        try:
            method.restore_shared(folder.read(folder.manifest["shared"], trust=True))
        except HfClError as error:
            unreadable[0] = str(error)
    device = str(folder.tasks[-1].get("device", "cpu"))
    if not unreadable and device == "cuda" and torch.cuda.is_available():
        # Logits are compared where they were taken; elsewhere they may differ, and the digests are what counts.
        method.model.to(device)
    for index, task in enumerate(folder.tasks):
        if unreadable and index >= min(unreadable):
            why = unreadable.get(index, "an earlier task cannot be read")
            found: dict[str, Any] = {"after": None, "moved": [why], "same_logits": False}
        else:
            found = _compare(method, index, task)
        verdict.tasks.append({"name": task["name"], "before": task_digest(task["parts"]), **found})
    return verdict


def _shelve(method: MaskedMethod, folder: RunFolder) -> tuple[list[str], dict[int, str]]:
    """Leave a run's tasks in its bank; return the files that are damaged, and by position what cannot be read."""
    read = FolderReader(folder.path / BANK)
    try:
        bank = _bank(folder)
    except HfClError as error:
        return [f"{BANK}/{MANIFEST}"], {0: str(error)}
    method.config = fixed_by(bank.store, method.config)
    bad, opened = {}, []
    for entry in bank.entries:
        try:
            opened.append(open_entry(entry, read))
        except HfClError as error:
            bad[entry.index] = str(error)
    files = [f"{BANK}/{entry.file.name}" for entry in bank.entries if entry.index in bad]
    try:
        open_shared(bank, read)
    except HfClError:
        files += [f"{BANK}/{bank.shared.name}"] if bank.shared is not None else []
    bad = bad or _first_wrong(bank, opened)
    whole = [task.index < min(bad, default=bank.next_index) for task in bank.tasks]
    method.keep_on(BankShelf(cut(bank, sum(whole)), read, prove=False))
    positions = {record["index"]: position for position, record in enumerate(folder.tasks)}
    return files, {positions.get(index, 0): why for index, why in bad.items()}


def _first_wrong(bank: Manifest, opened: Sequence[OpenedTask]) -> dict[int, str]:
    """Return the number of the first task whose content is not a task's, or claims what is not free, and why."""
    try:
        digests_of(bank, opened)
    except HfClError as error:
        why = str(error)
    else:
        return {}
    for count in range(1, len(opened)):
        try:
            digests_of(bank, opened[:count])
        except HfClError as error:
            return {opened[count - 1].entry.index: str(error)}
    return {opened[-1].entry.index: why}


def _compare(method: Method, index: int, task: Mapping[str, Any]) -> dict[str, Any]:
    number = int(task.get("index", index))
    method.activate(number)
    parts = method.parts(number)
    moved = sorted(part for part in {*parts, *task["parts"]} if parts.get(part) != task["parts"].get(part))
    same = probe_digest(method.model) == task["probe"]
    return {"after": task_digest(parts), "moved": moved, "same_logits": same}


def verify_in_fresh_process(path: Path) -> dict[str, Any]:
    """Return what `hf-cl verify --json` says of a run folder in a process that knows only its files.

    Raises:
        RunError: The process gave no verdict.
    """
    command = [sys.executable, "-m", "hf_cl", "verify", str(path), "--json"]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ranks.environment()
    )
    while True:
        try:
            out, errors = child.communicate(timeout=BEAT)
            break
        except subprocess.TimeoutExpired:
            ranks.beat()
        except BaseException:
            child.kill()
            raise
    try:
        verdict: dict[str, Any] = json.loads(out)
        verdict["tasks"], verdict["exact"], verdict["same_logits"]
    except (ValueError, KeyError) as error:
        raise RunError(f"{path}: verifying in a fresh process failed: {errors.strip()[-800:]}") from error
    return verdict
