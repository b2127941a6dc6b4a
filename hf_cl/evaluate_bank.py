"""Evaluate a bank on texts whose task nobody names: how often each router finds the task, and the label with it.

All shares are of all texts of all tasks together, so that they can be compared: a text counts for class-incremental
accuracy if its task and its label are right, over the union of all labels; a label that two tasks have is two labels.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_cl import plugins
from hf_cl.bank import MaskBank
from hf_cl.data import Task, TaskSpec, collator, load_task, tokenise
from hf_cl.errors import ConfigError, DataError, shown
from hf_cl.layers.base import Base
from hf_cl.metrics import auroc
from hf_cl.routed_pipeline import answer
from hf_cl.storage.manifest import Manifest

LOCAL = "local:"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class _Batch:
    inputs: dict[str, Tensor]
    task: Tensor
    label: Tensor


def evaluate_bank(
    bank: MaskBank,
    base: Base,
    tasks: Mapping[str, Task],
    routers: Sequence[str] = (),
    *,
    max_length: int = 128,
    batch_size: int = 64,
    out_of_scope: Sequence[str] | None = None,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Return how well each router does without the tasks' names, beside the accuracy with them.

    Args:
        bank: The bank.
        base: Its base, plain; it is wrapped.
        tasks: The rows of each of its tasks by name; the test rows are answered.
        routers: Files in `hf_cl/routing`; none is all of them.
        max_length: Tokens a text is cut to.
        batch_size: Texts a batch, of all tasks mixed.
        out_of_scope: Texts that belong to none of the tasks.
        progress: Told a line before each router.

    Returns:
        `texts`, `task_given` and, by router, `routing_accuracy`, `class_incremental_accuracy`,
        `task_given_accuracy`, `ms_per_text` (from tokens to answers, routing included) and, with `out_of_scope`,
        `out_of_scope_auroc`: how often a text of a task has the higher confidence.

    Raises:
        ConfigError: There is no such router.
        DataError: A task's rows are missing or have other labels.
        BankError: A router needs what was not collected.
    """
    for name in routers:
        plugins.load("routing", name)
    rows = _rows(bank, base, tasks, max_length)
    model = bank.attach(base.model)
    tuner: Any = model.base_model
    served, device = bank.served(), next(model.parameters()).device
    batches = _batches(rows, collator(base.tokenizer), batch_size, device)
    strangers = []
    if out_of_scope:
        encoded = base.tokenizer(list(out_of_scope), truncation=True, max_length=max_length)
        texts = [{name: encoded[name][row] for name in encoded} for row in range(len(out_of_scope))]
        strangers = _batches(
            [{**text, "labels": 0, "task": 0} for text in texts], collator(base.tokenizer), batch_size, device
        )

    def right(batch: _Batch, chosen: Tensor) -> Tensor:
        with torch.no_grad():
            found = answer(tuner, served, chosen, batch.inputs).argmax(1).cpu()
        return (found == batch.label) & (chosen.cpu() == batch.task)

    progress("task given")
    given, spent = _timed(batches, lambda batch: right(batch, batch.task))
    count = len(rows)
    accuracy, known = float(torch.cat(given).double().mean()), {"ms_per_text": 1000 * spent / count}
    found: dict[str, Any] = {"texts": count, "task_given": {"accuracy": accuracy, **known}, "routers": {}}
    for name in routers or plugins.available("routing"):
        progress(name)
        router = bank.router(name, model)

        def routed(batch: _Batch, router: Any = router) -> tuple[Tensor, Tensor, Tensor]:
            confidence, chosen = router.confidences(batch.inputs).cpu().max(1)
            return chosen == batch.task, right(batch, chosen), confidence

        answers, spent = _timed(batches, routed)
        hits, both, sure = (torch.cat(part) for part in zip(*answers, strict=True))
        found["routers"][name] = {
            "routing_accuracy": float(hits.double().mean()),
            "class_incremental_accuracy": float(both.double().mean()),
            "task_given_accuracy": accuracy,
            "ms_per_text": 1000 * spent / count,
        }
        if strangers:
            outside = torch.cat([router.confidences(batch.inputs).amax(1).cpu() for batch in strangers])
            found["routers"][name]["out_of_scope_auroc"] = auroc(sure.numpy(), outside.numpy())
    return found


