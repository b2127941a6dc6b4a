"""What a bank holds, read from its manifest alone; part of `hf-cl inspect`.

Anyone may have written the manifest: what is not fixed by its format is shown only where it is what it should be.
"""

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hf_cl.cli import show

if TYPE_CHECKING:
    from hf_cl.storage.manifest import Manifest, TaskEntry


def contents(where: str, manifest: "Manifest") -> dict[str, Any]:
    """Return what a manifest says, as plain values.

    Args:
        where: What the user called the bank.
        manifest: Its manifest.
    """
    base, store = manifest.base, manifest.store
    names = {entry.index: entry.name for entry in manifest.entries}
    return {
        "bank": where,
        "digest": manifest.digest,
        "generation": manifest.generation,
        "base": {"id": base.id, "revision": base.revision, "dtype": base.dtype, "fingerprint": base.fingerprint},
        "compose": store.compose,
        "seed": store.seed,
        "scale": store.scale,
        "layers": len(store.layers),
        "head": list(store.head),
        "bytes": sum(file.bytes for file in manifest.files),
        "bytes_shared": manifest.shared.bytes if manifest.shared is not None else 0,
        "tasks": [_task(task, names) for task in manifest.tasks],
        "tombstones": [{"index": left.index, "bytes": left.file.bytes} for left in manifest.tombstones],
    }


def _task(task: "TaskEntry", names: Mapping[int, str]) -> dict[str, Any]:
    from hf_cl.ownership.digest import task_digest

    return {
        "index": task.index,
        "name": task.name,
        "labels": list(task.labels),
        "problem_type": task.problem_type,
        "method": task.method.get("name"),
        "source": task.source,
        "density": task.density,
        "bytes": {part: task.sizes.get(part) for part in ("masks", "values", "head")},
        "inherits": [names.get(index, str(index)) for index in task.inherits],
        "kkt": _start(task.start, names),
        "accuracy": _number(task.metrics.get("accuracy")),
        "probe": task.probe,
        "digest": task_digest(task.parts),
    }


def _start(start: Mapping[str, Any] | None, names: Mapping[int, str]) -> str | None:
    """Return the task that KKT started from, `fresh` where it chose none, None where it was not asked."""
    if start is None:
        return None
    source = start.get("source")
    return "fresh" if source is None else names.get(source, str(source)) if isinstance(source, int) else str(source)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def show_bank(out: Console, content: Mapping[str, Any]) -> None:
    """Print what `contents` gave."""
    base, tasks, left = content["base"], content["tasks"], content["tombstones"]
    origin = f"{base['id'] or 'not named'}{' at ' + base['revision'] if base['revision'] else ''}"
    lines = {
        "base": f"{origin} ({base['dtype']}), fingerprint {show.short(base['fingerprint'])}",
        "store": f"{content['compose']}, seed {content['seed']}, scale {content['scale']}, {content['layers']} layers",
        "own": f"each task has its own {', '.join(content['head']) or '-'}",
        "bank": f"generation {content['generation']}, {len(tasks)} tasks, {show.size(content['bytes'])}",
        "digest": content["digest"],
    }
    for name, value in lines.items():
        out.print(show.plain(f"{name:<9} {value}"), soft_wrap=True)
    columns = ["task", "method", "labels", "source", "accuracy", "digest", "probe"]
    out.print(show.table("Tasks", columns, [_learned(task) for task in tasks]))
    columns = ["task", "density", "masks", "values", "head", "inherits from", "KKT start"]
    out.print(show.table("What each task stores", columns, [_stored(task) for task in tasks]))
    if left:
        numbers = ", ".join(str(stone["index"]) for stone in left)
        size = show.size(sum(stone["bytes"] for stone in left))
        out.print(f"dropped, and still read by others: task numbers {numbers} ({size})", soft_wrap=True)
    if content["bytes_shared"]:
        out.print(f"shared by all tasks: {show.size(content['bytes_shared'])}")
    out.print(show.plain(f"Next: hf-cl verify {shlex.quote(content['bank'])}"), soft_wrap=True)


def _learned(task: Mapping[str, Any]) -> list[object]:
    row = [task["name"], task["method"], len(task["labels"]), task["source"], show.accuracy(task["accuracy"])]
    return [*row, show.short(task["digest"]), show.short(task["probe"])]


def _stored(task: Mapping[str, Any]) -> list[object]:
    sizes = [show.size(task["bytes"][part]) for part in ("masks", "values", "head")]
    return [task["name"], show.share(task["density"]), *sizes, ", ".join(task["inherits"]) or "-", task["kkt"] or "-"]
