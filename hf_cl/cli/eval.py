"""`hf-cl eval`: measure every task of a run again, from its files, on its test rows; or a bank without task ids."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hf_cl.cli import show
from hf_cl.cli.arguments import BankOrRun, Base, Json, Model
from hf_cl.errors import ConfigError, RunError

if TYPE_CHECKING:
    from hf_cl.data import TaskSpec


def evaluate(
    run: BankOrRun,
    as_json: Json = False,
    model: Model = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", help="Where the rows are now; by default where the run found them.", show_default=False
        ),
    ] = None,
    no_task_id: Annotated[
        bool,
        typer.Option(
            "--no-task-id",
            help="Measure a bank on all its tasks' test texts together, without saying which text is whose.",
        ),
    ] = False,
    router: Annotated[
        list[str] | None,
        typer.Option(metavar="ROUTER", help="With --no-task-id: a router; may stand several times, all by default."),
    ] = None,
    stream: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --no-task-id: the stream in HF_CL_DATA whose rows are taken."),
    ] = None,
    out_of_scope: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --no-task-id: texts of no task (parquet, csv, jsonl; column `text`)."),
    ] = None,
    base: Base = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --no-task-id: texts a batch.")] = 64,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="With --no-task-id: tokens a text is cut to; by default as in the run.")
    ] = None,
) -> None:
    """Measure every task of a run again from its files, beside what was recorded; or a bank without task ids."""
    from hf_cl.cli.quiet import libraries

    if no_task_id:
        if recipe is not None and stream is not None:
            raise ConfigError("--stream: names the rows, and so does --recipe. Leave one out.")
        specs = _specs(recipe) if recipe else _stream(stream) if stream else None
        with libraries():
            from hf_cl.cli.eval_bank import measure, show_measured

            found = measure(
                run,
                base=base or model,
                specs=specs,
                routers=router or (),
                out_of_scope=out_of_scope,
                batch_size=batch_size,
                max_length=max_length,
            )
        if as_json:
            show.echo_json(found)
        else:
            show_measured(show.console(), found)
        return
    unused = {"--router": router, "--stream": stream, "--out-of-scope": out_of_scope, "--base": base}
    if any(given for given in unused.values()):
        raise ConfigError(f"{next(name for name, given in unused.items() if given)}: goes with --no-task-id. Add that.")
    _evaluate_run(Path(run), as_json, model, recipe)


def _evaluate_run(run: Path, as_json: bool, model: str | None, recipe: str | None) -> None:
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


def _stream(name: str) -> "tuple[TaskSpec, ...]":
    """Return the tasks of a stream in HF_CL_DATA."""
    from hf_cl.data import read_stream
    from hf_cl.recipe import data_dir

    return read_stream(name, data_dir=data_dir(), root=None)


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