def specs_of(manifest: Manifest, data_dir: Path | None) -> list[TaskSpec]:
    """Return where a bank's tasks' rows are on this machine, by the sources that its manifest names.

    A manifest is somebody's data: a local source is looked for among the folders that are in `data_dir`, a Hub data set
    is not fetched on its word.

    Args:
        manifest: The bank's.
        data_dir: Folder of data sets, `$HF_CL_DATA`.

    Raises:
        DataError: A task's rows are not there.
    """
    held = {place.name: place for place in data_dir.expanduser().iterdir()} if data_dir and data_dir.is_dir() else {}
    found = []
    for task in manifest.tasks:
        place = held.get(task.source.removeprefix(LOCAL)) if task.source.startswith(LOCAL) else None
        if place is None:
            raise DataError(
                f"task {task.name!r}: its rows are those of {shown(task.source)!r}, which is no folder in "
                f"{data_dir or 'HF_CL_DATA (not set)'}; nothing is fetched on a bank's word. Name them: --stream NAME, "
                f"or --recipe RECIPE."
            )
        found.append(TaskSpec(task.name, dataset=str(place.resolve()), labels=tuple(task.labels)))
    return found


def load_rows(manifest: Manifest, specs: Sequence[TaskSpec]) -> dict[str, Task]:
    """Return the rows of a bank's tasks by name.

    Args:
        manifest: The bank's.
        specs: Where they are; others than the bank's tasks are left out.

    Raises:
        DataError: None are named for a task, or they cannot be read.
    """
    known = {spec.name: spec for spec in specs}
    lacking = [task.name for task in manifest.tasks if task.name not in known]
    if lacking:
        raise DataError(
            f"no rows are named for {shown(', '.join(lacking))}; there are {', '.join(known) or 'none'}. Give the "
            f"stream that the bank was learned on."
        )
    return {task.name: load_task(known[task.name]) for task in manifest.tasks}


def _rows(bank: MaskBank, base: Base, tasks: Mapping[str, Task], max_length: int) -> list[dict[str, Any]]:
    """Return all tasks' tokenised test rows, each with its task's place, the shortest first."""
    rows: list[dict[str, Any]] = []
    for place, entry in enumerate(bank.manifest.tasks):
        if entry.name not in tasks:
            raise DataError(f"task {entry.name!r}: no rows are given for it. Give those it was measured on.")
        task = tasks[entry.name]
        if list(task.labels) != list(entry.labels):
            raise DataError(
                f"task {entry.name!r} learned the labels {shown(', '.join(entry.labels)):.200}, these rows have "
                f"{', '.join(task.labels):.200}. Give the rows it was learned on."
            )
        rows += [{**row, "task": place} for row in tokenise(task, base.tokenizer, max_length)["test"]]
    return sorted(rows, key=lambda row: len(row["input_ids"]))


def _batches(rows: Sequence[Mapping[str, Any]], collate: Any, size: int, device: torch.device) -> list[_Batch]:
    if size < 1:
        raise ConfigError(f"batch_size: expected 1 or more, found {size}.")
    made = []
    for at in range(0, len(rows), size):
        part = [dict(row) for row in rows[at : at + size]]
        task = torch.tensor([row.pop("task") for row in part])
        inputs = dict(collate(part))
        label = inputs.pop("labels")
        made.append(_Batch({name: tensor.to(device) for name, tensor in inputs.items()}, task, label))
    return made


def _timed(batches: Sequence[_Batch], ask: Callable[[_Batch], Any]) -> tuple[list[Any], float]:
    """Return what is said of each batch, and the seconds it took; the first batch is asked once before."""
    ask(batches[0])
    begun = time.perf_counter()
    found = [ask(batch) for batch in batches]
    return found, time.perf_counter() - begun
