"""`hf-cl inspect`: what a run or a bank holds, read from its manifest; no model is loaded."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hf_cl.cli import inspect_bank, show
from hf_cl.cli.arguments import BankOrRun, Json, Revision
from hf_cl.cli.banks import is_run, manifest_of

if TYPE_CHECKING:
    from hf_cl.storage.run_folder import RunFolder

HEAD = ("model", "dtype", "fingerprint", "stream", "method", "seed", "max_length", "training", "tuning", "from_bank")


def inspect(where: BankOrRun, revision: Revision = None, as_json: Json = False) -> None:
    """Show the tasks of a run or a bank: what each costs, owns and shares, and its digest."""
    if is_run(where, revision):
        from hf_cl.storage.run_folder import RunFolder

        content = contents(RunFolder.open(Path(where)))
    else:
        content = inspect_bank.contents(where, manifest_of(where, revision))
    if as_json:
        show.echo_json(content)
    elif "run" in content:
        _show(show.console(), Path(where), content)
    else:
        inspect_bank.show_bank(show.console(), content)


def contents(folder: "RunFolder") -> dict[str, Any]:
    """Return what a run's manifest says, as plain values."""
    from hf_cl.storage import run_folder

    manifest = folder.manifest
    tasks, bank = [_task(task) for task in folder.tasks], folder.path / run_folder.BANK
    return {
        "run": str(folder.path),
        **{name: manifest.get(name) for name in HEAD},
        "stream_tasks": [spec["name"] for spec in manifest.get("stream_tasks") or tasks],
        "head": list((manifest.get("settled") or {}).get("head_modules", [])),
        "bytes_shared": int((manifest["shared"] or {}).get("bytes", 0)),
        "bytes_carried": sum(int((task.get("bytes") or {}).get("carried", 0)) for task in folder.tasks),
        "tasks": tasks,
        "bank": str(bank) if bank.is_dir() else None,
    }


def _task(task: Mapping[str, Any]) -> dict[str, Any]:
    from hf_cl.ownership.digest import task_digest

    # A run of an earlier version says it of its files.
    sizes = task.get("bytes") or {part: file["bytes"] for part, file in task["files"].items()}
    return {
        "name": task["name"],
        "labels": len(task["labels"]),
        "source": task["source"],
        "bytes": int(sizes.get("task", 0)),
        "head_bytes": int(sizes.get("head", 0)),
        **task["facts"],
        "accuracy": task["metrics"].get(task["name"], {}).get("accuracy"),
        "seconds": task["seconds"],
        "digest": task_digest(task["parts"]),
    }


def _show(out: Console, run: Path, content: Mapping[str, Any]) -> None:
    _head(out, content)
    if content["tasks"]:
        _tasks(out, content)
    place = shlex.quote(str(run))
    if len(content["tasks"]) < len(content["stream_tasks"]):
        left = content["stream_tasks"][len(content["tasks"]) :]
        out.print(show.plain(f"Not finished: {', '.join(left)} to learn."), soft_wrap=True)
        out.print(
            f"Next: hf-cl train RECIPE --output-dir {place} --resume (the recipe it was started with)", soft_wrap=True
        )
    else:
        more = f"   or: hf-cl inspect {shlex.quote(content['bank'])}" if content["bank"] else ""
        out.print(f"Next: hf-cl verify {place}{more}", soft_wrap=True)


def _head(out: Console, content: Mapping[str, Any]) -> None:
    method = content["method"]
    lines = {
        "base": f"{content['model']} ({content['dtype']}), fingerprint {show.short(content['fingerprint'])}",
        "stream": f"{content['stream'] or '-'}: {len(content['tasks'])} of {len(content['stream_tasks'])} tasks",
        "own": f"each task has its own {', '.join(content['head']) or '-'}",
        "method": method["name"],
        "options": _pairs(method["options"]),
        "training": _pairs({**(content["training"] or {}), "max_length": content["max_length"]}),
        "seed": content["seed"],
    }
    if content["from_bank"]:
        lines["from"] = f"the bank {show.short(content['from_bank'])}"
    for name, value in lines.items():
        out.print(show.plain(f"{name:<9} {value}"), soft_wrap=True)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items()) or "defaults"


def _tasks(out: Console, content: Mapping[str, Any]) -> None:
    tasks = content["tasks"]
    columns = ["task", "labels", "source", "accuracy", "time", "digest"]
    out.print(show.table("Tasks", columns, [_learned(task) for task in tasks]))
    columns = ["task", "mask and values", "head", "claimed or trained cells"]
    out.print(show.table("What each task costs", columns, [_cost(task) for task in tasks]))
    if any(task.get("density") is not None for task in tasks):
        names = [task["name"] for task in tasks]
        columns = ["task", "density", "overlap", "trainable share", "capacity used", "KKT start"]
        out.print(show.table("Its mask, when it was learned", columns, [_mask(task, names) for task in tasks]))
    if content["bytes_shared"]:
        out.print(f"shared by all tasks: {show.size(content['bytes_shared'])}")
    if content["bytes_carried"]:
        out.print(f"kept for the next task alone: {show.size(content['bytes_carried'])}")


def _learned(task: Mapping[str, Any]) -> list[object]:
    return [
        task["name"],
        task["labels"],
        task["source"],
        show.accuracy(task["accuracy"]),
        show.seconds(task["seconds"]),
        show.short(task["digest"]),
    ]


def _cost(task: Mapping[str, Any]) -> list[object]:
    return [task["name"], show.size(task["bytes"]), show.size(task["head_bytes"]), show.count(task.get("trainable"))]


def _mask(task: Mapping[str, Any], names: list[str]) -> list[object]:
    from hf_cl.cli.after_run import kkt_source

    return [
        task["name"],
        show.share(task.get("density")),
        show.share(task.get("overlap")),
        show.share(task.get("trainable_share")),
        show.share(task.get("capacity_used")),
        kkt_source(task, names) or "-",
    ]
