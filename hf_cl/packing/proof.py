"""Every task's digests again, from a bank's files alone: no model, one layer in memory at a time.

Owners are worked out anew in the order of the tasks' numbers, so an entry that two tasks claim, or a claim that
leaves out a free entry, shows here. The base's own digest, and the values of the form `prune`, which are the base's,
need the base.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_cl.errors import BankCorruptError
from hf_cl.masks.bits import pack
from hf_cl.masks.compose import start_store
from hf_cl.ownership.digest import Digest
from hf_cl.ownership.owner import FREE, all_free
from hf_cl.packing.opened import OpenedTask, Part
from hf_cl.storage.manifest import Manifest, Tombstone

PARTS = ("masks", "values", "owners")


def digests_of(manifest: Manifest, opened: Sequence[OpenedTask]) -> dict[int, dict[str, str]]:
    """Return, for each task's number, the digests of its masks, values, owners and head.

    Args:
        manifest: What the bank says of itself.
        opened: All of its tasks and tombstones, in the order of their numbers.

    Raises:
        BankCorruptError: Two tasks own one entry, or a task claims other entries than the free ones of its mask.
    """
    store = manifest.store
    parts = PARTS if store.compose != "prune" else ("masks", "owners")
    sums = {task.entry.index: {part: Digest() for part in parts} for task in opened}
    streams: list[Iterator[Part]] = [task.parts(store) for task in opened]
    for path in store.layers:
        shape = tuple(store.shapes[path])
        owner = all_free(shape)
        values = start_store(store.compose, torch.empty(shape), store.seed, path, store.scales[path])
        for task, stream in zip(opened, streams, strict=True):
            part = next(stream)
            _claim(task, part, owner, values)
            if not isinstance(task.entry, Tombstone):
                held = {"masks": pack(part.mask), "values": values[part.mask], "owners": owner[part.mask]}
                for name, state in sums[task.entry.index].items():
                    state.update(f"{path}.{'mask' if name == 'masks' else name}", held[name])
    for stream in streams:
        next(stream, None)  # the last checks of a task's file stand behind its last layer
    found = {index: {name: state.hexdigest() for name, state in held.items()} for index, held in sums.items()}
    for task in opened:
        head = Digest()
        for name, tensor in sorted(task.head.items()):
            head.update(name, tensor)
        found[task.entry.index]["head"] = head.hexdigest()
    return {task.index: found[task.index] for task in manifest.tasks}


def _claim(task: OpenedTask, part: Part, owner: Tensor, values: Tensor) -> None:
    free = part.mask & (owner == FREE)
    own = free if part.own is None else part.own
    if not torch.equal(own, free) or (isinstance(task.entry, Tombstone) and not torch.equal(free, part.mask)):
        raise task.corrupt(f"{part.path}: it claims entries that an earlier task owns, or leaves free ones")
    owner[own] = task.entry.index
    if part.own is not None:
        values[own] = part.values


def require_whole(manifest: Manifest) -> None:
    """Refuse a bank whose tasks inherit from, or share a head of, a task that is not there.

    Raises:
        BankCorruptError: Names the task.
    """
    numbers = {entry.index for entry in manifest.entries}
    tasks = {task.index for task in manifest.tasks}
    for task in manifest.tasks:
        if not set(task.inherits) <= numbers or (task.head_of is not None and task.head_of not in tasks):
            raise BankCorruptError(f"task {task.name!r}: what it inherits is not in the bank. Restore a whole copy.")
