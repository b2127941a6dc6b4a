"""Every task's digests again, from a bank's files alone: no model, one layer in memory at a time.

Owners are worked out anew in the order of the tasks' numbers, so an entry that two tasks claim, or a claim that
leaves out a free entry, shows here. The base's own digest, and the values of the form `prune`, which are the base's,
need the base.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_cl.errors import BankCorruptError
from hf_cl.masks.bits import pack
from hf_cl.masks.compose import start_store
from hf_cl.ownership.digest import Digest
from hf_cl.ownership.owner import FREE, all_free
from hf_cl.packing.opened import OpenedTask, Part
from hf_cl.storage.manifest import MANIFEST, Manifest, TaskEntry, Tombstone

PARTS = ("masks", "values", "owners")
STRUCTURE = 64
"""How many times shorter than that of independent entries a mask's code may be."""


def digests_of(manifest: Manifest, opened: Sequence[OpenedTask]) -> dict[int, dict[str, str]]:
    """Return, for each task's number, the digests of its masks, values, owners and head.

    Args:
        manifest: What the bank says of itself.
        opened: Its tasks and tombstones in the order of their numbers, all or the first ones.

    Raises:
        BankCorruptError: Two tasks own one entry, or a task claims other entries than the free ones of its mask.
    """
    require_plausible(manifest)
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
    return {task.entry.index: found[task.entry.index] for task in opened if not isinstance(task.entry, Tombstone)}


def _claim(task: OpenedTask, part: Part, owner: Tensor, values: Tensor) -> None:
    free = part.mask & (owner == FREE)
    own = free if part.own is None else part.own
    if not torch.equal(own, free) or (isinstance(task.entry, Tombstone) and not torch.equal(free, part.mask)):
        raise task.corrupt(f"{part.path}: it claims entries that an earlier task owns, or leaves free ones")
    owner[own] = task.entry.index
    if part.own is not None:
        values[own] = part.values


def require_plausible(manifest: Manifest) -> None:
    """Refuse layers that no mask of the bank can be of, before anything of their size is allocated.

    With a base, its shapes are the measure; without one, the codes are: one byte cannot stand for more entries than
    the density says, give or take the structure that masks have.

    Raises:
        BankCorruptError: The layers are too large for every file.
    """
    entries = sum(math.prod(shape) for shape in manifest.store.shapes.values())

    def most(entry: TaskEntry | Tombstone) -> float:
        share = min(entry.density, 0.5)
        bits = -(share * math.log2(share) + (1 - share) * math.log2(1 - share))
        return STRUCTURE * 8 * entry.file.bytes / bits

    if entries > max(map(most, manifest.entries), default=0):
        raise BankCorruptError(
            f"{MANIFEST}: layers of {entries:,} entries are more than its files can hold masks of. Fetch it again."
        )
