"""`hf-cl eval`: measure every task of a run again, from its files, on its test rows."""

import shlex
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_cl.cli import show
from hf_cl.cli.arguments import Json, Model, Run, base_at
from hf_cl.cli.kept_recipe import NAME
from hf_cl.errors import DataError, RunError


def evaluate(
    run: Run,
    as_json: Json = False,
    model: Model = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help=f"Where the rows are; by default RUN/{NAME}.", show_default=False),
    ] = None,
) -> None:
    """Measure every task of a run again from its files, beside what was recorded at the end of the run."""
    from hf_cl.cli.quiet import libraries
    from hf_cl.storage.run_folder import RunFolder

    recorded = _recorded(RunFolder.open(run).tasks, run)
    with libraries():
        measured = dict(_measure(run, recipe or _own_recipe(run), base_at(run, model)))
    tasks = [
        {
            "name": name,
            "metrics": metrics,
            "recorded": recorded[name],
            "equal": metrics["accuracy"] == recorded[name].get("accuracy"),
        }
        for name, metrics in measured.items()
    ]
    content = {"run": str(run), "equal": all(task["equal"] for task in tasks), "tasks": tasks}
    if as_json:
        show.echo_json(content)
    else:
        _show(show.console(), run, content)


def _recorded(tasks: list[dict[str, Any]], run: Path) -> dict[str, dict[str, float]]:
    """Return every task's metrics as they were after the last task."""
    if not tasks:
        raise RunError(f"{run}: no task is finished, so there is nothing to evaluate. Go on with --resume.")
    return {task["name"]: tasks[-1]["metrics"].get(task["name"], {}) for task in tasks}


def _own_recipe(run: Path) -> str:
    file = run / NAME
    if not file.is_file():
        raise RunError(f"{run}: there is no {NAME} that says where the rows are. Give the run's --recipe.")
    return str(file)


def _measure(run: Path, recipe: str, base: Any) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield each task's name and its metrics on its test rows, in the order of the stream."""
    from hf_cl import recipe as recipes
    from hf_cl import runs
    from hf_cl.data import collator, load_task, read_stream, tokenise
    from hf_cl.from_recipe import training_arguments
    from hf_cl.training.evaluation import evaluate as measure

    checked = recipes.load(recipe)
    stream = read_stream(checked.stream, data_dir=recipes.data_dir(), root=checked.root)
    specs = {spec.name: spec for spec in stream}
    folder, base, method = runs.open_run(run, base)
    with tempfile.TemporaryDirectory() as scratch:
        args = training_arguments(folder.manifest.get("training") or {}, Path(scratch))
        for index, record in enumerate(folder.tasks):
            name = record["name"]
            if name not in specs:
                raise DataError(f"{recipe}: its stream has no task {name!r}, which {run} learned. Give the --recipe.")
            task = load_task(specs[name], checked.root)
            _require_labels(task.labels, record, recipe)
            rows = tokenise(task, base.tokenizer, folder.manifest["max_length"])
            method.activate(index)
            yield name, measure(method.model, rows["test"], collator(base.tokenizer), args)


def _require_labels(labels: tuple[str, ...], record: Mapping[str, Any], recipe: str) -> None:
    if list(labels) != list(record["labels"]):
        raise DataError(
            f"{recipe}: task {record['name']!r} has the labels {', '.join(labels):.200}, the run learned "
            f"{', '.join(record['labels']):.200}. Give the recipe that the run was started with."
        )


def _show(out: Console, run: Path, content: Mapping[str, Any]) -> None:
    rows = []
    for task in content["tasks"]:
        metrics = task["metrics"]
        row = [task["name"], *(show.accuracy(metrics[name]) for name in ("accuracy", "macro_f1", "loss"))]
        rows.append([*row, show.accuracy(task["recorded"].get("accuracy")), "yes" if task["equal"] else "NO"])
    columns = ["task", "accuracy", "macro F1", "loss", "accuracy recorded", "equal"]
    out.print(show.table("Test rows, measured again from the saved files", columns, rows))
    mean = sum(task["metrics"]["accuracy"] for task in content["tasks"]) / len(content["tasks"])
    out.print(f"average accuracy  {mean:.4f}")
    out.print(f"Next: hf-cl verify {shlex.quote(str(run))}", soft_wrap=True)
