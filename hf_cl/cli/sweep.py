"""`hf-cl sweep`: a recipe for every combination of some values, and a table of what they were worth."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_cl.cli import show
from hf_cl.cli.arguments import Json
from hf_cl.errors import ConfigError


def sweep(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")],
    values: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=V1,V2...",
            help="Values to try, as in method.density=0.01,0.02; with a single value, a change of the recipe.",
            show_default=False,
        ),
    ],
    output_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Its folder; by default sweeps/RECIPE.", show_default=False)
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="S1,S2...", help="Seeds of every combination; else the recipe's.", show_default=False),
    ] = None,
    test: Annotated[
        bool, typer.Option("--test", help="Measure on test rows: for final figures, never to choose by.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe for every combination of values, on validation rows. The same command again goes on."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("sweep: is one process. Start it without a launcher, or `hf-cl train` a recipe with one.")
    chosen = _seeds(seeds)
    progress = show.console(err=as_json)

    from hf_cl.cli.quiet import libraries
    from hf_cl.sweep import require_finished
    from hf_cl.sweep import sweep as run_sweep
    from hf_cl.sweep_plan import plan

    def tell(line: str) -> None:
        progress.print(show.plain(line), soft_wrap=True)

    asked = plan(recipe, values, seeds=chosen, split="test" if test else "validation")
    folder = output_dir or Path("sweeps") / asked.recipe
    tell(f"{len(asked.trials)} runs, measured on {asked.split} rows")
    try:
        with libraries():
            found = run_sweep(asked, folder, tell)
    except KeyboardInterrupt:
        progress.print("What is finished is kept. Go on with the same command.", soft_wrap=True)
        raise
    if as_json:
        show.echo_json(found)
    else:
        _show(show.console(), folder, found)
    require_finished(found)


def _seeds(text: str | None) -> tuple[int, ...]:
    try:
        seeds = tuple(int(word) for word in text.split(",")) if text is not None else ()
    except ValueError as error:
        raise ConfigError(f"--seeds {text!r}: expected whole numbers separated by commas, as in 0,1,2.") from error
    if any(seed < 0 for seed in seeds):
        raise ConfigError(f"--seeds {text!r}: a seed is 0 or more.")
    return seeds


def _show(out: Console, folder: Path, found: Mapping[str, Any]) -> None:
    keys = list(found["values"])
    columns = ["accuracy", "± sd", "forgetting", "exact", "bytes a task", "head", "time a task", "seeds"]
    rows = [[*(row["settings"][key] for key in keys), *_cells(row)] for row in found["combinations"]]
    title = f"{found['recipe']}: average {found['split']} accuracy, best first"
    out.print()
    out.print(show.table(show.plain(title), [*keys, *columns], rows))
    for row in found["combinations"]:
        name = ", ".join(f"{key}={value}" for key, value in row["settings"].items())
        for error in row["errors"]:
            out.print(show.plain(f"{name}: {error}"), soft_wrap=True)
    out.print(f"{'sweep':<8} {show.plain(folder / 'sweep.json')}", soft_wrap=True)
    out.print(f"Next: hf-cl report {shlex.quote(str(folder))} --out report.html", soft_wrap=True)


def _cells(row: Mapping[str, Any]) -> list[object]:
    if not row["finished"]:
        return [", ".join(row["states"]), *["-"] * 6, f"0 of {row['seeds']}"]
    return [
        show.accuracy(row["average_accuracy"]),
        show.accuracy(row["spread"]),
        show.figure(row["forgetting"], exact=row["exact"]),
        "yes" if row["exact"] else "no",
        show.size(round(row["bytes_per_task"])),
        show.size(round(row["head_bytes_per_task"])),
        show.seconds(row["seconds_per_task"]),
        row["seeds"] if row["finished"] == row["seeds"] else f"{row['finished']} of {row['seeds']}",
    ]
