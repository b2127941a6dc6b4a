"""Dropping a task: what other tasks read of it stays as a tombstone, the rest is free again.

Numbers are never used again, and no other task's file, owners or answer changes by a bit.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_cl.errors import ConfigError
from hf_cl.masks.coding import encode
from hf_cl.packing.entries import coded_values
from hf_cl.packing.opened import OpenedTask
from hf_cl.packing.proof import require_plausible
from hf_cl.storage.bank_folder import task_blob
from hf_cl.storage.manifest import Manifest, Tombstone
from hf_cl.training.masked import join_codes


def drop_task(manifest: Manifest, opened: Sequence[OpenedTask], index: int) -> tuple[Manifest, dict[str, bytes]]:
    """Return the manifest without a task, and the new files it names.

    Args:
        manifest: The bank's.
        opened: All of its tasks and tombstones, in the order of their numbers.
        index: The task's number.

    Raises:
        ConfigError: Another task has its head, or it is the last one.
    """
    name = next(task.name for task in manifest.tasks if task.index == index)
    sharing = [task.name for task in manifest.tasks if task.head_of == index]
    if sharing:
        raise ConfigError(f"task {name!r}: {', '.join(sharing)} share its head. Drop those first.")
    if len(manifest.tasks) == 1:
        raise ConfigError(f"task {name!r}: is the only one of this bank. Delete the folder instead.")
    require_plausible(manifest)
    gone = [task for task in opened if isinstance(task.entry, Tombstone) or task.entry.index == index]
    tombstones, files = [], {}
    for task, (masks, values) in zip(gone, _left(manifest, opened, [task.entry.index for task in gone]), strict=True):
        if not any(bool(mask.any()) for mask in masks):
            continue
        # What is left of a row may lack the value that its int8 scale was made from.
        dtype = "float32" if task.entry.values_dtype == "int8" else task.entry.values_dtype
        tensors = dict(zip(("masks", "mask_lengths"), _coded(masks), strict=True))
        if task.entry.trains == "claimed":
            where = [mask.view(-1).nonzero().squeeze(1) for mask in masks]
            layers = [(v, w, mask.shape[1]) for v, w, mask in zip(values, where, masks, strict=True)]
            tensors |= coded_values(layers, dtype)
        file, data = task_blob(f"left-{task.entry.index:05d}", tensors)
        files[file.name] = data
        entry = task.entry
        tombstones.append(Tombstone(entry.index, entry.density, dtype, entry.trains, file))
    left = {tombstone.index for tombstone in tombstones}
    tasks = [task for task in manifest.tasks if task.index != index]
    numbers = left | {task.index for task in tasks}
    # A tombstone that is needed no more is inherited from by nobody.
    tasks = [replace(task, inherits=[other for other in task.inherits if other in numbers]) for task in tasks]
    grown_from = [*manifest.grown_from, manifest.digest]
    generation = manifest.generation + 1
    return replace(manifest, generation=generation, tasks=tasks, tombstones=tombstones, grown_from=grown_from), files


def _coded(masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return join_codes([encode(mask.numpy(), mask.shape[1]) for mask in masks])


def _left(
    manifest: Manifest, opened: Sequence[OpenedTask], gone: Sequence[int]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Return, for each task that is gone, layer by layer: the entries it owned that others read, and their values."""
    store, found = manifest.store, {index: ([], []) for index in gone}  # type: ignore[var-annotated]
    streams = [(task, task.parts(store)) for task in opened]
    for path in store.layers:
        taken = torch.zeros(*store.shapes[path], dtype=torch.bool)
        read = torch.zeros_like(taken)
        owned = {}
        for task, stream in streams:
            part = next(stream)
            own = part.mask & ~taken if part.own is None else part.own
            taken |= own
            if task.entry.index in found:
                owned[task.entry.index] = (own, part.values)
            else:
                read |= part.mask
        for index, (own, values) in owned.items():
            kept = own & read
            found[index][0].append(kept)
            found[index][1].append(values[kept[own]] if values.numel() else values)
    for _, stream in streams:
        next(stream, None)  # the last checks of a task's file stand behind its last layer
    return [found[index] for index in gone]
