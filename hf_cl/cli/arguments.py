"""Arguments that more than one verb takes, with one description each."""

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `hf-cl train` wrote.", show_default=False)]
Bank = Annotated[
    str,
    typer.Argument(metavar="BANK", help="A bank's folder, a run that holds a bank, or a Hub id.", show_default=False),
]
BankFolder = Annotated[
    str, typer.Argument(metavar="BANK", help="A bank's folder, or a run that holds a bank.", show_default=False)
]
BankOrRun = Annotated[
    str,
    typer.Argument(metavar="BANK|RUN", help="A bank's folder, a bank's Hub id, or a run's folder.", show_default=False),
]
TaskName = Annotated[str, typer.Argument(metavar="TASK", help="The task's name.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value to stdout, and nothing else.")]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME_OR_FOLDER", help="Where the run's base lies now, if not where the run says.", show_default=False
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="ID_OR_FOLDER",
        help="The base to load. By default the one that the bank names, if this machine holds it already: on a "
        "bank's word alone nothing is downloaded.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="REVISION", help="Branch, tag or commit on the Hub.", show_default=False),
]
Token = Annotated[
    str | None,
    typer.Option(
        metavar="TOKEN",
        help="For the Hub; by default HF_TOKEN or what `hf auth login` stored, which other users of this machine "
        "cannot read off the list of processes.",
        show_default=False,
    ),
]
