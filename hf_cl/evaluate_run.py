"""Evaluate a run's tasks anew: from its files, on the rows its manifest (or the caller) points to."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_cl.config import read
from hf_cl.data import TaskSpec, collator, load_task, measured_on, tokenise
from hf_cl.errors import DataError, RunError
from hf_cl.from_recipe import training_arguments
from hf_cl.layers.base import Base
from hf_cl.runs import open_run
from hf_cl.training.evaluation import evaluate

EVALUATION = ("per_device_eval_batch_size", "bf16", "fp16", "use_cpu")
"""Training arguments that an evaluation takes from a run."""


def evaluate_run(
    path: Path, base: "Base | str | None" = None, specs: Sequence[TaskSpec] | None = None
) -> dict[str, dict[str, Any]]:
    """Return fresh metrics of every task of a run, by name, on the split that the run was measured on.

    Args:
        path: The run folder.
        base: The base, or where it lies now; None loads the one the run names.
        specs: Where the rows are; None takes what the run was learned on.

    Raises:
        RunError: The run says of no rows, or a file is not what its manifest says.
        DataError: A task's rows are not there, or have other labels.
    """
    folder, base, method = open_run(path, base)
    known = {spec.name: spec for spec in specs or _own_specs(folder.manifest, path)}
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        # A folder may come from anywhere: of its arguments only those that change how rows are evaluated.
        given = {key: value for key, value in (folder.manifest.get("training") or {}).items() if key in EVALUATION}
        args = training_arguments(given, Path(scratch))
        for position, record in enumerate(folder.tasks):
            name = record["name"]
            if name not in known:
                raise DataError(f"{path}: no rows are named for task {name!r}. Give the recipe it was learned with.")
            task = measured_on(load_task(known[name]), folder.manifest.get("split", "test"))
            if list(task.labels) != list(record["labels"]):
                raise DataError(
                    f"{path}: task {name!r} learned the labels {', '.join(record['labels']):.200}, these rows have "
                    f"{', '.join(task.labels):.200}. Give the recipe it was learned with."
                )
            rows = tokenise(task, base.tokenizer, folder.manifest["max_length"])
            method.activate(int(record.get("index", position)))
            found[name] = evaluate(method.model, rows["test"], collator(base.tokenizer), args).metrics
    return found


def _own_specs(manifest: dict[str, Any], path: Path) -> list[TaskSpec]:
    specs = manifest.get("stream_tasks")
    if not specs:
        raise RunError(f"{path}: does not say where its rows are (learned in memory?). Give the recipe with them.")
    return [read(TaskSpec, spec, "run.stream_tasks") for spec in specs]
