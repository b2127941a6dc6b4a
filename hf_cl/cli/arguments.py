"""Arguments that more than one verb takes, with one description each."""

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `hf-cl train` wrote.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value to stdout, and nothing else.")]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME_OR_FOLDER", help="Where the run's base lies now, if not where the run says.", show_default=False
    ),
]
