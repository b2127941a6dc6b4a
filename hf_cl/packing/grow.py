"""A bank's manifest and new files out of a method that has learned: begun, or grown by tasks on an earlier one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hf_cl.errors import BankError
from hf_cl.layers.base import Base
from hf_cl.packing.entries import base_entry, gives_bank, store_entry, task_entry
from hf_cl.storage.bank_folder import task_blob
from hf_cl.storage.manifest import Manifest
from hf_cl.training.masked import MaskedMethod
from hf_cl.training.method import Method


def grow(
    method: Method,
    records: Sequence[Mapping[str, Any]],
    way: Mapping[str, Any],
    base: Base,
    *,
    base_id: str | None = None,
    before: Manifest | None = None,
    since: Sequence[str] | None = None,
) -> tuple[Manifest, dict[str, bytes]]:
    """Return the bank of what was learned: its manifest, and the bytes of the files that `before` does not name.

    Args:
        method: Has learned the tasks.
        records: The learner's, one a task.
        way: Name and options of the method, plain JSON values.
        base: What was learned on.
        base_id: Its Hub id, where only a local folder is known; no path is ever written.
        before: The bank that was learned on from; its tasks stay as they stand there. One more generation.
        since: Digests that the bank has grown from, where `before` was cut and so no longer has the digest it had.

    Raises:
        BankError: The method gives no bank, nothing was learned, or `base_id` is not that of `before`.
    """
    if not gives_bank(method) or not isinstance(method, MaskedMethod) or not records:
        raise BankError(
            f"{way['name']}: gives no bank. A bank holds tasks of a masked method that never overwrites "
            f"(supsup, exssnet, a MaskConfig), at least one; other methods keep their run folder."
        )
    if before is not None and base_id not in (None, before.base.id):
        raise BankError(
            f"base_id: {base_id!r} was given, and the bank that was learned on from says {before.base.id!r}. Leave it "
            f"out here; push_to_hub(base_id=...) names it in the card of a bank that does not know it."
        )
    held = {task.index for task in before.tasks} if before is not None else set()
    added, files = [], {}
    for record in records:
        if record["index"] not in held:
            entry, data = task_entry(method, record, way)
            added.append(entry)
            files[entry.file.name] = data
    next_index = int(records[-1]["index"]) + 1
    shared = before.shared if before is not None else None
    if common := method.shared():
        shared, data = task_blob("shared", common)
        files[shared.name] = data
    if before is not None:
        if not added:
            return before, {}
        tasks = [*before.tasks, *added]
        generation = before.generation + len(added)
        grown_from = [*before.grown_from, before.digest] if since is None else list(since)
        grown = replace(
            before, generation=generation, tasks=tasks, shared=shared, next_index=next_index, grown_from=grown_from
        )
        return grown, files
    manifest = Manifest(
        generation=len(added) - 1,
        base=base_entry(base, method.fingerprint, base_id),
        store=store_entry(method.tuner),
        tasks=added,
        tombstones=[],
        shared=shared,
        next_index=next_index,
        grown_from=[],
    )
    return manifest, files


def cut(manifest: Manifest, count: int) -> Manifest:
    """Return the bank as it was when its newest tasks but `count` were not learned yet; what all share stays grown.

    Args:
        manifest: Has grown by one task a generation since.
        count: Tasks to keep.
    """
    gone = len(manifest.tasks) - count
    if gone <= 0:
        return manifest
    return replace(
        manifest,
        generation=manifest.generation - gone,
        tasks=manifest.tasks[:count],
        next_index=manifest.tasks[count].index,
        grown_from=manifest.grown_from[:-gone],
    )


def digests_before(manifest: Manifest, kept: Manifest) -> list[str]:
    """Return the digests that led to a bank's state before it was cut to `kept`, that state's own included."""
    gone = len(manifest.tasks) - len(kept.tasks)
    return list(manifest.grown_from[: len(manifest.grown_from) - gone + 1])
