"""Measure a bank on texts without a task's name; part of `hf-cl eval`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from hf_cl.cli import show
from hf_cl.cli.banks import base_of, open_bank
from hf_cl.config import read
from hf_cl.storage import run_folder

if TYPE_CHECKING:
    from hf_cl.data import TaskSpec
    from hf_cl.storage.manifest import Manifest


def measure(
    where: str,
    *,
    base: str | None,
    specs: "Sequence[TaskSpec] | None",
    routers: Sequence[str],
    out_of_scope: Path | None,
    batch_size: int,
    max_length: int | None,
) -> dict[str, Any]:
    """Return how well each router does, as plain values.

    Args:
        where: A bank's folder, a run that holds one, or a Hub id.
        base: The base to load; None is the run's, or the one that the bank names and this machine holds.
        specs: Where the rows are; None is where the run found them, or where the bank's sources lie in HF_CL_DATA.
        routers: Names; none is all.
        out_of_scope: A file of texts that belong to no task.
        batch_size: Texts a batch.
        max_length: Tokens a text is cut to; None is as the run did, or as the tokenizer says.

    Raises:
        HfClError: Bad input.
    """
    from hf_cl.cli.predict import longest
    from hf_cl.data import read_texts
    from hf_cl.evaluate_bank import evaluate_bank, load_rows

    bank = open_bank(where)
    run = _run(where)
    strangers = read_texts(out_of_scope) if out_of_scope is not None else None
    tasks = load_rows(bank.manifest, specs if specs is not None else _specs(run, bank.manifest))
    loaded = base_of(bank, base or run.get("model"))
    length = max_length or run.get("max_length") or longest(loaded.tokenizer)
    found = evaluate_bank(
        bank,
        loaded,
        tasks,
        routers,
        max_length=length,
        batch_size=batch_size,
        out_of_scope=strangers,
        progress=lambda line: typer.echo(f"{line} ...", err=True),
    )
    return {"bank": where, "digest": bank.digest, "tasks": bank.tasks, "split": "test", **found}


def _run(where: str) -> dict[str, Any]:
    """Return what a run's folder says of itself; nothing where this is none."""
    if not (Path(where) / run_folder.MANIFEST).exists():
        return {}
    return dict(run_folder.RunFolder.open(Path(where)).manifest)


def _specs(run: Mapping[str, Any], manifest: "Manifest") -> "Sequence[TaskSpec]":
    from hf_cl.data import TaskSpec
    from hf_cl.evaluate_bank import specs_of
    from hf_cl.recipe import data_dir

    own = [read(TaskSpec, spec, "run.stream_tasks") for spec in run.get("stream_tasks") or []]
    named = {spec.name for spec in own}
    return own if all(task.name in named for task in manifest.tasks) else specs_of(manifest, data_dir())


def show_measured(out: Console, content: Mapping[str, Any]) -> None:
    """Print what `measure` gave."""
    scoped = any("out_of_scope_auroc" in row for row in content["routers"].values())
    columns = ["router", "task found", "task and label", "label, task given", "ms a text"]
    rows = []
    for name, found in content["routers"].items():
        row = [name, *(show.accuracy(found[key]) for key in ("routing_accuracy", "class_incremental_accuracy"))]
        row += [show.accuracy(found["task_given_accuracy"]), f"{found['ms_per_text']:.1f}"]
        rows.append(row + ([show.accuracy(found.get("out_of_scope_auroc"))] if scoped else []))
    title = f"{content['texts']:,} test texts of {len(content['tasks'])} tasks, without the tasks' names"
    out.print(show.table(show.plain(title), columns + (["AUROC out of scope"] if scoped else []), rows))
    out.print(f"with the task given: {content['task_given']['ms_per_text']:.1f} ms a text")
