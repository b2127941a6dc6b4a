"""`hf-cl train`: learn a recipe's stream into a run folder."""

from pathlib import Path
from typing import Annotated

import typer

from hf_cl.cli import show
from hf_cl.cli.arguments import Json
from hf_cl.cli.banks import bank_source
from hf_cl.errors import ConfigError


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Change the recipe, as in training.learning_rate=1e-3, stream=clinc10 or method=supsup.",
            show_default=False,
        ),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run folder; by default runs/RECIPE.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run was interrupted.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is there.")] = False,
    from_bank: Annotated[
        str | None,
        typer.Option(
            metavar="BANK", help="Go on from a bank's folder or Hub id, or from a run's bank.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Learn a recipe's tasks one after another, and prove that none has changed an earlier one.

    SIGTERM and SIGUSR1 save the training and end it with exit code 75: start it again with --resume. Several processes:
    docs/launching.md.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite: one goes on with a run, the other removes it. Give one of them.")
    from hf_cl import recipe as recipes

    path = recipes.find(recipe)
    # Found before anything is loaded: a wrong path must not cost a minute.
    bank = None if from_bank is None else bank_source(from_bank)
    checked = recipes.load(recipe, overrides or ())
    run = output_dir or Path("runs") / path.stem
    progress = show.console(err=as_json)

    from hf_cl import ranks
    from hf_cl.cli.after_run import report
    from hf_cl.cli.quiet import libraries
    from hf_cl.train_stream import run_stream

    def tell(line: str) -> None:
        progress.print(show.plain(line), soft_wrap=True)

    try:
        with libraries():
            found = run_stream(checked, run, resume=resume, overwrite=overwrite, from_bank=bank, progress=tell)
    except KeyboardInterrupt:
        progress.print("Finished tasks are kept. Go on with the same command and --resume.", soft_wrap=True)
        raise
    if ranks.rank() > 0:
        return
    if as_json:
        show.echo_json(found)
    else:
        report(show.console(), run, found)
