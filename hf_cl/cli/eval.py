"""`hf-cl eval`: measure every task of a run again, from its files, on its test rows."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hf_cl.cli import show
from hf_cl.cli.arguments import Json, Model, Run
from hf_cl.errors import RunError

if TYPE_CHECKING:
    from hf_cl.data import TaskSpec


def evaluate(
    run: Run,
    as_json: Json = False,
    model: Model = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", help="Where the rows are now; by default where the run found them.", show_default=False
        ),
    ] = None,
) -> None:
    """Measure every task of a run again from its files, beside what was recorded at the end of the run."""
    from hf_cl.cli.quiet import libraries
    from hf_cl.storage.run_folder import RunFolder

    folder = RunFolder.open(run)
    recorded = _recorded(folder.tasks, run)
    with libraries():
        from hf_cl.evaluate_run import evaluate_run

        measured = evaluate_run(run, model, _specs(recipe) if recipe else None)
    tasks = [
        {
            "name": name,
            "metrics": metrics,
            "recorded": recorded[name],
            "equal": metrics["accuracy"] == recorded[name].get("accuracy"),
        }
        for name, metrics in measured.items()
    ]
    split = folder.manifest.get("split", "test")
    content = {"run": str(run), "split": split, "equal": all(task["equal"] for task in tasks), "tasks": tasks}
    if as_json:
        show.echo_json(content)
    else:
        _show(show.console(), run, content)


def _recorded(tasks: list[dict[str, Any]], run: Path) -> dict[str, dict[str, float]]:
    """Return every task's metrics as they were after the last task."""
    if not tasks:
        raise RunError(f"{run}: no task is finished, so there is nothing to evaluate. Go on with --resume.")
    return {task["name"]: tasks[-1]["metrics"].get(task["name"], {}) for task in tasks}


def _specs(recipe: str) -> "tuple[TaskSpec, ...]":
    """Return the tasks of another recipe than the run's own."""
    from hf_cl import recipe as recipes
    from hf_cl.data import read_stream

    checked = recipes.load(recipe)
    return read_stream(checked.stream, data_dir=recipes.data_dir(), root=checked.root)


def _show(out: Console, run: Path, content: Mapping[str, Any]) -> None:
    rows = []
    for task in content["tasks"]:
        metrics = task["metrics"]
        row = [task["name"], *(show.accuracy(metrics[name]) for name in ("accuracy", "macro_f1", "loss"))]
        rows.append([*row, show.accuracy(task["recorded"].get("accuracy")), "yes" if task["equal"] else "NO"])
    columns = ["task", "accuracy", "macro F1", "loss", "accuracy recorded", "equal"]
    title = f"{content['split'].capitalize()} rows, measured again from the saved files"
    out.print(show.table(show.plain(title), columns, rows))
    mean = sum(task["metrics"]["accuracy"] for task in content["tasks"]) / len(content["tasks"])
    out.print(f"average accuracy  {mean:.4f}")
    out.print(f"Next: hf-cl verify {shlex.quote(str(run))}", soft_wrap=True)
